"""Questions put to a library in a process of its own: a crash, a hang or a slow import there costs only the answer.

Every probe prints one JSON value on its last line. Telemetry of onnxruntime is off before it is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import ctypes, json
cuda = ctypes.CDLL("libcuda.so.1")
status = cuda.cuInit(0)
if status:
    raise SystemExit(f"cuInit answered {status}")
count, found = ctypes.c_int(), []
cuda.cuDeviceGetCount(ctypes.byref(count))
for i in range(count.value):
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), i)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    found.append(f"{name.value.decode()} (compute capability {major.value}.{minor.value})")
print(json.dumps(found))
"""

# An identity on one number. `get_available_providers` lists what is compiled in; only a session tells what works.
_IDENTITY = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0="
ONNXRUNTIME = f"""
import base64, json, sys
import onnxruntime as ort
ort.set_default_logger_severity(4)
model, works, failed = base64.b64decode("{_IDENTITY}"), [], "no provider is compiled in"
for name in ort.get_available_providers():
    if name.startswith("Azure"):
        continue  # somebody else's machine
    if sys.argv[1] == "none" and ("Tensor" in name or "CUDA" in name):
        continue  # without a driver these may crash the process instead of saying so
    try:
        used = ort.InferenceSession(model, providers=[name]).get_providers()[0]
    except Exception as error:
        failed = name + ": " + (str(error).strip().splitlines() or [type(error).__name__])[0]
        continue
    if used == name:
        works.append(name.removesuffix("ExecutionProvider"))
if not works:
    raise SystemExit(failed)
print(json.dumps(works))
"""

TENSORRT = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
runs = sys.argv[2] != "none" and trt.Runtime(trt.Logger(trt.Logger.ERROR)) is not None
print(json.dumps([trt.__version__, runs]))
"""

TORCH = """
import json, torch
print(json.dumps([torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]))
"""

DATA = """
import json, sys
from pathlib import Path
from pydantic import ValidationError
from stages.data.base import FOLDER, Dataset
from stages.method import load, names
found = {}
for name in names(FOLDER):
    try:
        files = load(FOLDER, Dataset, name).files(Path(sys.argv[1]))
        found[name] = [True, f"{len(files)} file{'s' if len(files) != 1 else ''}"]
    except ValidationError:
        found[name] = [True, "your own data: the spec names its place"]
    except (ValueError, OSError) as error:
        found[name] = [False, str(error)]
print(json.dumps(found))
"""


def ask(code: str, *words: str, timeout: float = 60) -> tuple[Any, str]:
    """The answer and an empty text, or None and why there is none."""
    env = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=timeout, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {timeout:.0f} s"
    except OSError as error:
        return None, str(error)
    if done.returncode < 0:
        return None, f"the process was killed by signal {-done.returncode}"
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    try:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (ValueError, IndexError):
        return None, "its answer could not be read"
