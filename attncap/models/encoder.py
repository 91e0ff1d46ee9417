"""The encoder: a torchvision backbone, cut before its pooling, that turns images into a grid of features."""

import copy
import re
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import Node

from attncap.errors import CallError, UserError
from attncap.weights import conform, read_state_dict


class Encoder(nn.Module):
    """images uint8 [B,3,S,S] -> features [B,P,D] of the P cells of a square grid, row by row; float32, or the dtype
    that the encoder was cast to.

    Args:
        name: a torchvision classification backbone (`torchvision.models.list_models`).
        layer: the module of the backbone whose output is the grid, by its name in torchvision. None selects the last
            one before the pooling; `self.layer` is then its name. For VGG16, `features.29` is the 14x14x512 grid of
            Xu et al. 2015, section 3.1.1.
        grid: cells along each side after adaptive average pooling, or None for the backbone's own grid.
        weights: "default" (torchvision's best ImageNet weights, downloaded once), "none" (random), or the path of a
            state dict of the whole backbone (.pth or .safetensors).

    Raises CallError for an unknown backbone or an unsuitable layer, and UserError for weights that cannot be obtained
    or do not fit.
    """

    def __init__(self, name: str, layer: str | None = None, grid: int | None = None, weights: str = "none"):
        super().__init__()
        self.name = name
        self.grid = grid
        self.backbone = _build(name)
        known = self.backbone.state_dict().keys()
        preprocessing = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        self.layer = _cut(self.backbone, name, layer, image_size=preprocessing.crop_size[0])
        if weights != "none":
            _load(self.backbone, name, weights, known)
        self.backbone.to(memory_format=torch.channels_last)
        mean, std = torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.float32).view(2, 3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        dtype = next(self.backbone.parameters()).dtype
        try:
            self.backbone(images.to(dtype, memory_format=torch.channels_last))
        except _Reached as reached:
            features = reached.output  # [B,D,rows,columns]
        if self.grid is not None:
            features = F.adaptive_avg_pool2d(features, self.grid)
        return features.flatten(2).transpose(1, 2).contiguous()

    def grid_shape(self, image_size: int) -> tuple[int, int]:
        """(P, D) for images with this side length. Raises CallError when they are too small for the backbone."""
        images = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8, device="meta")
        try:
            _, cells, channels = _without_data(self)(images).shape
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise CallError(
                f"image_size={image_size}: layer {self.layer} of {self.name} gives no feature grid for such images "
                f"({' '.join(str(error).split())[:200]}); choose another encoder_layer, or image_size=224"
            ) from error
        return cells, channels

    def fine_tune(self, first: str) -> None:
        """Make the backbone trainable from the layer `first` on, in the order in which the layers run, and nothing
        before it; "all" means the whole backbone, "none" nothing. Raises CallError if no parameter is in that layer."""
        names = [name for name, _ in self.backbone.named_parameters()]
        if first in ("all", "none"):
            start = 0 if first == "all" else len(names)
        else:
            inside = [name.startswith(f"{first}.") for name in names]
            if not any(inside):
                layers = ", ".join(dict.fromkeys(".".join(name.split(".")[:-1][:2]) for name in names))
                raise CallError(f'fine_tune_from="{first}": no such layer; choose all, none or one of {layers}')
            start = inside.index(True)
        for index, parameter in enumerate(self.backbone.parameters()):
            parameter.requires_grad_(index >= start)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Batch norms whose weights are frozen keep their statistics. A backbone that is entirely frozen stays in
        evaluation mode (no dropout, no stochastic depth)."""
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
        raise CallError(f'encoder="{name}": no such backbone in torchvision; choose one of {", ".join(known)}')
    if name.startswith("vit_"):
        raise CallError(f'encoder="{name}": a vision transformer has no feature grid before a pooling; try resnet50')
    # By default GoogLeNet and Inception warn about their slow random initialisation. Their published weights expect a
    # normalisation of their own, which torchvision does inside the network.
    extra = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    backbone = torchvision.models.get_model(name, weights=None, **extra)
    # DenseNet applies its last ReLU, which gives the grid, as a function; MNASNet refuses weights that come without the
    # metadata of a torch file. The same networks as plain sequences of modules do neither.
    if isinstance(backbone, torchvision.models.DenseNet):
        modules = {"features": backbone.features, "relu": nn.ReLU(inplace=True)}
    elif isinstance(backbone, torchvision.models.MNASNet):
        modules = {"layers": backbone.layers}
    else:
        return backbone
    modules |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": backbone.classifier}
    return nn.Sequential(OrderedDict(modules))


class _Reached(Exception):
    """Ends a backbone's forward at the layer that gives the grid, and carries the layer's output."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output


