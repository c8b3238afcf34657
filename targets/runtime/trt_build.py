"""ONNX -> TensorRT engine, strongly typed: the precision is in the graph, so one path serves 10.3 to 11.x and RTX.

`trt` is an argument: `tensorrt` on a device, `tensorrt_rtx` on machines without a GPU, where NVIDIA's parser and
builder run for real all the same. Both can crash the process: `build_apart` runs this file in another.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from targets.runtime.errors import EngineError, MissingRuntime
from targets.runtime.form import BATCHES

MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt-rtx", "tensorrt_rtx")}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Built:
    """What a builder made: its module and version, bytes of the plan, seconds it took."""

    module: str
    version: str
    bytes: int
    seconds: float


def installed(names: tuple[str, ...] = tuple(MODULES)) -> str | None:
    """The first TensorRT module that is installed, without importing it (an import can crash)."""
    for name in names:
        for distribution in MODULES[name]:
            try:
                metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            return name
    return None


def build(trt: Any, model: bytes, batches: tuple[int, int, int] = BATCHES) -> bytes:
    """Parse and build; returns the serialised plan.

    Raises `EngineError` with the parser's own messages, each with the node they are about.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise EngineError(f"TensorRT made no builder: {_said(logger)}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise EngineError("NVIDIA's parser refused the graph:\n" + "\n".join(_about(e) for e in errors))
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, batches))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"NVIDIA's builder refused the graph: {_said(logger)}")
    return bytes(plan)


def build_apart(
    module: str, model: Path, plan: Path | None = None, batches: tuple[int, int, int] = BATCHES, timeout: float = 600.0
) -> Built:
    """`build` in a process of its own; the plan is written to `plan` where one is given.

    Raises `MissingRuntime` where the module cannot be imported, `EngineError` where the graph is refused, the process
    crashes, or it does not end within `timeout` seconds.
    """
    task = {"module": module, "model": str(model), "plan": str(plan) if plan else None, "batches": list(batches)}
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "targets.runtime.trt_build", json.dumps(task)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"{module} did not build {model.name} within {timeout:g} s") from None
    if done.returncode != 0:
        tail = " / ".join(done.stderr.strip().splitlines()[-3:]) or "no message"
        raise EngineError(f"{module} crashed on {model.name} (status {done.returncode}): {tail}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "missing" in answer:
        raise MissingRuntime(answer["missing"])
    if "refused" in answer:
        raise EngineError(f"{model.name}: {answer['refused']}")
    return Built(module, answer["version"], answer["bytes"], answer["seconds"])


def _profile(builder: Any, network: Any, batches: tuple[int, int, int]) -> Any:
    if network.num_inputs != 1 or network.num_outputs not in (1, 3):
        raise EngineError(
            "expected one input, and logits alone or with a detector's score and flag, "
            f"got {network.num_inputs} inputs and {network.num_outputs} outputs"
        )
    tensor = network.get_input(0)
    inner = tuple(tensor.shape)[1:]
    if any(size < 1 for size in inner):
        raise EngineError(f"{tensor.name}: only the batch may be symbolic, got {tuple(tensor.shape)}")
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, *((batch, *inner) for batch in batches))
    return profile


def _logger(trt: Any) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc]
        """Keeps what TensorRT says, instead of writing to standard error."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.lines.append(message)

    return Collector()


def _said(logger: Any) -> str:
    return "; ".join(logger.lines[-5:]) or "it gave no reason"


def _about(error: Any) -> str:
    """One parser error as `  node "name" (Operator): message`. Older parsers know the node's number only."""
    name = error.node_name() if hasattr(error, "node_name") else f"number {error.node()}"
    operator = error.node_operator() if hasattr(error, "node_operator") else "operator unknown"
    return f'  node "{name}" ({operator}): {" ".join(error.desc().split())}'


def _child(task: dict[str, Any]) -> dict[str, Any]:
    try:
        trt = import_module(task["module"])
    except (ImportError, OSError) as error:
        return {"missing": f"{task['module']} cannot be imported: {error}"}
    start = time.perf_counter()
    try:
        plan = build(trt, Path(task["model"]).read_bytes(), tuple(task["batches"]))
    except EngineError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - start
    if task["plan"]:
        Path(task["plan"]).write_bytes(plan)
    return {"version": trt.__version__, "bytes": len(plan), "seconds": seconds}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(json.loads(sys.argv[1]))) + "\n")
