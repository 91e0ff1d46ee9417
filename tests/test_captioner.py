import collections
import copy
import io
import itertools
import json
import os
import resource
import shutil
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import COLORS
from PIL import Image
from safetensors.torch import load_file, save_file

from attncap import CallError, Captioner, Ensemble, SearchConfig, UserError
from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.search.beam_search import beam_search


@pytest.fixture(scope="module")
def model(trained):
    return Captioner.from_pretrained(trained)


def paths_of(flickr8k, count):
    """red, green, blue, red, ..."""
    return sorted((flickr8k / "Images").iterdir())[:count]


def same(one, other):
    """Captions, or lists of them, that are equal to the bit."""
    for a, b in zip(one, other, strict=True):
        assert a.text == b.text and a.score == b.score and a.attention.equal(b.attention)
    return True


def test_every_kind_of_image_gives_the_same(model, flickr8k):
    path = flickr8k / "Images" / "001.png"
    image = Image.open(path)
    resized = np.array(image.resize((32, 32), Image.Resampling.BILINEAR))
    content = path.read_bytes()
    sources = [path, str(path), content, io.BytesIO(content), path.open("rb"), image, np.array(image)]
    captions = [model.caption(source) for source in sources]
    captions += model.caption(torch.from_numpy(resized).permute(2, 0, 1)[None])
    assert {caption.text for caption in captions} == {captions[0].text} and "green" in captions[0].text
    assert model.caption([]) == [] and model.caption(torch.empty(0, 3, 32, 32, dtype=torch.uint8)) == []


def test_an_image_gives_a_caption_and_a_list_a_list(model, flickr8k):
    paths = paths_of(flickr8k, 3)
    one, several = model.caption(paths[0]), model.caption(paths)
    assert one.text == several[0].text and len(several) == 3
    same(model.caption(tuple(paths)), several)
    best = model.caption(paths[0], n_best=3)
    assert len(best) == 3 and best[0].text == one.text
    assert [len(of_image) for of_image in model.caption(paths, n_best=3)] == [3, 3, 3]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_pillow_images_of_any_mode(model, mode):
    assert model.caption(
        [Image.new("RGB", (40, 30), "red").convert(mode) if mode != "I;16" else Image.new(mode, (9, 9))]
    )


def test_batches_do_not_change_captions(model, flickr8k):
    paths = paths_of(flickr8k, 7)
    one, all_at_once = model.caption(paths, batch_size=1), model.caption(paths)
    assert [caption.text for caption in one] == [caption.text for caption in all_at_once]


def test_attention(model, flickr8k):
    """A map for each word that sums to 1: a plain tensor, to be used with gradients too; or none on request."""
    path = flickr8k / "Images" / "001.png"
    for caption in (model.caption(path), model.caption(path, method="sample")):
        assert caption.attention.shape == (len(caption.words), 4, 4) and caption.attention.dtype == torch.float32
        assert not caption.attention.is_inference() and not caption.attention.requires_grad
        torch.testing.assert_close(caption.attention.sum(dim=(1, 2)), torch.ones(len(caption.words)))
    (caption.attention * torch.ones(1, requires_grad=True)).sum().backward()
    assert model.caption(path, attention=False).attention is None


def test_iterables_of_images(model, flickr8k):
    paths = paths_of(flickr8k, 3)
    expected = model.caption(paths)
    for images in (iter(paths), (path for path in paths), map(str, paths), collections.deque(paths)):
        assert same(model.caption(images), expected)
    arrays = np.stack([np.array(Image.open(path).resize((32, 32))) for path in paths])
    assert [caption.text for caption in model.caption(iter(arrays))] == [caption.text for caption in expected]
    assert model.caption(iter(())) == []


def test_training_mode_is_kept(model, flickr8k):
    """And it captions as in evaluation mode."""
    expected = model.caption(flickr8k / "Images" / "001.png")
    model.train()
    same([model.caption(flickr8k / "Images" / "001.png")], [expected])
    assert model.training and model.decoder.training
    model.eval()


