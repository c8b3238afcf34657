"""`report`: render a record, here or on another machine, years later, or after a refusal."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.canonical import file_digest
from pipeline.core.errors import BadInput, Tampered
from pipeline.core.record import RunRecord
from pipeline.report.diff import Comparison
from pipeline.report.figures import figure_names
from pipeline.report.records import read_record


def run(args: argparse.Namespace) -> int:
    path = find_record(args.record, args.runs)
    record = read_record(path)
    files, missing = figure_files(record, path, args.runs)
    text = rendered(_format(args.format, args.out), record, files)
    if missing:
        print(
            f"temper: {missing} figure files are not beside the record; the report is made without them",
            file=sys.stderr,
        )
    if args.out is None:
        sys.stdout.buffer.write(text.encode())  # whatever the locale says, pages are UTF-8
    else:
        write(args.out, text)
        print(args.out)
    return 0


def rendered(
    form: str, record: RunRecord, files: Mapping[str, Path] | None = None, comparison: Comparison | None = None
) -> str:
    """The record in one of `options.FORMATS`; each renderer is imported only when it is named."""
    if form == "junit":
        from pipeline.report import junit

        return junit.render(record, comparison)
    from pipeline.report.view import view

    shown = view(record, files, comparison)
    if form == "markdown":
        from pipeline.report import markdown

        return markdown.render(shown)
    from pipeline.report import html

    return html.render(shown)


def find_record(name: str, runs: Path) -> Path:
    """A file, a folder with a record.json, or the name of a run. Raises `BadInput` naming the runs there are."""
    for place in (Path(name), runs / name):
        if place.is_dir() and (place / "record.json").is_file():
            return place / "record.json"
        if place.is_file():
            return place
    there = sorted(path.parent.name for path in runs.glob("*/record.json"))
    known = f"runs in {runs}: {', '.join(there)}" if there else f"there is no run in {runs}"
    raise BadInput(f"{name}: expected a record.json, a folder that holds one, or the name of a run; {known}")


def figure_files(record: RunRecord, path: Path, runs: Path) -> tuple[dict[str, Path], int]:
    """The record's figures from the store next to it, and how many are not there.

    The store is looked for beside the run, beside the run of a bundle, and in `runs`. Raises `Tampered` where a stored
    file has other bytes than the record says.
    """
    here = path.resolve().parent
    stores = [place / "store" / "blobs" for place in (here.parent, here.parent.parent, runs.resolve())]
    found, missing = {}, 0
    for name, digest in figure_names(record).items():
        blob = next((b for s in stores if (b := s / digest[:2] / digest).is_file()), None)
        if blob is None:
            missing += 1
        elif file_digest(blob) != digest:
            raise Tampered(f"{blob}: {name} is not what the record says; `clean --verify` finds what else is damaged")
        else:
            found[name] = blob
    return found, missing


def write(path: Path, text: str) -> None:
    """All of it or nothing. Raises `BadInput` where the place cannot be written."""
    from pipeline.engine.disk import write_atomic

    if path.is_dir():
        raise BadInput(f"{path}: expected a file to write, this is a folder")
    write_atomic(path, text.encode())


def _format(asked: str | None, out: Path | None) -> str:
    if asked is not None or out is None:
        return asked or "html"
    return {".md": "markdown", ".xml": "junit"}.get(out.suffix, "html")
