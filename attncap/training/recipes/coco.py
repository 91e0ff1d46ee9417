"""COCO, 113,287 images in Karpathy's splits, on a GPU.

Based on github.com/ruotianluo/ImageCaptioning.pytorch: ResNet-101, learning rate 5e-4, words that occur more than 5
times, scheduled sampling up to 0.25. Its batches have 10 images with 5 captions each; the batches here are larger, to
keep a GPU busy.

Self-critical training, as the second run, uses that project's batch size and learning rate:

    attncap train --recipe coco --data PATH --output runs/scst --objective scst --start-from runs/coco
        --batch-size 10 --learning-rate 5e-5 --fine-tune-from none

Measured: nothing yet. Guessed: the batch size, the number of epochs, and when and how fast the encoder is trained. GPUs
older than Ampere have no bfloat16: use --precision float16.
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
    run=RunConfig(recipe="coco", epochs=20, precision="bfloat16"),
    data=DataConfig(batch_size=64, captions_per_image=5, min_count=6),
    model=ModelConfig(encoder="resnet101", image_size=224, dropout=0.5),
    encoder=EncoderConfig(fine_tune_from="layer4", fine_tune_after=14, learning_rate=2e-5),
    objective=ObjectiveConfig(label_smoothing=0.1, scheduled_sampling=0.25),
    optimizer=OptimizerConfig(learning_rate=5e-4),
)
