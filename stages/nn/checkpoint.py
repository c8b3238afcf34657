"""A model on disk: `arch.json` and `weights.safetensors`; nothing is ever unpickled."""

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from stages.method import InputError
from stages.nn import _atomic
from stages.nn.arch import Arch, Model

ARCH = "arch.json"
WEIGHTS = "weights.safetensors"


def save(model: Model, folder: Path) -> None:
    """Write both files into `folder`, each atomically; equal models give equal bytes."""
    text = json.dumps(model.arch.dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Clones, because tied weights share storage, which the format refuses; contiguous, because training may have
    # left channels-last strides behind.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.net.state_dict().items()
    }
    _atomic.write(folder / WEIGHTS, bytes_of(state))
    _atomic.write(folder / ARCH, text.encode())


def load(arch_path: Path, weights_path: Path) -> Model:
    """Rebuild the network in eval mode, on the CPU, and fill it with the stored weights; file names do not matter.

    Raises `InputError` for a file that is missing, torn or foreign, weights of another architecture, and weights that
    are not finite. The global random state is left as it was.
    """
    try:
        arch = Arch.load(json.loads(_read(arch_path)))
    except (ValueError, ValidationError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{arch_path}: expected the JSON of an architecture, got: {error}") from error
    try:
        state = tensors_of(_read(weights_path))
    except SafetensorError as error:
        raise InputError(f"{weights_path}: expected a safetensors file, got: {error}; is it cut short?") from error
    with torch.random.fork_rng(devices=[]):
        net = arch.build()
    _check(net.state_dict(), state, weights_path)
    net.load_state_dict(state)
    return Model(arch, net)


def _check(wanted: dict[str, Tensor], got: dict[str, Tensor], where: Path) -> None:
    missing, foreign = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    if missing or foreign:
        raise InputError(
            f"{where}: these are weights of another architecture; missing {missing[:3]} ({len(missing)} in all), "
            f"not expected {foreign[:3]} ({len(foreign)} in all)"
        )
    for name, expected in wanted.items():
        tensor = got[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise InputError(
                f"{where}: {name}: expected {expected.dtype} {tuple(expected.shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: {name}: expected finite weights, got NaN or infinity; did training diverge?")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
