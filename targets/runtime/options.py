"""What the commands on the device take on the command line; imported before anything that computes."""

import argparse
from pathlib import Path


def verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle, or the folder of the run that made it")
    parser.add_argument("--threads", type=_at_least_one, default=1, help="threads inside one operator (default 1)")


def serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle, or the folder of the run that made it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=_port, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.add_argument("--threads", type=_at_least_one, default=1, help="threads inside one operator (default 1)")
    parser.add_argument(
        "--runtime", choices=("auto", "cpu", "onnxruntime", "tensorrt"), default="auto", help="what computes the logits"
    )


def finish_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle, or the folder of the run that made it")
    parser.add_argument("--runs", type=_at_least_one, default=200, help="timed calls (default 200)")
    parser.add_argument(
        "--warmup", type=_at_least_zero, default=20, help="calls before them that do not count (default 20)"
    )
    parser.add_argument("--threads", type=_at_least_one, default=1, help="threads inside one operator (default 1)")
    parser.add_argument(
        "--runtime",
        choices=("auto", "onnxruntime", "tensorrt"),
        default="auto",
        help="what will run here; auto is the manifest's, and onnxruntime where that is not to be had",
    )


def _at_least_one(text: str) -> int:
    return _whole(text, 1)


def _at_least_zero(text: str) -> int:
    return _whole(text, 0)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _whole(text: str, least: int, most: int | None = None) -> int:
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f'expected a whole number {span}, got "{text}"')
    return int(text)