def test_wrong_images(model, tmp_path):
    for images, message in (
        (torch.rand(1, 3, 32, 32), "torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"\[1, 3, 64, 64\]"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((2, 4, 4, 3), dtype=np.uint8), r"image of uint8 \[2, 4, 4, 3\]: an array must be uint8 \[H, W, 3\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"not torch.uint8 \[3, 32, 32\]"),
        (None, "image of type NoneType: must be a path"),
        ([None], "NoneType"),
        (7, "int"),
        (set(), "image of type set"),
        ({"no.jpg": 1}, "image of type dict"),
        ([[tmp_path / "no.jpg"]], "image of type list"),
        (iter([tmp_path / "no.jpg", torch.zeros(3, 32, 32, dtype=torch.uint8)]), "image of type Tensor"),
        ([tmp_path / "no.jpg", 7], "int"),  # found before any work
        (io.StringIO("text"), "must be opened in binary mode"),
    ):
        with pytest.raises(CallError, match=message) as raised:
            model.caption(images)
        assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)
    model.train()
    with pytest.raises(UserError, match="no.jpg"):
        model.caption([tmp_path / "no.jpg"])
    assert model.training
    model.eval()


def test_errors_in_their_place(model, flickr8k, tmp_path):
    good = paths_of(flickr8k, 5)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    images = [good[0], tmp_path / "broken.jpg", *good[1:3], tmp_path / "no.jpg", b"", good[3]]
    for batch_size in (1, 3, 32):
        found = model.caption(images, errors="return", batch_size=batch_size)
        assert [isinstance(entry, UserError) for entry in found] == [False, True, False, False, True, True, False]
        assert "broken.jpg" in str(found[1]) and "no.jpg" in str(found[4])
        assert [found[i].text for i in (0, 2, 3, 6)] == [caption.text for caption in model.caption(good[:4])]
    assert isinstance(model.caption(tmp_path / "no.jpg", errors="return"), UserError)
    with pytest.raises(CallError, match="errors='ignore'"):
        model.caption(images, errors="ignore")


def test_features(model, flickr8k):
    paths = paths_of(flickr8k, 3)
    arrays = [np.array(Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)) for path in paths]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = model.encoder(pixels)
    for settings in (dict(), dict(n_best=2), dict(method="sample")):
        captions = model.caption_features(features, **settings)
        assert len(captions) == 3
        if settings != dict(method="sample"):
            assert str(captions) == str(model.caption(pixels, **settings))
    for wrong in (features[:, :3], features[:, :, :3], features[0], pixels):
        with pytest.raises(CallError, match=r"features should be float \[B, 16, 64\], not"):
            model.caption_features(wrong)
    for wrong in (None, features.numpy()):
        with pytest.raises(CallError, match="features should be a tensor"):
            model.caption_features(wrong)
    with pytest.raises(CallError, match="features of 2 models are given; expected those of 1"):
        model.caption_features([features, features])


def test_a_grid_that_repeats_cells():
    """4x4 cells of a backbone that gives 2x2: the same captions, and each cell's attention shared by its copies."""
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet18", image_size=64, grid=4, attention_size=8, embedding_size=8, hidden_size=16)
    model = Captioner(config, Vocabulary([*Vocabulary.SPECIALS, *"abcdefgh"])).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(4)
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    captions = model.caption(images, max_length=6)
    with torch.no_grad():
        cells = model.encoder(images).view(5, 4, 4, -1)[:, ::2, ::2].flatten(1, 2)  # without copies
    found = beam_search(model.decoder, cells, SearchConfig(max_length=6))
    for caption, [hypothesis] in zip(captions, found, strict=True):
        assert caption.words == [model.vocabulary.words[token] for token in hypothesis.tokens]
        copies = hypothesis.attention.view(-1, 2, 2).repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        torch.testing.assert_close(caption.attention, copies / 4)
    assert max(len(caption.words) for caption in captions) > 1


