"""beam_search: captions from features, by the naive baseline, plain PyTorch eager and compiled, and attncap's search.
Captions are checked, then timed, and held against the machine's floor. Then the selection of the beams alone.

python benchmarks/beam_search.py                     # CPU
python benchmarks/beam_search.py --device cuda
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import measure
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._inductor import config as inductor
from tqdm import tqdm

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder, LSTMDecoder
from attncap.ops import beam_search_step, soft_attention_reference
from attncap.ops.linear import fixed_linear
from attncap.search.beam_search import beam_search
from attncap.search.config import SearchConfig
from attncap.search.graphs import GraphCache

NEVER_WRITTEN = [Vocabulary.PAD, Vocabulary.START, Vocabulary.END]


@dataclass
class Config:
    device: Literal["cpu", "cuda"] = "cpu"
    images: tuple[int, ...] | None = None
    """B; by default 1, 8 and 32, on CUDA 1, 32 and 256."""
    beams: tuple[int, ...] = (1, 3, 5, 10)
    """K."""
    cells: int = 196
    """P."""
    channels: int = 2048
    """D."""
    size: int = 512
    """A, E and H."""
    vocabulary: int = 9490
    """V."""
    steps: int = 20
    """Words of every caption."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] | None = None
    """By default float32, on CUDA bfloat16 too. The naive baseline is float32 in every case."""
    naive_images: int = 1
    """Images that the naive baseline is given; it takes one at a time."""
    rounds: int = 7
    """Timed calls of each provider."""
    output: Path = Path(__file__).parent / "results"


class Captions(NamedTuple):
    words: list[list[int]]
    scores: list[float]  # sums of log-probabilities


def make_decoder(config: Config) -> LSTMDecoder:
    """Random weights, larger than at the start of a training: captions of different images differ, and their candidates
    stand apart by more than rounding errors. No caption ends early."""
    torch.manual_seed(0)
    size = config.size
    sizes = {"attention_size": size, "embedding_size": size, "hidden_size": size}
    decoder = LSTMDecoder(ModelConfig(output_layer="plain", **sizes), config.channels, config.vocabulary)
    for parameter in decoder.requires_grad_(False).parameters():
        parameter *= 3
    decoder.word_output.bias[NEVER_WRITTEN] = -1e4
    return decoder.eval().to(config.device)


def make_features(config: Config, B: int) -> Tensor:
    random = torch.Generator().manual_seed(B)
    of_image = torch.randn(B, 1, config.channels, generator=random)
    return (of_image + torch.randn(B, config.cells, config.channels, generator=random)).relu().to(config.device)


def naive(decoder: LSTMDecoder, features: Tensor, K: int, steps: int) -> Captions:
    """As the caption.py of sgrvinod's tutorial does it: an image at a time, its features repeated for each beam, copied
    and projected in every step."""
    captions = [_naive_of_one(decoder, image, K, steps) for image in features]
    return Captions([words for words, _ in captions], [score for _, score in captions])


def _naive_of_one(decoder: LSTMDecoder, features: Tensor, K: int, steps: int) -> tuple[list[int], float]:
    features = features.expand(K, *features.shape)
    mean = features.mean(dim=1)
    h, c = decoder.initial_h(mean), decoder.initial_c(mean)
    tokens = torch.full((K, 1), Vocabulary.START, device=features.device)
    sequences = tokens
    attention = torch.ones(K, 1, features.shape[1], device=features.device)
    totals = torch.zeros(K, 1, device=features.device)
    for step in range(steps):
        hidden = torch.relu(decoder.attention.key(features) + decoder.attention.query(h).unsqueeze(1))  # [K,P,A]
        weights = F.linear(hidden, decoder.attention.score_weight.unsqueeze(0)).squeeze(2).softmax(dim=1)
        context = torch.sigmoid(decoder.attention.gate(h)) * (features * weights.unsqueeze(2)).sum(dim=1)
        embedded = decoder.embedding(tokens).squeeze(1)
        h, c = decoder.lstm(torch.cat([embedded, context], dim=1), (h, c))
        scores = totals + decoder.word_output(h).log_softmax(dim=1)  # [K,V]
        totals, places = (scores[0] if step == 0 else scores.view(-1)).topk(K)
        parents, tokens = places // scores.shape[1], places % scores.shape[1]
        sequences = torch.cat([sequences[parents], tokens.unsqueeze(1)], dim=1)
        attention = torch.cat([attention[parents], weights[parents].unsqueeze(1)], dim=1)
        live = [beam for beam, token in enumerate(tokens) if token != Vocabulary.END]
        sequences, attention = sequences[live], attention[live]
        h, c, features = h[parents[live]], c[parents[live]], features[parents[live]]
        totals, tokens = totals[live].unsqueeze(1), tokens[live].unsqueeze(1)
    best = int(totals.argmax())
    return sequences[best, 1:].tolist(), float(totals[best])


