"""From examples to captions."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from attncap.captioner import Caption, Captioner
from attncap.data import Example
from attncap.data.feature_cache import FeatureCache
from attncap.data.loader import Pictures, batches, report
from attncap.search.config import SearchConfig


def caption_examples(
    models: Sequence[Captioner],
    examples: Sequence,
    search: SearchConfig | None = None,
    *,
    batch_size: int = 32,
    workers: int = 0,
    features: FeatureCache | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[Example, list[Caption]]]:
    """Each example with its captions, best first, `search.n_best` of them, in the order of `examples`. Images that
    cannot be read are reported and left out.

    Args:
        models: one model, or the members of an ensemble.
        examples: anything with `name` and `image()`, see `attncap.data.Example`.
        search: the default settings if None.
        batch_size: images that go through the model together.
        workers: processes that read images; 0 reads them in this process.
        features: the examples' features, which saves encoding the images.
        progress: called after each batch with the number of examples in it.
    """
    search = search or SearchConfig()
    pictures = Pictures(examples, models[0].config.image_size) if features is None else features
    for indices, batch, errors in batches(pictures, batch_size, workers):
        for error in errors:
            report(str(error))
        if batch is not None:
            captions = _caption_batch(models, batch, search)
            yield from ((examples[i], found) for i, found in zip(indices, captions, strict=True))
        if progress is not None:
            progress(len(indices) + len(errors))


def _caption_batch(models: Sequence[Captioner], batch: Tensor, search: SearchConfig) -> list[list[Caption]]:
    """Images uint8 [B,3,S,S], or features [B,P,D] -> the captions of each image, best first."""
    model, *ensemble = models
    found = model.caption(batch, search, batch_size=len(batch), suppressed=search.suppressed, ensemble=ensemble)
    return [[caption, *caption.others] for caption in found]
