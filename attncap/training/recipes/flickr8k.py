"""flickr8k."""

from attncap.training.config import TrainConfig

RECIPE = TrainConfig(recipe="flickr8k")
