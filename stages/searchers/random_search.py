"""Seeded random search under limits on cost; the control that any cleverer search has to beat."""

from itertools import islice

from pydantic import Field, field_validator
from torch import Generator

from stages.method import InputError, module_of
from stages.nn.arch import BUILDERS, Arch
from stages.searchers._space import Space, Spaces, draw
from stages.searchers.base import Bench, Searcher

_LOOKS = 10_000


class RandomSearch(Searcher):
    """Draws candidates without repetition, keeps the first `trials` within the limits, and returns the best score.

    Equal scores go to the cheaper network (multiply-accumulates, then parameters), then to the earlier draw. At most
    10,000 candidates are looked at; looking costs no training.
    Source: Bergstra and Bengio 2012, with uniform choices.
    """

    space: Spaces = (Space(builder="small_cnn", options={"width": (16, 32), "hidden": (64, 128)}),)
    trials: int = Field(default=8, ge=1)
    max_macs: float | None = Field(default=None, gt=0)
    max_params: float | None = Field(default=None, gt=0)

    @field_validator("space")
    @classmethod
    def _builders(cls, space: Spaces) -> Spaces:
        if not space:
            raise ValueError("expected at least one table with a builder")
        for part in space:
            module_of(BUILDERS, part.builder)
        return space

    def search(self, bench: Bench, rng: Generator) -> Arch:
        """Raises `InputError` where no candidate is within the limits, naming the cheapest that was seen."""
        scored: list[tuple[float, float, float, Arch]] = []
        refused: list[tuple[float, float, Arch]] = []
        for builder, options in islice(draw(self.space, rng), _LOOKS):
            arch = bench.arch(builder, options)
            cost = bench.cost(arch)
            macs, params = cost["macs"], cost["params"]
            if self._beyond(macs, params):
                refused.append((macs, params, arch))
                continue
            score = bench.score(arch)
            scored.append((score, -macs, -params, arch))
            bench.note(f"candidate {len(scored)}: {builder} {options}: score {score:.4f}, {macs:,.0f} MACs")
            if len(scored) == self.trials:
                break
        if not scored:
            macs, params, arch = min(refused, key=lambda row: row[:2])
            raise InputError(
                f"random_search: no candidate within max_macs {self.max_macs} and max_params {self.max_params}; the "
                f"cheapest seen, {arch.builder} {arch.options}, has {macs:,.0f} MACs and {params:,.0f} parameters; "
                "raise the limits or add smaller choices to the space"
            )
        return max(scored, key=lambda row: row[:3])[3]

    def _beyond(self, macs: float, params: float) -> bool:
        over_macs = self.max_macs is not None and macs > self.max_macs
        return over_macs or (self.max_params is not None and params > self.max_params)
