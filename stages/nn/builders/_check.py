"""Checks of builder options that every builder shares."""

from collections.abc import Sequence

from stages.method import InputError


def positive(**options: int) -> None:
    """Every option is a whole number of at least 1; raises `InputError` naming the one that is not."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")


def per_stage(name: str, values: object, stages: int | None = None) -> tuple[float, ...]:
    """Positive numbers, one per stage; raises `InputError` where one is missing or not above 0."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name}: expected a list of numbers, one per stage, got {values!r}")
    if stages is not None and len(values) != stages:
        raise InputError(f"{name}: expected {stages} numbers, one per stage, got {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{name}: expected numbers above 0, got {value!r}")
    return tuple(values)


def image(input_shape: tuple[int, int, int], classes: int, least: int) -> tuple[int, int, int]:
    """[C, H, W] with sides of at least `least` pixels, and at least two classes; raises `InputError`."""
    channels, height, width = input_shape
    positive(channels=channels, height=height, width=width)
    if min(height, width) < least:
        raise InputError(f"input_shape: expected sides of at least {least} pixels, got {height}x{width}")
    if classes < 2:
        raise InputError(f"classes: expected at least 2, got {classes}")
    return channels, height, width
