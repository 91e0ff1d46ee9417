"""A training step of the decoder, forward and backward, from features: the naive baseline of tutorials, plain PyTorch
eager and compiled, and attncap's sequence. Losses and gradients are checked, then timed.

python benchmarks/training_step.py                     # CPU
python benchmarks/training_step.py --device cuda
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import measure
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from tqdm import tqdm

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models import fused, losses
from attncap.models.decoder import LSTMDecoder
from attncap.ops import BACKENDS


@dataclass
class Config:
    device: Literal["cpu", "cuda"] = "cpu"
    captions: tuple[int, ...] | None = None
    """N, captions in a step; by default 32, on CUDA 64 and 256."""
    rows: tuple[int, ...] = (1, 5)
    """K, captions of an image (of which N / K then are there, at least one)."""
    words: float = 13.4
    """Words of a caption on average, <end> counted."""
    cells: int = 196
    """P."""
    channels: int = 2048
    """D."""
    size: int = 512
    """A, E and H."""
    vocabulary: int = 9490
    """V."""
    encoders: tuple[Literal["frozen", "fine-tuned"], ...] = ("frozen", "fine-tuned")
    """frozen: no gradient for the features."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] | None = None
    """By default float32, on CUDA bfloat16 (by autocast) too. The naive baseline is float32 in every case."""
    rounds: int = 7
    """Timed calls of each provider."""
    output: Path = Path(__file__).parent / "results"


def make_tokens(N: int, words: float, vocabulary: int) -> Tensor:
    """Captions [N,T] whose lengths spread as those of COCO do, with a deviation of about 2.5 words."""
    random = torch.Generator().manual_seed(N)
    lengths = (words + 2.5 * torch.randn(N, generator=random)).round().clamp(min=6).long()
    lengths[0] += max(0, round(words * N) - int(lengths.sum()))  # one long caption, as there is in most batches
    tokens = torch.full((N, int(lengths.max()) + 1), Vocabulary.PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[1:length] = torch.randint(Vocabulary.UNK + 1, vocabulary, (int(length) - 1,), generator=random)
        row[0], row[length] = Vocabulary.START, Vocabulary.END
    return tokens


def naive(decoder: LSTMDecoder, features: Tensor, tokens: Tensor) -> Tensor:
    """As the train.py of sgrvinod's tutorial does it: captions sorted by length, their images' features projected in
    every step, logits of all steps in one padded tensor, packed for the loss."""
    features = features.repeat_interleave(len(tokens) // len(features), dim=0)
    lengths, order = (tokens != Vocabulary.PAD).sum(dim=1).sort(descending=True)
    features, tokens = features[order], tokens[order]
    embedded = decoder.embedding(tokens)
    mean = features.mean(dim=1)
    h, c = decoder.initial_h(mean), decoder.initial_c(mean)
    lengths = (lengths - 1).tolist()
    predictions = features.new_zeros(len(tokens), max(lengths), decoder.embedding.num_embeddings)
    alphas = features.new_zeros(len(tokens), max(lengths), features.shape[1])
    for t in range(max(lengths)):
        rows = sum(length > t for length in lengths)
        query = decoder.attention.query(h[:rows]).unsqueeze(1)
        hidden = torch.relu(decoder.attention.key(features[:rows]) + query)  # [N,P,A]
        weights = F.linear(hidden, decoder.attention.score_weight.unsqueeze(0)).squeeze(2).softmax(dim=1)
        context = (features[:rows] * weights.unsqueeze(2)).sum(dim=1)
        context = torch.sigmoid(decoder.attention.gate(h[:rows])) * context
        h, c = decoder.lstm(torch.cat([embedded[:rows, t], context], dim=1), (h[:rows], c[:rows]))
        predictions[:rows, t] = decoder.word_output(decoder.dropout(h))
        alphas[:rows, t] = weights
    scores = pack_padded_sequence(predictions, lengths, batch_first=True).data
    targets = pack_padded_sequence(tokens[:, 1:], lengths, batch_first=True).data
    return F.cross_entropy(scores, targets) + ((1.0 - alphas.sum(dim=1)) ** 2).mean()


def ours(decoder: LSTMDecoder, features: Tensor, tokens: Tensor, ops: SimpleNamespace = BACKENDS["native"]) -> Tensor:
    """The same loss by the package, with these ops: its own, or the same in plain PyTorch."""
    with (
        patch.object(fused, "ops", ops),
        patch.object(fused, "linear", ops.linear),
        patch.object(losses, "linear_cross_entropy", ops.linear_cross_entropy),
    ):
        words, attention = losses.caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:])
    return words / (tokens[:, 1:] != Vocabulary.PAD).sum() + attention / len(tokens)


