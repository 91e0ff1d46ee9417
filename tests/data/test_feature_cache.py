import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import largest_file, make_flickr8k
from safetensors import safe_open
from safetensors.torch import save_file

from attncap import Captioner, UserError
from attncap.cli.data import CELLS, CHANNELS
from attncap.config import ModelConfig
from attncap.data import Skipped, feature_cache, read_dataset
from attncap.data.feature_cache import FeatureCache
from attncap.data.feature_size import size_in_words
from attncap.data.loader import Pictures, batches
from attncap.data.shapes import open_shapes
from attncap.data.vocabulary import Vocabulary
from attncap.evaluation import evaluate
from attncap.models.encoder import Encoder
from attncap.search import SearchConfig

SIZE = 32  # layer1 of ResNet-18 gives 8x8 cells of 64 channels


def make_encoder(layer="layer1", grid=None, seed=0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder("resnet18", layer, grid).eval()


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture
def examples(tmp_path):
    """Twelve images of one colour each."""
    splits = read_dataset(make_flickr8k(tmp_path / "data", 12), 0).splits
    return sorted((example for part in splits.values() for example in part), key=lambda example: example.name)


@pytest.fixture
def build(encoder, tmp_path, monkeypatch):
    """build(examples, ...) is the cache; build.encoded counts the images that were encoded for it."""

    def build(examples, encoder=encoder, image_size=SIZE, workers=0):
        forward, grid_shape, build.encoded = Encoder.forward, Encoder.grid_shape, 0

        def counted(self, images, *arguments):
            build.encoded += len(images)
            return forward(self, images, *arguments)

        def uncounted(self, image_size):
            shape = grid_shape(self, image_size)  # it may encode an image of its own
            build.encoded = 0
            return shape

        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "forward", counted)
            patch.setattr(Encoder, "grid_shape", uncounted)
            return FeatureCache.of(examples, encoder, image_size, 3, workers, tmp_path / "cache")

    return build


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def features_of(example, encoder) -> torch.Tensor:
    """What the cache should contain, computed directly."""
    _, image = Pictures([example], SIZE)[0]
    with torch.no_grad():
        return encoder(image[None])[0]


def check(cache, examples, encoder):
    for i, example in enumerate(examples):
        index, features = cache[i]
        assert index == i and features.dtype == torch.float16
        torch.testing.assert_close(features.float(), features_of(example, encoder), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_the_encoders(examples, encoder, build, workers):
    cache = build(examples, workers=workers)
    assert build.encoded == len(cache) == 12 and cache[0][1].shape == (64, 64)
    check(cache, examples, encoder)
    # In batches, like the images.
    read = list(batches(cache, 5, workers))
    assert [index for indices, _, _ in read for index in indices] == list(range(12))
    for indices, features, skipped in read:
        assert not skipped and features.shape[1:] == (64, 64)
        assert all(row.equal(cache[i][1]) for i, row in zip(indices, features, strict=True))


def test_nothing_is_encoded_twice(examples, encoder, build, capsys):
    build(examples[:8])
    assert build.encoded == 8 and "0 MiB = 8 images x 64 cells x 64 channels x 2 bytes" in capsys.readouterr().out
    check(build(examples[:8]), examples[:8], encoder)
    assert build.encoded == 0 and not capsys.readouterr().out
    for other, new in (([*examples[6:], examples[0]], 4), (examples[::-1], 0), (examples[:1] * 3, 0)):
        check(build(other), other, encoder)
        assert build.encoded == new


@pytest.mark.parametrize("grid", [3, 16])
def test_all_cells_of_a_pooled_grid_are_stored(examples, build, grid):
    plain, pooled = make_encoder(grid=None), make_encoder(grid=grid)
    cache = build(examples, pooled)
    assert build.encoded == 12 and cache[0][1].shape == (grid**2, 64)
    images = torch.stack([image for _, image in Pictures(examples, SIZE)])
    with torch.no_grad():
        cells = plain(images).transpose(1, 2).unflatten(2, (8, 8))
    expected = F.adaptive_avg_pool2d(cells, grid).flatten(2).transpose(1, 2)
    features = torch.stack([features for _, features in (cache[i] for i in range(12))])
    torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-4)


