"""The HTML page of an evaluation, read back with Python's HTML parser."""

from html.parser import HTMLParser

import pytest
from PIL import Image

from attncap.errors import UserError
from attncap.evaluation import summary
from attncap.metrics import score
from attncap.report import MAX_SHOWN, as_markdown, as_text, write_page

NASTY = '<script>alert("1")</script> & a dog\ud83d'


class Page(HTMLParser):
    """The texts of a page by element, and the number of its images."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.images = [], {}, 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images += 1
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def write(path, captions, references, images):
    scores = score(captions, references)
    report = {**summary(scores, captions, None, None), "left out": {"SPICE": "<no> models"}}
    write_page(path, report, captions, references, scores, images)
    return Page(path), report


def test_captions_and_names_are_escaped(tmp_path):
    def broken():
        raise UserError("cannot be read")

    captions = {NASTY: NASTY, "b": "", "c": "a dog"}
    references = {NASTY: [NASTY, "</li></ul>"], "b": ["b"], "c": ["a cat runs"]}
    images = {NASTY: broken, "c": lambda: Image.new("RGB", (900, 300), "red")}
    page, report = write(tmp_path / "page.html", captions, references, images)
    shown = NASTY.replace("\ud83d", "?")
    assert page.texts["b"] == ["(empty)", "a dog", shown] and "script" not in page.texts and page.images == 1
    assert page.texts["li"][-2:] == [shown, "</li></ul>"]
    assert page.texts["small"][2].startswith(f"{shown}: CIDEr ")
    assert "SPICE skipped: <no> models." in page.texts["p"]
    assert "SPICE skipped: <no> models." in as_text(report) and "SPICE skipped: <no> models." in as_markdown(report)


@pytest.mark.parametrize("count", [1, MAX_SHOWN, MAX_SHOWN + 1, 3 * MAX_SHOWN])
def test_a_page_of_many_images_shows_evenly_spaced_ones_with_the_worst_and_the_best(tmp_path, count):
    captions = {str(i): f"w{i} " + "x " * (i % 7) for i in range(count)}
    references = {str(i): [f"w{i} x x x", f"a w{i} y z"] for i in range(count)}
    page, _ = write(tmp_path / "page.html", captions, references, {})
    shown = [text.split(":")[0] for text in page.texts["small"]]
    assert len(set(shown)) == len(shown) == min(count, MAX_SHOWN)
    assert page.texts["h2"] == [f"{len(shown)} of {count} captions, from the worst to the best"]
    scores = score(captions, references)
    keys = {name: (row["CIDEr"], row["ROUGE-L"]) for name, row in zip(scores.images, scores.rows(), strict=True)}
    assert [keys[name] for name in shown] == sorted(keys[name] for name in shown)
    assert keys[shown[0]] == min(keys.values()) and keys[shown[-1]] == max(keys.values())
