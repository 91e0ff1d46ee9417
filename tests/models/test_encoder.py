import copy
import io
import re
import sys
import threading

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models.feature_extraction import create_feature_extractor

from attncap.errors import CallError, UserError
from attncap.models.encoder import Encoder


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pictures / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def build_backbone(name: str) -> torch.nn.Module:
    special = name in ("googlenet", "inception_v3")
    return torchvision.models.get_model(name, **({"init_weights": False, "transform_input": True} if special else {}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "layer", "fx_name", "cells", "channels"),
    [
        ("resnet18", 64, "layer4", "layer4.1.relu_1", 4, 512),
        ("resnet50", 64, "layer4", "layer4.2.relu_2", 4, 2048),
        ("alexnet", 96, "features", "features.12", 4, 256),
        ("vgg11", 64, "features", "features.20", 4, 512),
        ("densenet121", 64, "relu", "relu", 4, 1024),
        ("googlenet", 64, "inception5b", "inception5b.cat", 4, 1024),
        ("inception_v3", 96, "Mixed_7c", "Mixed_7c.cat_2", 1, 2048),
        ("mobilenet_v2", 96, "features", "features.18", 9, 1280),
        ("mobilenet_v3_small", 64, "features", "features.12", 4, 576),
        ("efficientnet_b0", 64, "features", "features.8", 4, 1280),
        ("convnext_tiny", 64, "features", "features.7.2.add", 4, 768),
        ("swin_t", 64, "permute", "permute", 4, 768),
        ("maxvit_t", 224, "blocks.3", "blocks.3.layers.1.layers.grid_attention.departition_op.reshape_1", 49, 512),
        ("regnet_y_400mf", 64, "trunk_output", "trunk_output.block4.block4-5.activation", 4, 440),
        ("shufflenet_v2_x0_5", 64, "conv5", "conv5.2", 4, 1024),
        ("squeezenet1_1", 64, "classifier.2", "classifier.2", 9, 1000),
        ("mnasnet0_5", 64, "layers", "layers.16", 4, 1280),
    ],
)
def test_any_backbone_is_cut_before_its_pooling(name, size, layer, fx_name, cells, channels, tmp_path):
    """The features are those that torch.fx extracts from the whole network, and the weights have the same names and
    order. Models of earlier versions name their layer as torch.fx does."""
    torch.manual_seed(0)
    backbone = build_backbone(name)
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    pictures = images(size, 1)
    extractor = create_feature_extractor(backbone, {fx_name: "grid"}).eval()
    for given in (None, fx_name):
        encoder = Encoder(name, given, weights=str(tmp_path / "weights.pth")).eval()
        assert encoder.layer == layer or given == fx_name
        assert encoder.grid_shape(size) == (cells, channels)
        expected = extractor((pictures / 255 - encoder.mean) / encoder.std)["grid"].flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(pictures), expected, atol=1e-3, rtol=1e-3)
        assert [n for n, _ in encoder.backbone.named_parameters()] == [n for n, _ in extractor.named_parameters()]
        if name != "maxvit_t":  # torch.fx turns its position indices into constants
            assert encoder.backbone.state_dict().keys() == extractor.state_dict().keys()


def test_features_are_torchvisions_own(tmp_path):
    """The grid that torchvision's network pools: averaged over the cells and put through its classifier, it gives the
    network's own output."""
    torch.manual_seed(0)
    backbone = torchvision.models.resnet18().eval()
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("resnet18", weights=str(tmp_path / "weights.pth")).eval()
    pictures = images(96)
    features = encoder(pictures)
    assert features.shape == (2, 9, 512) and features.is_contiguous()
    torch.testing.assert_close(backbone.fc(features.mean(1)), backbone(normalized(pictures)), atol=1e-4, rtol=1e-4)


def test_layer_and_grid():
    encoder = Encoder("vgg16", layer="features.29").eval()  # the 14x14x512 grid of Xu et al. at 224 pixels
    assert encoder.grid_shape(224) == (196, 512)
    small, pooled = Encoder("resnet18", layer="layer3").eval(), Encoder("resnet18", layer="layer3", grid=2).eval()
    pooled.load_state_dict(small.state_dict())
    pictures = images(64)
    quarters = small(pictures).view(2, 2, 2, 2, 2, 256).mean(dim=(2, 4)).view(2, 4, 256)
    torch.testing.assert_close(pooled(pictures), quarters)