def test_other_encoders_have_their_own(examples, build):
    folders = {build(examples).folder}
    changed = make_encoder()
    with torch.no_grad():
        next(changed.parameters())[0, 0, 0, 0] += 1e-3
    statistics = make_encoder()
    statistics.backbone.bn1.running_mean[0] += 1e-3
    for number, (encoder, size) in enumerate(
        [
            (changed, SIZE),
            (statistics, SIZE),
            (make_encoder(), SIZE - 1),  # as many cells
            (make_encoder(grid=4), SIZE),
            (make_encoder("layer2"), SIZE),
            (make_encoder("layer1.1.bn2"), SIZE),
        ],
        start=2,
    ):
        folders.add(build(examples, encoder, size).folder)
        assert build.encoded == 12 and len(folders) == number


@pytest.mark.parametrize("same", ["size", "time"])
def test_a_changed_image_is_encoded_again(examples, encoder, build, same):
    path, other = examples[3].path, examples[4].path.read_bytes()
    path.write_bytes(path.read_bytes().ljust(5000))  # bytes after the end of a PNG are ignored
    old, status = build(examples)[3][1].clone(), path.stat()
    path.write_bytes(other.ljust(5000) if same == "size" else other)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + (same == "size")))
    cache = build(examples)
    assert build.encoded == 1 and not cache[3][1].equal(old)
    check(cache, examples, encoder)


def test_scenes_of_other_seeds_are_other_images(build, encoder):
    first, second = (open_shapes(seed, {"train": 3})["train"] for seed in (0, 1))
    assert [scene.name for scene in first] == [scene.name for scene in second]
    check(build(first), first, encoder)
    check(build(second), second, encoder)
    assert build.encoded == 3
    build(open_shapes(1, {"train": 3})["train"])
    assert build.encoded == 0


def test_broken_images_are_skipped_and_tried_again(examples, encoder, build):
    content = examples[4].path.read_bytes()
    examples[4].path.write_bytes(b"no image")
    examples[11].path.unlink()
    for _ in range(2):
        cache = build(examples)
        broken = [i for i in range(12) if isinstance(cache[i][1], Skipped)]
        assert broken == [4, 11] and "not an image" in cache[4][1].reason
        for (_, _, [skipped]), index in zip(batches(cache, 6, 0), broken, strict=True):
            assert (skipped.index, skipped.name) == (index, str(examples[index].path))
    examples[4].path.write_bytes(content)
    cache = build(examples[:11])
    assert build.encoded == 1
    check(cache, examples[:11], encoder)


def test_only_broken_images(examples, build):
    for example in examples:
        example.path.write_bytes(b"")
    cache = build(examples)
    assert all(isinstance(cache[i][1], Skipped) for i in range(12)) and not files(cache.folder)


