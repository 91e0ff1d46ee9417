"""Whatever the files of a model, a run, an encoder or a cache contain: they can be used, or refused in one line.

ATTNCAP_FUZZ=1000 tries more files of each kind than the default.
"""

import io
import json
import os
import random
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load, save, save_file

from attncap import Captioner, UserError
from attncap.config import ModelConfig
from attncap.data import feature_cache
from attncap.data.shapes import open_shapes
from attncap.data.vocabulary import Vocabulary
from attncap.evaluation import read_results
from attncap.models import encoder
from attncap.training import checkpoint, recipes, run_logger
from attncap.training.config import training_seed
from attncap.training.trainer import Trainer

SIZES = dict(attention_size=8, embedding_size=8, hidden_size=16)
ODD = [None, True, -1, 0, 1, 3, 2**31, 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), [], {}]
ODD += ["", "x", "resnet18", "layer2", "\n", "a\x1b[2J\n", "\ud800", "x" * 10**5, [1, [2]], {"a": {}}, ["<unk>"]]
COUNT = int(os.environ.get("ATTNCAP_FUZZ", 15))  # of each kind
PIECES = [b"", b"[" * 10**5, b"[" * 900 + b"]" * 900, b"9" * 5000, b"null", b"7", b'"a"', b"\xff\xfe"]


# Ways to damage a file


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, removed or put in, at the beginning, where the structure is, or anywhere."""
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        start = draw.randrange(min(len(content), draw.choice([16, 2000, 10**9])) + 1)
        way = draw.randrange(5)
        if way == 0:
            content[start : start + 1] = bytes([draw.randrange(256)])
        elif way == 1:
            del content[start : start + draw.choice([1, 4, 100])]
        elif way == 2:
            content[start:start] = draw.randbytes(draw.choice([1, 4, 100]))
        elif way == 3:
            content[start : start + 8] = draw.choice([b"\xff", b"\0", b"\x7f"]) * draw.choice([1, 4, 8])
        else:
            del content[start:]
    return bytes(content)


def damage_value(value, draw: random.Random, odd):
    """A copy with one value, anywhere in nested dicts and lists, changed, removed, added or moved."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return odd()
    value = value.copy()
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    way = draw.randrange(8)
    if way == 0:
        del value[key]
    elif way == 1:
        if isinstance(value, dict):
            value[draw.choice(["x", "\n", "é", 7])] = odd()
        else:
            value.insert(key, odd())
    elif way == 2:
        value[key] = value[draw.choice(list(value) if isinstance(value, dict) else range(len(value)))]
    else:
        value[key] = damage_value(value[key], draw, odd)
    return value


def damage_json(content: bytes, draw: random.Random) -> bytes:
    way = draw.randrange(10)
    if way == 0:
        return damage_bytes(content, draw)
    if way == 1:
        return draw.choice(PIECES)
    text = json.dumps(damage_value(json.loads(content), draw, lambda: draw.choice(ODD)))
    if way == 2:
        text = text.replace(draw.choice([": 1", ": 0", '"a"']), ": " + "[" * 500 + "]" * 500, 1)
    return text.encode()


def damage_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    index = draw.randrange(len(lines))
    lines[index] = damage_json(lines[index], draw) + draw.choice([b"\n", b"\n", b""])
    return b"".join(lines)


