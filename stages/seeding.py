"""Generators from derived seeds; the only module that touches a global seed."""

import hashlib
import json

import torch


def derive(root: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the root and on every name (as `pipeline.core.canonical.derive_seed`)."""
    text = json.dumps(["seed", root, *names], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(root: int, *names: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive(root, *names)`."""
    return torch.Generator(device).manual_seed(derive(root, *names))


def deterministic(seed: int) -> None:
    """Ask torch for repeatable kernels, and seed what cannot be handed a generator (module initialisation)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # It would write NaN into every fresh tensor, to show reads of memory that nobody wrote: a tenth of all time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set through a property
    torch.manual_seed(seed)