def test_a_larger_grid_repeats_cells():
    small, large = Encoder("resnet18", layer="layer3").eval(), Encoder("resnet18", layer="layer3", grid=8).eval()
    large.load_state_dict(small.state_dict())
    assert large.grid_shape(64) == (64, 256)
    pictures = images(64)
    repeated = small(pictures).view(2, 4, 4, 256).repeat_interleave(2, 1).repeat_interleave(2, 2).view(2, 64, 256)
    assert large(pictures).equal(repeated)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer2"),
        ("resnet18", "layer2.0.downsample"),  # runs after other modules but does not use their output
        ("alexnet", "features.6"),  # an in-place ReLU follows
        ("googlenet", "inception4a.branch3"),
        ("convnext_tiny", "features.3.1.block.0"),
        ("mnasnet0_5", "layers.9.1"),
        ("densenet121", "features"),  # before the last ReLU
    ],
)
def test_only_what_the_grid_depends_on_is_kept(name, layer):
    torch.manual_seed(0)
    extractor = create_feature_extractor(build_backbone(name), {layer: "grid"}).eval()
    torch.manual_seed(0)
    encoder = Encoder(name, layer).eval()
    assert [n for n, _ in encoder.backbone.named_parameters()] == [n for n, _ in extractor.named_parameters()]
    pictures = images(96, 1)
    expected = extractor((pictures / 255 - encoder.mean) / encoder.std)["grid"].flatten(2).transpose(1, 2)
    features = encoder(pictures)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("name", "given", "layer"),
    [
        ("resnet18", "layer2.1", "layer2.1"),
        ("resnet18", "layer2.1.relu_1", "layer2"),  # the same tensor
        ("resnet50", "layer2.0.relu_2", "layer2.0"),
        ("convnext_tiny", "features.5.3.add", "features.5.3"),
        ("shufflenet_v2_x0_5", "stage4.3.view_1", "stage4.3"),
        ("maxvit_t", "blocks", "blocks.3"),  # a ModuleList
    ],
)
def test_names_of_layers(name, given, layer):
    assert Encoder(name, given).layer == layer


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_never_run(name):
    encoder = Encoder(name).train()
    assert not any("aux" in key.lower() for key in encoder.state_dict())
    assert encoder(images(96)).requires_grad


def test_copies_are_independent():
    encoder = Encoder("resnet18", "layer1").eval()
    pictures = images(32)
    expected = encoder(pictures)
    copied = copy.deepcopy(encoder)
    assert copied(pictures).equal(expected)
    with torch.no_grad():
        copied.backbone.conv1.weight.zero_()
    assert not copied(pictures).equal(expected) and encoder(pictures).equal(expected)


def test_grid_shape_changes_nothing():
    encoder = Encoder("resnet18", "layer1").train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with torch.inference_mode():
        assert encoder.grid_shape(32) == Encoder("resnet18", "layer1").grid_shape(32) == (64, 64)
    assert all(module.training for module in encoder.modules())
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())


def test_threads_build_encoders_while_another_runs_one():
    encoder, half = Encoder("resnet18").eval(), Encoder("resnet18", "layer2").eval()
    half.load_state_dict({name: value for name, value in encoder.state_dict().items() if name in half.state_dict()})
    pictures = images(64)
    with torch.no_grad():
        expected = {None: encoder(pictures), "layer2": half(pictures)}
    call, stderr = torch.nn.Module.__call__, sys.stderr
    built, runs, errors = [], [], []
    done = threading.Event()

    def build():
        try:
            built.extend((layer, Encoder("resnet18", layer).eval()) for layer in (None, "layer2") * 2)
        except Exception as error:
            errors.append(error)

    def run():
        try:
            with torch.no_grad():
                while not done.is_set():
                    runs.append(encoder(pictures).equal(expected[None]))
        except Exception as error:
            errors.append(error)

    builders, runner = [threading.Thread(target=build) for _ in range(2)], threading.Thread(target=run)
    for thread in (runner, *builders):
        thread.start()
    for thread in builders:
        thread.join()
    done.set()
    runner.join()
    assert not errors and len(built) == 8 and runs and all(runs)
    assert torch.nn.Module.__call__ is call and sys.stderr is stderr
    for layer, other in built:
        other.load_state_dict((half if layer else encoder).state_dict())
        with torch.no_grad():
            assert other(pictures).equal(expected[layer])


def test_fine_tune():
    encoder = Encoder("resnet18")
    encoder.fine_tune("layer3")
    trained = {name.split(".")[0] for name, p in encoder.backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer3", "layer4"}
    encoder.train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder(images(64))
    moved = {name.split(".")[1] for name, value in encoder.state_dict().items() if not value.equal(before[name])}
    assert moved == {"layer3", "layer4"}, "only the batch norms of layers in training move"

    encoder.fine_tune("none")
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.backbone.modules())
    encoder.fine_tune("all")
    assert (
        all(p.requires_grad for p in encoder.parameters()) and encoder.backbone.get_submodule("layer1.0.bn1").training
    )
    with pytest.raises(CallError, match='fine_tune_from="layer9": no such layer; .*conv1, bn1, layer1.0'):
        encoder.fine_tune("layer9")


