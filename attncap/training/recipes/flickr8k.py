"""Flickr8k, and other collections of some thousand photographs: what `--data PATH` takes by default.

A ResNet-50 with ImageNet weights, frozen for the first half of the run, while the decoder's gradients would only spoil
it; then its last stage is trained too.

Measured: with a frozen MobileNetV2 and a smaller decoder, on 700 photographs (README.md, "Your photographs"). Guessed:
the number of epochs, and when and how fast the encoder is trained. Words seen twice are too rare in so few captions to
be learned; in larger collections more are.
"""

from attncap.config import ModelConfig
from attncap.training.config import TrainConfig

RECIPE = TrainConfig(
    recipe="flickr8k",
    epochs=20,
    batch_size=8,
    captions_per_image=5,
    learning_rate=5e-4,
    encoder_learning_rate=5e-5,
    fine_tune_from="layer4",
    fine_tune_after=10,
    label_smoothing=0.1,
    min_count=3,
    model=ModelConfig(encoder="resnet50", image_size=224, dropout=0.5),
)
