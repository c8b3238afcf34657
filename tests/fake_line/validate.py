"""Measures on the test split; may find its own numbers unbelievable."""

from collections.abc import Mapping
from typing import Any

from pipeline.core.measurement import fraction
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context, Files, Result
from tests.fake_line._work import Slow, chain, written

LIBRARIES = ("numpy",)


class Config(Slow):
    hits: int = 80
    findings: tuple[str, ...] = ()


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"accuracy.robust.test", "accuracy.clean.test"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    made = written(ctx, {"evidence.jsonl": f'"{chain("validate", config, ctx)}"\n'})
    hits = [i < config.hits for i in range(100)]
    passed = {name: files[name] for name in ("arch.json", "weights.safetensors")}
    return Result(
        {**passed, **made},
        (fraction("accuracy.robust.test", sum(hits), 100), fraction("accuracy.clean.test", 95, 100)),
        {"accuracy.robust.test": Outcomes.of(range(100), hits)},
        config.findings,
    )
