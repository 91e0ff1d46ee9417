"""The captioner: encoder, decoder and vocabulary as one model that is trained, saved, loaded and asked for captions."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from attncap.captions import Caption, CaptionMethods, Ensemble
from attncap.config import MAX_GRID, ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.devices import find_device
from attncap.errors import CallError, UserError
from attncap.files import write_atomically
from attncap.models.decoder import Decoder, LSTMDecoder, check_backend, rename_old_weights
from attncap.models.encoder import Encoder
from attncap.models.losses import CaptionLosses, caption_losses, losses_from_logits, target_lengths
from attncap.search.beam_search import Hypothesis
from attncap.search.graphs import GraphCache
from attncap.weights import OnMetaDevice, conform, read_state_dict

__all__ = ["Caption", "Captioner", "Ensemble"]


class Captioner(CaptionMethods, nn.Module):
    """An image captioner with soft attention.

    In evaluation mode it keeps a prepared decoder (see `LSTMDecoder.for_inference`) from one call to the next. It is
    dropped by `train`, and replaced after `load_state_dict`, `to` and similar methods of this model or its decoder, and
    after the decoder gets gradients. After any other change to the decoder's weights in evaluation mode (in place, by
    `.data`, or by a method of one of its parts), call `refresh`. Several threads may use one model for captioning.

    Args:
        config: what the model is built from.
        vocabulary: its words.
        encoder_weights: the encoder's initial weights: "default", "none" or a file (see `Encoder`).
        backend: "native" uses the project's own kernels, "torch" uses plain PyTorch; the captions are the same.
    """

    def __init__(
        self, config: ModelConfig, vocabulary: Vocabulary, encoder_weights: str = "none", backend: str = "native"
    ):
        super().__init__()
        self.encoder = Encoder(config.encoder, config.encoder_layer, config.grid, encoder_weights)
        self.config = replace(config, encoder_layer=self.encoder.layer)
        self.vocabulary = vocabulary
        cells, channels = self.encoder.grid_shape(config.image_size)
        if cells > MAX_GRID**2:
            raise CallError(
                f"image_size={config.image_size}: layer {self.encoder.layer} of {config.encoder} gives {cells:,} cells "
                f"(at most {MAX_GRID**2:,}); set grid, or choose a later encoder_layer"
            )
        self.grid = (math.isqrt(cells), math.isqrt(cells))  # rows, columns
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
        """Teacher forcing: predict each word from the image and the true words before it.

        Args:
            images: uint8 [B,3,S,S]; or their features, float [B,P,D].
            tokens: int64 [N,T], the words that are fed, <start> first. The K captions of an image are next to each
                other, N = B K.
            targets: int64 [N,T], the words that follow, <pad> where none does.
            label_smoothing, row_weights: see `caption_losses`.
            attention_penalty: weight of the doubly stochastic penalty (Xu et al. 2015, equation 14).
            losses_only: return only the `CaptionLosses`, which are sums, without computing all logits at once. (With
                None for images and tokens they are 0: the share of a process that has no images in a batch.)

        Returns:
            logits [N,T,V] and attention [N,T,P]; with targets the loss too: the mean cross entropy of the words plus
            the weighted penalty, averaged over the captions.

        Raises ValueError for arguments that do not fit together.
        """
        if images is None and tokens is None and losses_only:
            zero = torch.zeros((), device=self.device)
            nothing = sum((p.sum() for p in self.parameters() if p.requires_grad), zero) * 0.0
            return CaptionLosses(nothing, nothing)
        if images is None or tokens is None or (losses_only and targets is None):
            raise ValueError("forward needs images and tokens, and targets for the losses")
        features = images if images.is_floating_point() else self.encoder(images)
        options: dict[str, Any] = dict(label_smoothing=label_smoothing, row_weights=row_weights)
        if losses_only and targets is not None:
            return caption_losses(self.decoder, features, tokens, targets, **options)
        logits, attention = self.decoder(features, tokens.to(features.device))
        if targets is None:
            return logits, attention
        words = target_lengths(targets, tokens).sum()
        losses = losses_from_logits(logits, attention, targets, **options)
        return logits, attention, losses.words / words + attention_penalty * losses.attention / len(tokens)

    def refresh(self) -> None:
        """Drop the decoder that was prepared from earlier weights."""
        with self._lock:
            self._kept = None

    def train(self, mode: bool = True) -> Captioner:
        self._kept = None  # its memory can be used in training
        return super().train(mode)

    @property
    def models(self) -> list[Captioner]:
        return [self]

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[tuple[Decoder, GraphCache | None]]:
        """The prepared decoder and its CUDA graphs, while the model is in evaluation mode."""
        with self._lock:
            if self.training:
                modes = {module: module.training for module in self.modules()}
                self.eval()
                try:
                    yield self.decoder.for_inference(table=False), None
                finally:
                    for module, mode in modes.items():
                        module.training = mode
                return
            kept = self._kept
            if kept is None or not kept.is_made_from(self.decoder):
                kept = self._kept = _Prepared(self.decoder)
        yield kept.decoder, kept.graphs

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
        """Write `config.json`, `vocabulary.json` and `model.safetensors` into the folder. Each file is first written
        completely under a temporary name; the weights come last. Raises UserError when the folder cannot be written
        to."""
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
        default float32). Raises CallError when there is no such folder or device, UserError when one of its files is
        missing, cut short, or belongs to another model."""
        if not isinstance(folder, str | os.PathLike):
            raise CallError(f"the model's folder should be a path, not {type(folder).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise CallError(f"dtype={str(dtype)[:40]}: must be a floating-point torch.dtype, such as torch.bfloat16")
        folder = Path(folder)
        if not folder.is_dir():
            raise CallError(f"{folder}: no such model folder; train one with python -m attncap.train --output {folder}")
        check_backend(backend)
        settings, weights = folder / "config.json", folder / "model.safetensors"
        config, vocabulary = ModelConfig.load(settings), Vocabulary.load(folder / "vocabulary.json")
        try:
            # Sizes are compared with the weights before memory is allocated. The user's default device and dtype are
            # ignored.
            with torch.device("cpu"), OnMetaDevice():
                model = cls(config, vocabulary, backend=backend).float()
        except CallError as error:
            raise UserError(f"{settings}: {error}") from error
        try:
            state = read_state_dict(weights)
        except ValueError as error:
            raise UserError(f"{weights}: cannot read the model's weights: {error}; copy or train it again") from error
        rename_old_weights(model.decoder, state, "decoder.")
        _check_sizes(folder, model, state)
        try:
            model.load_state_dict(conform(state, model.state_dict()), assign=True)
        except ValueError as error:
            raise UserError(
                f"{weights}: does not fit {settings}: {error}; check encoder, encoder_layer and output_layer there, or "
                "copy the model again"
            ) from error
        return model.to(device=None if device is None else find_device(device), dtype=dtype).eval()


def _check_sizes(folder: Path, model: Captioner, state: dict[str, Tensor]) -> None:
    """Raises UserError, naming the field, if a size of the decoder differs from that of the weights."""
    config, settings = model.config, folder / "config.json"
    for file, field, value, name, axis in (
        (settings, "attention_size", config.attention_size, "decoder.attention.score_weight", 0),
        (settings, "embedding_size", config.embedding_size, "decoder.embedding.weight", 1),
        (settings, "hidden_size", config.hidden_size, "decoder.lstm.weight_hh", 1),
        (folder / "vocabulary.json", "number of words", len(model.vocabulary), "decoder.embedding.weight", 0),
    ):
        shape = state[name].shape if name in state else ()
        if axis < len(shape) and shape[axis] != value:
            raise UserError(
                f"{file}: {field} is {value}, but model.safetensors has {shape[axis]}: these files belong to different "
                "models; copy them again"
            )


class _Prepared:
    """A decoder prepared for inference, its CUDA graphs, and what they were made from."""

    def __init__(self, decoder: LSTMDecoder):
        self.made_from, self.weights, self.version = decoder, _weights(decoder), decoder.version
        self.decoder, self.graphs = decoder.for_inference(), GraphCache()
        # A gradient announces a step of an optimizer, even if it has been cleared by the next call.
        self.had_gradient = had_gradient = threading.Event()
        self.hooks = [
            p.register_post_accumulate_grad_hook(lambda _: had_gradient.set())
            for p in decoder.parameters()
            if p.requires_grad
        ]

    def is_made_from(self, decoder: LSTMDecoder) -> bool:
        """Whether this is the decoder, and nothing has announced a change of its weights."""
        if self.made_from is not decoder or self.version != decoder.version or self.had_gradient.is_set():
            return False
        return self.weights == _weights(decoder) and all(p.grad is None for p in decoder.parameters())

    def __del__(self) -> None:
        for hook in getattr(self, "hooks", ()):  # there are none if preparing failed
            hook.remove()


def _weights(decoder: LSTMDecoder) -> list[tuple]:
    """Which parameters a decoder has, and what they are, apart from their values."""
    return [(id(p), p.requires_grad, p.dtype, p.device) for p in decoder.parameters()]