def test_settings_of_the_search(model, flickr8k):
    paths = paths_of(flickr8k, 3)
    for best in model.caption(paths, n_best=4, length_penalty="average"):
        scores = [c.score / (len(c.words) + 1) for c in best]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert len({c.text for c in best}) == 4
    assert [c.text for c in model.caption(paths, SearchConfig(beam_size=1))] == [
        c.text for c in model.caption(paths, beam_size=1)
    ]
    without = model.caption(paths, suppressed=("red", "green"))
    assert not {"red", "green"} & {word for caption in without for word in caption.words}
    assert all(len(caption.words) >= 9 for caption in model.caption(paths, min_length=9))
    assert all(caption.words[:2] == ["a", "blue"] for caption in model.caption(paths, prefix="A blue"))

    def no_colours(log_probs, history):
        log_probs[:, [model.vocabulary.words.index(word) for word in ("red", "green", "blue")]] = -torch.inf
        return log_probs

    assert not {"red", "green", "blue"} & set(model.caption(paths[0], processors=[no_colours]).words)


def test_samples_depend_on_seed_and_image_alone(model, flickr8k):
    paths = paths_of(flickr8k, 6)

    def texts(paths, **settings):
        return [caption.text for caption in model.caption(paths, method="sample", temperature=3.0, **settings)]

    drawn = texts(paths)
    assert texts(paths, batch_size=2) == drawn and texts(paths[::-1]) == drawn[::-1]
    assert texts(paths, sample_seed=1) != drawn and len(set(drawn)) > 3
    apart = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # not contiguous
    assert texts(apart) == texts(apart.contiguous())


def test_ensemble(model, trained, flickr8k):
    paths = paths_of(flickr8k, 6)
    twin, other = (Captioner.from_pretrained(trained).train() for _ in range(2))
    alone = model.caption(paths)
    assert [c.text for c in Ensemble([model, twin]).caption(paths)] == [c.text for c in alone] and twin.training
    assert Ensemble([model, model]).caption(paths[0]).text == alone[0].text
    with torch.no_grad():
        other.decoder.word_output.bias[other.vocabulary.words.index("red")] += 100
    assert all("red" in c.words for c in Ensemble([model, other]).caption(paths))
    torch.manual_seed(0)
    same_grid = [  # 2x2 cells repeated, and 4x4 of their own
        Captioner(
            ModelConfig("resnet18", layer, 64, grid=4, attention_size=8, embedding_size=8, hidden_size=16),
            Vocabulary([*Vocabulary.SPECIALS, *"abc"]),
        )
        for layer in ("layer4", "layer3")
    ]
    [caption] = Ensemble(same_grid).caption(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), max_length=3)
    assert caption.attention.shape[1:] == (4, 4)
    other.vocabulary = Vocabulary(other.vocabulary.words[:-1])
    with pytest.raises(CallError, match="need the same vocabulary"):
        Ensemble([model, other])
    with pytest.raises(CallError, match="at least one model"):
        Ensemble([])
    for wrong in (5, [5], model, [Ensemble([model])]):
        with pytest.raises(CallError, match="takes a list of Captioners"):
            Ensemble(wrong)


def test_wrong_settings(model, flickr8k):
    path = flickr8k / "Images" / "001.png"
    for settings, message in (
        (dict(suppressed=("zebra",)), "'zebra'"),
        (dict(suppressed=("<end>",)), "'<end>'"),
        (dict(prefix="a zebra"), "'zebra'"),
        (dict(prefix="a " * 9, max_length=5), "must be shorter than max_length=5"),
        (dict(beams=4), "beams: not a setting of the search; choose from beam_size, method"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(beam_size=33), "beam_size=33"),
        (dict(beam_size="3"), "beam_size='3': must be an integer"),
        (dict(beam_size=torch.ones(9, 9)), "beam_size=<Tensor>: must be an integer"),
        (dict(temperature=None), "temperature=None: must be a number"),
        (dict(method=np.zeros(3)), "method=<ndarray>: choose shrink, fixed or sample"),
        (dict(suppressed=7), "suppressed: must be a tuple of words"),
        (dict(batch_size=2.5), "batch_size=2.5"),
        (dict(processors=None), "processors: must be a list of callables"),
        (dict(processors=[5]), "processors: must be a list of callables"),
        (dict(search="fast"), "should be a SearchConfig, not str"),
    ):
        with pytest.raises(CallError, match=message):
            model.caption(path, **settings)
    with pytest.raises(CallError, match="backend='cuda'"):
        Captioner(model.config, model.vocabulary, backend="cuda")


