"""What `init`, `list` and `verify-spec` take on the command line; imported before torch is."""

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
