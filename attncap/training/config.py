"""Settings of a training run. What suits which data stands in `recipes`, a file each."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from attncap import command
from attncap.config import ModelConfig
from attncap.errors import CallError
from attncap.training import recipes


@dataclass(kw_only=True)
class TrainConfig(command.CaptioningConfig):
    data: str = "shapes"
    """shapes, or the path of a data set: Flickr8k, Flickr30k, COCO, Karpathy's splits, or a table of your own (see
    `python -m attncap.data PATH`)."""
    recipe: str = "flickr8k"
    """Where all other settings come from unless they are given: shapes, flickr8k, flickr30k, coco or tutorial, a file
    each in attncap/training/recipes. By default shapes for --data shapes, else flickr8k."""
    output: str | None = None
    """Folder for the model and the log; by default runs/NAME, after the data."""
    objective: Literal["cross-entropy", "scst"] = "cross-entropy"
    """cross-entropy: the next word of a given caption. scst: CIDEr-D of captions that the model samples (self-critical
    training, Rennie et al. 2017); it needs --start-from."""
    start_from: str | None = None
    """Folder of a trained model whose weights, sizes and vocabulary the run has; a flag that asks for others is an
    error. It is validated first, as epoch 0, and kept where no epoch betters it."""
    samples: int = 5
    """scst: captions sampled for an image, at least 2; each one's baseline is the mean of the others."""
    epochs: int = 10
    """Times every training image is seen."""
    batch_size: int = 8
    """Images in a batch, each with --captions-per-image captions; under torchrun its processes share them."""
    captions_per_image: int = 5
    """cross-entropy: captions of an image in a batch; an image with more gets others the next time."""
    accumulate: int = 1
    """Batches to a step of the optimizer."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """Adam, with weight decay beside the gradients (adamw) or in them (adam)."""
    learning_rate: float = 5e-4
    """Of the decoder, at its highest."""
    encoder_learning_rate: float = 1e-4
    """The same for the layers of the encoder that are trained."""
    weight_decay: float = 0.01
    """The optimizer's."""
    warmup: float = 0.1
    """Share of the run in which the learning rates rise to their highest, below 1."""
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    """After the warm-up the learning rates fall to 0 along a cosine, are lowered when validation gains no more
    (plateau), or stay (constant)."""
    plateau_factor: float = 0.8
    """plateau: what the learning rates are multiplied with, above 0 and below 1."""
    plateau_patience: int = 8
    """plateau: epochs without gain after which they are, and again after so many more."""
    patience: int = 0
    """Epochs without gain on the validation images after which the run ends; 0: never."""
    clip_norm: float = 5.0
    """Gradients are scaled down to this norm; 0: not."""
    clip_value: float = 0.0
    """Each gradient is clamped to this from below and above, after --clip-norm; 0: not."""
    label_smoothing: float = 0.1
    """cross-entropy: share of a word's target spread over the whole vocabulary."""
    attention_penalty: float = 1.0
    """cross-entropy: weight of the doubly stochastic penalty, for which every cell should get attention 1 in sum over a
    caption."""
    scheduled_sampling: float = 0.0
    """cross-entropy: probability with which the model is fed a word of its own instead of the given caption's (Bengio
    et al. 2015) at the end of the run; it rises to this from 0. 0: never."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products and activations (autocast); the weights stay float32, and float16 gets a loss scale."""
    augment: bool = True
    """Train on random parts of the images, mirrored half of the time."""
    cache_features: bool = False
    """Run the encoder over the training and validation images once and keep its features on disk, in half precision.
    For an encoder that is not trained, and images that are not augmented."""
    encoder_weights: str = "default"
    """default (torchvision's ImageNet weights), none, or the file of a state dict."""
    fine_tune_from: str = "none"
    """Train the encoder from this layer on (torchvision's name, e.g. layer3); all of it, or none of it."""
    fine_tune_after: int = 0
    """Whole epochs before these layers are trained; until then all of the encoder is frozen."""
    average_weights: bool = True
    """Validate and keep a moving average of the weights, instead of the weights themselves."""
    min_count: int = 3
    """Words seen less often in the training captions become <unk>."""
    vocabulary: str | None = None
    """File of the words to use instead of the training captions' own: another run's vocabulary.json, or the WORDMAP of
    the tutorial a-PyTorch-Tutorial-to-Image-Captioning."""
    subwords: int = 0
    """Pieces of words to learn from the training captions (byte-pair encoding), for a language with too many words; 0:
    whole words. Needs the tokenizers library."""
    best_by: Literal["CIDEr", "BLEU-4"] = "CIDEr"
    """The validation figure, of freely written captions, that decides which model is kept and what a gain is."""
    seed: int = 0
    """Of the weights, the order, and the splits where the data set has none."""
    resume: bool = False
    """Go on with the run in --output."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)

    def check(self) -> None:
        """Raises CallError for settings that do not go together, and for numbers outside a range of their own; the
        ranges of all others `command.check_numbers` knows."""
        if self.recipe not in recipes.NAMES:
            raise CallError(f"--recipe {self.recipe}: no such recipe; choose one of {', '.join(recipes.NAMES)}")
        if self.warmup >= 1:
            raise CallError(f"--warmup {self.warmup}: a share of the run, must be below 1")
        if not 0 < self.plateau_factor < 1:
            raise CallError(f"--plateau-factor {self.plateau_factor}: must be above 0 and below 1")
        if self.scheduled_sampling > 1:
            raise CallError(f"--scheduled-sampling {self.scheduled_sampling}: a probability, must be at most 1")
        if self.schedule == "plateau" and 0 < self.patience <= self.plateau_patience:
            raise CallError(
                f"--patience {self.patience}: the run would end before the learning rates are ever lowered; give more "
                f"than --plateau-patience {self.plateau_patience}, or 0"
            )
        if self.cache_features and self.augment:
            raise CallError("--cache-features: an image has one set of features there; add --no-augment")
        if self.cache_features and self.fine_tune_from != "none":
            raise CallError(
                f"--cache-features: features change while the encoder is trained from {self.fine_tune_from} on; add "
                "--fine-tune-from none"
            )
        if self.objective == "scst":
            if self.start_from is None:
                raise CallError("--objective scst: it starts from a trained model; add --start-from FOLDER")
            if self.samples < 2:
                raise CallError(f"--samples {self.samples}: a sample's baseline is the others' mean; give 2 or more")
