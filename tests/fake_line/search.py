"""Chooses an architecture: a number."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.core.measurement import exact
from pipeline.core.stage import Context, Files, Result
from tests.fake_line._work import Slow, chain, written

LIBRARIES = ("numpy",)


class Config(Slow):
    width: int = 8


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"cost.params"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    name = chain("search", config, ctx)
    made = written(ctx, {"arch.json": json.dumps({"width": config.width, "name": name})})
    return Result(made, (exact("cost.params", 100.0 * config.width, "count"),))
