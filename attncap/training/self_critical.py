"""Self-critical training: the model writes several captions for an image, and learns from how much better each one is
than the others.

Rennie et al., "Self-critical Sequence Training for Image Captioning", 2017, with the baseline of Luo, "A Better Variant
of Self-Critical Sequence Training", 2020: the mean reward of the image's other samples, in place of that of the greedy
caption.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from attncap.data.tokenizer import characters, lacks_spaces, tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.metrics.cider import CiderD
from attncap.models.decoder import Decoder
from attncap.search.sampling import sample_captions

END = -1  # the end of a caption, among the ids of the reward's words


class SelfCritical:
    """From the images of a batch to the captions that the model learns from, and the weight of each caption.

    The reward is CIDEr-D against all of the image's captions, with the document frequencies of the training split.
    <end> counts as a word in samples and references: otherwise a caption would lose nothing by stopping at "a man in
    a", since its n-grams are also those of a longer caption. <unk> is a word that no reference contains. Subwords are
    joined into the words that they spell; captions without spaces between words are compared by characters.

    Args:
        vocabulary: that of the model.
        captions: those of each training image.
        samples: K, the number of captions sampled for each image, at least 2.
        max_length: maximum number of words in a sample, including <end>.
    """

    def __init__(self, vocabulary: Vocabulary, captions: Sequence[Sequence[str]], samples: int, max_length: int):
        self.vocabulary, self.samples, self.max_length = vocabulary, samples, max_length
        self.pieces = list(vocabulary.words)
        self.pieces[Vocabulary.UNK] = "\ufffd"  # in no reference: the tokenizer drops it
        self.ids: defaultdict[str, int] = defaultdict()
        self.ids.default_factory = self.ids.__len__  # a new word gets the next number
        self.by_characters = lacks_spaces(caption for of_image in captions for caption in of_image)
        self.cider = CiderD([[[*self.encode(tokenize(c)), END] for c in of_image] for of_image in captions])

    def encode(self, words: Sequence[str]) -> list[int]:
        return [self.ids[word] for word in (characters(words) if self.by_characters else words)]

    def rewards(self, tokens: Tensor, images: Sequence[int]) -> Tensor:
        """CIDEr-D, float64 [N], of samples int64 [N,T]; `images` are their training images, by index."""
        captions = []
        for row in tokens[:, 1:].tolist():
            pieces = [self.pieces[token] for token in row if token > Vocabulary.END]
            caption = self.encode(self.vocabulary.spell(pieces))
            captions.append([*caption, END] if Vocabulary.END in row else caption)
        return torch.from_numpy(self.cider.score(captions, images))

    @torch.no_grad()
    def __call__(
        self, decoder: Decoder, features: Tensor, images: Sequence[int], seed: int
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Sample captions and compare them. With `tokens` and `row_weights`, the expected gradient of `caption_losses`
        is that of -K times the expected reward, summed over the batch's images, provided that it is computed without
        dropout, like the samples.

        Args:
            decoder: what `LSTMDecoder.for_inference` returns, or any other.
            features: [B,P,D].
            images: the B training images, by index.
            seed: for sampling; an image's samples depend on it and on the image's index.

        Returns:
            tokens int64 [N,1+T] and row_weights float64 [N] for `caption_losses` (tokens[:, :-1] are fed, tokens[:, 1:]
            are the targets, without label smoothing), and metrics for the log: `reward`, the mean CIDEr-D of the
            samples.
        """
        seeds = [(seed, image) for image in images]
        tokens = sample_captions(decoder, features, seeds, self.samples, self.max_length)
        of_rows = [image for image in images for _ in range(self.samples)]
        rewards = self.rewards(tokens, of_rows).view(-1, self.samples)
        return tokens, advantages(rewards).flatten(), {"reward": rewards.mean().item()}


def advantages(rewards: Tensor) -> Tensor:
    """rewards [B,K] -> each sample's reward minus the mean of the image's other samples'. The baseline does not depend
    on the sample, so it leaves the expected gradient as it is and makes it less noisy."""
    K = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (K / (K - 1))