def test_wrong_folders_and_devices(trained, tmp_path):
    for folder, options, message in (
        (tmp_path / "no", {}, "no such model folder"),
        (tmp_path, {}, "config.json"),
        (trained, {"device": "tpu9"}, "device='tpu9'"),
        (trained, {"dtype": torch.int8}, "dtype=torch.int8: must be a floating-point"),
        (trained, {"dtype": "half"}, "dtype=half: must be a floating-point"),
        (None, {}, "should be a path, not NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            Captioner.from_pretrained(folder, **options)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained model's folder, and a function that changes one of its JSON files."""
    for name in ("config.json", "vocabulary.json", "model.safetensors"):
        shutil.copy(trained / name, tmp_path)

    def change(name, **values):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({**content, **values}))

    return tmp_path, change


SETTINGS = [
    ({"image_size": 20_000}, ": .*image_size=20000: must be at most 1,024"),
    ({"hidden_size": 10**9}, ": .*hidden_size=1000000000: must be at most 16,384"),
    ({"grid": 10**5}, ": .*grid=100000: must be at most 100"),
    ({"image_size": 1024, "grid": None}, ": image_size=1024: layer layer1 of resnet18 gives 65,536 cells"),
    ({"hidden_size": 16_000}, ": hidden_size is 16000, but model.safetensors has 32"),
    ({"attention_size": 8}, ": attention_size is 8, but model.safetensors has 16"),
    ({"embedding_size": 8}, ": embedding_size is 8, but model.safetensors has 16"),
    ({"encoder": "regnet_y_128gf", "encoder_layer": None}, ": encoder.backbone.* is missing"),
    ({"encoder": "resnet50"}, ": encoder.backbone.layer1.0.conv3.weight is missing"),
    ({"encoder_layer": "layer2"}, ": encoder.backbone.layer2.* is missing"),
    ({"output_layer": "plain"}, ": 'decoder.context_output.weight' is unknown"),
    ({"encoder": "no\nnet"}, r": .*encoder='no\\nnet': torchvision has no such name"),
    ({"encoder": "vgg99"}, ': encoder="vgg99": no such backbone'),
    ({"encoder_layer": "9" * 10**5}, ": .*encoder_layer='999"),
    ({"encoder_layer": "conv1_" + "9" * 90}, ": encoder_layer="),
]
WORDS = [
    ([*Vocabulary.SPECIALS, "a"], ": number of words is 5, but model.safetensors has 10"),
    ([*Vocabulary.SPECIALS, *map(str, range(10**6))], ": number of words is 1000004, but model.safetensors has 10"),
    ([*Vocabulary.SPECIALS, "x" * 2**24], ": .*larger than 16 MiB"),
]
DAMAGED = [("config.json", values, message) for values, message in SETTINGS]
DAMAGED += [("vocabulary.json", {"words": words}, message) for words, message in WORDS]


@pytest.mark.parametrize(("file", "values", "message"), DAMAGED, ids=[message for _, _, message in DAMAGED])
def test_folders_that_do_not_fit_together(copied, file, values, message):
    """One line names the file and the field, before memory is taken for what they ask for."""
    folder, change = copied
    change(file, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"{file}{message}") as raised:
        Captioner.from_pretrained(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200 * 2**10
    error = str(raised.value)
    assert raised.value.status == 1 and error.startswith(str(folder)) and error.isprintable() and "--" not in error


def test_weights_of_other_dtypes(copied, trained):
    """Floating-point numbers are converted to float32, anything else is refused; and so are NaN and infinity."""
    folder, _ = copied
    path, original = folder / "model.safetensors", load_file(trained / "model.safetensors")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        save_file({n: v.to(dtype) if v.is_floating_point() else v for n, v in original.items()}, path)
        for name, value in Captioner.from_pretrained(folder).state_dict().items():
            assert value.dtype == original[name].dtype and value.equal(original[name].to(dtype).to(value.dtype))
    for name in ("decoder.lstm.weight_hh", "encoder.backbone.bn1.running_var"):
        for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e5m2):
            save_file({**original, name: original[name].to(dtype)}, path)
            with pytest.raises(UserError, match=f"model.safetensors: does not fit .*: {name} is {dtype} instead of"):
                Captioner.from_pretrained(folder)
        for value in (torch.nan, torch.inf, 1e300):
            save_file({**original, name: original[name].double().index_fill(0, torch.tensor(1), value)}, path)
            with pytest.raises(
                UserError, match=f"model.safetensors: does not fit .*: {name} has values that are NaN, or"
            ):
                Captioner.from_pretrained(folder)
    save_file({**original, "decoder.further": torch.ones(3)}, path)
    with pytest.raises(UserError, match="'decoder.further' is unknown"):
        Captioner.from_pretrained(folder)


def test_loading_leaves_the_process_as_it_was(trained):
    """Including the random number generator; and what the user has set does not change the model."""
    torch.manual_seed(0)
    random, expected = torch.get_rng_state(), Captioner.from_pretrained(trained).state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = Captioner.from_pretrained(trained).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_rng_state().equal(random)
    assert all(value.dtype == expected[name].dtype and value.equal(expected[name]) for name, value in found.items())


def test_each_device_gives_the_same_captions(model, trained, flickr8k, device):
    """Also in the second call, whose decoder and graphs are those of the first."""
    paths, on_device = paths_of(flickr8k, 6), Captioner.from_pretrained(trained, device=device)
    for settings in (dict(), dict(n_best=3, method="fixed"), dict(method="sample"), dict(prefix="a")):
        expected = model.caption(paths, **settings)
        for _ in range(2):
            for one, other in zip(on_device.caption(paths, **settings), expected, strict=True):
                captions = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
                for caption, true in captions:
                    assert caption.text == true.text and caption.score == pytest.approx(true.score, abs=1e-3)
                    torch.testing.assert_close(caption.attention, true.attention, rtol=1e-3, atol=1e-3)


def test_device_and_dtype(trained, flickr8k):
    path = flickr8k / "Images" / "001.png"
    expected = Captioner.from_pretrained(trained).caption(path)
    for dtype, allowed in ((torch.float64, 1e-4), (torch.bfloat16, 0.3)):
        model = Captioner.from_pretrained(trained, device="cpu", dtype=dtype)
        caption = model.caption(path)
        assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
        assert caption.text == expected.text and caption.score == pytest.approx(expected.score, abs=allowed)
    torch_model = Captioner.from_pretrained(trained, backend="torch")
    assert torch_model.caption(path).text == expected.text


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_a_default_dtype_or_device_of_the_user(trained, flickr8k, default, backend):
    """It does not change the loaded model, which can caption and be trained."""
    paths, images = paths_of(flickr8k, 3), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[1, 4, 5], [1, 5, 6]])
    loaded = Captioner.from_pretrained(trained, backend=backend)
    expected = loaded.caption(paths)
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        model = Captioner.from_pretrained(trained, backend=backend)
        for kept in (loaded, model):
            assert same(kept.caption(paths), expected)
            kept.caption(paths, method="sample", n_best=2)
            kept(images, tokens, tokens, losses_only=True).words.backward()
            kept(images, tokens, tokens)[2].backward()
        for one, other in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
            assert one.dtype == other.dtype and one.equal(other)
        new = Captioner(model.config, model.vocabulary, backend=backend)
        if isinstance(default, torch.dtype):
            assert new(images, tokens)[0].dtype == default
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("of", ["model", "encoder", "decoder"])
def test_another_precision(trained, flickr8k, change, of, backend):
    """Of the whole model or a part of it, before and after the first caption: captions, features and losses. There are
    two ways to say what a picture shows, about as likely; only the colour has to stay."""
    paths, tokens = paths_of(flickr8k, 3), torch.tensor([[1, 4, 5], [1, 5, 6], [1, 7, 8]])
    model = Captioner.from_pretrained(trained, backend=backend)
    colors = [set(caption.words) & set(COLORS) for caption in model.caption(paths)]
    assert colors == [{"red"}, {"green"}, {"blue"}]
    part = model if of == "model" else getattr(model, of)
    getattr(part, change)()
    assert [set(caption.words) & set(COLORS) for caption in model.caption(paths)] == colors
    with torch.no_grad():
        features = model.encoder(torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8))
        assert features.dtype == next(model.encoder.parameters()).dtype
        assert len(model.caption_features(features.float())) == len(
            beam_search(model.decoder, features, SearchConfig())
        )
    model.train()(features, tokens, tokens, losses_only=True).words.backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters() if p.grad is not None)


