"""The captioner: encoder, decoder and vocabulary as one model that is trained, saved, loaded and asked for captions."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from attncap.config import ModelConfig
from attncap.data.images import open_image
from attncap.data.loader import to_tensor
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.files import write_atomically
from attncap.models.decoder import Decoder, LSTMDecoder
from attncap.models.encoder import Encoder
from attncap.models.losses import CaptionLosses, caption_losses, losses_of_logits
from attncap.search.beam_search import Hypothesis, beam_search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache
from attncap.search.processors import ForcedPrefix, LogitsProcessor, SuppressTokens

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
"""A path, the bytes of an image file, an open file, a Pillow image, or uint8 [H,W,3]."""


@dataclass
class Caption:
    """A caption of one image."""

    text: str
    score: float  # sum of the log-probabilities of its words and of <end>; see `attncap.search.beam_search.Hypothesis`
    words: list[str]  # with a vocabulary of subwords its pieces, ▁ before those that begin a word
    attention: Tensor | None  # float32 [len(words), rows, columns]: where the model looked for each word


class _CaptionMethods:
    """What a `Captioner` and an `Ensemble` have in common: `models`, one or several, asked for captions."""

    @property
    def models(self) -> Sequence[Captioner]:
        raise NotImplementedError

    # `| Any`: a list where `search` asks for n_best above 1, and an error with errors="return".
    @overload
    def caption(
        self, images: ImageSource, search: SearchConfig | None = None, *, n_best: int, **settings: Any
    ) -> list[Caption] | Any: ...

    @overload
    def caption(self, images: ImageSource, search: SearchConfig | None = None, **settings: Any) -> Caption | Any: ...

    @overload
    def caption(
        self, images: Sequence[ImageSource] | Tensor, search: SearchConfig | None = None, **settings: Any
    ) -> list[Any]: ...

    def caption(
        self,
        images: ImageSource | Sequence[ImageSource] | Tensor,
        search: SearchConfig | None = None,
        *,
        batch_size: int = 32,
        processors: Sequence[LogitsProcessor] = (),
        errors: str = "raise",
        attention: bool = True,
        **settings: Any,
    ) -> Any:
        """Caption an image, or a list of images.

        Args:
            images: one image or a list: paths, bytes of image files, open binary files, Pillow images, NumPy arrays
                uint8 [H,W,3]; or a tensor uint8 [B,3,S,S] of images at the model's size.
            search: settings of the search; the default ones if None.
            batch_size: images that go through the model together.
            processors: further rules for the words, see `attncap.search.processors`.
            errors: "raise" raises the error of the first image that cannot be read; "return" puts the UserError in the
                place of that image's caption.
            attention: whether captions get their attention.
            settings: fields of `SearchConfig` that differ from `search`: beam_size=3, length_penalty="average", ...

        Returns:
            A Caption for an image, a list for a list. With n_best above 1, a list of Captions, best first, in the place
            of each Caption.

        Raises UserError for an image that cannot be read, CallError for arguments other than the above.
        """
        search = _search_config(search, settings)
        if errors not in ("raise", "return"):
            raise CallError(f"errors={errors!r}: choose 'raise' or 'return'")
        if batch_size < 1:
            raise CallError(f"batch_size={batch_size}: must be at least 1")
        is_list = isinstance(images, Tensor | Sequence) and not isinstance(images, str | bytes)
        several: Any = images if is_list else [images]
        captions: list[Any] = []
        with self._ready() as decoders:
            for start in range(0, len(several), batch_size):
                batch = several[start : start + batch_size]
                pixels, failed = self._pixels(batch, errors == "raise")
                found = iter(self._caption_batch(decoders, pixels, search, processors, attention))
                captions += [failed.get(i) or _one_or_all(next(found), search) for i in range(len(batch))]
        return captions if is_list else captions[0]

    def caption_features(
        self,
        features: Tensor | Sequence[Tensor],
        search: SearchConfig | None = None,
        *,
        processors: Sequence[LogitsProcessor] = (),
        attention: bool = True,
        **settings: Any,
    ) -> list[Any]:
        """Caption a batch of images from their features, float [B,P,D] as the encoder makes them (for an ensemble, a
        list with those of each model); everything else as in `caption`. Returns a list."""
        search = _search_config(search, settings)
        given = [features] if isinstance(features, Tensor) else list(features)
        if len(given) != len(self.models):
            raise CallError(f"features of {len(given)} models for an ensemble of {len(self.models)}")
        for model, x in zip(self.models, given, strict=True):
            P, D = model.grid[0] * model.grid[1], model.decoder.feature_size
            if not x.is_floating_point() or x.dim() != 3 or x.shape[1:] != (P, D):
                raise CallError(f"features should be float [B, {P}, {D}], not {x.dtype} {list(x.shape)}")
        with self._ready() as decoders, torch.inference_mode():
            given = [x.to(model.device) for model, x in zip(self.models, given, strict=True)]
            seeds = _image_seeds(given[0]) if search.method == "sample" else None
            found = self._search(decoders, given, search, processors, seeds, attention)
        return [_one_or_all(captions, search) for captions in found]

    def caption_batch(self, images: Tensor, search: SearchConfig) -> list[list[Caption]]:
        """The `n_best` captions of each image, best first: images uint8 [B,3,S,S] at the model's size, or features
        float [B,P,D]."""
        if images.is_floating_point():
            captions = self.caption_features(images, search)
        else:
            captions = self.caption(images, search, batch_size=max(1, len(images)))
        return [[found] for found in captions] if search.n_best == 1 else captions

    @contextlib.contextmanager
    def _ready(self) -> Iterator[list[tuple[Decoder, GraphCache | None]]]:
        """The models' prepared decoders, while the models are in evaluation mode."""
        with contextlib.ExitStack() as held:
            yield [held.enter_context(model._prepared()) for model in self.models]

    def _pixels(self, batch: Sequence[ImageSource] | Tensor, raises: bool) -> tuple[Tensor, dict[int, UserError]]:
        """uint8 [B,3,S,S] of the images that can be read, and the errors of the others by index."""
        size = self.models[0].config.image_size
        if isinstance(batch, Tensor):
            if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1:] != (3, size, size):
                expected = f"torch.uint8 [B, 3, {size}, {size}]"
                raise CallError(f"a tensor of images should be {expected}, not {batch.dtype} {list(batch.shape)}")
            return batch, {}
        pixels, failed = [], {}
        for i, image in enumerate(batch):
            try:
                pixels.append(to_tensor(open_image(image), size))
            except CallError:
                raise
            except UserError as error:
                if raises:
                    raise
                failed[i] = error
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8), failed

    @torch.inference_mode()
    def _caption_batch(
        self,
        decoders: Sequence[tuple[Decoder, GraphCache | None]],
        images: Tensor,
        search: SearchConfig,
        processors: Sequence[LogitsProcessor],
        attention: bool,
    ) -> list[list[Caption]]:
        if len(images) == 0:
            return []
        features = [model.encoder(images.to(model.device)) for model in self.models]
        seeds = _image_seeds(images) if search.method == "sample" else None
        return self._search(decoders, features, search, processors, seeds, attention)

    def _search(
        self,
        decoders: Sequence[tuple[Decoder, GraphCache | None]],
        features: list[Tensor],
        search: SearchConfig,
        processors: Sequence[LogitsProcessor],
        seeds: Sequence[int] | None,
        attention: bool,
    ) -> list[list[Caption]]:
        model = self.models[0]
        hypotheses = beam_search(
            [decoder for decoder, _ in decoders],
            features,
            search,
            [*_rules(search, model.vocabulary), *processors],
            seeds=seeds,
            backend=model.decoder.backend,
            graphs=decoders[0][1],
            attention=attention,
        )
        return [[model._caption(hypothesis) for hypothesis in of_image] for of_image in hypotheses]