def test_fine_tune_follows_the_order_in_which_layers_run():
    """Swin's patch merging registers `reduction` before `norm`, which runs first."""
    encoder = Encoder("swin_t")
    encoder.fine_tune("features.2.reduction")
    trained = [name for name, p in encoder.backbone.named_parameters() if p.requires_grad]
    assert trained[0] == "features.2.reduction.weight" and not any("features.2.norm" in name for name in trained)


def test_weights_from_safetensors(tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.mobilenet_v2().state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    encoder = Encoder("mobilenet_v2", weights=str(tmp_path / "weights.safetensors"))
    for name, value in encoder.backbone.state_dict().items():
        assert value.equal(state[name])


@pytest.mark.parametrize("name", ["densenet121", "googlenet", "inception_v3"])
def test_published_weights_of_special_backbones(name, tmp_path):
    """DenseNet's published files have older names; GoogLeNet's and Inception's networks normalise their input again."""
    torch.manual_seed(0)
    backbone = build_backbone(name).eval()
    state = backbone.state_dict()
    old_names = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in state.items()
    }
    assert name != "densenet121" or "features.denseblock1.denselayer1.norm.1.weight" in old_names
    torch.save(old_names, tmp_path / "weights.pth")
    encoder = Encoder(name, weights=str(tmp_path / "weights.pth")).eval()
    pictures = images(96)
    pooled = encoder(pictures).mean(1)
    expected = backbone.classifier(pooled) if name == "densenet121" else backbone.fc(pooled)
    torch.testing.assert_close(expected, backbone(normalized(pictures)), atol=1e-4, rtol=1e-4)


def test_downloaded_weights_run_no_code(monkeypatch, tmp_path):
    """A file in torch's cache is read like any other: as weights and nothing else."""

    class Gadget:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    for content in (pickle_of({"conv1.weight": Gadget()}), b""):
        (cache / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: damaged; remove it"):
            Encoder("resnet18", weights="default")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("resnet19", None, 'encoder="resnet19": no such backbone .*resnet18'),
        ("vit_b_16", None, 'encoder="vit_b_16": a vision transformer has no feature grid'),
        ("resnet18", "layer9", 'encoder_layer="layer9": resnet18 has no such layer; .*: conv1, .*layer4'),
        ("resnet18", "layer4.1.add", 'encoder_layer="layer4.1.add": resnet18 has no such layer'),  # before the ReLU
        ("resnet18", "layer4.1.relu", "resnet18 runs this layer 2 times; choose layer4.1 instead"),
        ("resnet50", "layer4.2.relu_1", "resnet50 runs this layer 3 times; choose layer4.2 instead"),
        ("resnet18", "fc", r"gives \[B, 1000\] instead of a square feature grid"),
        ("swin_t", "features.7", r"gives \[B, 7, 7, 768\] instead of a square feature grid"),
        ("vgg11", "features.99", 'encoder_layer="features.99": vgg11 has no such layer'),
        ("resnet18", "layer4.1.re", 'encoder_layer="layer4.1.re": resnet18 has no such layer'),
        ("googlenet", "aux1", 'encoder_layer="aux1": googlenet has no such layer'),
    ],
)
def test_wrong_names(name, layer, message):
    with pytest.raises(CallError, match=message):
        Encoder(name, layer)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 8), ("inception_v3", 64), ("maxvit_t", 64)])
def test_images_that_are_too_small(name, size):
    with pytest.raises(CallError, match=f"image_size={size}: layer .* of {name} gives no feature grid for such images"):
        Encoder(name).grid_shape(size)


def test_wrong_weights(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(CallError, match="no such file"):
        Encoder("resnet18", weights=str(path))
    # ResNet-101 has every weight of ResNet-50, and more: only the surplus gives it away.
    for name, other, reason in (
        ("resnet50", "resnet101", "backbone does not have, such as layer3.6"),
        ("resnet18", "resnet34", "backbone does not have"),
        ("resnet34", "resnet18", "lacks weights that the backbone has"),
        ("resnet50", "wide_resnet50_2", "of other shapes"),
    ):
        torch.save(torchvision.models.get_model(other).state_dict(), path)
        with pytest.raises(UserError, match=f"not the weights of {name}: .*{reason}"):
            Encoder(name, weights=str(path))
    for content in (b"", b"not weights", pickle_of(torchvision.models.resnet18()), pickle_of([1, 2])):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: "):
            Encoder("resnet18", weights=str(path))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot read the weights"):
        Encoder("resnet18", weights=str(path))


def pickle_of(thing) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="resnet18 cannot be downloaded from https.*encoder_weights"):
        Encoder("resnet18", weights="default")
