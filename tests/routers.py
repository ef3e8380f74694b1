"""The routers of the library, without those that tests define."""

from vmoe.config import Router

ROUTERS = [kind for kind in Router.__subclasses__() if kind.__module__.startswith("vmoe.")]
