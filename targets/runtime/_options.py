"""Types of options that the commands on the device share."""

import argparse


def at_least_one(text: str) -> int:
    return _whole(text, 1)


def at_least_zero(text: str) -> int:
    return _whole(text, 0)


def port(text: str) -> int:
    return _whole(text, 0, 65535)


def _whole(text: str, least: int, most: int | None = None) -> int:
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f'expected a whole number {span}, got "{text}"')
    return int(text)