class _Unused(nn.Module):
    """In the place of a module whose output the grid does not depend on. Most of these never run."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.clone()  # what follows may work in place


def _stop(module: nn.Module, inputs: tuple, output: Tensor) -> None:
    """A forward hook. It keeps no state, so threads may share the module and copies of the module are independent."""
    raise _Reached(output)


class _Call(NamedTuple):
    """A call of a module in a backbone's forward."""

    name: str
    shape: torch.Size  # of the output
    operation: Node | None  # the one that computed the output, as autograd records it

    @property
    def gives_grid(self) -> bool:
        return len(self.shape) == 4 and self.shape[2] == self.shape[3]


def _cut(backbone: nn.Module, name: str, layer: str | None, image_size: int) -> str:
    """End the backbone's forward, in place, at `layer` (None: the last grid before the pooling). Modules that do not
    contribute to its output lose their weights; the others are registered in the order in which they run. Returns the
    name of the module whose output is the grid. Raises CallError if there is none."""
    calls: list[_Call] = []  # in the order in which they end
    started: dict[str, int] = {}  # modules, and the modules that contain them, in the order in which they start

    def start(path: str) -> None:
        while path:
            started.setdefault(path, len(started))
            path = path.rpartition(".")[0]

    twin = _without_data(backbone)
    for path, module in twin.named_modules():
        if path:
            module.register_forward_pre_hook(lambda _module, _inputs, path=path: start(path))
            module.register_forward_hook(
                lambda _module, _inputs, output, path=path: calls.append(_Call(path, output.shape, output.grad_fn))
            )
    with torch.inference_mode(False), torch.enable_grad():
        twin(torch.zeros(1, 3, image_size, image_size, device="meta"))

    grid = _find(calls, name, layer)
    used = _parameters_behind(grid.operation)
    _prune(backbone, {path for path, parameter in twin.named_parameters() if parameter in used}, started)
    backbone.get_submodule(grid.name).register_forward_hook(_stop)
    return grid.name


