"""Describe a data set before training on it: its layout, images, captions, splits and words.

attncap data flickr8k/ --decode
attncap data coco/annotations/dataset_coco.json --convert coco/karpathy.jsonl
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from attncap.cli import command
from attncap.config import check_at_least
from attncap.data import Dataset, Splits, first_of, read_dataset, report_skipped
from attncap.data.dataset import one_line
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.files import write_atomically

MIN_COUNTS = (1, 2, 3, 5, 10)
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
CELLS, CHANNELS = 49, 2048  # of the default encoder's feature grid: ResNet-50, images of 224 pixels


@dataclass
class DataConfig:
    path: tyro.conf.Positional[str]
    """shapes, or the path of a data set: its folder or its caption file."""
    images: str | None = None
    """Folder of the images, if it is not near the captions."""
    decode: bool = False
    """Also read every image to find broken ones."""
    convert: str | None = None
    """Also write the data set to this file, NAME.jsonl: one line per caption, with its image's path and its split."""
    seed: int = 0
    """Random seed for generating shapes, and for the splits if the data set has none."""
    workers: int = min(8, os.cpu_count() or 1)
    """Number of processes that read images for --decode; 0 reads them in the main process."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "seed", "workers")


def run(prog: str, arguments: Sequence[str]) -> None:
    command.run(main, DataConfig, __doc__, prog, arguments)


def main(config: DataConfig) -> None:
    if config.convert is not None and not config.convert.lower().endswith(".jsonl"):
        raise CallError(f"--convert {config.convert}: should be NAME.jsonl")
    if config.convert is not None and Path(config.convert).resolve() == Path(config.path).resolve():
        raise CallError(f"--convert {config.convert}: this is the data set itself; give another name")
    if config.convert is not None and config.path == "shapes":
        raise CallError(f"--convert {config.convert}: shapes is synthetic and has no image files to name")
    dataset = read_dataset(config.path, config.seed, config.images)
    report_skipped(dataset.skipped)
    if config.convert is not None:
        convert(dataset.splits, Path(config.convert))
    print(describe(dataset, config.seed))
    print(f"missing images  {named([item.name for item in dataset.missing])}")
    if config.decode:
        print(f"broken images   {named(broken_images(dataset.splits, config.workers))}")


def describe(dataset: Dataset, seed: int) -> str:
    """Statistics of the data set, as lines of text. `seed` is the one from which its splits were drawn, if it has none
    of its own. Words are counted in the training captions, as a model learns them."""
    import numpy as np
    from tqdm import tqdm

    from attncap.data.feature_size import size_in_words

    splits = dataset.splits
    lengths, counts = [], Counter()
    with tqdm(total=sum(map(len, splits.values())), desc="counting words", unit="image", leave=False) as bar:
        for split, examples in splits.items():
            for example in examples:
                for words in map(tokenize, example.captions):
                    lengths.append(len(words))
                    if split == "train":
                        counts.update(words)
                bar.update()
    sizes = [(split, len(examples), sum(len(e.captions) for e in examples)) for split, examples in splits.items()]
    images, captions = (sum(column) for column in list(zip(*sizes, strict=True))[1:])
    lines = [f"layout          {one_line(dataset.layout)}"]
    if folders := {example.path.parent: None for part in splits.values() for example in part if not example.scene}:
        lines.append(f"images          {first_of(list(folders))}")
    if dataset.lists:
        lines.append(f"splits          {first_of(dataset.lists)}")
    elif dataset.drawn:
        lines.append(f"splits          drawn at random with --seed {seed}")
    lines += ["", "split     images    captions"]
    lines += [f"{split:5} {n:10,}  {m:10,}" for split, n, m in [*sizes, ("all", images, captions)]]
    if counts:
        lines += ["", "words seen at least   words    share of all words in train"]
        for least in MIN_COUNTS:
            kept = [n for word, n in counts.items() if n >= least and word not in Vocabulary.SPECIALS]
            lines.append(f"{least:10} times {len(kept):10,}    {sum(kept) / counts.total():7.2%}")
    if lengths:
        values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
        lines += ["", "words in a caption, by percentile"]
        lines += ["".join(f"{p:5}%" for p in PERCENTILES), "".join(f"{value:6}" for value in values)]
    size = size_in_words(images, CELLS, CHANNELS)
    return "\n".join([*lines, "", f"feature cache   {size}, with the default encoder"])


def named(names: Sequence[object]) -> str:
    """How many names there are, and the first ones."""
    return f"{len(names):,}: {first_of(names)}" if names else "0"


def broken_images(splits: Splits, workers: int) -> list[str]:
    """The names of the images that cannot be read. Each is reported with the reason."""
    from tqdm import tqdm

    from attncap.data.loader import Pictures, batches

    examples = [example for part in splits.values() for example in part]
    read: set[int] = set()
    with tqdm(total=len(examples), desc="reading images", unit="image", leave=False) as bar:
        for indices, _, skipped in batches(Pictures(examples, size=1), 32, workers):
            report_skipped(skipped)
            read.update(indices)
            bar.update(len(indices) + len(skipped))
    return [example.name for i, example in enumerate(examples) if i not in read]


def convert(splits: Splits, path: Path) -> None:
    """Write JSON Lines that read back as the same examples. An image inside the file's own folder is named relative to
    it, any other one by its full path. Raises CallError for a data set without captions, and UserError when the file
    cannot be written."""
    folder = os.path.join(os.path.abspath(path.parent), "")
    lines = [
        {"image": os.path.abspath(example.path).removeprefix(folder), "caption": caption, "split": split}
        for split, examples in splits.items()
        for example in examples
        for caption in example.captions
    ]
    if not lines:
        raise CallError(f"--convert {path}: the data set has no captions")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))  # for unpaired surrogates, which JSON escapes
    print(f"wrote {path}: {len(lines):,} lines")