def test_a_model_without_weights(trained, flickr8k):
    model = Captioner.from_pretrained(trained).to("meta")
    for ask in (lambda: model.caption(paths_of(flickr8k, 1)), lambda: model.caption_features(torch.zeros(2, 16, 64))):
        with pytest.raises(CallError, match="the model is on the meta device, which keeps no weights"):
            ask()


def test_forward(model):
    """Logits and attention; the loss, from float64 by hand; and the same terms without logits."""
    model = copy.deepcopy(model)
    images, V = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8), len(model.vocabulary)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, V, (4, 5), generator=random)
    targets = torch.randint(4, V, (4, 5), generator=random)
    targets[1, 3:] = targets[2, 1:] = Vocabulary.PAD
    logits, attention = model(images, tokens)
    assert logits.shape == (4, 5, V) and attention.shape == (4, 5, 16)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(4, 5))
    features = model.encoder(images)
    torch.testing.assert_close(model(features, tokens), (logits, attention))

    words, penalty, count = 0.0, 0.0, 0
    for n in range(4):
        attended = torch.zeros(16, dtype=torch.double)
        for t in range(5):
            if targets[n, t] != Vocabulary.PAD:
                words -= logits[n, t].double().log_softmax(0)[targets[n, t]].item()
                attended += attention[n, t].double()
                count += 1
        penalty += ((1 - attended) ** 2).mean().item()
    *_, loss = model(images, tokens, targets)
    assert loss.item() == pytest.approx(words / count + penalty / 4, rel=1e-5)
    *_, loss = model(images, tokens, targets, attention_penalty=0.5)
    assert loss.item() == pytest.approx(words / count + 0.5 * penalty / 4, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.decoder.parameters())
    losses = model(images, tokens, targets, losses_only=True)
    assert [x.item() for x in losses] == pytest.approx([words, penalty], rel=1e-5)
    for arguments, options in (((images, None), {}), ((images, tokens), dict(losses_only=True)), ((None, None), {})):
        with pytest.raises(ValueError, match="forward needs images and tokens"):
            model(*arguments, **options)
    for wrong in (targets[:, :3], torch.full_like(targets, Vocabulary.PAD)):
        for losses_only in (True, False):
            with pytest.raises(ValueError, match="the shapes must be the same, and at least one word"):
                model(images, tokens, wrong, losses_only=losses_only)
    nothing = model(None, None, losses_only=True)
    assert [x.item() for x in nothing] == [0, 0] and nothing.words.requires_grad


