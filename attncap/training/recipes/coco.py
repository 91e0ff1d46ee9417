"""coco."""

from attncap.training.config import TrainConfig

RECIPE = TrainConfig(recipe="coco")