def providers(
    config: Config, B: int, K: int, encoder: str, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], tuple[Tensor, ...]]], Tensor]:
    """Each a function without arguments that returns the loss and all gradients; and the captions."""
    device = torch.device(config.device)
    torch.manual_seed(0)
    sizes = {"attention_size": config.size, "embedding_size": config.size, "hidden_size": config.size}
    model = ModelConfig(output_layer="plain", dropout=0.0, **sizes)
    decoder = LSTMDecoder(model, config.channels, config.vocabulary).to(device)
    torch.compiler.reset()
    eager = BACKENDS["torch"]
    compiled = {**vars(eager), "attention_lstm": torch.compile(eager.attention_lstm, dynamic=False)}
    compiled = SimpleNamespace(**compiled)

    tokens = make_tokens(B * K, config.words, config.vocabulary)
    longest = (tokens != Vocabulary.PAD).sum(dim=1).view(B, K).amax(dim=1)
    tokens = tokens.view(B, K, -1)[longest.argsort(descending=True, stable=True)].flatten(0, 1)  # as a loader sorts
    features = torch.randn(B, config.cells, config.channels, generator=torch.Generator().manual_seed(1)).relu()
    features = features.to(device).requires_grad_(encoder == "fine-tuned")

    def step(loss: Callable, autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype, enabled=autocast and dtype != torch.float32):
            value = loss(decoder, features, tokens.to(device) if loss is naive else tokens)
        wanted = [*decoder.parameters(), *([features] if features.requires_grad else [])]
        return value.detach(), *torch.autograd.grad(value, wanted)

    return {
        "naive": lambda: step(naive, False),
        "eager": lambda: step(partial(ours, ops=eager), True),
        "compiled": lambda: step(partial(ours, ops=compiled), True),
        "native": lambda: step(ours, True),
    }, tokens


def check(functions: dict[str, Callable[[], tuple[Tensor, ...]]], dtype: torch.dtype) -> None:
    """Loss and gradients against the naive baseline in float32."""
    truth = functions["naive"]()
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    for name, function in functions.items():
        for index, (mine, true) in enumerate(zip(function(), truth, strict=True)):
            error, size = (mine - true).norm(), true.norm()
            assert error <= allowed * size + 1e-6, f"{name}, result {index}: error {error:.2e} of {size:.2e}"


def main(config: Config) -> None:
    device = torch.device(config.device)
    environment = measure.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    on_cpu = device.type == "cpu"
    cases = [
        (encoder, max(1, N // K), K, dtype)
        for encoder in config.encoders
        for N in config.captions or ((32,) if on_cpu else (64, 256))
        for K in config.rows
        for dtype in config.dtypes or (("float32",) if on_cpu else ("float32", "bfloat16"))
    ]
    results = []
    for encoder, B, K, dtype in tqdm(cases, unit="case", leave=False):
        functions, tokens = providers(config, B, K, encoder, getattr(torch, dtype))
        check(functions, getattr(torch, dtype))
        times = measure.interleaved(functions, device, config.rounds)
        words = int((tokens[:, 1:] != Vocabulary.PAD).sum())
        tqdm.write(f"{encoder}, B {B}, K {K}, {dtype}: {words / len(tokens):.1f} words, {tokens.shape[1] - 1} steps")
        for name, milliseconds in times.items():
            result = {
                **{"encoder": encoder, "B": B, "K": K, "dtype": dtype, "words": words, "steps": tokens.shape[1] - 1},
                "provider": name,
                "ms": milliseconds,
                "captions/s": len(tokens) / milliseconds * 1000,
                # The least of five: what the memory allocator keeps for later differs from call to call.
                "peak MiB": min(measure.peak_memory(functions[name], device) for _ in range(5)),
                "native is faster by": milliseconds / times["native"],
            }
            results.append(result)
            tqdm.write(
                f"  {name:8} {result['ms']:9.2f} ms  {result['captions/s']:9.1f} captions/s  "
                f"{result['peak MiB']:7.1f} MiB  native is faster by {result['native is faster by']:.2f}"
            )
    path = config.output / f"training_step-{config.device}.json"
    sizes = {"P": config.cells, "D": config.channels, "A = E = H": config.size, "V": config.vocabulary}
    measure.save(path, {**environment, "sizes": sizes, "results": results})
    panels = {encoder: [result for result in results if result["encoder"] == encoder] for encoder in config.encoders}
    title = f"training step, {environment['device']}, {environment['date']}"
    measure.draw(panels, lambda r: f"B={r['B']} K={r['K']} {r['dtype']}", title, path.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
