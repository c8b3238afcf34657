"""Makes weights out of an architecture; the wider, the better."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.core.measurement import fraction
from pipeline.core.stage import Context, Files, Result
from tests.fake_line._work import Slow, chain, written

LIBRARIES = ("numpy",)


class Config(Slow):
    hits: int = 90


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"accuracy.robust.holdout"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    weights = chain(json.loads(files["arch.json"].read_text())["name"], config, ctx)
    if config.fault == "no result":
        return None  # type: ignore[return-value]
    made = written(ctx, {"weights.safetensors": bytes.fromhex(weights) * 64})
    return Result({"arch.json": files["arch.json"], **made}, (fraction("accuracy.robust.holdout", config.hits, 100),))