def damage_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Any bytes, or a value of the header, whose length is then right again."""
    if draw.random() < 0.2:
        return damage_bytes(content, draw)
    if draw.random() < 0.5:  # complete, but other tensors
        state = load(content)
        kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]
        for name in draw.sample(sorted(state), draw.choice([1, len(state)])):
            value = state.pop(name)
            others = [value.to(draw.choice(kinds)), value * float("inf"), value[None], value.flatten()[:1], None]
            change = draw.choice([value, *others])
            if change is not None:
                state[name if draw.random() < 0.9 else draw.choice(["x", "\n"])] = change.contiguous()
        return save(state)
    length = int.from_bytes(content[:8], "little")
    header = damage_json(content[8 : 8 + length], draw)
    if draw.random() < 0.3:  # another dtype
        header = header.replace(b'"F32"', draw.choice([b'"F64"', b'"F16"', b'"I8"', b'"BOOL"', b'"C64"', b'"F8_E5M2"']))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def odd_tensor(draw: random.Random):
    """Tensors, and other things, that a file of torch may have in place of weights."""
    like = torch.ones(draw.choice([(), (1,), (4,), (8,), (16, 8), (1, 2), (0,), (64, 64, 3, 3)]))
    return draw.choice(
        [
            lambda: like,
            lambda: like * float("nan"),
            lambda: like.to(draw.choice([torch.int8, torch.bool, torch.complex64, torch.float64, torch.float16])),
            lambda: like.to_sparse(),
            lambda: torch.quantize_per_tensor(like, 0.1, 0, torch.qint8),
            lambda: like.to("meta"),
            lambda: torch.ones(1).expand(10**6, 10**6),
            lambda: torch.ones(()).expand(like.shape),
            lambda: torch.ones(64).as_strided((8, 8), (1, 1)),
            lambda: torch.nn.Parameter(like),
            lambda: draw.choice(ODD),
            lambda: (1, 2),
            lambda: {"a": like},
            lambda: random.Random,  # refused by torch.save's reader, as code
        ]
    )()


def damage_pickle(content: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.5:
        return damage_bytes(content, draw)
    state = damage_value(torch.load(io.BytesIO(content)), draw, lambda: odd_tensor(draw))
    return pickled(state, _use_new_zipfile_serialization=draw.random() < 0.8)


def pickled(state, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


# What is damaged, and how it is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with all of its files."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    shapes = recipes.load("shapes")
    config = replace(shapes, model=ModelConfig("resnet18", "layer1", 32, grid=2, **SIZES))
    words = Vocabulary([*Vocabulary.SPECIALS, "▁", "a", "b", "▁a", "▁ab"], ["▁ a", "▁a b"])
    trainer = Trainer(config, Captioner(config.model, words), open_shapes(0, {"train": 4, "val": 2}), folder, None)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()
    trainer.schedule.epoch_ended([0.5, 0.25, 0.125])
    trainer.model.save_pretrained(folder)
    checkpoint.save(folder, trainer.state_dict())
    (folder / "settings.json").write_text(json.dumps({"settings": asdict(config), "versions": {}}))
    lines = [{"epoch": epoch, "loss_words": 4 / epoch, "CIDEr": 0.5, "BLEU-4": 0.25} for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text('[{"image_id": 1, "caption": "a"}, {"image_id": "a.jpg", "caption": "b"}]')
    weights = torchvision.models.squeezenet1_1().state_dict()
    (folder / "encoder.pth").write_bytes(pickled(weights))
    (folder / "old.pth").write_bytes(pickled(weights, _use_new_zipfile_serialization=False))
    save_file(weights, folder / "encoder.safetensors")
    features = {"features": torch.ones(2, 4, 8, dtype=torch.float16)}
    (folder / "cache.safetensors").write_bytes(save(features, {"images": '["a", "b"]'}))
    return folder, config, trainer


def load_model(path: Path, _):
    model = Captioner.from_pretrained(path.parent)
    assert all(value.isfinite().all() and not value.is_meta for value in model.state_dict().values())
    model.vocabulary.encode("a ab", 9)


def load_log(path: Path, _):
    for line in run_logger._read(path, 2):
        assert line["epoch"] <= 2 and all(isinstance(value, int | float) for value in line.values())


def load_settings(path: Path, trainer: Trainer):
    try:
        checkpoint.check_settings(trainer.config, path.parent)
    finally:
        training_seed(path.parent)


def load_checkpoint(path: Path, trainer: Trainer):
    trainer.output = path.parent
    trainer.load_checkpoint()
    trainer.optimizer.step()  # with the gradients of the fixture


def load_encoder(path: Path, _):
    backbone = torchvision.models.squeezenet1_1()
    encoder._load(backbone, "squeezenet1_1", str(path), backbone.state_dict().keys())


def load_features(path: Path, _):
    locations = feature_cache._find(path.parent, 4, 8)
    if not locations:
        assert not path.exists()
        raise UserError(f"{path}: its images are encoded again")
    for image, location in locations.items():
        index, features = feature_cache.FeatureCache(path.parent, [location])[0]
        assert features.shape == (4, 8) and features.dtype == torch.float16 and image


KINDS = {
    "config.json": (damage_json, load_model),
    "vocabulary.json": (damage_json, load_model),
    "model.safetensors": (damage_safetensors, load_model),
    "settings.json": (damage_json, load_settings),
    "metrics.jsonl": (damage_lines, load_log),
    "checkpoint.pt": (damage_pickle, load_checkpoint),
    "results.json": (damage_json, lambda path, _: read_results(path)),
    "encoder.pth": (damage_pickle, load_encoder),
    "old.pth": (damage_pickle, load_encoder),
    "encoder.safetensors": (damage_safetensors, load_encoder),
    "cache.safetensors": (damage_safetensors, load_features),
}


def attempt(name: str, folder, tmp_path: Path, seed: int) -> str | None:
    """Damage one file and read it. Returns the message if it was refused; anything but success and one line fails."""
    source, _, trainer = folder
    damage, load = KINDS[name]
    for other in ("config.json", "vocabulary.json", "model.safetensors") if load is load_model else ():
        (tmp_path / other).write_bytes((source / other).read_bytes())
    (tmp_path / name).write_bytes(damage((source / name).read_bytes(), random.Random(f"{name} {seed}")))
    began = time.process_time()
    try:
        load(tmp_path / name, trainer)
        return None
    except UserError as error:
        assert str(tmp_path) in str(error) and str(error).isprintable() and len(str(error)) < 2000, str(error)
        assert "weights_only" not in str(error)
        return str(error)
    finally:
        assert time.process_time() - began < 5


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(name, folder, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = [attempt(name, folder, tmp_path, seed) is not None for seed in range(COUNT)]
    assert any(refused)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_checkpoint_is_restored(folder, tmp_path):
    """All of it, whatever the trainer did in between; and from a file with the settings of another version of torch."""
    source, _, trainer = folder
    state = torch.load(source / "checkpoint.pt")
    for group in state["optimizer"]["param_groups"]:
        group |= {"lr": 0.125, "fused": None, "maximize": True, "betas": (5, 7), "unknown": 1}
    torch.save({**state, "epoch": 3, "words": 7}, tmp_path / "checkpoint.pt")
    load_checkpoint(tmp_path / "checkpoint.pt", trainer)
    trainer.load_checkpoint()
    found = trainer.state_dict()
    assert (found["epoch"], found["words"], found["schedule"]) == (3, 7, state["schedule"])
    for name in ("model", "average"):
        assert all(value.equal(state[name][key]) for key, value in found[name].items())
    for index, moments in found["optimizer"]["state"].items():
        assert all(value.equal(state["optimizer"]["state"][index][key]) for key, value in moments.items())
        assert moments["exp_avg"].stride() == trainer_parameters(trainer)[index].stride()
    for group in found["optimizer"]["param_groups"]:
        assert (group["lr"], group["fused"], group["maximize"], group["betas"]) == (0.125, True, False, (0.9, 0.999))


def trainer_parameters(trainer):
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(
    "place, value, message",
    [
        (
            "optimizer/state/0/exp_avg",
            torch.zeros(1, 2),
            r"optimizer.state.0.exp_avg has the shape \[1, 2\] instead of \[",
        ),
        ("optimizer/state/0/exp_avg_sq", torch.zeros(8).int(), "optimizer.state.0.exp_avg_sq"),
        ("optimizer/state/3/step", torch.zeros(3), r"optimizer.state.3.step has the shape \[3\] instead of \[\]"),
        ("optimizer/state/3/step", 5, "optimizer.state.3.step is not a plain tensor"),
        ("optimizer/state/3", {}, "optimizer.state.3.step is missing"),
        ("optimizer/param_groups", [], "optimizer.param_groups is not a list of 2 entries"),
        ("optimizer/param_groups/0/lr", "x", "optimizer.param_groups.0.lr is not of type float"),
        ("schedule/best", [float("nan")] * 3, "schedule.best.0=nan is out of range"),
        ("schedule/lowered", 2.0, "schedule.lowered=2.0 is out of range"),
        ("model/decoder.score_weight", torch.zeros(1), "model.'decoder.score_weight' is unknown"),
        (
            "average/decoder.lstm.bias_ih",
            torch.ones(64) * float("nan"),
            "average.decoder.lstm.bias_ih has values that are",
        ),
        ("step", 2, "step=2 is out of range"),
        ("epoch", True, "epoch is not of type int"),
        ("images", 5, "the data had 5 training images, now 4"),
        ("sums/words", float("inf"), "sums.words=inf is out of range"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit(folder, tmp_path, place, value, message):
    source, _, trainer = folder
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = node = torch.load(source / "checkpoint.pt")
    *parts, last = (int(part) if part.isdecimal() else part for part in place.split("/"))
    for part in parts:
        node = node[part]
    node[last] = value
    torch.save(state, tmp_path / "checkpoint.pt")
    trainer.output = tmp_path
    with pytest.raises(UserError, match=f"^{tmp_path}/checkpoint.pt: cannot continue from it: {message}"):
        trainer.load_checkpoint()
    assert all(tensor.equal(before[name]) for name, tensor in trainer.model.state_dict().items())