def decoder_parameters():
    torch.manual_seed(0)
    config = ModelConfig("resnet18", "layer1", 32, attention_size=4, embedding_size=4, hidden_size=8)
    return [name for name, _ in Captioner(config, Vocabulary([*Vocabulary.SPECIALS, *"ab"])).decoder.named_parameters()]


@pytest.fixture(scope="module")
def random_model():
    torch.manual_seed(0)
    sizes = dict(attention_size=8, embedding_size=8, hidden_size=16)
    config = ModelConfig("resnet18", "layer1", 32, activation="tanh", **sizes)
    model = Captioner(config, Vocabulary([*Vocabulary.SPECIALS, *"abcdefghij"])).eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)


@pytest.fixture
def drawn(random_model):
    """A model with random weights, whose captions depend on all of them, and images."""
    model, images = random_model
    return copy.deepcopy(model), images


def found(model, images):
    return [(caption.text, caption.score) for caption in model.caption(images, max_length=8)]


def check_change(model, images, change, refresh=False):
    """After the change the captions are those of a copy that was never asked before, and others than before it."""
    before = found(model, images)
    assert found(model, images) == before
    change()
    if refresh:
        model.refresh()
    after = found(model, images)
    assert after == found(copy.deepcopy(model), images) != before


@pytest.mark.parametrize("name", decoder_parameters())
@pytest.mark.parametrize("way", ["all but the last", "copy_", "data replaced"])
def test_a_parameter_changed_in_place(drawn, name, way):
    """By ways that torch does not count or announce: `refresh`."""
    model, images = drawn
    parameter = model.decoder.get_parameter(name)

    def change():
        if way == "all but the last":
            parameter.data.flatten()[:-1].mul_(-7)
        elif way == "copy_":
            with torch.no_grad():
                parameter.copy_(parameter * -7 + 0.1)
        else:
            parameter.data = parameter.data * -7 + 0.1

    check_change(model, images, change, refresh=True)