def test_an_interrupted_build_goes_on(examples, encoder, build, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 4 * 64 * 64 * 2)  # four images a file
    with monkeypatch.context() as patch:
        loader = feature_cache.batches

        def interrupted(*arguments):
            for number, batch in enumerate(loader(*arguments)):
                if number == 3:
                    raise KeyboardInterrupt
                yield batch

        patch.setattr(feature_cache, "batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(examples)
    assert [path.suffix for path in files(tmp_path / "cache")] == [".safetensors"] * 2
    cache = build(examples)
    assert build.encoded == 4 and len(files(cache.folder)) == 3
    check(cache, examples, encoder)


def test_temporary_files_of_killed_processes_are_removed(examples, build):
    folder = build(examples).folder
    old, young = folder / ".a.safetensors.1.tmp", folder / ".b.safetensors.2.tmp"
    for path, age in ((old, 7200), (young, 60)):
        path.write_bytes(b"half a file")
        os.utime(path, (time.time() - age,) * 2)
    build(examples)
    assert not old.exists() and young.exists()


def test_damaged_files_are_replaced(examples, encoder, build, caplog):
    folder = build(examples).folder
    [path] = files(folder)
    for content in (path.read_bytes()[:-100], b"", path.read_bytes()[:50], b"\xff" * 200):
        path.write_bytes(content)
        caplog.clear()
        cache = build(examples)
        assert build.encoded == 12 and caplog.text.count(f"{path}: damaged") == 1
        check(cache, examples, encoder)
        assert files(folder) == [path]
    path.write_bytes(b"")
    build(examples[:5])
    assert not path.exists()


def test_files_with_other_features_are_replaced(examples, encoder, build, caplog):
    folder = build(examples).folder
    [path] = files(folder)
    with safe_open(path, "pt") as file:
        features, images = file.get_tensor("features").clone(), file.metadata()["images"]
    for tensors, names in (
        ({"features": features.float()}, images),
        ({"features": features.view(torch.int16)}, images),
        ({"features": features[:, :32].contiguous()}, images),
        ({"features": features[:3]}, images),
        ({"features": features.transpose(0, 1).contiguous()}, images),
        ({"other": features}, images),
        ({"features": features}, "[]"),
        ({"features": features}, "7"),
        ({"features": features}, json.dumps(list(range(12)))),
        ({"features": features}, "[" * 100_000),
        ({"features": features}, images[:-9]),
    ):
        save_file(tensors, path, {"images": names})
        caplog.clear()
        check(build(examples), examples[:1], encoder)
        assert build.encoded == 12 and caplog.text.count(f"{path}: damaged") == 1


def test_only_regular_files_are_removed(examples, encoder, build):
    folder = build(examples).folder
    os.mkfifo(folder / "a.safetensors")
    (folder / "b.safetensors").mkdir()
    check(build(examples), examples, encoder)
    assert build.encoded == 0 and (folder / "a.safetensors").exists() and (folder / "b.safetensors").exists()


def test_not_enough_disk_space(examples, build, tmp_path, monkeypatch):
    needed = 12 * 64 * 64 * 2
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match="not enough space for the features.*12 images x 64 cells.*XDG_CACHE_HOME"):
        build(examples)
    assert build.encoded == 0 and not files(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    build(examples)


def test_a_disk_that_fills_up(examples, build, tmp_path):
    with largest_file(1000), pytest.raises(UserError, match="cannot write .*: File too large"):
        build(examples)
    assert not files(tmp_path / "cache")


def test_a_folder_that_cannot_be_made(examples, build, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot write .*; set XDG_CACHE_HOME to another folder"):
        build(examples)


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (float("nan"), False)])
def test_features_fit_half_precision_or_are_refused(examples, build, tmp_path, monkeypatch, value, fits):
    """65504 is float16's largest number; numbers nearer to it than to the next power of two, 65536, round to it."""

    def forward(self, images, *_):
        features = torch.zeros(len(images), 64, 64)
        features[-1, 5, 6] = value
        return features

    monkeypatch.setattr(Encoder, "forward", forward)
    if fits:
        assert build(examples)[2][1].max() == 65504
    else:
        with pytest.raises(UserError, match=r"002.png: .*do not fit half precision.*--cache-features"):
            build(examples)
        assert not files(tmp_path / "cache")


def test_the_encoder_is_left_as_it_was(examples, build):
    encoder = make_encoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    cache = build(examples, encoder)
    assert encoder.training and encoder.backbone.bn1.training
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    check(cache, examples, encoder.eval())


def test_pickled_caches_contain_no_features(examples, build):
    cache = build(examples)
    content = pickle.dumps(cache)
    assert len(content) < cache[0][1].nbytes
    copied = pickle.loads(content)
    assert all(copied[i][1].equal(cache[i][1]) for i in range(12))
    shutil.rmtree(cache.folder)  # open files stay readable
    assert copied[5][1].equal(cache[5][1])


