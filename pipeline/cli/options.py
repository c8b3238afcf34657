"""Options that `build`, `ci` and `plan` share."""

import argparse
import json
import os
from pathlib import Path

from pipeline.core.spec import Draft, read


def line_options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs and the store live")
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="where data sets lie; else $TEMPER_DATA, else ./data"
    )


def draft_of(args: argparse.Namespace) -> Draft:
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
