"""The settings of the most widely used tutorial, github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning (train.py),
for comparison with it, or as a familiar starting point.

Everything that its train.py sets is set here: sizes, optimizer, learning rates and when they fall, clipping by value,
batches of 32 captions, the loss (tests/training/test_recipes.py writes it out by hand). The second run that it
recommends, in which the encoder is trained, is

    attncap train --recipe tutorial --data PATH --output runs/SECOND --start-from runs/FIRST --fine-tune-from layer2

The remaining differences: the decisive validation metric is BLEU-4 of captions written freely by beam search, while in
the tutorial each word is predicted from the true words before it; an epoch shows each image once with one of its
captions, while the tutorial's shows it with each of its five, so 8 epochs are fewer steps; captions are cut after 50
words instead of being left out; the batch norms of the frozen encoder keep their ImageNet statistics; there is no final
bias in the attention score, since nothing depends on it. This recipe has not been trained to the end yet, so there are
no results.
"""

from attncap.config import ModelConfig
from attncap.search.config import SearchConfig
from attncap.training.config import (
    DataConfig,
    EncoderConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

RECIPE = TrainConfig(
    run=RunConfig(recipe="tutorial", epochs=120, best_by="BLEU-4", average_weights=False),
    data=DataConfig(batch_size=32, captions_per_image=1, min_count=6, augment=False),
    model=ModelConfig(
        encoder="resnet101",
        image_size=256,
        grid=14,
        attention_size=512,
        embedding_size=512,
        hidden_size=512,
        activation="relu",
        output_layer="plain",
        dropout=0.5,
    ),
    encoder=EncoderConfig(learning_rate=1e-4),
    objective=ObjectiveConfig(label_smoothing=0.0, attention_penalty=1.0),
    optimizer=OptimizerConfig(name="adam", learning_rate=4e-4, weight_decay=0.0, clip_norm=0.0, clip_value=5.0),
    schedule=ScheduleConfig(name="plateau", warmup=0.0, plateau_factor=0.8, plateau_patience=8, patience=20),
    search=SearchConfig(max_length=50, suppressed=()),
)