def test_several_processes_at_once(tmp_path, examples):
    """Three start together, two with the same images, the third with a different split of them."""
    script = (
        "import os, sys, time, torch\n"
        "from pathlib import Path\n"
        "from attncap.data import feature_cache, read_dataset\n"
        "from attncap.models.encoder import Encoder\n"
        "data, folder, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])\n"
        "torch.manual_seed(0)\n"
        "encoder = Encoder('resnet18', 'layer1').eval()\n"
        "examples = read_dataset(data, seed).splits['train']\n"
        "feature_cache.SHARD = 2 * 64 * 64 * 2\n"
        "(folder / f'{os.getpid()}.ready').touch()\n"
        "while len(list(folder.glob('*.ready'))) < 3: time.sleep(0.001)\n"
        "for round in range(5):\n"
        "    cache = feature_cache.FeatureCache.of(examples, encoder, 32, 3, 0, folder / str(round))\n"
        "    for i, example in enumerate(examples):\n"
        "        _, image = feature_cache.Pictures([example], 32)[0]\n"
        "        expected = encoder(image[None])[0]\n"
        "        torch.testing.assert_close(cache[i][1].float(), expected, rtol=1e-3, atol=1e-4)\n"
    )
    (tmp_path / "cache").mkdir()
    command = [sys.executable, "-c", script, examples[0].path.parent.parent, tmp_path / "cache"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(seed)], env=environment) for seed in (0, 0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    assert not list((tmp_path / "cache").rglob(".*.tmp"))


def test_captions_from_features(examples, build):
    """The same captions as from the images, in a model whose grid is larger than the encoder's."""
    torch.manual_seed(1)
    config = ModelConfig("resnet18", "layer1", SIZE, grid=16, attention_size=8, embedding_size=8, hidden_size=16)
    model = Captioner(config, Vocabulary.build((c for e in examples for c in e.captions), 1)).eval()
    examples[7].path.write_bytes(b"")
    search, options = SearchConfig(max_length=6), {"batch_size": 5}
    captions = evaluate(model, examples, search, **options)[1]
    cache = build(examples, model.encoder)
    assert evaluate(model, examples, search, **options, features=cache)[1] == captions and len(captions) == 11
    features = cache[0][1][None]
    [one], [other] = model.caption([examples[0].path]), model.caption_features(features)
    assert one.text == other.text and one.score == pytest.approx(other.score, abs=1e-3)
    torch.testing.assert_close(one.attention, other.attention, atol=1e-4, rtol=1e-2)
    for wrong in (features[:, :-1], features[..., :-1], features[:, :9]):  # 255 and 9 cells, 63 channels
        with pytest.raises(UserError, match=r"features should be float \[B, 256, 64\]"):
            model.caption_features(wrong)


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert feature_cache.cache_folder() == tmp_path / "attncap"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert feature_cache.cache_folder() == Path("/home/somebody/.cache/attncap")


def test_the_size_is_the_one_that_the_data_command_prints(attncap, examples, monkeypatch, tmp_path, capsys):
    class ResNet50(torch.nn.Conv2d):
        """Has the shapes of the default encoder, and does not compute anything."""

        name, layer, grid = "resnet50", "layer4", None

        def grid_shape(self, image_size):
            return CELLS, CHANNELS

        def forward(self, images):
            return torch.zeros(len(images), CELLS, CHANNELS)

    cache = FeatureCache.of(examples, ResNet50(1, 1, 1), SIZE, 4, 0, tmp_path)
    said = size_in_words(12, CELLS, CHANNELS)
    assert said == "2 MiB = 12 images x 49 cells x 2048 channels x 2 bytes" and said in capsys.readouterr().out
    assert said in attncap("data.__main__", examples[0].path.parent.parent)[1]
    size = sum(path.stat().st_size for path in files(cache.folder))
    assert size == pytest.approx(12 * 49 * 2048 * 2, rel=0.01)
