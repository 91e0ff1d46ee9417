"""Reports of an evaluation: tables as text or Markdown, and an HTML page that also shows the images."""

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
MAX_SHOWN = 200  # images on a page; more would be slow to load

STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .1em .8em .1em 0; text-align: left }
article { display: flex; gap: 1em; border-top: 1px solid #ddd; padding: .8em 0 }
figure { flex: 0 0 200px; margin: 0 } b { font-size: 17px } ul { margin: .3em 0; padding-left: 1.2em; color: #555 }
small { color: #777 }
"""


def tables(report: Mapping) -> list[list[tuple[str, ...]]]:
    """The tables of a report, each a header followed by rows. `report` is the result of `summary`, optionally with
    "left out" and "difference"."""
    metrics = [("metric", "value", "95% interval")]
    metrics += [(name, f"{m['value']:.4f}", _interval(m)) for name, m in report["figures"].items()]
    captions = [("captions", "value")]
    captions += [(name, f"{v}" if isinstance(v, int) else f"{v:.4f}") for name, v in report["captions"].items()]
    found = [metrics, captions]
    if "difference" in report:
        rows = [("metric, difference", "value", "95% interval", "above 0 in")]
        for name, d in report["difference"]["figures"].items():
            rows.append((name, f"{d['value']:+.4f}", _interval(d), f"{d['above']:.1%} of resamples"))
        found.append(rows)
    return found


def _interval(metric: Mapping) -> str:
    return f"{metric['low']:.4f} to {metric['high']:.4f}"


def notes(report: Mapping) -> list[str]:
    """The sentences that explain the tables."""
    found = [f"{report['images']} images. CIDEr is CIDEr-D, as in coco-caption.", *report.get("notes", [])]
    found += [f"{name} skipped: {reason}." for name, reason in report.get("left out", {}).items()]
    if "difference" in report:
        found.append(f"Differences are relative to {report['difference']['from']}, by a paired bootstrap.")
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
    """Write a self-contained HTML page: the tables, then each image with its caption and references, from the worst
    CIDEr to the best (ties are ordered by ROUGE-L). Of more than MAX_SHOWN images it shows that many, evenly spaced in
    this order and including the worst and the best.

    Args:
        images: functions that open the images, by name. An image that is missing here or cannot be read is shown
            without a picture.

    Raises UserError if the file cannot be written.
    """
    rows = scores.rows()
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["CIDEr"], rows[i]["ROUGE-L"]))
    last, count = len(order) - 1, min(MAX_SHOWN, len(order))
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
        listed = "".join(f"<li>{escape(reference)}</li>" for reference in references[name])
        metrics = ", ".join(f"{metric} {rows[i][metric]:.2f}" for metric in ("CIDEr", "ROUGE-L", "BLEU-4"))
        parts.append(
            f"<article><figure>{_thumbnail(images.get(name))}</figure><div><b>{escape(captions[name]) or '(empty)'}</b>"
            f"<ul>{listed}</ul><small>{escape(name)}: {metrics}</small></div></article>"
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
