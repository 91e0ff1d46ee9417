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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from attncap.errors import CallError, UserError
from attncap.files import read_json, write_atomically

MAX_BEAMS = 32  # of an image; kMaxBeams, csrc/beam_search_step/beam_search_step.h
FORMAT_VERSION = 1  # of config.json
MODEL_TYPE = "attention-lstm"

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
    """Side length in pixels to which images are resized."""
    grid: int | None = None
    """Cells along each side of the feature grid, by adaptive average pooling. By default, the backbone's own grid."""
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
        check_at_least(self, 0, "dropout")
        if self.grid is not None:
            check_at_least(self, 1, "grid")
        if self.dropout >= 1:
            raise CallError(f"dropout={self.dropout}: must be below 1")

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
        content = read_json(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not the settings of a model: expected a JSON object; train or copy it again")
        version, kind = content.pop("format_version", FORMAT_VERSION), content.pop("model_type", MODEL_TYPE)
        if kind != MODEL_TYPE:
            raise UserError(f"{path}: holds a model of type {kind!r}; this version of attncap reads {MODEL_TYPE!r}")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{path}: has format_version {version!r}; this version of attncap reads up to {FORMAT_VERSION}: "
                "update attncap"
            )
        try:
            return cls(**content)
        except (CallError, TypeError) as error:
            raise UserError(f"{path}: not the settings of a model: {error}; train or copy the model again") from error


def check_types(config: Any) -> None:
    """Raises CallError for a dataclass field whose value is not of its declared type: a number, a string, a bool, or
    one of the values of a Literal. Fields of other types are not checked."""
    for setting in dataclasses.fields(config):
        kind = get_args(setting.type)[0] if get_origin(setting.type) is Annotated else setting.type
        name, value = setting.name, getattr(config, setting.name)
        if get_origin(kind) is Literal:
            if not isinstance(value, str) or value not in get_args(kind):
                raise CallError(f"{name}={_short(value)}: choose {_in_words(get_args(kind))}")
        elif kind in _KINDS:
            expected, description = _KINDS[kind]
            if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
                raise CallError(f"{name}={_short(value)}: must be {description}")


_KINDS = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
    bool: (bool, "True or False"),
}


def _short(value: object) -> str:
    """A value for an error message; for what may be long, such as an array, only its type."""
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"<{type(value).__name__}>"


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Raises CallError for a field that is below `least`, or NaN."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise CallError(f"{name}={value}: must be at least {least}")


def _in_words(choices: tuple[str, ...]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
