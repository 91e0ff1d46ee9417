"""`shapes`, the synthetic data set: a small encoder that learns from random weights, in minutes on a CPU."""

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
    run=RunConfig(recipe="shapes", epochs=4),
    data=DataConfig(
        batch_size=16,
        captions_per_image=2,
        min_count=1,
        augment=False,  # in a mirrored scene, "left" would be wrong
    ),
    model=ModelConfig(
        encoder="resnet18",
        encoder_layer="layer2",
        image_size=64,
        attention_size=128,
        embedding_size=128,
        hidden_size=256,
        dropout=0.1,
    ),
    encoder=EncoderConfig(weights="none", fine_tune_from="all", learning_rate=1e-3),
    objective=ObjectiveConfig(
        label_smoothing=0.0,
        attention_penalty=0.0,  # 64 cells and a dozen words: most cells hold nothing to attend to
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)
