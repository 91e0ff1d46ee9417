"""Named settings of a run, a file each; a new file here is a new recipe."""

import pkgutil
from importlib import import_module

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str):
    """The TrainConfig of the recipe `name`, one of `NAMES`."""
    return import_module(f"{__name__}.{name}").RECIPE
