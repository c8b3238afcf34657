"""Half-done training on disk: one safetensors file whose header holds the counters as JSON, replaced atomically."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from stages.nn import _atomic

FILE = "fit.safetensors"


def identity(net: nn.Module, x: Tensor, y: Tensor, settings: Mapping[str, Any]) -> str:
    """SHA-256 over what a checkpoint must belong to: the initial weights, the data and the settings."""
    state = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    tensors = [*sorted(net.state_dict().items()), ("x", x), ("y", y)]
    for name, tensor in tensors:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return state.hexdigest()


def save(folder: Path, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
    """Replace the checkpoint in `folder`. Tensors and counters share one file, so they always fit each other."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    _atomic.write(folder / FILE, bytes_of(plain, {"counters": json.dumps(counters)}))


def load(folder: Path, owner: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint that `owner` (see `identity`) left in `folder`; None where there is none, or it is another's."""
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as file:
            counters: dict[str, Any] = json.loads((file.metadata() or {}).get("counters", "{}"))
            if counters.get("owner") != owner:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, counters  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None


def clear(folder: Path) -> None:
    """Remove the checkpoint, if there is one."""
    (folder / FILE).unlink(missing_ok=True)
