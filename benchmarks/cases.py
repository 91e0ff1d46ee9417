"""Calls of the kernels, and of the matrix products between them: what cuda_model.py predicts and first_gpu_run.py
measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder, LSTMDecoder
from attncap.ops import beam_search_step, lstm_step, soft_attention


@dataclass(frozen=True)
class Sizes:
    """Of a model."""

    cells: int = 196
    """P."""
    channels: int = 2048
    """D."""
    size: int = 512
    """A, E and H."""
    vocabulary: int = 9490
    """V."""


class Case(NamedTuple):
    op: str
    B: int  # images
    K: int  # rows of an image
    dtype: str = "bfloat16"
    activation: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} B={self.B} K={self.K} {self.dtype} {self.activation}".rstrip()


class Work(NamedTuple):
    """The least that a call has to do."""

    bytes: int  # each number that it needs read once, each result written once
    flops: int  # of matrix products


def kernels(images: Sequence[int]) -> list[Case]:
    """All kernels that a user's call reaches alone, the most important cases first."""
    dtypes = ("bfloat16", "float32")
    attention = [
        Case("soft_attention", B, K, dtype, activation)
        for B in images[::-1]
        for K in (5, 1)
        for dtype in dtypes
        for activation in ("tanh", "relu")
    ]
    steps = [Case(op, B, 5, dtype) for op in ("beam_search_step", "lstm_step") for B in images for dtype in dtypes]
    backward = [
        Case("soft_attention_backward", B, K, dtype, activation)
        for B in images
        for K in (1, 5)
        for dtype in dtypes
        for activation in ("tanh", "relu")
    ]
    return attention + steps + backward


def decode_parts(B: int, K: int, dtype: str = "bfloat16") -> list[Case]:
    """The parts of a step of the search by the decoder with the deep output layer, as it is by default."""
    products = [Case(op, B, K, dtype) for op in PRODUCTS]
    return [
        Case("soft_attention", B, K, dtype, ModelConfig().activation),
        *products,
        Case("lstm_step", B, K, dtype),
        Case("beam_search_step", B, K, dtype),
    ]


# The matrix products of a step, from the size that is summed over to the size of the result.
PRODUCTS: dict[str, Callable[[Sizes], tuple[int, int]]] = {
    "product of h": lambda s: (s.size, 5 * s.size + s.channels),  # recurrent, query, gate
    "product of context": lambda s: (s.channels, 5 * s.size),  # LSTM, output layer
    "product of output": lambda s: (s.size, s.size),
    "product for words": lambda s: (s.size, s.vocabulary),
}


def work(case: Case, sizes: Sizes) -> Work:
    P, D, A, V = sizes.cells, sizes.channels, sizes.size, sizes.vocabulary
    B, N, flops = case.B, case.B * case.K, 0
    if case.op in PRODUCTS:
        inner, outer = PRODUCTS[case.op](sizes)
        numbers, flops = N * inner + inner * outer + N * outer, 2 * N * inner * outer
    elif case.op == "soft_attention":
        numbers = B * P * (D + A) + A + N * (A + D) + N * (D + P)
    elif case.op == "soft_attention_backward":  # of a frozen encoder: no gradient of the features
        numbers = B * P * (D + A) + A + N * (A + D) + 2 * N * (D + P) + B * P * A + A + N * (A + D)
    elif case.op == "lstm_step":
        numbers = N * 4 * A + N * 5 * A + min(N, V) * 5 * A + N * A + N * 3 * A
    elif case.op == "beam_search_step":
        numbers = N * V
    else:
        raise ValueError(case.op)
    others = {"lstm_step": 16 * N, "beam_search_step": 36 * N}.get(case.op, 0)  # indices and scores
    return Work(numbers * getattr(torch, case.dtype).itemsize + others, flops)


def make(case: Case, sizes: Sizes, device: torch.device) -> Callable[[], object]:
    """The call, on random inputs of its own."""
    P, D, A, V = sizes.cells, sizes.channels, sizes.size, sizes.vocabulary
    B, K, N = case.B, case.K, case.B * case.K
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if case.op in PRODUCTS:
        inner, outer = PRODUCTS[case.op](sizes)
        x, weight, bias = normal(N, inner), normal(outer, inner), normal(outer)
        return lambda: F.linear(x, weight, bias)
    if case.op == "lstm_step":
        tensors = [normal(N, 4 * A), normal(N, 5 * A), normal(V, 5 * A), normal(N, A)]
        parents = torch.arange(N, device=device) // K * K + torch.randint(K, (N,), device=device)
        tokens = torch.randint(V, (N,), device=device)
        return lambda: lstm_step(*tensors, parents, tokens)
    if case.op == "beam_search_step":
        logits, scores = 3 * normal(N, V), torch.randn(B, K, device=device)
        finished = torch.full((B, K), -torch.inf, device=device)
        return lambda: beam_search_step(logits, scores, finished, end=Vocabulary.END)
    inputs = [normal(B, P, D), normal(B, P, A), normal(N, A), normal(A) / A**0.5, normal(N, D)]
    if case.op == "soft_attention":
        return lambda: soft_attention(*inputs[:4], activation=case.activation, gate=inputs[4])
    wanted = [x.requires_grad_() for x in inputs[1:]]
    gradients = [normal(N, D), normal(N, P)]
    with torch.enable_grad():
        results = soft_attention(*inputs[:4], activation=case.activation, gate=inputs[4])
    return lambda: torch.autograd.grad(results, wanted, gradients, retain_graph=True)


def make_decoder(sizes: Sizes, device: torch.device, backend: str = "native") -> LSTMDecoder:
    """Random weights, with which no caption ends early."""
    torch.manual_seed(0)
    config = ModelConfig(attention_size=sizes.size, embedding_size=sizes.size, hidden_size=sizes.size, dropout=0.0)
    decoder = LSTMDecoder(config, sizes.channels, sizes.vocabulary, backend)
    with torch.no_grad():
        decoder.word_output.bias[[Vocabulary.PAD, Vocabulary.START, Vocabulary.END]] = -1e4
    return decoder.to(device)


def make_features(B: int, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, sizes.cells, sizes.channels, device=device, dtype=dtype).relu()


def make_decode_step(decoder: Decoder, features: Tensor, K: int) -> Callable[[], object]:
    """A step of the search in its middle: from K beams of each image to the K best that continue them."""
    B, device = len(features), features.device
    first = torch.arange(B, device=device).repeat_interleave(K)
    tokens = torch.randint(decoder.vocabulary_size, (B * K,), device=device)
    state, _, _ = decoder.step(decoder.start(features), first, tokens)
    parents = torch.arange(B * K, device=device)
    scores = torch.randn(B, K, device=device)
    finished = torch.full((B, K), -torch.inf, device=device)

    def step() -> object:
        _, logits, _ = decoder.step(state, parents, tokens)
        return beam_search_step(logits, scores, finished, end=Vocabulary.END)

    return step
