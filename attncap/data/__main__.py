"""Describe a data set before training on it: its layout, images, captions, splits and words.

python -m attncap.data flickr8k/ --decode
python -m attncap.data coco/annotations/dataset_coco.json --convert coco/karpathy.jsonl
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from attncap import command
from attncap.data import Dataset, Splits, first_of, read_dataset, report_skipped
from attncap.data.feature_size import size_in_words
from attncap.data.loader import Pictures, batches
from attncap.data.tokenizer import tokenize
from attncap.data.vocabulary import Vocabulary
from attncap.errors import CallError
from attncap.files import write_atomically

MIN_COUNTS = (1, 2, 3, 5, 10)
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
CELLS, CHANNELS = 49, 2048  # of the default encoder's grid: ResNet-50 on 224 px


@dataclass
class DataConfig:
    path: tyro.conf.Positional[str]
    """shapes, or the path of a data set: its folder, or its file of captions."""
    decode: bool = False
    """Also read every image, to find the broken ones."""
    convert: str | None = None
    """Also write the data set to this file, NAME.jsonl: a line a caption with its image's path and its split."""
    seed: int = 0
    """Of `shapes`, and of the splits where the data set has none."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes that read images."""
    debug: bool = False
    """Show the traceback of an error."""


def main(config: DataConfig) -> None:
    if config.convert is not None and not config.convert.lower().endswith(".jsonl"):
        raise CallError(f"--convert {config.convert}: should be NAME.jsonl")
    if config.convert is not None and Path(config.convert).resolve() == Path(config.path).resolve():
        raise CallError(f"--convert {config.convert}: is the data set itself; give another name")
    if config.convert is not None and config.path == "shapes":
        raise CallError(f"--convert {config.convert}: shapes draws its images and has no files to name")
    dataset = read_dataset(config.path, config.seed)
    report_skipped(dataset.skipped)
    if config.convert is not None:
        convert(dataset.splits, Path(config.convert))
    print(describe(dataset))
    print(f"missing images  {named([item.name for item in dataset.missing])}")
    if config.decode:
        print(f"broken images   {named(broken_images(dataset.splits, config.workers))}")


def describe(dataset: Dataset) -> str:
    """The data set in figures, as lines of text. Words are those of the training captions, as a model learns them."""
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
    lines = [f"layout          {dataset.layout}", "", "split     images    captions"]
    lines += [f"{split:5} {n:10,}  {m:10,}" for split, n, m in [*sizes, ("all", images, captions)]]
    if counts:
        lines += ["", "words seen at least   words    of the running words in train"]
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
    """How many, and the first of them."""
    return f"{len(names):,}" + ": " * bool(names) + first_of(names)


def broken_images(splits: Splits, workers: int) -> list[str]:
    """The names of the images that cannot be read; each is reported with its reason."""
    examples = [example for part in splits.values() for example in part]
    read: set[int] = set()
    with tqdm(total=len(examples), desc="reading images", unit="image", leave=False) as bar:
        for indices, _, skipped in batches(Pictures(examples, size=1), 32, workers):
            report_skipped(skipped)
            read.update(indices)
            bar.update(len(indices) + len(skipped))
    return [example.name for i, example in enumerate(examples) if i not in read]


def convert(splits: Splits, path: Path) -> None:
    """Write JSON Lines that read back as the same examples: an image is named from the file's own folder where it lies
    in it, and by its full path elsewhere. Raises CallError for a data set without captions, UserError when the file
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
    write_atomically(path, text.encode("utf-8", "backslashreplace"))  # of halves of characters, as JSON spells them
    print(f"wrote {path}: {len(lines):,} lines")


if __name__ == "__main__":
    command.run("data", main, DataConfig, __doc__)
