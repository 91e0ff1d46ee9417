"""Settings check themselves, and config.json is read across versions."""

import json
from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest

from attncap.config import ModelConfig
from attncap.errors import CallError, UserError
from attncap.search.config import SearchConfig
from attncap.training.config import RunConfig, TrainConfig

CONFIG = ModelConfig(encoder="resnet18", image_size=64, grid=4, dropout=0.1)


def test_config_json(tmp_path):
    CONFIG.save(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content == {"format_version": 1, "model_type": "attention-lstm", **asdict(CONFIG)}
    assert ModelConfig.load(tmp_path / "config.json") == CONFIG


def test_config_json_of_older_versions(tmp_path):
    """It had neither a format version nor a model type."""
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    assert ModelConfig.load(tmp_path / "config.json") == CONFIG


@pytest.mark.parametrize(
    "content, message",
    [
        ({"format_version": 2}, "has format_version 2; this version of attncap reads up to 1: update attncap"),
        ({"format_version": "x"}, "has format_version 'x'"),
        (
            {"model_type": "transformer"},
            "a model of type 'transformer'; this version of attncap reads 'attention-lstm'",
        ),
        ({"layers": 3}, "unknown field 'layers'"),
        ({"hidden_size": 0}, "hidden_size=0: must be at least 1"),
        ({"hidden_size": "many"}, "not the settings of a model"),
        ([], "expected a JSON object"),
    ],
    ids=str,
)
def test_config_json_that_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as raised:
        ModelConfig.load(tmp_path / "config.json")
    assert raised.value.status == 1
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'}: ") and message in str(raised.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"image_size": 0}, "image_size=0: must be at least 1"),
        ({"grid": 0}, "grid=0: must be at least 1"),
        ({"embedding_size": -1}, "embedding_size=-1: must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0: must be below 1"),
        ({"dropout": float("nan")}, "dropout=nan: must be at least 0"),
        ({"activation": "gelu"}, "activation='gelu': choose relu or tanh"),
    ],
    ids=str,
)
def test_model_settings_that_are_refused(settings, message):
    with pytest.raises(CallError) as raised:
        ModelConfig(**settings)
    assert str(raised.value) == message


def test_checked_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        CONFIG.grid = 0


def test_suppressed_words_are_separated_by_spaces():
    for given, words in (
        (("<unk>", "red"), ("<unk>", "red")),
        (("<unk> red",), ("<unk>", "red")),
        (["<unk>", "red  blue"], ("<unk>", "red", "blue")),
        ("<unk> red", ("<unk>", "red")),
        (("",), ()),
        ((), ()),
    ):
        assert SearchConfig(suppressed=given).suppressed == words
    assert SearchConfig().suppressed == ("<unk>",)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ModelConfig(grid="2"), "grid='2': must be an integer"),
        (lambda: ModelConfig(grid=2.5), "grid=2.5: must be an integer"),
        (lambda: ModelConfig(grid=True), "grid=True: must be an integer"),
        (lambda: ModelConfig(encoder_layer=3), "encoder_layer=3: must be a string"),
        (lambda: ModelConfig(hidden_size=np.zeros(99)), "hidden_size=<ndarray>: must be an integer"),
        (lambda: RunConfig(workers="2"), "workers='2': must be an integer"),
        (lambda: RunConfig(resume=1), "resume=1: must be True or False"),
        (lambda: TrainConfig(model={}), "model=<dict>: must be a ModelConfig"),
        (lambda: SearchConfig(length_penalty=True), "length_penalty=True: must be a number from 0 to 10"),
    ],
)
def test_values_of_other_types(make, message):
    with pytest.raises(CallError, match=message):
        make()


def test_numpy_numbers_are_saved(tmp_path):
    config = ModelConfig(hidden_size=np.int64(8), grid=np.int32(2), dropout=np.float32(0.25))
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config == ModelConfig(hidden_size=8, grid=2, dropout=0.25)
