"""OpenCV, loaded when it is first used: importing it takes a while."""

import functools
from types import ModuleType


@functools.cache
def opencv() -> ModuleType:
    """OpenCV without threads of its own, as the readers fill the cores, and without messages."""
    import cv2

    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2