def backward(model, images, parameters):
    tokens = torch.tensor([[1, 4, 5], [1, 6, 7], [1, 8, 4], [1, 5, 5]])
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is chosen for chosen in parameters))
    logits, attention = model(images, tokens)
    (logits.sin().sum() + attention.square().sum()).backward()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.5, foreach=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.5, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.5, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("chosen", ["all", "word_output.weight"])
def test_a_step_of_an_optimizer(drawn, optimizer, cleared, chosen):
    """Also in evaluation mode, also of one parameter, whether or not the gradients are cleared afterwards."""
    model, images = drawn
    parameters = list(model.decoder.parameters()) if chosen == "all" else [model.decoder.get_parameter(chosen)]
    step = OPTIMIZERS[optimizer](parameters)

    def change():
        backward(model, images, parameters)
        if chosen != "all":
            parameters[0].grad[-1] = 0  # the last row stays as it is
        step.step()
        if cleared:
            step.zero_grad(set_to_none=True)

    check_change(model, images, change)
    check_change(model, images, change)


def test_parameters_that_were_frozen(drawn):
    """When the decoder was prepared; then they are trained."""
    model, images = drawn
    model.decoder.requires_grad_(False)

    def change():
        model.decoder.requires_grad_(True)
        step = torch.optim.SGD(model.decoder.parameters(), lr=0.5)
        backward(model, images, list(model.decoder.parameters()))
        step.step()
        step.zero_grad(set_to_none=True)

    check_change(model, images, change)


def test_another_decoder(drawn):
    model, images = drawn
    other = copy.deepcopy(model.decoder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)

    def change():
        model.decoder = other

    check_change(model, images, change)


def test_another_parameter(drawn):
    model, images = drawn

    def change():
        model.decoder.word_output.bias = torch.nn.Parameter(torch.randn_like(model.decoder.word_output.bias))

    check_change(model, images, change)


