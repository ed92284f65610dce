"""The page with plots: one file, sound HTML, figures drawn to scale, and nobody's text is markup."""

import json
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from etchat_hf.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br"}
ATTACK = '<script>alert(1)</script><img src="http://example.org/x.png">'


class Page(HTMLParser):
    """What a page holds: `(tag, attributes)` in order, and its texts; AssertionError if tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


def write_page(benchmark: str, rows: list[dict], folder: Path) -> tuple[Path, Page]:
    (folder / "p.json").write_text(json.dumps(rows))
    options = ["--similarity", "jaccard"] if benchmark == "etbench" else []
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", benchmark, str(folder / "p.json"), "--html", str(folder / "page.html"), *options])
    assert stop.value.code == 0
    return folder / "page.html", Page((folder / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def etbench(tmp_path):
    rows = json.loads((GOLDEN / "etbench_predictions.json").read_text())
    return write_page("etbench", rows, tmp_path)


def test_etbench_page_draws_every_task_and_answer(etbench):
    path, page = etbench
    assert page.count("line", **{"class": "mark"}) == 14 + 4  # published figures, also of the two absent ones; groups
    assert page.count("rect", **{"class": "predicted", "height": "16"}) == 12 + 4
    for text in ("TVG", "75.0", "38.6", "absent", "192 answers, 25 of which could not be read.", "IoU"):
        assert text in page.texts, text
    bins = [text for text in page.texts if " answers of IoU " in text]
    rows = json.loads((path.parent / "p.json").read_text())
    overlapping = Counter(row["task"] for row in rows if row["task"] in "tvg epm tal tem gvq dvc slc".split())
    assert len(bins) == 10 and sum(int(text.split()[0]) for text in bins) == overlapping.total()
    assert page.count("svg", **{"class": "timeline"}) == 3 * 9
    assert "Answers that could not be read" in page.texts and "no idea" in page.texts


def test_it_needs_no_other_file(etbench):
    path, page = etbench
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & {
        key for _, found in page.tags for key in found
    }
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not any(word in path.read_text() for word in ("url(", "@import", "http"))


@pytest.mark.parametrize("benchmark", ["etbench", "charades", "mvbench"])
def test_texts_of_files_are_no_markup(tmp_path, benchmark):
    attack = f"{ATTACK} \ud800"
    row = {
        "etbench": {"task": "tvg", "source": ATTACK, "video": ATTACK, "idx": ATTACK, "tgt": [0, 1], "q": attack},
        "charades": {"vid": ATTACK, "query": attack, "span": [0, 1], "pred": [3, 1], "response": attack},
        "mvbench": {"task": ATTACK, "video": ATTACK, "question": attack, "candidates": ["x"], "answer": "x"},
    }[benchmark]
    rows = [{**row, "a": answer, "video": f"{ATTACK}{i}"} for i, answer in enumerate(("0 - 1", ATTACK, None, 3))]
    _, page = write_page(benchmark, rows, tmp_path)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert any(ATTACK in text for text in page.texts)


def test_a_span_in_a_list_of_its_own_is_drawn(tmp_path):
    row = {"vid": "V", "query": "q", "span": [[0, 5]], "pred": [1, 5], "response": "1 - 5"}
    _, page = write_page("charades", [row], tmp_path)
    assert page.count("svg", **{"class": "timeline"}) == 1


def test_a_huge_answer_makes_no_huge_page(tmp_path):
    row = {"task": "tal", "source": "s", "idx": 0, "video": "v", "tgt": [[0, 5]], "a": "1 - 2 " * 20_000}
    path, page = write_page("etbench", [row], tmp_path)
    assert path.stat().st_size < 50_000
    assert page.count("rect", **{"class": "predicted", "height": "14"}) == 50
    assert any("and 19,992 more; 19,950 of them are not drawn" in text for text in page.texts)


def test_the_histogram_says_which_span_counts(tmp_path):
    annotation = {"source": "s", "video": "v", "o": ["x", "y"], "p": 0, "g": ["x"], "a": "A) 50 - 60, 0 - 10 x"}
    tasks = {"tvg": [0, 10], "gvq": [0, 10], "tal": [[0, 10]], "dvc": [[0, 10]]}
    rows = [{**annotation, "task": task, "idx": i, "tgt": tgt} for i, (task, tgt) in enumerate(tasks.items())]
    _, page = write_page("etbench", rows, tmp_path)
    (text,) = [text for text in page.texts if text.startswith("Answers by IoU")]
    assert "The first span, which alone is scored, of 2 answers of TVG, GVQ. " in text
    assert "The best of all spans, of 2 answers of TAL, DVC." in text
    bins = [text for text in page.texts if " answers of IoU " in text]
    assert bins[0].startswith("2 answers") and bins[-1].startswith("2 answers")


def test_a_page_of_nothing_but_failures(tmp_path):
    row = {"vid": "V", "query": "q", "span": [0, 1], "pred": None, "response": ""}
    _, page = write_page("charades", [row], tmp_path)
    assert "1 x no answer holds exactly two times: all 1 rows" in page.texts and "(empty)" in page.texts


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1000, 400])
def test_a_browser_draws_bars_to_scale(etbench, width):
    path, _ = etbench
    picture = path.with_suffix(".png")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},1400", f"--screenshot={picture}"]
    subprocess.run([*command, path.as_uri()], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)

    def is_colour(*rgb):
        return np.abs(pixels - rgb).max(-1) < 8

    blue, track = is_colour(0x3F, 0x74, 0xC8), is_colour(0xE9, 0xEC, 0xF1)
    # The rows of pixels through the first bar, RAR, which fills 58.3 % of its track; text has no such even columns.
    top = int(np.argmax((blue | track).sum(1) > 0.2 * width))
    filled, whole = (np.flatnonzero(mask[top + 2 : top + 12].all(0)) for mask in (blue, blue | track))
    assert np.ptp(filled) / np.ptp(whole) == pytest.approx(0.583, abs=0.02)
    assert not (blue | track)[:, -8:].any()  # nothing sticks out of the window
