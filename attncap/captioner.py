"""The captioner: encoder, decoder and vocabulary as one model that is saved, loaded and asked for captions."""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from attncap.config import ModelConfig
from attncap.data.images import load_image, upright_rgb
from attncap.data.loader import to_tensor
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.files import write_atomically
from attncap.models.decoder import Decoder
from attncap.models.encoder import Encoder
from attncap.search.beam_search import beam_search
from attncap.search.config import SearchConfig


@dataclass
class Caption:
    """A caption of one image."""

    text: str
    score: float  # sum of the log-probabilities of its words and of <end>; see `attncap.search.Hypothesis`
    words: list[str]  # of a vocabulary of subwords its pieces, those that begin a word with ▁ before them
    attention: Tensor  # float32 [len(words), rows, columns]: where the model looked as it wrote each word
    others: list["Caption"] = field(default_factory=list)  # the next best, as many as `n_best` asks for


class Captioner(nn.Module):
    """An image captioner with soft attention.

    Args:
        config: what the model is built from.
        vocabulary: its words.
        encoder_weights: the encoder's weights to start from: "default", "none" or a file (see `Encoder`).
        implementation: "native" uses the project's own kernels, "torch" plain PyTorch; the captions are the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        encoder_weights: str = "none",
        implementation: str = "native",
    ):
        super().__init__()
        self.encoder = Encoder(config.encoder, config.encoder_layer, config.grid, encoder_weights)
        self.config = replace(config, encoder_layer=self.encoder.layer)
        self.vocabulary = vocabulary
        cells, channels = self.encoder.grid_shape(config.image_size)
        self.grid = (int(cells**0.5),) * 2  # rows, columns
        self.decoder = Decoder(config, channels, len(vocabulary), implementation)

    @torch.inference_mode()
    def caption(
        self,
        images: Tensor | Sequence[str | Path | Image.Image],
        search: SearchConfig | None = None,
        *,
        batch_size: int = 32,
        suppressed: Sequence[str] = ("<unk>",),
        ensemble: Sequence["Captioner"] = (),
        **settings,
    ) -> list[Caption]:
        """Caption images with the best hypotheses of a beam search; `attncap.search.beam_search` says how it goes.

        Args:
            images: paths, Pillow images, a uint8 tensor [B,3,S,S] of images already at the model's size, or a float
                tensor [B,P,D] of their features, with or without copies of cells (see `Encoder`); no ensemble then.
            search: settings of the search; the default ones if None.
            batch_size: images that go through the model together.
            suppressed: words that no caption has; of a vocabulary of subwords, pieces.
            ensemble: models of the same vocabulary, image size and grid; their words' probabilities and this model's
                are averaged, and so is their attention.
            settings: fields of `SearchConfig` that differ from `search`: beam_size=3, length_penalty="average", ...

        Raises UserError for a file that is no readable image, CallError for anything but the above.
        """
        try:
            search = replace(search or SearchConfig(), **settings)
        except TypeError as error:
            known = ", ".join(setting.name for setting in fields(SearchConfig))
            raise CallError(f"caption(): {error}; the settings of a search are {known}") from error
        if batch_size < 1:
            raise CallError(f"caption(): batch_size {batch_size}: must be at least 1")
        if isinstance(images, str | Path | Image.Image):
            raise CallError("caption() takes a list of images; put the one you have into [ ]")
        size = self.config.image_size
        encoded = isinstance(images, Tensor) and images.is_floating_point() and images.dim() == 3
        if encoded:
            side, channels = math.isqrt(images.shape[1]), self.decoder.key.in_features
            if side**2 != images.shape[1] or self.grid[0] % side or images.shape[2] != channels or ensemble:
                expected = f"[B, {self.grid[0] ** 2}, {channels}], without an ensemble"
                raise CallError(f"caption() takes features {expected}, not {list(images.shape)}")
        elif isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.shape[1:] != (3, size, size)):
            found = f"{images.dtype} {list(images.shape)}"
            raise CallError(f"caption() takes a tensor of torch.uint8 [B, 3, {size}, {size}], not {found}")
        words = self.vocabulary.words
        for model in ensemble:
            if (model.vocabulary.words, model.config.image_size, model.grid) != (words, size, self.grid):
                raise CallError("the models of an ensemble need the same vocabulary, image size and grid")
        forbidden = self.vocabulary.forbid(suppressed)

        models = (self, *ensemble)
        training = [model.training for model in models]
        captions = []
        try:
            for model in models:
                model.eval()
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                if not isinstance(batch, Tensor):
                    pictures = (
                        upright_rgb(image) if isinstance(image, Image.Image) else load_image(image) for image in batch
                    )
                    batch = torch.stack([to_tensor(picture, size) for picture in pictures])
                if encoded:
                    features = [batch.to(self.decoder.score_weight)]  # its device and dtype
                else:
                    # An ensemble's models may come to the same grid by other ways, so all of them give all its cells.
                    features = [model.encoder(batch.to(model.device), repeat=bool(ensemble)) for model in models]
                seeds = None
                if search.method == "sample":  # an image's own, wherever it comes
                    seeds = [zlib.crc32(image.numpy()) for image in batch.cpu().contiguous()]
                decoders = [model.decoder for model in models]
                for hypotheses in beam_search(decoders, features, search, forbidden, seeds):
                    best, *best.others = map(self._caption, hypotheses)
                    captions.append(best)
        finally:
            for model, mode in zip(models, training, strict=True):
                model.train(mode)
        return captions

    def _caption(self, hypothesis) -> Caption:
        words = [self.vocabulary.words[token] for token in hypothesis.tokens]
        side = int(hypothesis.attention.shape[1] ** 0.5)
        copies = self.grid[0] // side  # of a cell, on each side
        attention = hypothesis.attention.view(len(words), side, side) / copies**2
        attention = attention.repeat_interleave(copies, dim=1).repeat_interleave(copies, dim=2)
        return Caption(self.vocabulary.text(words), hypothesis.score, words, attention)

    @property
    def device(self) -> torch.device:
        return self.decoder.score_weight.device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `vocabulary.json` and `model.safetensors` into the folder. Each file is written whole
        under a temporary name first, the weights last. Raises UserError when the folder cannot be written."""
        folder = Path(folder)
        self.config.save(folder / "config.json")
        self.vocabulary.save(folder / "vocabulary.json")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", safetensors.torch.save(state))

    @classmethod
    @torch.inference_mode(False)  # so that torch counts changes of the weights, which the search's cache looks at
    def from_pretrained(cls, folder: str | Path, implementation: str = "native") -> "Captioner":
        """Load what `save_pretrained` wrote, ready to caption. Raises CallError when there is no such folder, UserError
        when a file of it is missing, cut short, or of another model."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CallError(f"{folder}: no such model folder; train one with python -m attncap.train --output {folder}")
        config = ModelConfig.load(folder / "config.json")
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        weights = folder / "model.safetensors"
        try:
            state = safetensors.torch.load_file(weights)
        except OSError as error:
            raise UserError(f"{weights}: cannot read the model's weights: {error.strerror or error}") from error
        except (safetensors.SafetensorError, struct.error, json.JSONDecodeError) as error:
            raise UserError(f"{weights}: the file is damaged or cut short ({error}); copy or train it again") from error
        model = cls(config, vocabulary, implementation=implementation)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{weights}: does not fit {folder / 'config.json'}: {reason}") from error
        return model.eval()
