"""From images to captions: the methods that a captioner and an ensemble of captioners share."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attncap.config import ModelConfig
from attncap.data.images import ImageError, check_source, open_image
from attncap.data.loader import to_tensor
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError, UserError
from attncap.models.decoder import Decoder
from attncap.search.beam_search import beam_search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache
from attncap.search.processors import LogitsProcessor, processors_for

if TYPE_CHECKING:
    from attncap.captioner import Captioner

ImageSource = str | Path | bytes | BinaryIO | Image.Image | np.ndarray
"""A path, the bytes of an image file, an open file, a Pillow image, or uint8 [H,W,3]."""


@dataclass
class Caption:
    """A caption of one image."""

    text: str
    score: float  # sum of the log-probabilities of its words and of <end>; see `attncap.search.beam_search.Hypothesis`
    words: list[str]  # for a vocabulary of subwords, the pieces, with ▁ before those that begin a word
    attention: Tensor | None  # float32 [len(words), rows, columns]: where the model looked for each word


class CaptionMethods:
    """The caption methods that `Captioner` and `Ensemble` share. `models` is the one model, or the ensemble's."""

    @property
    def models(self) -> Sequence[Captioner]:
        raise NotImplementedError

    # `| Any`: a list if `search` asks for n_best above 1, or an error with errors="return".
    @overload
    def caption(
        self, images: ImageSource, search: SearchConfig | None = None, *, n_best: int, **settings: Any
    ) -> list[Caption] | Any: ...

    @overload
    def caption(self, images: ImageSource, search: SearchConfig | None = None, **settings: Any) -> Caption | Any: ...

    @overload
    def caption(
        self, images: Iterable[ImageSource] | Tensor, search: SearchConfig | None = None, **settings: Any
    ) -> list[Any]: ...

    def caption(
        self,
        images: ImageSource | Iterable[ImageSource] | Tensor,
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
            images: one image, or a list or iterator of images (an iterator is read to its end first): paths, bytes of
                image files, open binary files, Pillow images, NumPy arrays uint8 [H,W,3]; or a tensor uint8 [B,3,S,S]
                of images at the model's size.
            search: settings of the search; the defaults if None.
            batch_size: number of images that go through the model together.
            processors: additional rules for the words, see `attncap.search.processors`.
            errors: "raise" raises the error of the first image that cannot be read; "return" puts the UserError in
                place of that image's caption.
            attention: whether captions include their attention.
            settings: fields of `SearchConfig` that differ from `search`: beam_size=3, length_penalty="average", ...

        Returns:
            A Caption for an image, or a list for a list. With n_best above 1, a list of Captions, best first, in place
            of each Caption.

        Raises UserError for an image that cannot be read, and CallError for invalid arguments.
        """
        search = _search_config(search, settings)
        if errors not in ("raise", "return"):
            raise CallError(f"errors={errors!r}: choose 'raise' or 'return'")
        if type(batch_size) is not int or batch_size < 1:
            raise CallError(f"batch_size={str(batch_size)[:20]}: must be an integer of at least 1")
        _check_processors(processors)
        is_list = _is_list(images)
        several: Any = images if is_list else [images]
        if not isinstance(several, Tensor):
            several = list(several)
            for image in several:
                check_source(image)
        captions: list[Any] = []
        with self._ready() as decoders:
            for start in range(0, len(several), batch_size):
                batch = several[start : start + batch_size]
                pixels, failed = self._pixels(batch, errors == "raise")
                found = iter(self._caption_pixels(decoders, pixels, search, processors, attention))
                for i in range(len(batch)):
                    captions.append(failed[i] if i in failed else _one_or_all(next(found), search))
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
        """Caption a batch of images from their features, float [B,P,D] as returned by the encoder (for an ensemble, a
        list with the features of each model). Everything else is as in `caption`. Returns a list."""
        search = _search_config(search, settings)
        _check_processors(processors)
        given: list[Any] = list(features) if isinstance(features, list | tuple) else [features]
        if len(given) != len(self.models):
            raise CallError(f"features of {len(given)} models are given; expected those of {len(self.models)}")
        for model, x in zip(self.models, given, strict=True):
            P, D = model.grid[0] * model.grid[1], model.decoder.feature_size
            if not isinstance(x, Tensor):
                raise CallError(f"features should be a tensor, float [B, {P}, {D}], not {type(x).__name__}")
            if not x.is_floating_point() or x.dim() != 3 or x.shape != (len(given[0]), P, D):
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
        """The models' prepared decoders, while the models are in evaluation mode. Raises CallError for models without
        weights."""
        if self.models[0].device.type == "meta":
            raise CallError("the model is on the meta device, which keeps no weights; load it with from_pretrained")
        with contextlib.ExitStack() as held:
            # In one order for all ensembles, since a model in training mode is locked.
            ready = {model: held.enter_context(model._prepared()) for model in sorted(set(self.models), key=id)}
            yield [ready[model] for model in self.models]

    def _pixels(self, batch: Sequence[ImageSource] | Tensor, raises: bool) -> tuple[Tensor, dict[int, UserError]]:
        """uint8 [B,3,S,S] of the images that can be read, and the errors of the others by index."""
        size = self.models[0].config.image_size
        if isinstance(batch, Tensor):
            if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1:] != (3, size, size):
                expected = f"torch.uint8 [B, 3, {size}, {size}]"
                raise CallError(f"a tensor of images should be {expected}, not {batch.dtype} {list(batch.shape)}")
            return batch, {}
        pixels: list[Tensor] = []
        failed: dict[int, UserError] = {}
        for i, image in enumerate(batch):
            try:
                pixels.append(to_tensor(open_image(image), size))
            except ImageError as error:
                if raises:
                    raise
                failed[i] = error
        return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8), failed

    @torch.inference_mode()
    def _caption_pixels(
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
            [*processors_for(search, model.vocabulary), *processors],
            seeds=seeds,
            backend=model.decoder.backend,
            graphs=decoders[0][1],
            attention=attention,
        )
        return [[model._caption(hypothesis) for hypothesis in of_image] for of_image in hypotheses]


class Ensemble(CaptionMethods):
    """Several captioners with the same vocabulary, image size, grid and device that write a caption together: their
    word probabilities are averaged, and so is their attention.

    Raises CallError for models that differ in any of these."""

    def __init__(self, models: Sequence[Captioner]):
        is_list = isinstance(models, list | tuple)
        if not is_list or not all(isinstance(m, CaptionMethods) and not isinstance(m, Ensemble) for m in models):
            raise CallError("an ensemble takes a list of Captioners")
        self._models = list(models)
        if not self.models:
            raise CallError("an ensemble needs at least one model")
        kinds = [(model.vocabulary.words, model.config.image_size, model.grid, model.device) for model in self.models]
        if any(kind != kinds[0] for kind in kinds):
            raise CallError("the models of an ensemble need the same vocabulary, image size, grid and device")

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


def _search_config(search: SearchConfig | None, settings: dict) -> SearchConfig:
    """`search`, with the settings that are given by name changed. Raises CallError."""
    known = [field.name for field in fields(SearchConfig)]
    if unknown := [name for name in settings if name not in known]:
        raise CallError(f"{unknown[0]}: not a setting of the search; choose from {', '.join(known)}")
    if search is not None and not isinstance(search, SearchConfig):
        raise CallError(f"search should be a SearchConfig, not {type(search).__name__}")
    return replace(search or SearchConfig(), **settings)


def _is_list(images: object) -> bool:
    """Whether `images` is several images. Sets and dicts are not, because they have no order for the captions."""
    not_lists = str | bytes | bytearray | memoryview | np.ndarray | Mapping | Set
    return isinstance(images, Iterable) and not isinstance(images, not_lists) and not hasattr(images, "read")


def _check_processors(processors: object) -> None:
    if not isinstance(processors, list | tuple) or not all(callable(rule) for rule in processors):
        raise CallError("processors: must be a list of callables, see attncap.search.processors")


def _image_seeds(images: Tensor) -> list[int]:
    """A seed for each image, which depends on its values alone."""
    images = images.cpu().contiguous()
    return [zlib.crc32((image if image.dtype == torch.uint8 else image.float()).numpy()) for image in images]


def _one_or_all(captions: list[Caption], search: SearchConfig) -> Caption | list[Caption]:
    return captions[0] if search.n_best == 1 else captions
