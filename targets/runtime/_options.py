"""Types of options that the commands on the device share."""

import argparse


def at_least_one(text: str) -> int:
    return _whole(text, 1)


def at_least_zero(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'expected a whole number of at least {least}, got "{text}"')
    return int(text)
