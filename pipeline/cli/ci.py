"""`ci`: build, hold the record against a baseline, and fail on a regression."""

import argparse
import sys
from pathlib import Path

from pipeline.cli.build import execute
from pipeline.cli.report import figure_files, rendered, write
from pipeline.cli.summary import summary
from pipeline.cli.ui import say, width
from pipeline.core.errors import PASSED, BadInput, GateRefused, Regressed
from pipeline.core.record import RunRecord
from pipeline.engine.build import Built
from pipeline.engine.step import Plan
from pipeline.report.diff import Comparison, check_baseline, compare
from pipeline.report.records import read_record


def run(args: argparse.Namespace) -> int:
    """0 kept, 1 a gate refused, 4 regression; bad input (2) and failed stages (3) are raised.

    The baseline is read and found comparable before anything is built. A refused gate rules before a regression:
    where the line ended early there is nothing to compare.
    """
    baseline = read_record(args.baseline, "baseline")
    for out in (args.junit, args.markdown):
        _writable(out, args.baseline)

    def comparable(made: Plan) -> None:
        configs = {s.name: (s.bisect.base if s.bisect else s.attempts[0]).config for s in made.steps}
        check_baseline(baseline, made.spec, made.data_digest, args.baseline, configs)

    built = execute(args, comparable)
    comparison = None if built.refused else compare(baseline, built.record)
    _write(args, built, comparison)
    say(summary(built, width()))
    if comparison is None:
        return _ended(built.refused)
    say(_lines(comparison, baseline, args.baseline))
    if not comparison.verdict.passed:
        names = ", ".join(dict.fromkeys(change.metric for change in comparison.regressions))
        return _ended(Regressed(f"regression against {args.baseline}: {names}"))
    return PASSED


def _writable(out: Path | None, baseline: Path) -> None:
    """Found out before hours of work, not after."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        raise BadInput(f"{out}: expected a file in a folder that exists, got {'a folder' if out.is_dir() else 'none'}")
    if out.resolve() == baseline.resolve():
        raise BadInput(f"{out}: this is the baseline; writing there would destroy it")


def _write(args: argparse.Namespace, built: Built, comparison: Comparison | None) -> None:
    if args.junit is not None:
        write(args.junit, rendered("junit", built.record, None, comparison))
    if args.markdown is not None:
        files, _ = figure_files(built.record, built.folder / "record.json", args.runs)
        write(args.markdown, rendered("markdown", built.record, files, comparison))


def _lines(comparison: Comparison, baseline: RunRecord, path: Path) -> str:
    """One line per number that is not the same, the regressions in full."""
    counts = {change.word: 0 for change in comparison.changes}
    for change in comparison.changes:
        counts[change.word] += 1
    told = ", ".join(f"{count} {word}" for word, count in sorted(counts.items()))
    lines = [f"against {path} ({baseline.name} for {baseline.spec.target}): {told}"]
    for change in comparison.changes:
        if change.regressed:
            lines += [f"  REGRESSED {change.stage}: {reason.text}" for reason in change.reasons if not reason.ok]
            lines += [f"            {change.paired.text()}"] if change.paired else []
        elif change.word in ("new", "vanished"):
            lines.append(f"  {change.word:<9} {change.stage}: {change.metric}")
        elif change.note:
            lines.append(f"  note      {change.stage}: {change.metric} {change.note}")
    return "\n".join(lines)


def _ended(error: GateRefused | Regressed | None) -> int:
    print(f"temper: {error}", file=sys.stderr)
    return error.status if error is not None else PASSED
