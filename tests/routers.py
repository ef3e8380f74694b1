"""The routers of the library, without those that tests define."""

from vmoe.config import AnyRouter
from vmoe.fields import kinds, replace

ROUTERS = [kind for kind in kinds(AnyRouter).values() if kind.__module__.startswith("vmoe.")]


def grouped(router: AnyRouter, images: int) -> AnyRouter:
    """A router with groups of at most so many images, if it has groups of several."""
    return replace(router, images_per_group=images) if router.has("images_per_group") else router
