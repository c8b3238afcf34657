"""What the commands of this package take on the command line. Nothing heavy is imported, so that help comes at once."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.core.spec import Draft

FORMATS = ("html", "markdown", "junit")


def build_options(parser: argparse.ArgumentParser) -> None:
    """A line to run, and how to run it; none of --device, --threads, --quiet is in a cache key."""
    plan_options(parser)
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=_threads, metavar="N", help="threads for computing (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only warnings and the summary")


def ci_options(parser: argparse.ArgumentParser) -> None:
    build_options(parser)
    parser.add_argument("--baseline", type=Path, required=True, metavar="FILE", help="the record.json to hold against")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write every verdict as JUnit XML")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write report and comparison as Markdown")


def plan_options(parser: argparse.ArgumentParser) -> None:
    """SPEC or --preset, --target, --set, --name, --seed, --runs, --data-root."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("spec", nargs="?", type=Path, help="a spec file (TOML); none means the digits preset")
    which.add_argument("--preset", metavar="NAME", help="a spec that comes with Temper; `list presets` shows them")
    parser.add_argument("--target", metavar="NAME", help="the device to build for; `list targets` shows them")
    parser.add_argument(
        "--set",
        metavar="A.B=C",
        action="append",
        default=[],
        help='change one key, such as "train.epochs=3"; repeatable',
    )
    parser.add_argument("--name", help="name of the run; its folder is RUNS/NAME-TARGET")
    parser.add_argument("--seed", type=int, help="root seed of everything random")
    _runs(parser)
    _data_root(parser)


def report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "record", metavar="RUN_OR_RECORD", help="a run's folder, its name under --runs, or a record.json"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --out, else html")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write; none means standard output")
    _runs(parser)


def clean_options(parser: argparse.ArgumentParser) -> None:
    _runs(parser)
    parser.add_argument("--verify", action="store_true", help="rehash everything, set damaged entries aside, exit 2")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, only say what would go")


def doctor_options(parser: argparse.ArgumentParser) -> None:
    _data_root(parser)


def draft_of(args: argparse.Namespace) -> Draft:
    from pipeline.core.spec import read

    settings = list(args.set)
    if args.name is not None:
        settings.append(f"name={json.dumps(args.name)}")  # a text, also where it looks like a number
    if args.seed is not None:
        settings.append(f"seed={args.seed}")
    return read(args.spec, args.preset, settings)


def roots(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where runs go and where data lies, both absolute."""
    data = args.data_root or Path(os.environ.get("TEMPER_DATA") or "data")
    return args.runs.resolve(), data.resolve()


def _runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs and the store live")


def _data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where data sets lie; else $TEMPER_DATA, else ./data"
    )


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f'expected cpu, cuda or cuda:N, got "{text}"')
    return text


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number of at least 1, got "{text}"')
    return int(text)
