"""What `init`, `list`, `audit` and `verify-spec` take on the command line; imported before torch is."""

import argparse
from pathlib import Path

from stages.catalog import KINDS


def init_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder with a folder per class, or a .npz file")
    parser.add_argument("--out", type=Path, default=Path("spec.toml"), help="where the spec goes (spec.toml)")
    parser.add_argument("--name", help="name of the run; else that of PATH")
    parser.add_argument("--groups", metavar="REGEX", help="what it catches in a file name marks near-duplicates")
    parser.add_argument("--size", type=int, metavar="N", help="resize every picture to N x N")
    parser.add_argument("--target", default="reference", metavar="NAME", help="the device to build for (reference)")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="as for build: else $TEMPER_DATA, else ./data")
    parser.add_argument("--force", action="store_true", help="overwrite the spec if it is there")


def list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(KINDS)}; none lists them all")


def verify_spec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="an ONNX file, gzip'd or not")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="a VNN-LIB file, gzip'd or not")
    parser.add_argument("--timeout", type=float, required=True, metavar="S", help="seconds until the answer is due")
    parser.add_argument("--witness", type=Path, metavar="OUT", help="where an unsafe input goes if there is one")


def audit_options(parser: argparse.ArgumentParser) -> None:
    """eps is in pixel units, whatever the file wants its pixels to be."""
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="an ONNX classifier, ours or not")
    data = parser.add_argument_group("images")
    data.add_argument(
        "--data", required=True, metavar="NAME|PATH", help="a data set (`list data`), a folder of pictures, or a .npz"
    )
    data.add_argument("--data-root", type=Path, metavar="DIR", help="as for build: else $TEMPER_DATA, else ./data")
    data.add_argument("--split", choices=("test", "train"), default="test", help="which part of the data (test)")
    which = data.add_mutually_exclusive_group()
    which.add_argument("--limit", type=_count, metavar="N", help="the first N images, in file order")
    which.add_argument("--indices", type=Path, metavar="FILE", help="the images listed: one 0-based index a line")
    how = parser.add_argument_group("attack")
    how.add_argument(
        "--threat", required=True, metavar="NORM:EPS", help="linf:8/255, l2:0.5 or l1:12, in [0, 1] pixels"
    )
    how.add_argument(
        "--attack",
        default="standard",
        metavar="standard|quick|NAME,...",
        help="which attacks (standard; `list attacks`)",
    )
    how.add_argument(
        "--certify", default="ibp", metavar="NAME,...", help='what proves (ibp; `list bounds`), "none" proves nothing'
    )
    how.add_argument(
        "--certify-seconds", type=_above_0, metavar="S", help="what is not proved by then stays open (no limit)"
    )
    how.add_argument("--certify-memory", type=_above_0, metavar="GIB", help="of coefficients, for all but ibp (2)")
    how.add_argument(
        "--no-shortcuts", dest="shortcuts", action="store_false", help="attack what is proved too; must agree"
    )
    how.add_argument("--grid", action="store_true", help="ask again with adversarial inputs rounded to 8-bit images")
    how.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    how.add_argument("--threads", type=_count, metavar="N", help="threads for computing (all cores)")
    smooth = parser.add_argument_group("--certify smoothing", "l2 radii of another classifier, the smoothed one")
    smooth.add_argument("--sigma", type=_number, metavar="S", help="standard deviation of the noise, in pixels (0.25)")
    smooth.add_argument("--n0", type=_count, metavar="N", help="noisy copies to choose the class by (100)")
    smooth.add_argument("--n", type=_count, metavar="N", help="further ones to bound its share by (10000)")
    smooth.add_argument("--alpha", type=_number, metavar="A", help="each radius holds at confidence 1 - A (0.001)")
    form = parser.add_argument_group("what the file wants")
    form.add_argument(
        "--mean", type=_numbers, metavar="M,...", help="it wants (x - mean) / std: one number, or one a channel"
    )
    form.add_argument("--std", type=_numbers, metavar="S,...", help="the same; 1 without it")
    form.add_argument(
        "--pixels",
        type=_span,
        metavar="LOW:HIGH",
        help="it wants pixels from LOW to HIGH, such as 0:255; --pixels=-1:1 needs the =",
    )
    form.add_argument("--layout", choices=("nchw", "nhwc"), help="channels first or last (as the file's shape says)")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="OUT", help="write every number, by docs/audit.md")
    out.add_argument("--evidence", type=Path, metavar="OUT", help="write every image's outcome, by docs/evidence.md")
    out.add_argument("--at-least", type=_fraction, metavar="F", help="exit 1 where robust accuracy is less")
    out.add_argument(
        "--early",
        type=_fraction,
        metavar="C",
        help="with --at-least: stop once its verdict is certain at this confidence, such as 0.99",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a whole number of at least 1, got "{text}"')
    return int(text)


def _fraction(text: str) -> float:
    (value,) = _floats(text, "a fraction from 0 to 1", 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'expected a fraction from 0 to 1, got "{text}"')
    return value


def _number(text: str) -> float:
    return _floats(text, "a number", 1)[0]


def _above_0(text: str) -> float:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'expected a number above 0, got "{text}"')
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return _floats(text, "numbers such as 0.49,0.48,0.45", None)


def _span(text: str) -> tuple[float, float]:
    low, high = _floats(text.replace(":", ","), "LOW:HIGH such as 0:255", 2)
    if low >= high:
        raise argparse.ArgumentTypeError(f'expected LOW below HIGH, got "{text}"')
    return low, high


def _floats(text: str, what: str, count: int | None) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if (
        not found
        or not all(abs(value) < float("inf") for value in found)
        or (count is not None and len(found) != count)
    ):
        raise argparse.ArgumentTypeError(f'expected {what}, got "{text}"')
    return found
