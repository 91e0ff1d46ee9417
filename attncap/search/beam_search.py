"""Beam search over images x beams, in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attncap.data.vocabulary import Vocabulary
from attncap.models.decoder import Decoder, State

SUPPRESSED = [Vocabulary.PAD, Vocabulary.START, Vocabulary.UNK]


@dataclass
class Hypothesis:
    """A caption as the search found it."""

    tokens: list[int]  # without <start> and <end>
    score: float  # sum of the log-probabilities of its words, <end>'s included where it was reached
    attention: Tensor  # float32 [len(tokens),P], on the CPU


@torch.inference_mode()
def beam_search(decoder: Decoder, features: Tensor, beam_size: int, max_length: int) -> list[Hypothesis]:
    """The best caption of every image: features [B,P,D] -> B hypotheses, found in at most `max_length` steps (a word or
    <end> each).

    As in Show, Attend and Tell's own search: a beam that ends is taken out and the width shrinks by one; an image is
    done when no beam is left; the hypothesis with the highest sum of log-probabilities wins, without length
    normalisation. Where no beam has ended, the best live one is the answer. <pad>, <start> and <unk> are never written.
    """
    B, K, V = len(features), beam_size, decoder.embedding.num_embeddings
    memory, state = decoder.start(features, rows=K)
    tokens = torch.full((B, K), Vocabulary.START, device=features.device)
    scores = torch.full((B, K), -torch.inf, device=features.device)  # a beam that is not live has -inf
    scores[:, 0] = 0  # all beams of an image begin alike, so only one of them is expanded
    width = torch.full((B, 1), K, device=features.device)  # beams that an image may still have
    rank = torch.arange(K, device=features.device)
    first_row = K * torch.arange(B, device=features.device).unsqueeze(1)
    trail = []  # of every step: tokens [B,K], parents [B,K], weights [B,K,P]
    ended = [[] for _ in range(B)]  # of every image: (score, step, beam) of the beams that wrote <end>

    for step in range(max_length):
        embedded = decoder.embedding(tokens.view(-1))
        state, context, weights = decoder.step(embedded, state, memory)
        log_probs = decoder.logits(embedded, state.h, context).float().log_softmax(dim=1)
        log_probs[:, SUPPRESSED] = -torch.inf
        candidates = (scores.view(-1, 1) + log_probs).view(B, K * V)
        scores, index = candidates.topk(K, dim=1)  # best first
        scores = scores.masked_fill(rank >= width, -torch.inf)
        parents, tokens = index // V, index % V
        trail.append((tokens, parents, weights.view(B, K, -1)))

        finished = (tokens == Vocabulary.END) & scores.isfinite()
        for image, beam in finished.nonzero().tolist():
            ended[image].append((scores[image, beam].item(), step, beam))
        width = width - finished.sum(dim=1, keepdim=True)
        scores = scores.masked_fill(finished, -torch.inf)
        if not scores.isfinite().any():
            break
        rows = (first_row + parents).view(-1)
        state = State(state.h[rows], state.c[rows])

    live = [(score, step, beam) for score, beam in zip(*(x.tolist() for x in scores.max(dim=1)), strict=True)]
    winners = [max(ended[image] or [live[image]], key=lambda end: end[0]) for image in range(B)]
    return _trace_back(trail, winners)


def _trace_back(trail: list[tuple[Tensor, Tensor, Tensor]], winners: list[tuple[float, int, int]]) -> list[Hypothesis]:
    """Follow each winner (score, last step, beam) through its parents to the first word."""
    tokens, parents = (torch.stack([step[i] for step in trail]).tolist() for i in (0, 1))  # [T][B][K]
    hypotheses = []
    for image, (score, step, beam) in enumerate(winners):
        words, attention = [], []
        for t in range(step, -1, -1):
            words.append(tokens[t][image][beam])
            beam = parents[t][image][beam]
            attention.append(trail[t][2][image, beam])  # the row that wrote the word is the parent's
        words.reverse()
        attention = torch.stack(attention[::-1]).float().cpu()
        length = len(words) - (words[-1] == Vocabulary.END)
        hypotheses.append(Hypothesis(words[:length], score, attention[:length]))
    return hypotheses
