"""Flickr30k, and other collections of some ten thousand photographs.

As for Flickr8k, with larger batches, fewer epochs, and a ResNet-101, the usual backbone of published grid features.

Measured: nothing yet. Guessed: batches, epochs, and when and how fast the encoder is trained. `min_count` is that of
Karpathy's neuraltalk.
"""

from attncap.config import ModelConfig
from attncap.training.config import TrainConfig

RECIPE = TrainConfig(
    recipe="flickr30k",
    epochs=16,
    batch_size=16,
    captions_per_image=5,
    learning_rate=5e-4,
    encoder_learning_rate=5e-5,
    fine_tune_from="layer4",
    fine_tune_after=8,
    label_smoothing=0.1,
    min_count=5,
    model=ModelConfig(encoder="resnet101", image_size=224, dropout=0.5),
)