class Captioner(_CaptionMethods, nn.Module):
    """An image captioner with soft attention.

    In evaluation mode it keeps a prepared decoder (see `LSTMDecoder.for_inference`) from one call to the next. It is
    dropped by `train`, `load_state_dict`, `to` and its relatives, and by gradients of the decoder. After any other
    change of the decoder's weights in evaluation mode, call `refresh`. Several threads may caption with one model.

    Args:
        config: what the model is built from.
        vocabulary: its words.
        encoder_weights: the encoder's weights to start from: "default", "none" or a file (see `Encoder`).
        backend: "native" uses the project's own kernels, "torch" plain PyTorch; the captions are the same.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, encoder_weights: str = "none", backend: str = "native"
    ):
        super().__init__()
        self.encoder = Encoder(config.encoder, config.encoder_layer, config.grid, encoder_weights)
        self.config = replace(config, encoder_layer=self.encoder.layer)
        self.vocabulary = vocabulary
        cells, channels = self.encoder.grid_shape(config.image_size)
        self.grid = (int(cells**0.5),) * 2  # rows, columns
        self.decoder = LSTMDecoder(config, channels, len(vocabulary), backend)
        self._kept: _Prepared | None = None
        self._lock = threading.RLock()

    def forward(
        self,
        images: Tensor | None,
        tokens: Tensor | None,
        targets: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        attention_penalty: float = 1.0,
        row_weights: Tensor | None = None,
        losses_only: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor] | CaptionLosses:
        """Teacher forcing: predict every next word from the image and the true words before it.

        Args:
            images: uint8 [B,3,S,S]; or their features, float [B,P,D].
            tokens: int64 [N,T], the words that are fed, <start> first. The K captions of an image are next to each
                other, N = B K.
            targets: int64 [N,T], the words that follow, <pad> where none does.
            label_smoothing, row_weights: see `caption_losses`.
            attention_penalty: weight of the doubly stochastic penalty (Xu et al. 2015, equation 14).
            losses_only: return the `CaptionLosses` alone, sums, without making all logits. (With None for images and
                tokens they are 0: the part of a process that has no images in a batch.)

        Returns:
            logits [N,T,V] and attention [N,T,P]; with targets the loss too: the mean cross entropy of the words plus
            the weighted penalty, averaged over the captions.
        """
        if images is None:
            zero = torch.zeros((), device=self.device)
            nothing = sum((p.sum() for p in self.parameters() if p.requires_grad), zero) * 0.0
            return CaptionLosses(nothing, nothing)
        assert tokens is not None
        features = images if images.is_floating_point() else self.encoder(images)
        options: dict[str, Any] = dict(label_smoothing=label_smoothing, row_weights=row_weights)
        if losses_only:
            assert targets is not None
            return caption_losses(self.decoder, features, tokens, targets, **options)
        logits, attention = self.decoder(features, tokens.to(features.device))
        if targets is None:
            return logits, attention
        losses = losses_of_logits(logits, attention, targets, **options)
        words = (targets != Vocabulary.PAD).sum().to(features.device)
        return logits, attention, losses.words / words + attention_penalty * losses.attention / len(tokens)

    def refresh(self) -> None:
        """Drop what was prepared from the decoder's weights."""
        self._kept = None

    @property
    def models(self) -> list[Captioner]:
        return [self]

    @property
    def device(self) -> torch.device:
        return self.decoder.word_output.weight.device

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[tuple[Decoder, GraphCache | None]]:
        """The prepared decoder and its CUDA graphs, while the model is in evaluation mode."""
        if self.training:
            with self._lock:
                self.eval()
                try:
                    yield self.decoder.for_inference(), None
                finally:
                    self.train()
            return
        with self._lock:
            kept = self._kept
            if kept is None or not kept.is_current(self.decoder):
                kept = self._kept = _Prepared(self.decoder)
        yield kept.prepared, kept.graphs

    def _caption(self, hypothesis: Hypothesis) -> Caption:
        words = [self.vocabulary.words[token] for token in hypothesis.tokens]
        attention = hypothesis.attention
        if attention is not None:
            attention = attention.view(len(words), *self.grid)
        return Caption(self.vocabulary.text(words), hypothesis.score, words, attention)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None, "_lock": None}  # a copy prepares its own

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_lock": threading.RLock()})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `vocabulary.json` and `model.safetensors` into the folder. Each file is written whole
        under a temporary name first, the weights last. Raises UserError when the folder cannot be written."""
        folder = Path(folder)
        self.config.save(folder / "config.json")
        self.vocabulary.save(folder / "vocabulary.json")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", safetensors.torch.save(state))

    @classmethod
    @torch.inference_mode(False)  # so that the model can be trained, wherever it was loaded
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "native",
    ) -> Captioner:
        """Load what `save_pretrained` wrote, in evaluation mode, on `device` (by default the CPU) and in `dtype` (by
        default float32). Raises CallError when there is no such folder, UserError when one of its files is missing, cut
        short, or belongs to another model."""
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
        model = cls(config, vocabulary, backend=backend)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{weights}: does not fit {folder / 'config.json'}: {reason}") from error
        return model.to(device=device, dtype=dtype).eval()


class Ensemble(_CaptionMethods):
    """Several captioners of the same vocabulary, image size and grid that write one caption together: the
    probabilities of the words are averaged, and so is the attention.

    Raises CallError for models that differ in one of the three."""

    def __init__(self, models: Sequence[Captioner]):
        self._models = list(models)
        if not self.models:
            raise CallError("an ensemble needs at least one model")
        kinds = [(model.vocabulary.words, model.config.image_size, model.grid) for model in self.models]
        if any(kind != kinds[0] for kind in kinds):
            raise CallError("the models of an ensemble need the same vocabulary, image size and grid")

    @property
    def models(self) -> list[Captioner]:
        return self._models

    @property
    def vocabulary(self) -> Vocabulary:
        return self.models[0].vocabulary

    @property
    def config(self) -> ModelConfig:
        """Of the first model."""
        return self.models[0].config

    @property
    def device(self) -> torch.device:
        return self.models[0].device


class _Prepared:
    """A decoder prepared for inference, its CUDA graphs, and whether it is up to date."""

    def __init__(self, decoder: LSTMDecoder):
        self.version = decoder.version
        self.prepared, self.graphs = decoder.for_inference(), GraphCache()
        # A gradient announces a step of an optimizer.
        has_gradient = threading.Event()
        self.has_gradient = has_gradient
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _: has_gradient.set())
            for p in decoder.parameters()
            if p.requires_grad
        ]

    def is_current(self, decoder: LSTMDecoder) -> bool:
        if self.version != decoder.version or self.has_gradient.is_set():
            return False
        return all(p.grad is None for p in decoder.parameters())

    def __del__(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _search_config(search: SearchConfig | None, settings: dict) -> SearchConfig:
    """The settings with those changed that are given by name. Raises CallError."""
    known = [field.name for field in fields(SearchConfig)]
    if unknown := [name for name in settings if name not in known]:
        raise CallError(f"{unknown[0]}: not a setting of a search; these are {', '.join(known)}")
    if search is not None and not isinstance(search, SearchConfig):
        raise CallError(f"search should be a SearchConfig, not {type(search).__name__}")
    return replace(search or SearchConfig(), **settings)


def _rules(search: SearchConfig, vocabulary: Vocabulary) -> list[LogitsProcessor]:
    """The settings that name words, as processors. Raises CallError for words that the vocabulary lacks."""
    rules: list[LogitsProcessor] = [SuppressTokens(tuple(vocabulary.suppress(search.suppressed)))]
    prefix = tuple(vocabulary.tokens(search.prefix))
    if len(prefix) >= search.max_length:
        raise CallError(f"prefix={search.prefix!r}: must be shorter than max_length={search.max_length}")
    return [*rules, ForcedPrefix(prefix)] if prefix else rules


def _image_seeds(images: Tensor) -> list[int]:
    """A seed for each image that depends on its values alone."""
    images = images.cpu().contiguous()
    return [zlib.crc32((image if image.dtype == torch.uint8 else image.float()).numpy()) for image in images]


def _one_or_all(captions: list[Caption], search: SearchConfig) -> Caption | list[Caption]:
    return captions[0] if search.n_best == 1 else captions
