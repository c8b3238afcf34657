"""Checks of builder options that every builder shares."""

from collections.abc import Sequence

from torch import nn

from stages.method import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


def positive(**options: object) -> None:
    """Every option is a whole number of at least 1; raises `InputError` naming the one that is not."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, got {value!r}")


def numbers(name: str, values: object, count: int | None = None) -> tuple[float, ...]:
    """A non-empty list of numbers above 0, `count` of them where given; raises `InputError`."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name}: expected a list of numbers, got {values!r}")
    if count is not None and len(values) != count:
        raise InputError(f"{name}: expected {count} numbers, one per stage, got {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise InputError(f"{name}: expected numbers above 0, got {value!r}")
    return tuple(values)


def whole(name: str, values: object, count: int | None = None) -> tuple[int, ...]:
    """As `numbers`, and each of them whole."""
    found = numbers(name, values, count)
    positive(**{f"{name}[{i}]": value for i, value in enumerate(found)})
    return tuple(int(value) for value in found)


def activation(name: str) -> type[nn.Module]:
    """The module of an activation; raises `InputError` with the names on offer."""
    if name not in ACTIVATIONS:
        raise InputError(f'activation: expected {" or ".join(ACTIVATIONS)}, got "{name}"')
    return ACTIVATIONS[name]


def image(input_shape: tuple[int, int, int], classes: int, least: int) -> tuple[int, int, int]:
    """[C, H, W] with sides of at least `least` pixels, and at least two classes; raises `InputError`."""
    channels, height, width = input_shape
    positive(channels=channels, height=height, width=width)
    if min(height, width) < least:
        raise InputError(f"input_shape: expected sides of at least {least} pixels, got {height}x{width}")
    if classes < 2:
        raise InputError(f"classes: expected at least 2, got {classes}")
    return channels, height, width
