"""The given architecture; nothing is searched."""

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator
from torch import Generator

from stages.nn.arch import Arch, check_options
from stages.searchers.base import Bench, Searcher


class Fixed(Searcher):
    """`arch` is a builder with its options: `{ builder = "small_cnn", width = 32 }`.

    Shape, classes and normalisation come from the task.
    """

    arch: dict[str, Any] = {"builder": "small_cnn"}

    @field_validator("arch")
    @classmethod
    def _builder(cls, arch: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(arch.get("builder"), str):
            raise ValueError(f'expected a table with "builder", such as {{ builder = "small_cnn" }}, got {arch!r}')
        check_options(arch["builder"], [key for key in arch if key != "builder"])
        return arch

    def search(self, bench: Bench, rng: Generator) -> Arch:
        del rng
        return bench.arch(self.arch["builder"], {key: value for key, value in self.arch.items() if key != "builder"})