class EagerStep(nn.Module):
    """A step of the search as well as plain PyTorch does it: keys and features shared by an image's beams, one matrix
    product for all that the hidden state is multiplied with, a table of the embeddings times the LSTM's weights, and
    the best candidates found beam by beam first."""

    def __init__(self, decoder: LSTMDecoder, K: int):
        super().__init__()
        lstm, query, gate = decoder.lstm, decoder.attention.query, decoder.attention.gate
        E = decoder.embedding.embedding_dim
        self.K = K
        self.sizes = [4 * lstm.hidden_size, query.out_features, gate.out_features]
        no_bias = torch.zeros_like(lstm.bias_hh)  # the LSTM's is in the table
        self.hidden_weight = nn.Buffer(torch.cat([lstm.weight_hh, query.weight, gate.weight]))
        self.hidden_bias = nn.Buffer(torch.cat([no_bias, query.bias, gate.bias]))
        self.context_weight = nn.Buffer(lstm.weight_ih[:, E:].contiguous())
        bias = lstm.bias_ih + lstm.bias_hh
        self.word_table = nn.Buffer(F.linear(decoder.embedding.weight, lstm.weight_ih[:, :E], bias))
        self.score_weight = decoder.attention.score_weight
        self.word_output = decoder.word_output

    def forward(
        self, features: Tensor, keys: Tensor, h: Tensor, c: Tensor, tokens: Tensor, scores: Tensor
    ) -> tuple[Tensor, ...]:
        """From J beams an image, h and c [B*J,H], tokens [B*J], scores [B,J], to the K best that continue them, best
        first: the same, and the rows that they continue [B*K]."""
        (B, J), K = scores.shape, self.K
        recurrent, query, gate = F.linear(h, self.hidden_weight, self.hidden_bias).split(self.sizes, dim=1)
        context, _ = soft_attention_reference(features, keys, query, self.score_weight, activation="relu", gate=gate)
        i, f, g, o = (recurrent + F.linear(context, self.context_weight) + self.word_table[tokens]).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        best, words = self.word_output(h).float().log_softmax(dim=1).topk(K)  # [B*J,K]
        scores, places = (scores.unsqueeze(2) + best.view(B, J, K)).view(B, J * K).topk(K)
        tokens = words.view(B, J * K).gather(1, places).flatten()
        rows = (places // K + J * torch.arange(B, device=h.device).unsqueeze(1)).flatten()
        return h[rows], c[rows], tokens, scores, rows


def batched(decoder: LSTMDecoder, step: Callable, features: Tensor, K: int, steps: int) -> Captions:
    """A search by an `EagerStep`, eager or compiled. All beams of an image begin as one."""
    torch.compiler.cudagraph_mark_step_begin()  # the compiled step's results stay valid until the next search
    mean = features.mean(dim=1)
    keys, h, c = decoder.attention.key(features), decoder.initial_h(mean), decoder.initial_c(mean)
    tokens = torch.full((len(features),), Vocabulary.START, device=features.device)
    scores = torch.zeros(len(features), 1, device=features.device)
    history = []
    for _ in range(steps):
        h, c, tokens, scores, rows = step(features, keys, h, c, tokens, scores)
        history.append((tokens, rows))
    best = K * torch.arange(len(features), device=features.device)
    words = []
    for tokens, rows in reversed(history):
        words.append(tokens[best])
        best = rows[best]
    return Captions(torch.stack(words[::-1], dim=1).tolist(), scores[:, 0].tolist())


def native(decoder: Decoder, graphs: GraphCache, features: Tensor, K: int, steps: int) -> Captions:
    found = beam_search(decoder, features, SearchConfig(beam_size=K, max_length=steps), (), graphs=graphs)
    return Captions([best.tokens for best, *_ in found], [best.score for best, *_ in found])


def providers(config: Config, decoder: LSTMDecoder, features: Tensor, K: int) -> dict[str, Callable]:
    """Each a function without arguments: from features to captions."""
    torch.compiler.reset()
    prepared, graphs = decoder.for_inference(), GraphCache()
    step = EagerStep(decoder, K)
    # The best setting on the CPU. As an option of torch.compile it has no effect: the tracing looks it up as well.
    inductor.freezing = config.device == "cpu"
    mode = "default" if config.device == "cpu" else "reduce-overhead"
    compiled = torch.compile(step, dynamic=False, fullgraph=True, mode=mode)
    return {
        "eager": lambda: batched(decoder, step, features, K, config.steps),
        "compiled": lambda: batched(decoder, compiled, features, K, config.steps),
        "native": lambda: native(prepared, graphs, features, K, config.steps),
    }


def check(functions: dict[str, Callable], dtype: torch.dtype) -> dict[str, int]:
    """Every provider's captions are those of plain PyTorch, or as good: their scores are equal but for rounding.
    Returns how many are others."""
    captions = {name: function() for name, function in functions.items()}
    others = {}
    for name, (words, scores) in captions.items():
        others[name] = 0
        expected = captions["eager"]
        for image, (ours, theirs) in enumerate(
            zip(words, expected.words, strict=False)
        ):  # the naive baseline has fewer
            others[name] += ours != theirs
            error = abs(scores[image] - expected.scores[image])
            allowed = abs(scores[image]) * 8 * torch.finfo(dtype).eps
            assert error <= allowed, f"{name}, image {image}: score off by {error:.2e}, allowed {allowed:.2e}"
    return others


def products(config: Config, decoder: LSTMDecoder, features: Tensor, K: int) -> Callable:
    """The search's matrix products alone: the keys once; in each step what the hidden state and the context are
    multiplied with, and the logits. One row an image until the first words are chosen."""
    B, H = len(features), decoder.lstm.hidden_size
    E = decoder.embedding.embedding_dim
    weight = torch.cat([decoder.lstm.weight_hh, decoder.attention.query.weight, decoder.attention.gate.weight])
    hidden, context = fixed_linear(weight, None), fixed_linear(decoder.lstm.weight_ih[:, E:].contiguous(), None)
    words = fixed_linear(decoder.word_output.weight, decoder.word_output.bias)
    states, contexts = features.new_ones(B * K, H), features.new_ones(B * K, config.channels)

    def run():
        decoder.attention.key(features)
        for step in range(config.steps):
            rows = B if step < 2 else B * K
            hidden(states[:rows])
            context(contexts[:rows])
            words(states[: B if step == 0 else B * K])

    return run


def measure_search(config: Config, decoder: LSTMDecoder, B: int, K: int, dtype: str) -> list[dict]:
    features = make_features(config, B)
    few = features[: config.naive_images]
    functions = {"naive": lambda decoder=decoder: naive(decoder, few, K, config.steps)}
    decoder, features = copy.deepcopy(decoder).to(getattr(torch, dtype)), features.to(getattr(torch, dtype))
    functions |= providers(config, decoder, features, K)
    others = check(functions, getattr(torch, dtype))
    # The floor: the matrix products, and reading features and keys in every step as fast as a large array is read. Both
    # are measured among the providers, so that a slow spell of the machine meets them too.
    large = measure.large_array(features.device)
    functions |= {"products": products(config, decoder, features, K), "read": large.sum}
    times = measure.interleaved(functions, torch.device(config.device), config.rounds)
    size = B * config.cells * (config.channels + config.size) * features.element_size()  # bytes of features and keys
    floor = {"attention": config.steps * times.pop("read") * size / large.nbytes, "products": times.pop("products")}
    results = []
    for name, milliseconds in times.items():
        images = len(few) if name == "naive" else B
        at_once = 1 if name == "naive" else B
        results.append(
            {
                "B": B,
                "K": K,
                "dtype": dtype,
                "provider": name,
                "images": images,
                "captions/s": images / milliseconds * 1000,
                "ms a step": milliseconds / config.steps / (images / at_once),
                "floor ms": floor,
                "share of floor": sum(floor.values()) / B / (milliseconds / images),
                "other captions": others[name],
                "native is faster by": milliseconds / images / (times["native"] / B),
            }
        )
    return results


def measure_selection(config: Config, B: int, K: int, dtype: str) -> list[dict]:
    """From logits to the beams that continue: the op, and log-softmax and top-k over all words of all beams."""
    random, V = torch.Generator().manual_seed(0), config.vocabulary
    logits = 3 * torch.randn(B * K, V, generator=random)
    logits[:, NEVER_WRITTEN] = -1e4
    logits = logits.to(config.device, getattr(torch, dtype))
    scores = torch.randn(B, K, generator=random).to(config.device)
    finished = torch.full((B, K), -torch.inf, device=config.device)

    def candidates() -> Tensor:
        return (scores.unsqueeze(2) + logits.float().log_softmax(dim=1).view(B, K, V)).view(B, K * V)

    functions = {
        "eager": lambda: candidates().topk(K),
        "native": lambda: beam_search_step(logits, scores, finished, end=Vocabulary.END),
    }
    chosen, expected = functions["native"](), functions["eager"]().values
    places = chosen.parents % K * V + chosen.tokens
    assert all(len(set(of_image)) == K for of_image in places.tolist())
    torch.testing.assert_close(chosen.scores, expected)
    torch.testing.assert_close(candidates().gather(1, places), expected)
    calls = 1 if config.device == "cpu" else measure.CALLS
    times = measure.interleaved(functions, torch.device(config.device), 3 * config.rounds, calls)
    case = {"B": B, "K": K, "dtype": dtype}
    return [
        {**case, "provider": name, "ms": milliseconds, "native is faster by": milliseconds / times["native"]}
        for name, milliseconds in times.items()
    ]


@torch.no_grad()
def main(config: Config) -> None:
    device = measure.select(config.device)
    bandwidth = measure.bandwidth(device, config.rounds)
    environment = measure.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print("bandwidth: " + ", ".join(f"{key} {value:.1f} GB/s" for key, value in bandwidth.items()))
    images = config.images or ((1, 8, 32) if device.type == "cpu" else (1, 32, 256))
    dtypes = config.dtypes or (("float32",) if device.type == "cpu" else ("float32", "bfloat16"))
    cases = [(B, K, dtype) for B in images for K in config.beams for dtype in dtypes]
    decoder = make_decoder(config)
    search, selection = [], []
    for B, K, dtype in tqdm(cases, unit="case", leave=False):
        tqdm.write(f"B {B}, K {K}, {dtype}")
        search += measure_search(config, decoder, B, K, dtype)
        for result in search[-4:]:
            tqdm.write(
                f"  {result['provider']:8} {result['captions/s']:9.1f} captions/s  {result['ms a step']:8.3f} ms a step"
                f"  {result['share of floor']:4.0%} of the floor  {result['other captions']} other captions  "
                f"native is faster by {result['native is faster by']:.2f}"
            )
        selection += measure_selection(config, B, K, dtype)
        plain, ours = selection[-2:]
        tqdm.write(
            f"  selection: {ours['ms']:.3f} ms, log-softmax and top-k {plain['ms']:.3f} ms, "
            f"native is faster by {plain['native is faster by']:.2f}"
        )
    path = config.output / f"beam_search-{config.device}.json"
    sizes = {"P": config.cells, "D": config.channels, "A, E, H": config.size, "V": config.vocabulary}
    record = {"sizes": sizes, "steps": config.steps, "bandwidth GB/s": bandwidth}
    measure.save(path, {**environment, **record, "search": search, "selection": selection})
    title = f"beam_search, {environment['device']}, {environment['date']}"
    measure.draw({"search": search, "selection": selection}, _label, title, path.with_suffix(".png"))


def _label(result: dict) -> str:
    return f"B={result['B']} K={result['K']} {result['dtype']}"


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
