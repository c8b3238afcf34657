"""NVIDIA's parser and builder run for real here (tensorrt_rtx); what needs a GPU is held against stand-ins."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from targets.lowering.apply import apply
from targets.passes.base import Kit, LoweringError
from targets.passes.tensorrt_check import lower
from targets.runtime import trt, trt_build
from targets.runtime.errors import EngineError, MissingRuntime
from targets.runtime.trt import TrtEngine
from tests.graphs import images, tiny

Array = npt.NDArray[np.float32]
needs_rtx = pytest.mark.skipif(trt_build.installed(("tensorrt_rtx",)) is None, reason="the rtx extra is not installed")


@needs_rtx
def test_a_plan_is_built_without_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(tiny())
    built = trt_build.build_apart("tensorrt_rtx", tmp_path / "m.onnx", tmp_path / "plan")
    assert built.bytes == (tmp_path / "plan").stat().st_size > 1000
    assert built.version


@needs_rtx
def test_the_recipe_for_cpus_is_refused_with_the_parsers_words_and_the_node(tmp_path: Path) -> None:
    model = onnx.load_from_string(apply(tiny(), ["qdq_int8_cpu"], Kit(images(32), tmp_path)).model)
    with pytest.raises(LoweringError) as caught:
        lower(model, {}, Kit(images(32), tmp_path))
    text = str(caught.value)
    assert "NVIDIA's parser refused the graph" in text
    assert 'DequantizeLinear" (DequantizeLinear)' in text
    assert "Int32" in text


@needs_rtx
def test_bytes_that_are_no_model_are_refused_and_not_crashed_on(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match="refused the graph"):
        trt_build.build_apart("tensorrt_rtx", tmp_path / "m.onnx")


def test_a_module_that_cannot_be_imported_is_missing_and_one_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(tiny())
    with pytest.raises(MissingRuntime, match="no_such_trt cannot be imported"):
        trt_build.build_apart("no_such_trt", tmp_path / "m.onnx")
    (tmp_path / "dying_trt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "slow_trt.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"dying_trt crashed on m\.onnx \(status -11\)"):
        trt_build.build_apart("dying_trt", tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="did not build"):
        trt_build.build_apart("slow_trt", tmp_path / "m.onnx", timeout=0.5)


def test_without_any_tensorrt_the_check_says_that_nothing_was_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("targets.passes.tensorrt_check.installed", lambda _: None)
    said: list[str] = []
    model = onnx.load_from_string(tiny())
    assert lower(model, {}, Kit(images(8), tmp_path, note=said.append)) is model
    assert said == ["NVIDIA's parser was not asked: tensorrt-rtx is not installed (extra rtx)"]


def test_a_symbolic_height_is_refused_by_name() -> None:
    tensor = SimpleNamespace(name="input", shape=(-1, 1, -1, 8))
    network = SimpleNamespace(num_inputs=1, num_outputs=1, get_input=lambda _: tensor)
    with pytest.raises(EngineError, match="input: only the batch may be symbolic"):
        trt_build._profile(SimpleNamespace(), network, (1, 1, 8))


def test_parser_errors_of_old_and_new_versions_name_their_node() -> None:
    new = SimpleNamespace(node_name=lambda: "head", node_operator=lambda: "Gemm", desc=lambda: "bad\n  thing")
    old = SimpleNamespace(node=lambda: 7, desc=lambda: "bad")
    assert trt_build._about(new) == '  node "head" (Gemm): bad thing'
    assert trt_build._about(old) == '  node "number 7" (operator unknown): bad'


class Memory:
    """Stands in for the CUDA driver: device memory is a dictionary of arrays."""

    stream = 5

    def __init__(self) -> None:
        self.blocks: dict[int, Array] = {}

    def enter(self) -> None:
        return

    def allocate(self, size: int) -> int:
        self.blocks[len(self.blocks) + 1] = np.zeros(size // 4, np.float32)
        return len(self.blocks)

    def upload(self, pointer: int, array: Array) -> None:
        assert array.size <= self.blocks[pointer].size
        self.blocks[pointer][: array.size] = array.ravel()

    def download(self, array: Array, pointer: int) -> None:
        array.ravel()[:] = self.blocks[pointer][: array.size]

    def wait(self) -> None:
        return


def fake_trt(memory: Memory, works: bool = True) -> Any:
    """Stands in for a runtime whose engine gives the four first pixels as logits."""
    where: dict[str, int] = {}
    shape: list[tuple[int, ...]] = []

    def execute(stream: int) -> bool:
        assert stream == memory.stream
        batch, size = shape[-1][0], int(np.prod(shape[-1][1:]))
        pixels = memory.blocks[where["input"]][: batch * size].reshape(batch, size)
        memory.blocks[where["logits"]][: batch * 4] = pixels[:, :4].ravel()
        return works

    context = SimpleNamespace(
        set_tensor_address=where.__setitem__,
        set_input_shape=lambda _, dims: shape.append(tuple(dims)),
        execute_async_v3=execute,
    )
    engine = SimpleNamespace(create_execution_context=lambda: context)
    return SimpleNamespace(
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda *_: None}),
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine if plan == b"plan" else None),
    )


def test_an_engine_runs_long_batches_in_pieces_and_in_order() -> None:
    memory = Memory()
    engine = TrtEngine(fake_trt(memory), b"plan", memory, (1, 8, 8), 4)
    x = images(150)
    np.testing.assert_array_equal(engine(x), x.reshape(150, -1)[:, :4])


def test_a_plan_for_another_gpu_and_a_failed_run_are_errors() -> None:
    memory = Memory()
    with pytest.raises(EngineError, match="fits another GPU or version"):
        TrtEngine(fake_trt(memory), b"other", memory, (1, 8, 8), 4)
    with pytest.raises(EngineError, match="failed to run a batch of 2"):
        TrtEngine(fake_trt(memory, works=False), b"plan", memory, (1, 8, 8), 4)(images(2))


DRIVER = r"""
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
int cuInit(unsigned flags) { return getenv("NO_GPU") ? 100 : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = malloc(1); return 0; }
int cuCtxSetCurrent(void *context) { return context == 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = malloc(1); return 0; }
int cuMemAlloc_v2(uint64_t *pointer, size_t size) { *pointer = (uint64_t)(uintptr_t)malloc(size); return size == 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) { memcpy((void *)(uintptr_t)to, from, n); return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) { memcpy(to, (void *)(uintptr_t)from, n); return 0; }
int cuStreamSynchronize(void *stream) { return stream == 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *left = (size_t)1 << 35; *total = (size_t)1 << 36; return 0; }
"""
USE = """
import numpy as np
from targets.runtime.errors import EngineError
from targets.runtime.trt import Cuda, driver_answers
assert driver_answers()
cuda = Cuda()
sent = np.arange(5000, dtype=np.float32)
back = np.empty_like(sent)
block = cuda.allocate(sent.nbytes)
cuda.upload(block, sent)
cuda.wait()
cuda.download(back, block)
assert (back == sent).all()
assert cuda.free_bytes() == 1 << 35
try:
    cuda.allocate(0)
except EngineError as error:
    assert str(error) == "CUDA driver: cuMemAlloc_v2 failed with status 1", error
else:
    raise AssertionError
print("fine")
"""


def test_the_drivers_calls_pass_pointers_and_sizes_whole(tmp_path: Path) -> None:
    """The same symbols, backed by the C library: 64-bit pointers and sizes survive the way through ctypes."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", USE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr
    asked = "from targets.runtime.trt import driver_answers; print(driver_answers())"
    done = subprocess.run(
        [sys.executable, "-c", asked], env={**env, "NO_GPU": "1"}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "False\n", done.stderr


def test_a_machine_without_a_driver_is_told_apart_without_a_crash() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert trt.driver_answers() is False
        name = trt_build.installed()
        words = "TensorRT is not installed" if name is None else "no CUDA driver answers"
        with pytest.raises(MissingRuntime, match=words):
            trt.open_engine(b"plan", (1, 8, 8), 4)
    else:
        pytest.skip("this machine has a CUDA driver")
