"""`shapes`, the data set that draws itself: a small encoder that learns from nothing, in minutes on a CPU."""

from attncap.config import ModelConfig
from attncap.training.config import TrainConfig

RECIPE = TrainConfig(
    recipe="shapes",
    epochs=4,
    batch_size=16,
    captions_per_image=2,
    learning_rate=1e-3,
    encoder_learning_rate=1e-3,
    label_smoothing=0.0,
    attention_penalty=0.0,  # 64 cells and a dozen words: most cells hold nothing to look at
    augment=False,  # a mirrored scene would make "left" a lie
    encoder_weights="none",
    fine_tune_from="all",
    min_count=1,
    model=ModelConfig(
        encoder="resnet18",
        encoder_layer="layer2",
        image_size=64,
        attention_size=128,
        embedding_size=128,
        hidden_size=256,
        dropout=0.1,
    ),
)
