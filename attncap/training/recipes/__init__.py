"""Settings for different kinds of data, one file each. To add a recipe, add a file here."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attncap.training.config import TrainConfig

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> TrainConfig:
    """The settings of the recipe `name`, one of `NAMES`."""
    return import_module(f"{__name__}.{name}").RECIPE
