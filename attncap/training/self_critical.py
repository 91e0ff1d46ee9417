"""Self-critical training: the model writes captions, and learns from how well each does beside the others.

Rennie et al., "Self-critical Sequence Training for Image Captioning", 2017, with the baseline of Luo, "A Better Variant
of Self-Critical Sequence Training", 2020: the mean of the image's other samples, in place of the greedy caption.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.metrics.cider import CiderD
from attncap.models.decoder import Decoder
from attncap.search.decoder_step import DecoderStep
from attncap.training.scheduled_sampling import draw_words

END = -1  # the end of a caption, among the numbers of words
LOOK_EVERY = 8  # words after which CUDA is asked whether all captions have ended: the answer makes it wait


@torch.no_grad()
def sample_captions(
    decoder: Decoder, features: Tensor, samples: int, max_length: int, generator: torch.Generator
) -> Tensor:
    """Captions drawn word by word from the model's own distribution, as teacher forcing without dropout scores them
    (<pad> and <start> alone are never drawn). It draws in the weights' dtype, also under autocast.

    Args:
        features: [B,P,D].
        samples: K, captions of an image.
        max_length: words of a caption at most, <end> counted; one that gets there has no <end>.
        generator: on any device; the same state gives the same captions.

    Returns:
        int64 [N,T], N = B K: <start>, the words, <end>, then <pad>.
    """
    rows = torch.arange(len(features) * samples, device=features.device)
    draws = torch.rand(max_length, len(rows), generator=generator, device=generator.device).to(features.device)
    tokens = torch.full((len(rows), 1 + max_length), Vocabulary.PAD, device=features.device)
    tokens[:, 0] = Vocabulary.START
    has_ended = torch.zeros_like(rows, dtype=torch.bool)
    with torch.autocast(features.device.type, enabled=False):
        step = DecoderStep(decoder, table=False)  # not `of`: the next step of the optimizer makes it old
        memory, h, c = step.start(features.to(step.score_weight.dtype))
        parents = rows // samples  # an image's captions go on from one beginning
        for t in range(1, 1 + max_length):
            h, c, logits = step.write(step.look(memory, h), c, parents, tokens[:, t - 1])
            words = draw_words(logits, draws[t - 1], Vocabulary.END)
            tokens[:, t] = words.masked_fill(has_ended, Vocabulary.PAD)
            has_ended |= words == Vocabulary.END
            parents = rows
            if (t % LOOK_EVERY == 0 or not features.is_cuda) and has_ended.all():
                break
    longest = int((tokens != Vocabulary.PAD).sum(dim=1).max())
    return tokens[:, :longest]


class SelfCritical:
    """From a batch's images to the captions that the model learns from, and how much of each.

    The reward is CIDEr-D against all of the image's captions, with the document frequencies of the training split.
    <end> is a word in it, on both sides: without it a caption loses nothing by stopping at "a man in a", which gives
    the n-grams of a longer one. <unk> is a word that no reference has. Of subwords the words that they spell count.

    Args:
        vocabulary: the model's.
        captions: of each training image.
        samples: K, captions sampled for an image, at least 2.
        max_length: words of a sample at most, <end> counted.
    """

    def __init__(self, vocabulary: Vocabulary, captions: Sequence[Sequence[str]], samples: int, max_length: int):
        self.vocabulary, self.samples, self.max_length = vocabulary, samples, max_length
        self.pieces = list(vocabulary.words)
        self.pieces[Vocabulary.UNK] = "\ufffd"  # no word has it: the tokenizer drops it
        self.ids: defaultdict[str, int] = defaultdict()
        self.ids.default_factory = self.ids.__len__  # a word not seen before gets the next number
        self.cider = CiderD([[[*self.encode(tokenize(c)), END] for c in of_image] for of_image in captions])

    def encode(self, words: Sequence[str]) -> list[int]:
        return list(map(self.ids.__getitem__, words))

    def rewards(self, tokens: Tensor, images: Sequence[int]) -> Tensor:
        """CIDEr-D, float64 [N], of samples int64 [N,T], each with its training image."""
        captions = []
        for row in tokens[:, 1:].tolist():
            pieces = [self.pieces[token] for token in row if token > Vocabulary.END]
            ends = [END] * (Vocabulary.END in row)
            captions.append([*self.encode(self.vocabulary.text(pieces).split()), *ends])
        return torch.from_numpy(self.cider.score(captions, images))

    def __call__(
        self, decoder: Decoder, features: Tensor, indices: Sequence[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Sample, and compare. With `tokens` and `row_weights` the sum of `caption_losses` has in the mean the gradient
        of -K times the expected reward, summed over the batch's images.

        It puts the decoder into evaluation mode, in which it is to be trained: the words are drawn from the model
        without dropout, and only with the gradient of that very model is the mean as above.

        Args:
            features: [B,P,D].
            indices: the B training images.
            generator: for the samples.

        Returns:
            tokens int64 [N,T] and row_weights [N] for `caption_losses` (without label smoothing), and figures for the
            log: `reward`, the mean of the samples' CIDEr-D.
        """
        decoder.eval()
        tokens = sample_captions(decoder, features.detach(), self.samples, self.max_length, generator)
        images = [index for index in indices for _ in range(self.samples)]
        rewards = self.rewards(tokens, images).view(-1, self.samples)
        row_weights = advantages(rewards).flatten().to(decoder.word_output.weight)  # features may be in half precision
        return tokens, row_weights, {"reward": rewards.mean().item()}


def advantages(rewards: Tensor) -> Tensor:
    """rewards [B,K] -> each sample's less the mean of the image's other samples'. The baseline does not depend on the
    sample, so it takes nothing from the mean of the gradient; it makes it less noisy."""
    K = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (K / (K - 1))
