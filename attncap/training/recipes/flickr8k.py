"""Flickr8k, and other collections of a few thousand photographs: the default for `--data PATH`.

A ResNet-50 with ImageNet weights. It is frozen for the first half of the run, while the gradients of an untrained
decoder would only damage it; then its last stage is trained, too.

Measured: with a frozen MobileNetV2 and a smaller decoder, on 700 photographs (docs/recipes.md, "Small data sets").
Guessed: the number of epochs, and when and how fast the encoder is trained. With so few captions, words that occur only
twice are too rare to be learned; larger collections have more such words to leave out.
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
    run=RunConfig(recipe="flickr8k", epochs=20),
    data=DataConfig(batch_size=8, captions_per_image=5, min_count=3),
    model=ModelConfig(encoder="resnet50", image_size=224, dropout=0.5),
    encoder=EncoderConfig(fine_tune_from="layer4", fine_tune_after=10, learning_rate=5e-5),
    objective=ObjectiveConfig(label_smoothing=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-4),
)
