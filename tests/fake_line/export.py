"""Writes what ships; may find its own file unbelievable."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.core.measurement import Measurement, exact
from pipeline.core.stage import Context, Files, Result
from tests.fake_line._work import Slow, chain, written

LIBRARIES = ("numpy",)


class Config(Slow):
    precision: str = "fp32"
    padding: int = 0
    contract: dict[str, Any] | None = {"model": "model.onnx"}
    findings: tuple[str, ...] = ()


def measures(config: Config, task: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"size.model", "latency.p95"})


def run(files: Files, config: Config, ctx: Context) -> Result:
    model = files["weights.safetensors"].read_bytes() + chain("export", config, ctx).encode()
    made = written(ctx, {"bundle/model.onnx": model, "bundle/extra/probe.npz": b"probe", "figures.json": "{}"})
    if config.padding:
        made |= written(ctx, {"bundle/padding.bin": b"x" * config.padding})
    if config.contract is not None:
        made |= written(ctx, {"bundle/contract.json": json.dumps({**config.contract, "precision": config.precision})})
    late = Measurement(name="latency.p95", value=2.0, low=1.5, high=2.5, unit="ms", samples=50, better="lower")
    return Result(made, (exact("size.model", len(model), "bytes"), late), findings=config.findings)
