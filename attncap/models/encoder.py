"""The encoder: a torchvision backbone, cut before its pooling, that turns images into a grid of features."""

import contextlib
import io
import math
import pickle
import re
from pathlib import Path
from urllib.error import URLError

import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from attncap.errors import CallError, UserError


class Encoder(nn.Module):
    """images uint8 [B,3,S,S] -> features float32 [B,P,D]. A `grid` that only repeats the backbone's cells (14x14 of
    7x7: each cell 4 times) is left as the backbone gives it with `repeat=False`: attention over the cells themselves,
    spread over their copies, is attention over the copies.

    Args:
        name: a torchvision classification backbone (`torchvision.models.list_models`).
        layer: the backbone's layer whose output is the grid, by torchvision's name; None finds the last one before the
            pooling (and `self.layer` then tells which it is). For VGG16, `features.29` is the 14x14x512 grid of Xu et
            al. 2015, section 3.1.1.
        grid: cells on a side after adaptive average pooling, or None for the backbone's own grid.
        weights: "default" (torchvision's best ImageNet weights, downloaded once), "none" (random), or the path of a
            state dict of the whole backbone (.pth or .safetensors).

    Raises CallError for an unknown backbone or layer, UserError for weights that cannot be had or do not fit.
    """

    def __init__(self, name: str, layer: str | None = None, grid: int | None = None, weights: str = "none"):
        super().__init__()
        backbone = _build(name)
        self.name = name
        self.layer = layer or _last_grid(name, backbone)
        try:
            self.backbone = create_feature_extractor(backbone, {self.layer: "grid"})
        except ValueError as error:
            layers = [module for module, _ in backbone.named_modules() if module and module.count(".") < 2]
            raise CallError(f"{name} has no layer {layer!r}; it has {', '.join(layers)}") from error
        self.grid = grid
        if weights != "none":
            _load(self.backbone, name, weights, known=backbone.state_dict().keys())
        self.backbone.to(memory_format=torch.channels_last)
        preprocessing = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, repeat: bool = True) -> Tensor:
        images = (images / 255 - self.mean) / self.std
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))["grid"]  # [B,D,rows,columns]
        if self.grid is not None and self.grid % features.shape[2]:
            features = F.adaptive_avg_pool2d(features, self.grid)
        features = features.flatten(2).transpose(1, 2).contiguous()
        return self.repeat_cells(features) if repeat else features

    def repeat_cells(self, features: Tensor) -> Tensor:
        """What `repeat=False` gives, or a cache of it -> features [B,P,D] of all cells, copies counted."""
        side = math.isqrt(features.shape[1])
        copies = (self.grid or side) // side  # of a cell, on each side
        if copies == 1:
            return features
        grid = features.unflatten(1, (side, side))
        return grid.repeat_interleave(copies, dim=1).repeat_interleave(copies, dim=2).flatten(1, 2)

    @torch.no_grad()
    def grid_shape(self, image_size: int, repeat: bool = True) -> tuple[int, int]:
        """(P, D) for images of that side. Raises CallError when they are too small for the backbone."""
        training = self.training
        self.eval()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints a traceback of what is caught here
                image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device=self.mean.device)
                _, cells, channels = self(image, repeat).shape
        except (RuntimeError, AssertionError, IndexError) as error:
            raise CallError(
                f"layer {self.layer} gives no feature grid for images of {image_size} px ({error}); try another "
                "--encoder-layer, or --image-size 224"
            ) from error
        self.train(training)
        return cells, channels

    def fine_tune(self, first: str) -> None:
        """Let training change the backbone from the layer `first` on, in the network's order, and nothing before it;
        "all" is the whole backbone, "none" nothing. Raises CallError for a name that no parameter begins with."""
        names = [name for name, _ in self.backbone.named_parameters()]
        prefix = {"all": "", "none": None}.get(first, first + ".")
        begins = [prefix is not None and name.startswith(prefix) for name in names]
        if prefix is not None and not any(begins):
            layers = dict.fromkeys(".".join(name.split(".")[:2]) for name in names)
            raise CallError(f"--fine-tune-from {first}: no such layer; choose all, none or one of {', '.join(layers)}")
        start = begins.index(True) if any(begins) else len(names)
        for index, parameter in enumerate(self.backbone.parameters()):
            parameter.requires_grad_(index >= start)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Batch norms whose weights are frozen keep their statistics; a backbone that is all frozen stays as in
        evaluation (no dropout, no stochastic depth)."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()
        return self


def _build(name: str) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise CallError(f"--encoder {name}: no such backbone in torchvision; choose one of {', '.join(known)}")
    if name.startswith("vit_"):
        raise CallError(f"--encoder {name}: a vision transformer has no feature grid before a pooling; try resnet50")
    # GoogLeNet and Inception warn, and start slowly, unless told not to draw their own initial weights.
    # Their published weights want their own normalisation, which torchvision puts inside the network.
    extra = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **extra)


@torch.no_grad()
def _last_grid(name: str, backbone: nn.Module) -> str:
    """The last layer whose output is a square grid of more than one cell: the one that the pooling reads."""
    side = torchvision.models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    nodes = get_graph_node_names(backbone)[1]
    outputs = create_feature_extractor(backbone, nodes).eval()(torch.zeros(1, 3, side, side))
    grids = [
        node
        for node, output in outputs.items()
        if isinstance(output, Tensor)
        and output.dim() == 4
        and output.shape[2] == output.shape[3] > 1
        and node != "avgpool"  # VGG's and AlexNet's pooling gives a grid too, of one size for every image size
    ]
    return grids[-1]


def _load(backbone: nn.Module, name: str, weights: str, known: "set[str]") -> None:
    if weights == "default":
        enum = torchvision.models.get_model_weights(name).DEFAULT
        try:
            state = enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(f"{folder / Path(enum.url).name}: damaged; remove it to download it again") from error
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded from {enum.url} ({error}); download them "
                "elsewhere and give the file with --encoder-weights FILE, or start with --encoder-weights none"
            ) from error
    else:
        state = _read(Path(weights))
    # DenseNet's published weights have names from before torchvision renamed them: norm.1.weight for norm1.weight.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    needed = backbone.state_dict()
    unknown = [key for key in state if key not in known]
    missing = [key for key in needed if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [key for key in needed if key in state and state[key].shape != needed[key].shape]
    for keys, reason in (
        (unknown, "has weights that the backbone lacks"),
        (missing, "lacks weights that the backbone has"),
        (shapes, "has weights of another shape"),
    ):
        if keys:
            raise UserError(f"{weights}: not the weights of {name}: the file {reason}, such as {keys[0]}")
    backbone.load_state_dict({key: state[key] for key in needed if key in state}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CallError(f"--encoder-weights {path}: no such file; give default, none or the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot read the weights: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors); save it with torch.save(model.state_dict())")
    return state
