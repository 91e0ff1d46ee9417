"""From examples to captions."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from PIL import Image

from attncap.captioner import Caption, Captioner, Ensemble
from attncap.data import CaptionedImage, ImageError, Skipped, report_skipped
from attncap.data.feature_cache import FeatureCache
from attncap.data.loader import Pictures, batches
from attncap.search.config import SearchConfig


def caption_examples(
    model: Captioner | Ensemble,
    examples: Sequence[CaptionedImage],
    search: SearchConfig | None = None,
    *,
    batch_size: int = 32,
    workers: int = 0,
    features: FeatureCache | None = None,
    progress: Callable[[int], object] | None = None,
    skip: Callable[[Sequence[Skipped]], object] = report_skipped,
) -> Iterator[tuple[CaptionedImage, list[Caption]]]:
    """Each example with its captions, best first, `search.n_best` of them, in the order of `examples`. Images that
    cannot be read are left out.

    Args:
        search: settings of the search; the defaults if None.
        batch_size: number of images that go through the model together.
        workers: number of processes that read images; 0 reads them in this process.
        features: the examples' features, if they are cached; the images then need not be encoded.
        progress: called after each batch with the number of examples in it.
        skip: called with the images of a batch that cannot be read, if there are any; by default it reports them.
    """
    search = search or SearchConfig()
    pictures = Pictures(examples, model.config.image_size) if features is None else features
    for indices, batch, skipped in batches(pictures, batch_size, workers):
        if skipped:
            skip(skipped)
        if batch is not None:
            captions = model.caption_batch(batch, search)
            yield from ((examples[i], found) for i, found in zip(indices, captions, strict=True))
        if progress is not None:
            progress(len(indices) + len(skipped))


def read_images(examples: Iterable[CaptionedImage]) -> Iterator[tuple[CaptionedImage, Image.Image]]:
    """Each example with its image. Images that cannot be read are reported and left out."""
    for example in examples:
        try:
            image = example.image()
        except ImageError as error:
            report_skipped([Skipped(None, error.name, error.reason)])
        else:
            yield example, image
