"""Drops a share of the weights; the more, the worse. `brittle` plants a gap between hold-out and test."""

from collections.abc import Mapping
from typing import Any

from pipeline.core.measurement import exact, fraction
from pipeline.core.stage import Context, Files, Result
from tests.fake_line._work import Slow, chain, written

LIBRARIES = ("numpy",)


class Config(Slow):
    ratio: float = 0.5


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"accuracy.robust.holdout", "size.weights"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    old = files["weights.safetensors"].read_bytes()
    left = old[: round(len(old) * (1 - config.ratio))]
    name = chain("compress", config, ctx)
    made = written(ctx, {"weights.safetensors": left, "compression.json": f'"{name}"'})
    measured = (
        fraction("accuracy.robust.holdout", round(90 - 40 * config.ratio), 100),
        exact("size.weights", len(left), "bytes"),
    )
    return Result({"arch.json": files["arch.json"], **made}, measured)
