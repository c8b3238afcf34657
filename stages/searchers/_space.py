"""The search space as data: builders with a list of choices per option."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator
from torch import Generator, randint

from stages.method import Value


class Each(Value):
    """One independent choice per position: `{ each = [[1, 2], [1, 2], [1]] }` stands for four lists of three."""

    each: tuple[tuple[Any, ...], ...]


class Space(Value):
    """All networks of one builder whose options take one of their choices each, independently.

    In a spec: `{ builder = "wrn", depths = { each = [[1, 2], [1, 2], [1]] }, widths = [[1, 1, 1], [2, 2, 1]] }`. A list
    holds the choices of an option, whatever they are; anything else is the option's one value.
    """

    builder: str
    options: dict[str, tuple[Any, ...] | Each] = {}

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: object) -> object:
        if not isinstance(data, Mapping) or "options" in data:
            return data
        options = {key: _choices(value) for key, value in data.items() if key != "builder"}
        return {"options": options, **({"builder": data["builder"]} if "builder" in data else {})}

    @model_validator(mode="after")
    def _not_empty(self) -> "Space":
        for name, choices in self.options.items():
            lists = choices.each if isinstance(choices, Each) else (choices,)
            if not lists or not all(lists):
                raise ValueError(f'space: option "{name}" of "{self.builder}" has nothing to choose from')
        return self

    def size(self) -> int:
        """How many candidates there are."""
        return math.prod(len(choices) for choices in self._axes())

    def candidate(self, number: int) -> tuple[str, dict[str, Any]]:
        """Builder and options of candidate 0..size-1; the last option varies fastest."""
        picks = []
        for choices in reversed(self._axes()):
            number, place = divmod(number, len(choices))
            picks.append(choices[place])
        found = iter(reversed(picks))
        options: dict[str, Any] = {}
        for name, choices in self.options.items():
            options[name] = [next(found) for _ in choices.each] if isinstance(choices, Each) else next(found)
        return self.builder, options

    def _axes(self) -> list[tuple[Any, ...]]:
        return [
            axis
            for choices in self.options.values()
            for axis in (choices.each if isinstance(choices, Each) else (choices,))
        ]


def _choices(value: object) -> object:
    if isinstance(value, Each) or (isinstance(value, Mapping) and set(value) == {"each"}):
        return value
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Spaces = Annotated[
    tuple[Space, ...], BeforeValidator(lambda data: (data,) if isinstance(data, Mapping | Space) else data)
]
"""One space, or several side by side; candidates are counted through."""


def pick(spaces: Sequence[Space], number: int) -> tuple[str, dict[str, Any]]:
    """Candidate 0..total-1 of all spaces."""
    for space in spaces:
        if number < space.size():
            return space.candidate(number)
        number -= space.size()
    raise IndexError(number)


def draw(spaces: Sequence[Space], rng: Generator) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every candidate once, in random order, without holding them all; uniform over what has not been drawn yet."""
    total = sum(space.size() for space in spaces)
    moved: dict[int, int] = {}
    for left in range(total, 0, -1):
        # Fisher-Yates on a virtual list 0..total-1 of which only the moved entries are stored.
        place = int(randint(left, (), generator=rng))
        yield pick(spaces, moved.get(place, place))
        moved[place] = moved.pop(left - 1, left - 1)
