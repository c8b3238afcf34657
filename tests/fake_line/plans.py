"""Plans over the fake stages, made without the planner."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.canonical import derive_seed, digest
from pipeline.core.gate import Budget, Limit
from pipeline.core.spec import Spec
from pipeline.core.stage import ORDER
from pipeline.engine.step import Attempt, Bisect, Plan, Step

Overrides = Mapping[str, Any]


def step(
    name: str,
    overrides: Overrides | None = None,
    attempts: Sequence[Overrides] = ({},),
    budget: Budget = (),
    bisect: Mapping[str, Any] | None = None,
    seed: int = 0,
    procs: int = 1,
    timeout_seconds: float | None = None,
    code: str = "code",
) -> Step:
    """One fake step; `bisect` holds the fields of `Bisect` from `knob` to `integer`."""
    parse = importlib.import_module(f"tests.fake_line.{name}").Config
    made = [
        Attempt(overrides=dict(o), config=parse(**{**(overrides or {}), **o}).model_dump(mode="json"), code=code)
        for o in attempts
    ]
    return Step(
        name=name,
        module=f"tests.fake_line.{name}",
        attempts=() if bisect else tuple(made),
        bisect=Bisect(path=(bisect["knob"],), base=made[0], **bisect) if bisect else None,
        budget=budget,
        libraries={"numpy": "2.0"},
        seed=derive_seed(seed, name),
        timeout_seconds=timeout_seconds,
        procs=procs,
    )


def plan(*steps: Step, name: str = "toy", target: str = "reference", data: str = "data", seed: int = 0) -> Plan:
    """All five stages; those given replace the plain ones."""
    given = {s.name: s for s in steps}
    line = tuple(given.get(stage) or step(stage, seed=seed) for stage in ORDER)
    budget = {s.name: s.budget for s in line if s.budget}
    spec = Spec(name=name, seed=seed, target=target, task={"data": "none"}, budget=budget)
    return Plan(spec=spec, spec_digest=digest(spec.dump()), data_digest=data, steps=line)


def slow(pause: float = 0.02, steps: int = 4, name: str = "toy", seed: int = 0) -> Plan:
    """Every stage takes `steps` pauses, and can be killed in any of them."""
    long = {"pause": pause, "steps": steps}
    return plan(*(step(stage, long, seed=seed) for stage in ORDER), name=name, seed=seed)


def at_least(metric: str, bound: float, **more: Any) -> Limit:
    return Limit(metric=metric, at_least=bound, **more)


def at_most(metric: str, bound: float, **more: Any) -> Limit:
    return Limit(metric=metric, at_most=bound, **more)
