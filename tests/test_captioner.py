from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from attncap import CallError, Captioner, UserError
from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.search import SearchConfig


@pytest.fixture(scope="module")
def model(trained):
    return Captioner.from_pretrained(trained)


def test_paths_pillow_images_and_tensors_give_the_same(model, flickr8k):
    path = flickr8k / "Images" / "001.png"
    image = Image.open(path)
    tensor = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    texts = [model.caption(images)[0].text for images in ([path], [str(path)], [image], tensor.unsqueeze(0))]
    assert len(set(texts)) == 1 and "green" in texts[0]
    assert model.caption([]) == []


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_pillow_images_of_any_mode(model, mode):
    assert model.caption(
        [Image.new("RGB", (40, 30), "red").convert(mode) if mode != "I;16" else Image.new(mode, (9, 9))]
    )


def test_batches_do_not_change_captions(model, flickr8k):
    paths = sorted((flickr8k / "Images").iterdir())[:7]
    one, all_at_once = model.caption(paths, batch_size=1), model.caption(paths)
    assert [caption.text for caption in one] == [caption.text for caption in all_at_once]


def test_training_mode_is_kept(model, flickr8k):
    model.train()
    model.caption([flickr8k / "Images" / "001.png"])
    assert model.training and model.decoder.training
    model.eval()


def test_wrong_images(model, tmp_path):
    for images, message in (
        ("photo.jpg", "takes a list"),
        (Image.new("RGB", (9, 9)), "takes a list"),
        (torch.rand(1, 3, 32, 32), "torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"\[B, 3, 32, 32\], not"),
    ):
        with pytest.raises(CallError, match=message):
            model.caption(images)
    model.train()
    with pytest.raises(UserError, match="no.jpg"):
        model.caption([tmp_path / "no.jpg"])
    assert model.training
    model.eval()


def test_settings_of_the_search(model, flickr8k):
    paths = sorted((flickr8k / "Images").iterdir())[:3]  # red, green, blue
    best = model.caption(paths, n_best=4, length_penalty="average")
    for caption in best:
        scores = [c.score / (len(c.words) + 1) for c in (caption, *caption.others)]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert len({c.text for c in (caption, *caption.others)}) == 4 and not caption.others[0].others
    assert [c.text for c in model.caption(paths, SearchConfig(beam_size=1))] == [
        c.text for c in model.caption(paths, beam_size=1)
    ]
    without = model.caption(paths, suppressed=["red", "green"])
    assert not {"red", "green"} & {word for caption in without for word in caption.words}
    assert all(len(caption.words) >= 9 for caption in model.caption(paths, min_length=9))


def test_samples_depend_on_seed_and_image_alone(model, flickr8k):
    paths = sorted((flickr8k / "Images").iterdir())[:6]

    def texts(paths, **settings):
        return [caption.text for caption in model.caption(paths, method="sample", temperature=3.0, **settings)]

    drawn = texts(paths)
    assert texts(paths, batch_size=2) == drawn and texts(paths[::-1]) == drawn[::-1]
    assert texts(paths, sample_seed=1) != drawn and len(set(drawn)) > 3
    apart = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # not contiguous
    assert texts(apart) == texts(apart.contiguous())


def test_ensemble(model, trained, flickr8k):
    paths = sorted((flickr8k / "Images").iterdir())[:6]
    twin, other = (Captioner.from_pretrained(trained).train() for _ in range(2))
    alone = model.caption(paths)
    assert [c.text for c in model.caption(paths, ensemble=[twin])] == [c.text for c in alone] and twin.training
    with torch.no_grad():
        other.decoder.word_output.bias[other.vocabulary.words.index("red")] += 100
    assert all("red" in c.words for c in model.caption(paths, ensemble=[other]))
    paths_of_cells = ("layer4", "layer3")  # 2x2 cells, each of them four times, and 4x4 cells
    torch.manual_seed(0)
    config = ModelConfig(encoder="resnet18", image_size=64, grid=4, attention_size=8, embedding_size=8, hidden_size=16)
    same_grid = [
        Captioner(replace(config, encoder_layer=layer), Vocabulary([*Vocabulary.SPECIALS, *"abc"]))
        for layer in paths_of_cells
    ]
    [caption] = same_grid[0].caption(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ensemble=same_grid[1:], max_length=3)
    assert caption.attention.shape[1:] == (4, 4)
    other.vocabulary = Vocabulary(other.vocabulary.words[:-1])
    with pytest.raises(CallError, match="the same vocabulary"):
        model.caption(paths, ensemble=[other])


def test_wrong_settings(model, flickr8k):
    paths = [flickr8k / "Images" / "001.png"]
    for settings, message in (
        (dict(suppressed=["zebra"]), "'zebra' cannot be suppressed"),
        (dict(suppressed=["<end>"]), "'<end>' cannot be suppressed"),
        (dict(beams=4), "unexpected keyword argument 'beams'; the settings of a search are beam_size, method"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(beam_size=33), "--beam-size 33"),
    ):
        with pytest.raises(CallError, match=message):
            model.caption(paths, **settings)
