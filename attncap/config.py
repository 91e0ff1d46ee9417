"""Settings of a model. Those of a command stand in the command's own file.

The letters of every shape in this project:

    B   images            P   cells of the feature grid     A   attention size     V   words in the vocabulary
    K   rows of an image  D   channels of a cell            E   embedding size     T   words in a caption, <start> and
    N   rows, N = B K     S   side of an image in pixels    H   hidden size            <end> counted

The K rows of an image (its captions in training, its beams in the search) are neighbours among the N rows.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attncap.errors import UserError
from attncap.files import write_atomically

MAX_BEAMS = 32  # most beams per image in a search; the kernels' limit, kMaxBeams in beam_search_step.h


@dataclass
class ModelConfig:
    """What a model is built from; saved as `config.json` beside its weights."""

    encoder: str = "resnet50"
    """Any torchvision classification backbone with a feature grid: resnet18, vgg16, efficientnet_b0, ..."""
    encoder_layer: str | None = None
    """The backbone's layer (torchvision's name, e.g. layer3) whose output is the grid; by default the last one before
    the pooling."""
    image_size: int = 224
    """Side S, in pixels, to which an image is resized."""
    grid: int | None = None
    """Cells on a side of the feature grid, P = grid x grid, by adaptive average pooling; by default as the backbone
    gives it."""
    attention_size: int = 512
    """A, values in which features and hidden state are compared."""
    embedding_size: int = 512
    """E, values of a word."""
    hidden_size: int = 512
    """H, values of the LSTM's state."""
    activation: Literal["relu", "tanh"] = "relu"
    """Activation in the attention score: tanh is the paper's, relu is cheaper."""
    output_layer: Literal["plain", "deep"] = "deep"
    """Output layer: plain looks at the hidden state, deep also at the context and the last word."""
    dropout: float = 0.5
    """Share of the values dropped before the output layer, in training."""

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """Raises UserError when the file is missing, is not JSON, or has other fields than this version knows."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields)
        except OSError as error:
            raise UserError(f"{path}: cannot read the model's settings: {error.strerror}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not the settings of a model: {error}; train or copy the model again") from error
