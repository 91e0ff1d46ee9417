"""Settings of a model, and the checks that all settings share.

The letters of every shape in this project:

    B   images            P   cells of the feature grid     A   attention size     V   words in the vocabulary
    K   rows of an image  D   channels of a cell            E   embedding size     T   words in a caption, including
    N   rows, N = B K     S   side of an image in pixels    H   hidden size            <start> and <end>

The K rows of an image (its captions in training, its beams in the search) are next to each other among the N rows.
"""

import dataclasses
import json
import numbers
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from attncap.errors import CallError, UserError
from attncap.files import read_json, write_atomically

FORMAT_VERSION = 1  # of config.json
MODEL_TYPE = "attention-lstm"

MAX_IMAGE_SIZE = 1024  # pixels; the largest images that torchvision's backbones were trained on have 528
MAX_GRID = 100  # cells along each side; the kernels on CUDA attend to at most 10,240 cells
MAX_SIZE = 16384  # of a vector in the decoder
MAX_CONFIG = 2**20  # bytes of a file of settings
MAX_BEAMS = 32  # most beams per image in a search; the kernels' limit, kMaxBeams in beam_search_step.h


@dataclass(frozen=True)
class ModelConfig:
    """The model: what it is built from. Saved as config.json next to its weights."""

    encoder: str = "resnet50"
    """Name of a torchvision classification backbone with a feature grid: resnet18, vgg16, efficientnet_b0, ..."""
    encoder_layer: str | None = None
    """The backbone's layer whose output is the feature grid (torchvision's name, e.g. layer3).
    By default, the last one before the pooling."""
    image_size: int = 224
    """Side length in pixels to which images are resized, at most 1024."""
    grid: int | None = None
    """Cells along each side of the feature grid, at most 100, by adaptive average pooling.
    By default, the backbone's own grid."""
    attention_size: int = 512
    """Size of the space in which the features and the hidden state are compared."""
    embedding_size: int = 512
    """Size of a word embedding."""
    hidden_size: int = 512
    """Size of the LSTM's hidden state."""
    activation: Literal["relu", "tanh"] = "relu"
    """Activation in the attention score: tanh as in the paper, or relu, which is faster."""
    output_layer: Literal["plain", "deep"] = "deep"
    """What the output layer sees: the hidden state alone (plain), or also the context and the previous word (deep)."""
    dropout: float = 0.5
    """Dropout probability before the output layer, in training."""

    def __post_init__(self) -> None:
        """Raises CallError for a value that is out of range."""
        check_types(self)
        check_at_least(self, 1, "image_size", "attention_size", "embedding_size", "hidden_size")
        check_at_most(self, MAX_IMAGE_SIZE, "image_size")
        check_at_most(self, MAX_SIZE, "attention_size", "embedding_size", "hidden_size")
        check_at_least(self, 0, "dropout")
        if self.grid is not None:
            check_at_least(self, 1, "grid")
            check_at_most(self, MAX_GRID, "grid")
        for name, value in (("encoder", self.encoder), ("encoder_layer", self.encoder_layer)):
            if value is not None and not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", value):
                raise CallError(f"{name}={short(value)}: torchvision has no such name")
        if self.dropout >= 1:
            raise CallError(f"dropout={short(self.dropout)}: must be below 1")

    def save(self, path: Path) -> None:
        """Write config.json. Raises UserError when it cannot be written."""
        content = {"format_version": FORMAT_VERSION, "model_type": MODEL_TYPE, **dataclasses.asdict(self)}
        write_atomically(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Read config.json. Files without format_version and model_type, as written by older versions, can be read,
        too.

        Raises UserError when the file is missing, is not JSON, has unknown fields or values, or was written by a newer
        version or for another kind of model.
        """
        if not path.is_file():
            raise UserError(f"{path}: the model's settings are missing; train or copy the model again")
        content = read_json(path, MAX_CONFIG)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not the settings of a model: expected a JSON object; train or copy it again")
        version, kind = content.pop("format_version", FORMAT_VERSION), content.pop("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise UserError(
                f"{path}: holds a model of type {short(kind)}; this version of attncap reads {MODEL_TYPE!r}"
            )
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UserError(
                f"{path}: has format_version {short(version)}; this version of attncap reads up to {FORMAT_VERSION}: "
                "update attncap"
            )
        if unknown := [name for name in content if name not in cls.__dataclass_fields__]:
            raise UserError(
                f"{path}: not the settings of a model: unknown field {short(unknown[0])}; update attncap, or train or "
                "copy the model again"
            )
        try:
            return cls(**content)
        except CallError as error:
            raise UserError(f"{path}: not the settings of a model: {error}; train or copy the model again") from error


def check_types(config: Any) -> None:
    """Raises CallError for a dataclass field whose value is not of its declared type: a number, a string, a bool, one
    of the values of a Literal, or another dataclass; or None where it is optional. Fields of other types are not
    checked."""
    for setting in dataclasses.fields(config):
        kind: Any = get_args(setting.type)[0] if get_origin(setting.type) is Annotated else setting.type
        name, value = setting.name, getattr(config, setting.name)
        if type(None) in get_args(kind):
            if value is None:
                continue
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            if not isinstance(value, str) or value not in get_args(kind):
                raise CallError(f"{name}={short(value)}: choose {_in_words(get_args(kind))}")
        elif kind in _KINDS:
            expected, description = _KINDS[kind]
            if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
                raise CallError(f"{name}={short(value)}: must be {description}")
            if kind in (int, float) and not isinstance(value, int | float):  # a NumPy number, which JSON does not know
                object.__setattr__(config, name, kind(value))
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
            raise CallError(f"{name}={short(value)}: must be a {kind.__name__}")


_KINDS = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
    bool: (bool, "True or False"),
}


def short(value: object) -> str:
    """A value for an error message; for what may be long, such as an array, only its type."""
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"<{type(value).__name__}>"


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises CallError for a field that is below `least`, or NaN."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise CallError(f"{name}={short(value)}: must be at least {least}")


def check_at_most(config: Any, most: int, *names: str) -> None:
    """Raises CallError for a field that is above `most`."""
    for name in names:
        value = getattr(config, name)
        if value > most:
            raise CallError(f"{name}={short(value)}: must be at most {most:,}")


def _in_words(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
