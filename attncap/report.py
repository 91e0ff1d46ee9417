"""What an evaluation found, to read and to look at: the tables as text and Markdown, and a page of pictures."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from attncap.errors import UserError
from attncap.files import write_atomically
from attncap.metrics import Scores

THUMBNAIL = 200  # pixels
SHOWN = 200  # images of a page: more take long to load

STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .1em .8em .1em 0; text-align: left }
article { display: flex; gap: 1em; border-top: 1px solid #ddd; padding: .8em 0 }
figure { flex: 0 0 200px; margin: 0 } b { font-size: 17px } ul { margin: .3em 0; padding-left: 1.2em; color: #555 }
small { color: #777 }
"""


def tables(report: Mapping) -> list[list[tuple[str, ...]]]:
    """A report's tables, each a header and rows. `report` is what `evaluation.summary` gives, perhaps with "left out" and
    "difference"."""
    figures = [("figure", "value", "95 % interval")]
    figures += [(name, f"{f['value']:.4f}", _interval(f)) for name, f in report["figures"].items()]
    captions = [("captions", "value")]
    captions += [(name, f"{v}" if isinstance(v, int) else f"{v:.4f}") for name, v in report["captions"].items()]
    found = [figures, captions]
    if "difference" in report:
        rows = [("figure, difference", "value", "95 % interval", "above 0 in")]
        for name, d in report["difference"]["figures"].items():
            rows.append((name, f"{d['value']:+.4f}", _interval(d), f"{d['above']:.1%} of draws"))
        found.append(rows)
    return found


def _interval(figure: Mapping) -> str:
    return f"{figure['low']:.4f} to {figure['high']:.4f}"


def notes(report: Mapping) -> list[str]:
    """The sentences that belong to the tables."""
    found = [f"{report['images']} images. CIDEr is CIDEr-D, which coco-caption calls CIDEr."]
    found += [f"{name} left out: {reason}." for name, reason in report.get("left out", {}).items()]
    if "difference" in report:
        found.append(f"The difference is to {report['difference']['from']}, drawn in pairs.")
    return found


def as_text(report: Mapping) -> str:
    parts = []
    for rows in tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, "\n".join(notes(report))])


def as_markdown(report: Mapping) -> str:
    parts = []
    for header, *rows in tables(report):
        lines = [header, ("---",) * len(header), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, *notes(report)]) + "\n"


def write_page(
    path: Path,
    report: Mapping,
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    scores: Scores,
    images: Mapping[str, Callable[[], Image.Image]],
) -> None:
    """Write an HTML page in one file: the tables, then images with caption and references from the worst CIDEr to the
    best (ROUGE-L decides between equals). Of more than SHOWN it takes every so many, the worst and the best among them.

    `images` opens the image of a name; those that are not in it, or cannot be read, go without a picture.
    """
    rows = scores.rows()
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["CIDEr"], rows[i]["ROUGE-L"]))
    last, count = len(order) - 1, min(SHOWN, len(order))
    order = [order[round(k * last / max(1, count - 1))] for k in range(count)]
    parts = ["<!DOCTYPE html>", f'<meta charset="utf-8"><title>Captions</title><style>{STYLE}</style>']
    for header, *lines in tables(report):
        cells = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
    parts += [f"<p>{escape(note)}</p>" for note in notes(report)]
    parts.append(f"<h2>{len(order)} of {len(rows)} captions, from the worst to the best</h2>")
    for i in order:
        name = scores.images[i]
        said = "".join(f"<li>{escape(reference)}</li>" for reference in references[name])
        figures = ", ".join(f"{figure} {rows[i][figure]:.2f}" for figure in ("CIDEr", "ROUGE-L", "BLEU-4"))
        parts.append(
            f"<article><figure>{_thumbnail(images.get(name))}</figure><div><b>{escape(captions[name]) or '(empty)'}</b>"
            f"<ul>{said}</ul><small>{escape(name)}: {figures}</small></div></article>"
        )
    write_atomically(path, "\n".join(parts).encode("utf-8", errors="replace"))


def _thumbnail(open_image: Callable[[], Image.Image] | None) -> str:
    try:
        image = open_image() if open_image else None
    except UserError:
        image = None
    if image is None:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
