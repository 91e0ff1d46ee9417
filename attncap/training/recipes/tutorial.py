"""tutorial."""

from attncap.training.config import TrainConfig

RECIPE = TrainConfig(recipe="tutorial")
