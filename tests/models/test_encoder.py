import io
import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from attncap.errors import CallError, UserError
from attncap.models.encoder import Encoder


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pictures / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize(
    ("name", "size", "cells", "channels"),
    [
        ("resnet18", 64, 4, 512),
        ("resnet50", 64, 4, 2048),
        ("vgg16", 64, 4, 512),
        ("mobilenet_v2", 96, 9, 1280),
        ("efficientnet_b0", 64, 4, 1280),
        ("densenet121", 64, 4, 1024),
        ("shufflenet_v2_x0_5", 64, 4, 1024),
        ("regnet_y_400mf", 64, 4, 440),
        ("convnext_tiny", 64, 4, 768),
        ("swin_t", 64, 4, 768),
        ("googlenet", 64, 4, 1024),
    ],
)
def test_any_backbone_is_cut_before_its_pooling(name, size, cells, channels):
    encoder = Encoder(name).eval()
    assert encoder.grid_shape(size) == (cells, channels)


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
    with pytest.raises(CallError, match="--fine-tune-from layer9: no such layer; .*layer1.0"):
        encoder.fine_tune("layer9")


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
    extra = {} if name == "densenet121" else {"init_weights": False, "transform_input": True}
    backbone = torchvision.models.get_model(name, **extra).eval()
    state = backbone.state_dict()
    old_names = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", key): value for key, value in state.items()
    }
    assert name != "densenet121" or "features.denseblock1.denselayer1.norm.1.weight" in old_names
    torch.save(old_names, tmp_path / "weights.pth")
    encoder = Encoder(name, weights=str(tmp_path / "weights.pth")).eval()
    pictures = images(96)
    pooled = encoder(pictures).mean(1)
    if name == "densenet121":  # its last ReLU is part of the pooling's line
        expected = backbone.classifier(pooled)
    else:
        expected = backbone.fc(pooled)
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


def test_wrong_names():
    with pytest.raises(CallError, match="--encoder resnet19: no such backbone .*resnet18"):
        Encoder("resnet19")
    with pytest.raises(CallError, match="vit_b_16: a vision transformer has no feature grid"):
        Encoder("vit_b_16")
    with pytest.raises(CallError, match="resnet18 has no layer 'layer9'; it has conv1, .*layer4"):
        Encoder("resnet18", layer="layer9")
    with pytest.raises(CallError, match="gives no feature grid for images of 8 px"):
        Encoder("alexnet").grid_shape(8)


def test_wrong_weights(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(CallError, match="no such file"):
        Encoder("resnet18", weights=str(path))
    # ResNet-101 has every weight of ResNet-50, and more: only the surplus gives it away.
    for name, other, reason in (
        ("resnet50", "resnet101", "backbone lacks, such as layer3.6"),
        ("resnet18", "resnet34", "backbone lacks"),
        ("resnet34", "resnet18", "lacks weights that the backbone has"),
        ("resnet50", "wide_resnet50_2", "of another shape"),
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
    with pytest.raises(UserError, match="resnet18 cannot be downloaded from https.*--encoder-weights FILE"):
        Encoder("resnet18", weights="default")
