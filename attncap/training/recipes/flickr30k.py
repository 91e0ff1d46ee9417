"""Flickr30k, and other collections of tens of thousands of photographs.

Like the recipe for Flickr8k, but with larger batches, fewer epochs, and a ResNet-101, the usual backbone of published
grid features.

Measured: nothing yet. Guessed: the batch size, the number of epochs, and when and how fast the encoder is trained.
`min_count` is that of Karpathy's neuraltalk.
"""

from attncap.config import ModelConfig
from attncap.training.config import (
    DataConfig,
    EncoderConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)

RECIPE = TrainConfig(
    run=RunConfig(recipe="flickr30k", epochs=16),
    data=DataConfig(batch_size=16, captions_per_image=5, min_count=5),
    model=ModelConfig(encoder="resnet101", image_size=224, dropout=0.5),
    encoder=EncoderConfig(fine_tune_from="layer4", fine_tune_after=8, learning_rate=5e-5),
    objective=ObjectiveConfig(label_smoothing=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-4),
)
