"""The contract of a searcher. Scores and costs arrive as closures."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from torch import Generator

from stages.method import Method, polymorphic
from stages.nn.arch import Arch

FOLDER = "stages.searchers"


@dataclass(frozen=True, slots=True)
class Bench:
    """What a searcher may use, made by `stages/search.py`.

    `arch(builder, options)` completes an architecture with the task's shape, classes and normalisation.
    `score(arch)` trains it shortly and robustly and returns its robust accuracy on the hold-out; it is kept per
    candidate, so asking again is free. `cost(arch)` returns {"macs", "params", "activations"} without training.
    """

    arch: Callable[[str, Mapping[str, object]], Arch]
    score: Callable[[Arch], float]
    cost: Callable[[Arch], Mapping[str, float]]
    note: Callable[[str], None]


class Searcher(Method):
    @abstractmethod
    def search(self, bench: Bench, rng: Generator) -> Arch: ...


AnySearcher = Annotated[Searcher, *polymorphic(FOLDER, Searcher)]
