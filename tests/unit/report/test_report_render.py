"""The three renderers: golden files for the short ones, structure and safety for the page.

`python -m tests.unit.report.test_report_render` makes the golden files again; look at what changed before committing.
"""

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pipeline.core.gate import Reason, Verdict
from pipeline.core.record import RunRecord
from pipeline.report import html, junit, markdown
from pipeline.report.diff import compare
from pipeline.report.view import view
from tests.unit.report import sample

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = "<script>alert(1)</script>|`*_[x](javascript:0)\x08&\"'"
_VOID = {"meta", "img", "br"}


def golden() -> Mapping[str, str]:
    regressed = sample.passed(0.74)
    return {
        "refused.md": markdown.render(view(sample.refused())),
        "regressed.xml": junit.render(regressed, compare(sample.passed(), regressed)),
        "refused.xml": junit.render(sample.refused()),
    }


class Page(HTMLParser):
    """Collects what a page is made of, and fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def pages(folder: Path) -> dict[str, str]:
    figures = sample.figures(folder)
    regressed = sample.passed(0.74)
    return {
        "passed": html.render(view(sample.passed(), figures)),
        "refused": html.render(view(sample.refused())),
        "unfinished": html.render(view(sample.unfinished())),
        "compared": html.render(view(regressed, figures, compare(sample.passed(), regressed))),
    }


def hostile() -> RunRecord:
    """Every text that a stage or a user can set holds markup."""
    record = sample.refused()
    reason = Reason(metric="accuracy.robust.holdout", ok=False, text=HOSTILE)
    last = record.stages[-1].model_copy(update={"overrides": {HOSTILE: HOSTILE}, "verdict": Verdict(reasons=(reason,))})
    spec = record.spec.model_copy(update={"target": HOSTILE})
    update = {"stages": (*record.stages[:-1], last), "environment": {HOSTILE: HOSTILE}, "spec": spec, "name": HOSTILE}
    return record.model_copy(update=update)


@pytest.mark.parametrize("name", ["refused.md", "regressed.xml", "refused.xml"])
def test_the_text_is_the_recorded_one(name: str) -> None:
    assert golden()[name] == (GOLDEN / name).read_text("utf-8")


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    for text in pages(tmp_path).values():
        page = Page(text)
        assert "script" not in page.tags
        assert "link" not in page.tags
        sources = [value for _, name, value in page.attributes if name in ("src", "href", "action", "data")]
        assert all(value.startswith("data:image/png;base64,") for value in sources)
        assert not [name for _, name, _ in page.attributes if name.startswith("on") or name == "style"]
        assert "url(" not in text
        assert "@import" not in text
        assert "http://" not in text
        assert "https://" not in text


def test_markdown_says_all_that_the_page_says_in_words(tmp_path: Path) -> None:
    sample.figures(tmp_path)
    shown = view(sample.passed(), tmp_path)
    text = markdown.render(shown)
    assert all(sha in text for _, _, sha in shown.artifacts)
    assert [f"### {table.title}" in text for table in shown.tables] == [True] * len(shown.tables)
    assert shown.tables
    record = sample.passed()
    kept = [s.model_copy(update={"verdict": Verdict()}) if not s.chosen else s for s in record.stages]
    assert text.count(markdown.KEPT) == 0
    assert markdown.render(view(record.model_copy(update={"stages": tuple(kept)}))).count(markdown.KEPT) == 2


def test_every_picture_has_words(tmp_path: Path) -> None:
    page = Page(pages(tmp_path)["passed"])
    assert page.tags.count("img") == 18
    assert len([value for tag, name, value in page.attributes if tag == "img" and name == "alt" and value]) == 18
    drawn = [(name, value) for tag, name, value in page.attributes if tag == "svg"]
    labelled = sum(name == "aria-label" and bool(value) for name, value in drawn)
    hidden = sum((name, value) == ("aria-hidden", "true") for name, value in drawn)
    assert labelled + hidden == page.tags.count("svg")
    assert labelled >= 12


def test_the_bar_says_what_is_proved_open_and_broken_in_words_too(tmp_path: Path) -> None:
    page = Page(pages(tmp_path)["passed"])
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert "model.int8.onnx: proved 31 of 1000, open 752 of 1000, broken 217 of 1000" in labels
    wide = [float(value.removesuffix("%")) for tag, name, value in page.attributes if tag == "rect" and name == "width"
            and value.endswith("%") and value != "100%"]  # fmt: skip
    assert wide == [41.2, 37.8, 21.0] * 2 + [3.1, 75.2, 21.7]
    for words in ("proved 41.2 %", "open 75.2 %", "proved 31", "broken 217, 40 of them without an attack"):
        assert any(words in word for word in page.words), words
    assert not any("3.1 %" in word for word in page.words)  # it would not fit
    assert "| model.int8.onnx | 31 (3.1 %) | 752 (75.2 %) | 217 (21.7 %) | 40 | 1000 |" in markdown.render(
        view(sample.passed(), sample.figures(tmp_path))
    )


def test_shares_that_do_not_add_up_are_named_and_not_drawn(tmp_path: Path) -> None:
    path = sample.figures(tmp_path) / "figures.json"
    table = json.loads(path.read_text())
    table["verdicts"][0]["open"] += 1
    path.write_text(json.dumps(table))
    shown = view(sample.passed(), tmp_path)
    assert shown.verdicts == ()
    assert any("verdicts does not fit" in problem for problem in shown.problems)
    assert 'id="proved"' not in html.render(shown)


def test_the_page_shows_every_section(tmp_path: Path) -> None:
    text = pages(tmp_path)["compared"]
    for heading in (
        "baseline",
        "line",
        "proved",
        "cost",
        "curve",
        "confusion",
        "images",
        "validity",
        "meaning",
        "lineage",
    ):
        assert f'id="{heading}"' in text
    assert "2 of 24 numbers regressed" in text
    refused = pages(tmp_path)["refused"]
    assert 'id="curve"' not in refused
    assert "a loss of 0.17 must be &lt;= 0.03" in refused


def test_equal_records_make_equal_pages(tmp_path: Path) -> None:
    assert pages(tmp_path / "a") == pages(tmp_path / "b")


def test_the_style_is_the_one_that_the_page_allows(tmp_path: Path) -> None:
    import base64
    import hashlib

    text = pages(tmp_path)["refused"]
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in text.replace("&#39;", "'")


def test_hostile_text_stays_text() -> None:
    record = hostile()
    page = Page(html.render(view(record)))
    assert "script" not in page.tags
    assert any("<script>alert(1)</script>" in word for word in page.words)
    assert "<script" not in markdown.render(view(record))
    root = ET.fromstring(junit.render(record))
    failure = root.find("testsuite/testcase/failure")
    assert failure is not None
    assert failure.text == HOSTILE.replace("\x08", "?")


def test_many_classes_with_long_names_stay_small_and_whole(tmp_path: Path) -> None:
    names = [f"a <long> name {i}" for i in range(100)]
    text = html.render(view(sample.passed(), sample.figures(tmp_path, names)))
    Page(text)
    assert len(text) < 400_000
    assert "<long>" not in text


def test_junit_counts_what_failed_and_skips_what_the_line_repaired() -> None:
    root = ET.fromstring(junit.render(sample.passed()))
    assert (root.get("failures"), root.get("skipped")) == ("0", "2")
    assert int(root.get("tests", "0")) == len(root.findall("testsuite/testcase"))
    refused = ET.fromstring(junit.render(sample.refused()))
    failed = [case.get("name") for case in refused.findall("testsuite/testcase") if case.find("failure") is not None]
    assert failed == ["accuracy.robust.holdout", "every gate held"]


def test_junit_names_the_metric_that_regressed() -> None:
    regressed = sample.passed(0.74)
    root = ET.fromstring(junit.render(regressed, compare(sample.passed(), regressed)))
    messages = [failure.get("message", "") for failure in root.findall("testsuite[@name='baseline']/testcase/failure")]
    assert len(messages) == 2
    assert messages[0].startswith("regression of accuracy.robust.test: accuracy.robust.test 0.74 was 0.79")


if __name__ == "__main__":
    for name, text in golden().items():
        (GOLDEN / name).write_text(text, "utf-8")
