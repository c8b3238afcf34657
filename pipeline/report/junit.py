"""Verdicts as JUnit XML, the form in which CI servers show results."""

import re
from xml.etree import ElementTree as ET  # only builds; nothing is parsed here

from pipeline.core.gate import Reason
from pipeline.core.record import RunRecord, StageRecord
from pipeline.report.diff import Change, Comparison

_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(record: RunRecord, comparison: Comparison | None = None) -> str:
    """One suite per stage with a case per reason of its gate, one for the run, one for the baseline if there is one.

    A reason of an attempt that was set aside is skipped, not failed: the line repaired it. Works for refused and
    unfinished runs too. Characters that XML cannot hold become question marks.
    """
    root = ET.Element("testsuites", name=_clean(f"{record.name} for {record.spec.target}"))
    counting = {stage.name: stage for stage in record.stages}
    counting.update({stage.name: stage for stage in record.chosen()})
    for name, counted in counting.items():
        suite = ET.SubElement(root, "testsuite", name=_clean(f"gate.{name}"))
        suite.set("time", f"{sum(s.seconds for s in record.stages if s.name == name and not s.reused):.3f}")
        for stage in (s for s in record.stages if s.name == name):
            for reason in stage.verdict.reasons:
                _reason(suite, stage, reason, stage is counted)
    run = ET.SubElement(root, "testsuite", name="run")
    case = ET.SubElement(run, "testcase", classname="run", name="every gate held")
    if not record.complete:
        end = f"refused after {record.refused}" if record.refused else "the line stopped before its end"
        _failed(case, "run", end, end)
    if comparison is not None:
        suite = ET.SubElement(root, "testsuite", name="baseline")
        for change in comparison.changes:
            _change(suite, change)
    _count(root)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _reason(suite: ET.Element, stage: StageRecord, reason: Reason, counted: bool) -> None:
    attempt = "" if counted else f" (attempt {stage.attempt + 1}, set aside)"
    case = ET.SubElement(suite, "testcase", classname=_clean(f"gate.{stage.name}"))
    case.set("name", _clean(f"{reason.metric}{attempt}"))
    if not counted and not reason.ok:
        ET.SubElement(case, "skipped", message=_clean(reason.text))
    elif not reason.ok:
        _failed(case, "refused", reason.text, reason.text)
    else:
        ET.SubElement(case, "system-out").text = _clean(reason.text)


def _change(suite: ET.Element, change: Change) -> None:
    case = ET.SubElement(suite, "testcase", classname=f"baseline.{change.stage}", name=_clean(change.metric))
    texts = [reason.text for reason in change.reasons if not reason.ok]
    if texts:
        paired = f"\n{change.paired.text()}" if change.paired else ""
        _failed(case, "regression", f"regression of {change.metric}: {'; '.join(texts)}", "\n".join(texts) + paired)
        return
    facts = [change.word, change.note, *(reason.text for reason in change.reasons)]
    facts += [change.paired.text()] if change.paired else []
    ET.SubElement(case, "system-out").text = _clean("; ".join(fact for fact in facts if fact))


def _failed(case: ET.Element, kind: str, message: str, text: str) -> None:
    failure = ET.SubElement(case, "failure", type=kind, message=_clean(message))
    failure.text = _clean(text)


def _count(root: ET.Element) -> None:
    totals = {"tests": 0, "failures": 0, "skipped": 0}
    for suite in root:
        found = {
            "tests": len(suite.findall("testcase")),
            "failures": len(suite.findall("testcase/failure")),
            "skipped": len(suite.findall("testcase/skipped")),
        }
        for key, value in found.items():
            suite.set(key, str(value))
            totals[key] += value
    for key, value in totals.items():
        root.set(key, str(value))


def _clean(text: str) -> str:
    return _ILLEGAL.sub("?", text)
