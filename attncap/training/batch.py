"""A batch on its way to the loss."""

from dataclasses import dataclass

from torch import Tensor, nn

from attncap.captioner import Captioner
from attncap.data.vocabulary import Vocabulary
from attncap.models.losses import caption_losses

TERMS = ("words", "attention")  # of the loss


@dataclass
class Batch:
    """A process's share of a batch, on its device. If none of its images can be read, `indices` is empty and the rest
    is None."""

    indices: list[int]  # of the examples
    pictures: Tensor | None = None  # images uint8 [B,3,S,S]; if the encoder is frozen, their features [B,P,D]
    tokens: Tensor | None = None  # int64 [N,T], on the device or the CPU
    row_weights: Tensor | None = None  # [N]
    inputs: Tensor | None = None  # int64 [N,T-1]
    reward: float = 0.0  # summed over rows

    @property
    def words(self) -> int:
        """The number of words to predict."""
        return 0 if self.tokens is None else int((self.tokens[:, 1:] != Vocabulary.PAD).sum())

    @property
    def rows(self) -> int:
        """The number of captions."""
        return 0 if self.tokens is None else len(self.tokens)


class Losses(nn.Module):
    """From a batch to the sums of the terms of its loss, see `caption_losses`. DistributedDataParallel wraps this."""

    def __init__(self, model: Captioner, label_smoothing: float):
        super().__init__()
        self.encoder, self.decoder, self.label_smoothing = model.encoder, model.decoder, label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if batch.pictures is None:  # the other processes wait for this one's gradients, which are 0
            return dict.fromkeys(TERMS, sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0)
        features = batch.pictures if batch.pictures.is_floating_point() else self.encoder(batch.pictures)
        return caption_losses(
            self.decoder, features, batch.tokens, self.label_smoothing, batch.row_weights, batch.inputs
        )
