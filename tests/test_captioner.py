import numpy as np
import pytest
import torch
from PIL import Image

from attncap import CallError, Captioner, UserError


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
    with pytest.raises(UserError, match="no.jpg"):
        model.caption([tmp_path / "no.jpg"])
