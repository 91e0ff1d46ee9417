import copy

import numpy as np
import pytest
import torch
from conftest import NO_CUDA

from attncap.config import ModelConfig
from attncap.data.vocabulary import Vocabulary
from attncap.models import fused
from attncap.models.decoder import LSTMDecoder
from attncap.models.losses import caption_losses, losses_from_logits

B, K, P, D, A, E, H, V = 2, 3, 5, 7, 6, 4, 8, 11


def make_decoder(backend: str, **settings) -> LSTMDecoder:
    torch.manual_seed(1)
    config = ModelConfig(attention_size=A, embedding_size=E, hidden_size=H, dropout=0.0, **settings)
    return LSTMDecoder(config, D, V, backend).double()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_the_equations(decoder: LSTMDecoder, features: np.ndarray, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """One caption of one image, from the paper's equations with nothing but NumPy: logits [T-1,V], weights [T-1,P]."""
    w = {name: value.detach().numpy() for name, value in decoder.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    h, c = linear("initial_h", features.mean(0)), linear("initial_c", features.mean(0))
    all_logits, all_weights = [], []
    for token in tokens[:-1]:
        word = w["embedding.weight"][token]
        scores = []
        for cell in features:  # equation 4
            x = linear("attention.key", cell) + linear("attention.query", h)
            x = np.tanh(x) if decoder.attention.activation == "tanh" else np.maximum(x, 0)
            scores.append(w["attention.score_weight"] @ x)
        weights = np.exp(scores) / np.exp(scores).sum()  # equation 5
        context = sigmoid(linear("attention.gate", h)) * (weights @ features)  # equation 13 and section 4.2.1
        x = np.concatenate([word, context])
        gates = w["lstm.weight_ih"] @ x + w["lstm.bias_ih"] + w["lstm.weight_hh"] @ h + w["lstm.bias_hh"]
        i, f, g, o = np.split(gates, 4)  # equations 1 to 3
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out = h
        if decoder.deep:  # equation 7
            out = word + linear("hidden_output", h) + linear("context_output", context)
        all_logits.append(linear("word_output", out))
        all_weights.append(weights)
    return np.array(all_logits), np.array(all_weights)


def make_tokens(lengths: list[int]) -> torch.Tensor:
    """Captions of these lengths, which include <end> but not <start>."""
    random = torch.Generator().manual_seed(4)
    tokens = torch.full((len(lengths), max(lengths) + 1), Vocabulary.PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length + 1] = torch.randint(Vocabulary.START, V, (length + 1,), generator=random)
    return tokens


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("K, lengths", [(3, [3, 1, 2, 5, 4, 5]), (1, [2, 6]), (1, [4, 3])])
def test_teacher_forcing_follows_the_paper(backend, activation, output_layer, K, lengths):
    decoder = make_decoder(backend, activation=activation, output_layer=output_layer)
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens(lengths)
    logits, attention = (x.detach().numpy() for x in decoder(features, tokens[:, :-1]))
    assert logits.shape == (len(lengths), max(lengths), V) and attention.shape == (len(lengths), max(lengths), P)
    for n, length in enumerate(lengths):
        expected = by_the_equations(decoder, features[n // K].numpy(), tokens[n, : length + 1].tolist())
        np.testing.assert_allclose(logits[n, :length], expected[0], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(attention[n, :length], expected[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("output_layer", ["plain", "deep"])
def test_packed_words_are_those_of_the_loop(output_layer):
    """Every word of every caption once, wherever it is packed; unpacked they are what the plain loop gives."""
    lengths = [3, 1, 2, 5, 4, 5]
    decoder, plain = (make_decoder(backend, output_layer=output_layer) for backend in ("native", "torch"))
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens(lengths)[:, :-1]
    output = fused.teacher_forcing(decoder, features, tokens, torch.tensor(lengths))
    words = list(zip(output.rows.tolist(), output.steps.tolist(), strict=True))
    assert sorted(words) == [(n, t) for n, length in enumerate(lengths) for t in range(length)]
    logits, attention = plain(features, tokens)
    torch.testing.assert_close(decoder.word_output(output.outputs), logits[output.rows, output.steps])
    torch.testing.assert_close(output.attention, attention[output.rows, output.steps])


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("output_layer", ["plain", "deep"])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("for_cuda", [True, False])
def test_step_by_step_is_teacher_forcing(monkeypatch, backend, output_layer, table, for_cuda):
    """Also where rows are continued in another order, several times, and images are taken out, and with the weights
    laid out as for CUDA."""
    decoder = make_decoder(backend, output_layer=output_layer).eval()
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens([4] * (B * K))[:, :-1]
    expected = decoder(features, tokens)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", for_cuda)
        prepared = decoder.for_inference(table)
    with torch.no_grad():
        state = prepared.start(features)
        parents = torch.arange(B).repeat_interleave(K)
        order = torch.arange(B * K)  # which caption each row of the state continues
        for t in range(tokens.shape[1]):
            state, *found = prepared.step(state, parents, tokens[order, t])
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y[order, t])
            shuffled = torch.cat([K * b + torch.randperm(K) for b in range(B)])
            order, parents = order[shuffled], shuffled
        state = prepared.select(state, torch.tensor([1]))
        [state_of_one] = [prepared.start(features[1:])]
        assert state.features.equal(state_of_one.features) and state.h.shape == (K, H)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_losses_follow_the_paper(backend):
    """Equation 14, from the equations' logits and weights; smoothed, weighted by row, and fed other words."""
    decoder = make_decoder(backend)
    lengths = [3, 1, 2, 5, 4, 5]
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens(lengths)
    inputs = torch.where(torch.rand(len(tokens), tokens.shape[1] - 1) < 0.5, tokens[:, :-1], 7)
    row_weights = torch.randn(len(tokens), dtype=torch.double)
    smoothing, words, attention = 0.2, 0.0, 0.0
    for n, length in enumerate(lengths):
        fed = [*inputs[n, :length].tolist(), 0]  # the last one is not fed
        logits, weights = by_the_equations(decoder, features[n // K].numpy(), fed)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        of_targets = log_p[np.arange(length), tokens[n, 1 : length + 1].numpy()]
        words -= row_weights[n].item() * ((1 - smoothing) * of_targets + smoothing * log_p.mean(axis=1)).sum()
        attention += ((1 - weights.sum(axis=0)) ** 2).mean()
    options = dict(label_smoothing=smoothing, row_weights=row_weights)
    losses = caption_losses(decoder, features, inputs, tokens[:, 1:], **options)
    np.testing.assert_allclose([x.item() for x in losses], [words, attention], rtol=1e-11)
    losses = losses_from_logits(*decoder(features, inputs), tokens[:, 1:], **options)
    np.testing.assert_allclose([x.item() for x in losses], [words, attention], rtol=1e-11)


@pytest.mark.parametrize("output_layer", ["plain", "deep"])
def test_native_and_torch_agree(output_layer):
    """Same losses and same gradients, within float64's rounding."""
    features, tokens = torch.randn(B, P, D, dtype=torch.double), make_tokens([3, 1, 2, 5, 4, 5])
    results = []
    for backend in ("torch", "native"):
        decoder = make_decoder(backend, output_layer=output_layer)
        features_copy = features.clone().requires_grad_()
        losses = caption_losses(decoder, features_copy, tokens[:, :-1], tokens[:, 1:], label_smoothing=0.1)
        (losses.words + losses.attention).backward()
        gradients = {name: p.grad for name, p in decoder.named_parameters()}
        results.append((losses, features_copy.grad, gradients))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_captions_without_words(backend):
    """They count for nothing beside others, and cannot be all."""
    decoder, features, tokens = make_decoder(backend), torch.randn(B, P, D, dtype=torch.double), make_tokens([0, 3])
    losses = caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:])
    alone = caption_losses(decoder, features[1:], tokens[1:, :-1], tokens[1:, 1:])
    torch.testing.assert_close(losses.words, alone.words)
    torch.testing.assert_close(losses.attention, alone.attention + 1)
    for wrong in (make_tokens([3, 2, 1]), make_tokens([3])[:0], make_tokens([0, 0])):
        with pytest.raises(ValueError, match="for 2 images"):
            decoder(features, wrong[:, :-1])
    with pytest.raises(ValueError, match="at least one word must not be"):
        caption_losses(decoder, features, tokens, torch.full_like(tokens, Vocabulary.PAD))


def test_an_image_costs_its_own_longest_caption(monkeypatch):
    """Not that of the batch; and features that come sorted are not copied."""
    decoder, asked = make_decoder("native"), []
    attention_lstm = fused.ops.attention_lstm
    monkeypatch.setattr(
        fused.ops,
        "attention_lstm",
        lambda *tensors, **options: (
            asked.append((tensors[0], options["batch_sizes"])) or attention_lstm(*tensors, **options)
        ),
    )
    features = torch.randn(B, P, D, dtype=torch.double)
    for lengths in ([1, 2, 2, 5, 4, 1], [5, 4, 1, 1, 2, 2]):
        tokens = make_tokens(lengths)
        caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:])
    assert [batch_sizes for _, batch_sizes in asked] == [[2, 2, 1, 1, 1]] * 2
    assert torch.equal(asked[0][0], features.flip(0)) and asked[1][0] is features


def test_weights_from_before_the_attention_was_a_module():
    """Their names had no `attention.` in front."""
    decoder = make_decoder("native")
    state = {name.removeprefix("attention."): value + 1 for name, value in decoder.state_dict().items()}
    assert "key.weight" in state
    decoder.load_state_dict(state)
    assert all(value.equal(state[name.removeprefix("attention.")]) for name, value in decoder.state_dict().items())


def test_changes_that_are_announced_are_counted():
    decoder = make_decoder("native")
    for change in (
        decoder.eval,
        decoder.float,
        lambda: decoder.to(torch.float64),
        lambda: decoder.load_state_dict(decoder.state_dict()),
        lambda: torch.nn.Sequential(decoder).load_state_dict(torch.nn.Sequential(decoder).state_dict()),
        lambda: torch.nn.Sequential(decoder).half(),
    ):
        before = decoder.version
        change()
        assert decoder.version > before
    copied = copy.deepcopy(decoder)
    before = decoder.version
    copied.load_state_dict(decoder.state_dict())
    assert decoder.version == before < copied.version


@pytest.mark.gpu
@NO_CUDA
def test_training_does_not_wait_for_the_device():
    """What it needs to know is known on the host, and what it sends goes through pinned memory."""
    decoder, lengths = make_decoder("native").float().cuda(), [3, 1, 2, 5, 4, 5]
    features, tokens = torch.randn(B, P, D, device="cuda", requires_grad=True), make_tokens(lengths)
    for mode in ("default", "error"):  # the first time sets things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            losses = caption_losses(decoder, features, tokens[:, :-1], tokens[:, 1:], label_smoothing=0.1)
            (losses.words + losses.attention).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
