"""flickr30k."""

from attncap.training.config import TrainConfig

RECIPE = TrainConfig(recipe="flickr30k")