@pytest.mark.parametrize("output_layer", ["deep", "plain"])
def test_what_is_prepared_under_autocast_is_as_without(output_layer, monkeypatch):
    """Also where weights are not packed."""
    monkeypatch.setattr(sys.modules["attncap.ops.linear"], "_PACK", None)
    torch.manual_seed(0)
    sizes = dict(attention_size=8, embedding_size=8, hidden_size=16, output_layer=output_layer)
    model = Captioner(ModelConfig("resnet18", "layer1", 32, **sizes), Vocabulary([*Vocabulary.SPECIALS, *"abc"])).eval()
    features = torch.randn(3, 64, 64)
    expected = copy.deepcopy(model).caption_features(features, max_length=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(model.caption_features(features, max_length=5), expected)
    assert same(model.caption_features(features, max_length=5), expected)


def test_gradients_set_by_hand(drawn):
    model, images = drawn

    def change():
        for parameter in model.decoder.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.optim.AdamW(model.decoder.parameters(), lr=0.5, fused=True).step()

    check_change(model, images, change)


def test_training_drops_what_is_prepared(drawn):
    model, images = drawn

    def change():
        model.train()
        for parameter in model.decoder.parameters():
            parameter.data.mul_(-1.5)
        model.eval()

    check_change(model, images, change)


@pytest.mark.parametrize("of", ["model", "decoder"])
def test_loading_weights(drawn, of):
    model, images = drawn
    module = model if of == "model" else model.decoder

    def change():
        module.load_state_dict(
            {name: v if "encoder" in name else v.flip(0) * 1.5 for name, v in module.state_dict().items()}
        )

    check_change(model, images, change)


@pytest.mark.parametrize("of", ["model", "decoder"])
def test_another_dtype(drawn, of):
    """And back: the weights have been rounded in between."""
    model, images = drawn
    module = model if of == "model" else model.decoder
    before = found(model, images)
    module.to(torch.bfloat16)
    found(model, images)
    module.float()
    after = found(model, images)
    assert after == found(copy.deepcopy(model), images) != before


def test_a_moving_average(drawn):
    """As training keeps it: written in place, and then `refresh`."""
    model, images = drawn
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    average.module.eval()

    def change():
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(-2)
        average.update_parameters(model)

    check_change(average.module, images, change, refresh=True)


def test_prepared_once(drawn, monkeypatch):
    """For as many calls as there are, in evaluation mode."""
    model, images = drawn
    prepared = []
    for_inference = type(model.decoder).for_inference
    monkeypatch.setattr(
        type(model.decoder), "for_inference", lambda self: prepared.append(for_inference(self)) or prepared[-1]
    )
    for _ in range(3):
        model.caption(images, batch_size=2)
    assert len(prepared) == 1
    model.eval()
    model.caption(images)
    model.refresh()
    model.caption(images)
    assert len(prepared) == 3


def test_threads_in_training_mode(drawn):
    """It is left in training mode, and no caption is made in it; ensembles lock their models in one order."""
    model, images = drawn
    other = copy.deepcopy(model).train()
    statistics = model.encoder.backbone.bn1.running_mean.clone()
    expected = [found(model, images), found(Ensemble([model, other]), images)]
    model.train()

    def caption(_):
        for _ in range(4):
            assert found(model, images) == expected[0]
            for ensemble in (Ensemble([model, other]), Ensemble([other, model])):
                texts = [text for text, _ in found(ensemble, images)]
                assert texts == [text for text, _ in expected[1]]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caption, range(4)))
    assert model.training and model.encoder.training and statistics.equal(model.encoder.backbone.bn1.running_mean)


def test_threads(trained, flickr8k):
    """Eight threads caption with one model while two load models: the captions are the same, and the state of the
    process does not change. ATTNCAP_SECONDS sets the duration."""
    model, paths = Captioner.from_pretrained(trained), paths_of(flickr8k, 12)
    end = time.monotonic() + float(os.environ.get("ATTNCAP_SECONDS", 0))
    before = (sys.stdout, sys.stderr, torch.nn.Module.__call__, warnings.filters[:], torch.get_num_threads())
    expected, stop = [model.caption(paths), model.caption(paths, n_best=3)], threading.Event()

    def load():
        loaded = 0
        while not stop.is_set() or not loaded:
            other = Captioner.from_pretrained(trained)
            loaded += 1
            same(other.caption(paths[:2], batch_size=1), [Captioner.caption(other, path) for path in paths[:2]])
        return loaded

    def caption(_):
        for rounds in itertools.count(1):
            same(model.caption(paths), expected[0])
            for of_image, of_other in zip(model.caption(paths, n_best=3), expected[1], strict=True):
                same(of_image, of_other)
            if rounds >= 5 and time.monotonic() > end:
                return rounds

    with ThreadPoolExecutor(10) as pool:
        loading = [pool.submit(load) for _ in range(2)]
        try:
            rounds = sum(pool.map(caption, range(8)))
        finally:
            stop.set()
        loaded = [job.result() for job in loading]
    print(f"{rounds * 2 * len(paths)} images were captioned, {sum(loaded)} models loaded")
    assert all(loaded)
    assert (sys.stdout, sys.stderr, torch.nn.Module.__call__, warnings.filters[:], torch.get_num_threads()) == before
