"""The routers of the library, without those that tests define."""

from vmoe.config import AnyRouter
from vmoe.fields import kinds

ROUTERS = [kind for kind in kinds(AnyRouter).values() if kind.__module__.startswith("vmoe.")]
