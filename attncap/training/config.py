"""Settings of a training run, one dataclass for each part of it. `recipes` has one file for each kind of data.

The flags of `attncap train` are the names of the fields, apart from the few that are named in the annotations, e.g.
--optimizer for optimizer.name. The text below a field is its help, in which tyro keeps the line breaks. Every dataclass
checks its own values, and TrainConfig checks that they fit together.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from attncap.config import MAX_CONFIG, ModelConfig, check_at_least, check_at_most, check_types, short
from attncap.errors import CallError, UserError
from attncap.files import read_json
from attncap.search.config import SearchConfig
from attncap.training import recipes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: images, captions, and the vocabulary."""

    path: Annotated[str, arg(name="data")] = "shapes"
    """shapes, a synthetic data set, or the path of a data set.
    Layouts: Flickr8k, Flickr30k, COCO, Karpathy's splits, or a table of your own (see also `attncap data PATH`)."""
    images: str | None = None
    """Folder of the data set's images, if it is not near the captions."""
    batch_size: int = 8
    """Images per batch, each with --captions-per-image captions. With torchrun, the processes share each batch."""
    captions_per_image: int = 5
    """cross-entropy: captions per image in a batch. If an image has more, every epoch draws from them."""
    augment: bool = True
    """Train on random crops of the images, half of them mirrored."""
    cache_features: bool = False
    """Encode the training and validation images once, and keep their features on disk in half precision.
    Needs --fine-tune-from none and --no-augment."""
    min_count: int = 3
    """Words that occur less often than this in the training captions become <unk>."""
    vocabulary: str | None = None
    """File with the vocabulary to use, instead of the words of the training captions:
    the vocabulary.json of another run, or the WORDMAP of the tutorial a-PyTorch-Tutorial-to-Image-Captioning."""
    subwords: int = 0
    """Number of subwords to learn from the training captions (byte-pair encoding). 0: use whole words.
    For languages with very many words. Needs the tokenizers library."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range."""
        check_types(self)
        check_at_least(self, 1, "batch_size", "captions_per_image", "min_count")
        check_at_least(self, 0, "subwords")
        if self.vocabulary is not None and self.subwords:
            raise CallError(
                "subwords, vocabulary: a vocabulary file already defines the words; give only one of the two"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run: how long, where, and what it writes."""

    recipe: str = "flickr8k"
    """Recipe that gives the defaults of all other settings: shapes, flickr8k, flickr30k, coco or tutorial.
    Each is a file in attncap/training/recipes. By default, shapes for --data shapes and flickr8k for other data."""
    output: str | None = None
    """Folder for the model and the log. By default, runs/NAME, where NAME is that of the data."""
    epochs: int = 10
    """Number of passes over the training images."""
    start_from: str | None = None
    """Folder of a trained model whose weights, sizes and vocabulary the run starts from.
    Flags that contradict these are an error.
    This model is validated first, as epoch 0, and is kept if no epoch is better."""
    resume: bool = False
    """Continue the run in --output."""
    seed: int = 0
    """Random seed for the weights, the order of the images, and the splits if the data set has none."""
    best_by: Literal["CIDEr", "BLEU-4"] = "CIDEr"
    """Validation metric that decides which epoch's model is kept, and what counts as an improvement."""
    average_weights: bool = True
    """Validate and keep a moving average of the weights instead of the weights themselves."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of matrix products and activations (autocast). The weights stay in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."""
    workers: int | None = None
    """Number of processes that read images; 0 reads them in the main process.
    By default, 0 if the model runs on a CPU, or one per CPU core, at most 8, if it runs on a GPU."""
    # tyro lists aliases before the name, so this shows --backend first.
    backend: Annotated[Literal["native", "torch"], arg(name="implementation", aliases=("--backend",))] = "native"
    """native: this project's own kernels. torch: plain PyTorch."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range, or a recipe that does not exist."""
        check_types(self)
        check_at_least(self, 1, "epochs")
        check_at_least(self, 0, "seed")
        check_at_most(self, 2**63 - 1, "seed")
        if self.workers is not None:
            check_at_least(self, 0, "workers")
        if self.recipe not in recipes.NAMES:
            raise CallError(f"recipe={self.recipe!r}: no such recipe; choose one of {', '.join(recipes.NAMES)}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder's weights, and how they are trained."""

    weights: Annotated[str, arg(name="encoder-weights")] = "default"
    """default (torchvision's ImageNet weights), none (random weights), or the path of a state dict."""
    fine_tune_from: str = "none"
    """First layer of the encoder that is trained (torchvision's name, e.g. layer3).
    all trains every layer, none freezes the encoder."""
    fine_tune_after: int = 0
    """Number of epochs for which the whole encoder stays frozen, before these layers are trained."""
    learning_rate: Annotated[float, arg(name="encoder-learning-rate")] = 1e-4
    """Peak learning rate of the encoder's trained layers."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range."""
        check_types(self)
        check_at_least(self, 0, "fine_tune_after")
        if not self.learning_rate >= 0:
            raise CallError(f"encoder.learning_rate={self.learning_rate}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective: what is minimised."""

    name: Annotated[Literal["cross-entropy", "scst"], arg(name="objective")] = "cross-entropy"
    """cross-entropy: predict the next word of a given caption.
    scst: maximise the CIDEr-D of sampled captions (self-critical training, Rennie et al. 2017). Needs --start-from."""
    samples: int = 5
    """scst: captions sampled per image, at least 2. The baseline of each is the mean reward of the others."""
    label_smoothing: float = 0.1
    """cross-entropy: share of a word's target that is spread over the whole vocabulary, below 1."""
    attention_penalty: float = 1.0
    """cross-entropy: weight of the doubly stochastic penalty.
    It pushes the attention that a cell gets over a whole caption towards 1."""
    scheduled_sampling: float = 0.0
    """cross-entropy: probability that the model is fed its own word instead of the true one. 0: never.
    It rises linearly from 0 to this value at the end of the run (scheduled sampling, Bengio et al. 2015)."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range."""
        check_types(self)
        check_at_least(self, 2 if self.name == "scst" else 1, "samples")
        check_at_least(self, 0, "label_smoothing", "attention_penalty", "scheduled_sampling")
        if self.label_smoothing >= 1:
            raise CallError(f"label_smoothing={self.label_smoothing}: must be below 1")
        if self.scheduled_sampling > 1:
            raise CallError(f"scheduled_sampling={self.scheduled_sampling}: a probability, must be at most 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, and how gradients are accumulated and clipped."""

    name: Annotated[Literal["adamw", "adam"], arg(name="optimizer")] = "adamw"
    """adamw: Adam with decoupled weight decay. adam: Adam with weight decay added to the gradients."""
    learning_rate: float = 5e-4
    """Peak learning rate of the decoder."""
    weight_decay: float = 0.01
    """Weight decay of all trained weights."""
    accumulate: int = 1
    """Batches per step of the optimizer."""
    clip_norm: float = 5.0
    """All gradients are scaled down together so that their total norm is at most this. 0: no scaling."""
    clip_value: float = 0.0
    """Each gradient value is then clamped to the range from minus this value to this value. 0: no clamping."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range."""
        check_types(self)
        check_at_least(self, 0, "learning_rate", "weight_decay", "clip_norm", "clip_value")
        check_at_least(self, 1, "accumulate")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The schedule: learning rates over the run, and early stopping."""

    name: Annotated[Literal["cosine", "plateau", "constant"], arg(name="schedule")] = "cosine"
    """What the learning rates do after the warm-up.
    cosine: they fall to 0 along a cosine. plateau: they fall when validation stops improving. constant: no change."""
    warmup: float = 0.1
    """Share of the run during which the learning rates rise to their peak, below 1."""
    plateau_factor: float = 0.8
    """plateau: factor by which the learning rates are multiplied, above 0 and below 1."""
    plateau_patience: int = 8
    """plateau: lower the learning rates after this many epochs without improvement, and again after as many more."""
    patience: int = 0
    """Number of epochs without improvement on the validation images after which the run ends. 0: no early stopping."""

    def __post_init__(self) -> None:
        """Raises CallError for values that are out of range or contradict each other."""
        check_types(self)
        check_at_least(self, 0, "warmup", "patience")
        check_at_least(self, 1, "plateau_patience")
        if self.warmup >= 1:
            raise CallError(f"warmup={self.warmup}: a share of the run, must be below 1")
        if not 0 < self.plateau_factor < 1:
            raise CallError(f"plateau_factor={self.plateau_factor}: must be above 0 and below 1")
        if self.name == "plateau" and 0 < self.patience <= self.plateau_patience:
            raise CallError(
                f"patience={self.patience}: the run would end before the learning rates are ever lowered; "
                f"must be above plateau_patience={self.plateau_patience}, or 0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run."""

    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    encoder: EncoderConfig = EncoderConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    search: SearchConfig = SearchConfig()

    def __post_init__(self) -> None:
        """Raises CallError for settings of different parts that contradict each other."""
        check_types(self)
        if self.data.cache_features and self.data.augment:
            raise CallError("cache_features=True: the cache holds one set of features per image; set augment=False")
        if self.data.cache_features and self.encoder.fine_tune_from != "none":
            raise CallError(
                "cache_features=True: features change while the encoder is trained from "
                f"{self.encoder.fine_tune_from} on; set fine_tune_from='none'"
            )
        if self.objective.name == "scst" and self.run.start_from is None:
            raise CallError("objective 'scst': needs a trained model to start from; set start_from to its folder")


# Flags whose name is not that of their field, and the field. Older settings.json files, which were not nested, use
# these names too.
RENAMED = {
    "data": "data.path",
    "encoder_weights": "encoder.weights",
    "encoder_learning_rate": "encoder.learning_rate",
    "objective": "objective.name",
    "optimizer": "optimizer.name",
    "schedule": "schedule.name",
    "implementation": "run.backend",
}


def setting_paths() -> dict[str, str]:
    """A flag, with underscores -> its setting in TrainConfig, e.g. learning_rate -> optimizer.learning_rate."""
    parts = dataclasses.fields(TrainConfig)
    paths = [f"{part.name}.{setting.name}" for part in parts for setting in dataclasses.fields(part.type)]
    return {path.partition(".")[2]: path for path in paths if path not in RENAMED.values()} | RENAMED


def flatten(settings: dict[str, dict]) -> dict[str, object]:
    """Nested settings, as `dataclasses.asdict` gives them -> values keyed by setting, e.g. optimizer.learning_rate, in
    the form in which JSON returns them."""
    values = {f"{part}.{name}": value for part, inner in settings.items() for name, value in inner.items()}
    return json.loads(json.dumps(values))


def read_settings(path: Path) -> dict[str, object]:
    """The values in a run's settings.json, keyed by setting, e.g. optimizer.learning_rate.

    Reads the files of older versions, too, in which most settings were not nested. Raises UserError for a file that is
    missing or damaged.
    """
    content = read_json(path, MAX_CONFIG)
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise UserError(f'{path}: field "settings" should be an object, as a training run writes it')
    parts = {part: inner for part, inner in settings.items() if isinstance(inner, dict)}
    if "run" in parts:
        values = {f"{part}.{name}": value for part, inner in parts.items() for name, value in inner.items()}
    else:
        flat = {name: value for name, value in settings.items() if name not in parts}
        for inner in parts.values():  # `model` and, later, `search` were nested
            flat |= inner
        if isinstance(flat.get("suppressed"), str):
            flat["suppressed"] = flat["suppressed"].split()
        paths = setting_paths()
        values = {paths[name]: value for name, value in flat.items() if name in paths}
    for name, value in values.items():
        if any(isinstance(entry, dict | list) for entry in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path}: field {short(name)} should be a number, a string or a list of strings")
    return values


def training_seed(model: str | Path) -> int:
    """The seed that the model in this folder was trained with; 0, the default, if the folder has no settings.json.
    Raises UserError when that file is damaged."""
    path = Path(model) / "settings.json"
    if not path.exists():
        return 0
    seed = read_settings(path).get("run.seed")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UserError(f'{path}: field "seed" should be an integer from 0; or give --seed')
    return seed
