"""Have NVIDIA's own parser and builder take the graph, with or without a GPU; the graph passes through unchanged.

`tensorrt_rtx` (extra `rtx`) parses and builds a real plan on any machine; only running it needs a GPU. A graph that is
refused fails the build, with the parser's words and the node. Where neither module is installed, nothing is proved, and
a note says so.
"""

from collections.abc import Mapping
from typing import Any

import onnx

from targets.passes.base import Kit, LoweringError, read_options
from targets.runtime.errors import EngineError, MissingRuntime
from targets.runtime.trt_build import build_apart, installed

EXACT = True
WHOLE = True


def lower(model: onnx.ModelProto, options: Mapping[str, Any], kit: Kit) -> onnx.ModelProto:
    """Options: `timeout_seconds`. Raises `LoweringError` where the graph is refused or TensorRT crashes on it."""
    asked = read_options("tensorrt_check", options, {"timeout_seconds": 600})
    # RTX first: it builds without a GPU, and TensorRT proper does not.
    module = installed(("tensorrt_rtx", "tensorrt"))
    if module is None:
        kit.note("NVIDIA's parser was not asked: tensorrt-rtx is not installed (extra rtx)")
        return model
    path = kit.work / "asked.onnx"
    onnx.save(model, path)
    try:
        built = build_apart(module, path, timeout=float(asked["timeout_seconds"]))
    except MissingRuntime as error:
        kit.note(f"NVIDIA's parser was not asked: {error}")
        return model
    except EngineError as error:
        raise LoweringError(f'pass "tensorrt_check": {error}') from error
    kit.note(f"{module} {built.version} takes the graph: a plan of {built.bytes:,} bytes in {built.seconds:.1f} s")
    return model