def _without_data(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the meta device: its forward gives shapes without computing anything."""
    memo: dict[int, Tensor] = {}  # what deepcopy finds here, by its id, it does not copy
    with torch.inference_mode(False):
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"))
        for buffer in module.buffers():
            memo[id(buffer)] = torch.empty_like(buffer, device="meta")
        return copy.deepcopy(module, memo).eval()


def _find(calls: list[_Call], name: str, layer: str | None) -> _Call:
    """The call whose output is the grid. Raises CallError if there is none."""
    grids = [call for call in calls if call.gives_grid]
    if layer is None:
        # Of several modules that return the same grid, the outermost ends last. The pooling of VGG and AlexNet returns
        # a grid too, of the same size for every image size.
        return [call for call in grids if call.shape[2] > 1 and call.name != "avgpool"][-1]

    found = [call for call in calls if call.name == layer]
    if not found:  # a ModuleList is never called; its output is that of its last module
        found = [call for call in calls if call.name.startswith(f"{layer}.")][-1:]
    found = found or _find_operation(calls, layer)
    if not found:
        layers = ", ".join(dict.fromkeys(call.name for call in grids if call.name.count(".") < 2))
        raise CallError(f'encoder_layer="{layer}": {name} has no such layer; these give a feature grid: {layers}')
    if len(found) > 1:
        parent = layer.rpartition(".")[0] or "another layer"
        raise CallError(f'encoder_layer="{layer}": {name} runs this layer {len(found)} times; choose {parent} instead')
    if not found[0].gives_grid:
        shape = ", ".join(map(str, found[0].shape[1:]))
        raise CallError(
            f'encoder_layer="{layer}": this layer of {name} gives [B, {shape}] instead of a square feature grid '
            "[B, D, S, S]; choose another layer"
        )
    return found[0]


def _find_operation(calls: list[_Call], layer: str) -> list[_Call]:
    """The call whose output is that of an operation named as in torch.fx, which is how older models name their layer:
    "layer4.1.relu_1" is the second call of layer4.1.relu, "features.7.2.add" an addition in the forward of
    features.7.2. If no module returns the output of a repeated call, all calls of that module are returned."""
    module, _, index = layer.rpartition("_")
    repeated = [call for call in calls if call.name == module]
    if index.isdecimal() and int(index) < len(repeated):
        operation = repeated[int(index)].operation
        return [call for call in calls if call.operation is operation and call.name != module][-1:] or repeated
    owner, _, function = layer.rpartition(".")
    function = function.rstrip("_0123456789")
    recorded = {"reshape": "view"}.get(function, function) + "backward0"  # autograd's name of the operation
    owned = [call for call in calls if call.name == owner and call.operation]
    return [call for call in owned if call.operation.name().lower().removeprefix("unsafe") == recorded]


def _parameters_behind(operation: Node | None) -> set[Tensor]:
    """The parameters from which the output of an operation is computed."""
    pending, seen, parameters = [operation], {None}, set()
    while pending:
        operation = pending.pop()
        if operation not in seen:
            seen.add(operation)
            pending.extend(previous for previous, _ in operation.next_functions)
            if hasattr(operation, "variable"):
                parameters.add(operation.variable)
    return parameters


def _prune(backbone: nn.Module, parameters: set[str], order: dict[str, int], prefix: str = "") -> None:
    """Remove all other parameters: only what the grid depends on is trained, saved and loaded. Register the modules in
    the given order, last those that are never called themselves (although their weights may be used)."""
    for name, _ in list(backbone.named_parameters(recurse=False)):
        if prefix + name not in parameters:
            setattr(backbone, name, None)
    children = list(backbone.named_children())
    for name, child in sorted(children, key=lambda item: order.get(prefix + item[0], len(order))):
        names = [path for path, _ in child.named_parameters(f"{prefix}{name}")]
        if names and parameters.isdisjoint(names):
            child = _Unused()
        else:
            _prune(child, parameters, order, f"{prefix}{name}.")
        delattr(backbone, name)
        setattr(backbone, name, child)


def _load(backbone: nn.Module, name: str, weights: str, known: Collection[str]) -> None:
    path = _download(name) if weights == "default" else Path(weights)
    if not path.is_file():
        raise CallError(f'encoder_weights="{path}": no such file; give default, none or the path of a state dict')
    try:
        state = read_state_dict(path)
    except ValueError as error:
        if weights == "default":
            raise UserError(f"{path}: damaged; remove it to download it again ({error})") from error
        raise UserError(f"{path}: cannot read the weights: {error}") from error
    # DenseNet's published weights have names from before torchvision renamed them: norm.1.weight for norm1.weight.
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key): state[key] for key in state}
    needed = backbone.state_dict()
    unknown = [key for key in state if key not in known]
    missing = [key for key in needed if key not in state and not key.endswith("num_batches_tracked")]
    shapes = [key for key in needed if key in state and state[key].shape != needed[key].shape]
    for keys, reason in (
        (unknown, "has weights that the backbone does not have"),
        (missing, "lacks weights that the backbone has"),
        (shapes, "has weights of other shapes"),
    ):
        if keys:
            raise UserError(f"{weights}: not the weights of {name}: the file {reason}, such as {keys[0]}")
    try:
        backbone.load_state_dict(conform({key: state.get(key, needed[key]) for key in needed}, needed))
    except ValueError as error:
        raise UserError(f"{weights}: not the weights of {name}: {error}") from error


def _download(name: str) -> Path:
    """The file of torchvision's best ImageNet weights, which is downloaded if it is not there yet."""
    enum = torchvision.models.get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(enum.url).name
    if not path.exists():
        try:
            enum.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"the ImageNet weights of {name} cannot be downloaded from {enum.url} ({error}); download them "
                "elsewhere and give the file as encoder_weights, or start with encoder_weights=none"
            ) from error
    return path
