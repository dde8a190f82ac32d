import base64
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from reports import html
from reports.plots import PLOTS


class Page(HTMLParser):
    """Collects text, images and whatever would be fetched from elsewhere; checks that tags close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.fetched = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        for key in ("src", "href"):
            if key in attributes and not attributes[key].startswith("data:"):
                self.fetched.append(attributes[key])
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run(run_maker, tmp_path_factory):
    run = run_maker(tmp_path_factory.mktemp("html"), name="broken <run>", num_pages=40, rate=12.0, violate_at=60)
    (run / "plots").mkdir()
    for plot in PLOTS:
        (run / "plots" / f"{plot.stem}.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg' id='{plot.stem}'/>")
    return run


@pytest.fixture
def summary(run):
    path = run / "summary.json"
    kept = path.read_text()
    yield json.loads(kept)
    path.write_text(kept)


def page_of(run):
    return Page(html.write(run).read_text(encoding="utf-8"))


def test_the_report_needs_nothing_beside_itself(run):
    page = page_of(run)
    assert page.fetched == []
    assert "url(" not in (run / "report.html").read_text()
    assert [image["alt"].split(":")[0] for image in page.images] == [plot.title for plot in PLOTS]
    for image, plot in zip(page.images, PLOTS, strict=True):
        kind, data = image["src"].split(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data)
        assert svg == (run / "plots" / f"{plot.stem}.svg").read_bytes()
        assert ElementTree.fromstring(svg).get("id") == plot.stem


def test_the_report_tells_verdict_violation_evidence_and_replay(run):
    words = page_of(run).words
    steps = json.loads((run / "summary.json").read_text())["steps"]
    assert "✗ violated" in words
    assert "P1 at step 60" in words
    assert "page 7 has two owners: requests 3 and 5 <b>both</b>" in words
    assert '{"page": 7, "owners": [3, 5]}' in words
    assert re.search(r"kvproof replay '\S*/broken <run>-20260101T000000Z-0007'", words)
    assert f"the device batch. {steps} 0 0 nothing to compare" in words
    assert f"P1 Each page from 1 on is exactly one of free, owned and fenced. {steps} {steps} 1 ✗ violated" in words


def test_what_others_wrote_is_escaped(run):
    html.write(run)
    source = (run / "report.html").read_text()
    assert "<b>both</b>" not in source
    assert "broken <run>" not in source
    assert "broken &lt;run&gt;" in source


def test_the_report_shows_what_the_failure_folder_keeps(run):
    failure = run / "failure"
    failure.mkdir()
    (failure / "replay.txt").write_text("kvproof replay runs/x/failure\n")
    (failure / "events.txt").write_text("".join(f"event {i}\n" for i in range(100)))
    words = page_of(run).words
    assert "kvproof replay runs/x/failure" in words
    assert "event 99" in words
    assert "event 60" in words
    assert "event 59" not in words


def test_expectations_and_refusals_are_listed(run, summary):
    summary |= {
        "verdict": "held",
        "expectations": [{"name": "violated", "expected": "P1", "found": "P1", "held": True}],
        "rejected_reasons": {"prompt is too long": 3},
        "device": {"platform": "cpu"},
        "crash": None,
    }
    summary["invariants"]["K1"] = {"checked": 0, "nontrivial": 0, "violated": 0}
    (run / "summary.json").write_text(json.dumps(summary))
    words = page_of(run).words
    assert "Invariants checked: 2." in words
    assert "✓ held" in words
    assert "violated P1 P1 ✓ held" in words
    assert "prompt is too long 3" in words
    assert "device platform cpu" in words


def test_a_summary_with_the_bare_minimum_still_gives_a_report(run, summary):
    kept = ("schema", "name", "clock", "steps", "requests", "verdict")
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in kept}))
    assert "✗ violated" in page_of(run).words


def test_the_same_record_gives_the_same_report(run):
    assert html.write(run).read_bytes() == html.write(run).read_bytes()


def test_print_and_dark_screens_have_their_own_colours(run):
    source = html.write(run).read_text()
    assert "@media print" in source
    assert "@media (prefers-color-scheme: dark)" in source


def test_missing_plots_are_drawn_first(run):
    (run / "plots" / "load.svg").unlink()
    assert len(page_of(run).images) == len(PLOTS)
    assert (run / "plots" / "load.svg").is_file()


def test_a_report_that_cannot_be_written_is_named(run):
    (run / "report.html").unlink(missing_ok=True)
    (run / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match=r"report\.html"):
        html.write(run)
    (run / "report.html").rmdir()
