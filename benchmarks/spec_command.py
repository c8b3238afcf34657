"""`verify-spec` asked as from a shell, and a search that its answers are held against; for `benchmarks.verify_spec`."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.float32]
WORDS = ("sat", "unsat", "unknown")
_STARTS, _STEPS = 256, 60


@dataclass(frozen=True, slots=True)
class Said:
    """The word, after how many seconds, the last line on standard error, and the witness [n], exactly as written."""

    word: str
    seconds: float
    last: str
    witness: npt.NDArray[np.float64] | None

    def inside(self, low: Array, high: Array) -> Array | None:
        """The witness where it is made of float32 numbers within the box."""
        x = self.witness
        if (
            x is None
            or x.shape != low.shape
            or (x != x.astype(np.float32)).any()
            or (x < low).any()
            or (x > high).any()
        ):
            return None
        return x.astype(np.float32)


def put(network: Path, name: str, text: str, timeout: float) -> Said:
    """Writes the specification and the witness beside the network, and what was said to standard error."""
    spec, out = network.with_name(f"{name}.vnnlib"), network.with_name(f"{name}.txt")
    spec.write_text(text)
    argv = [sys.executable, "-m", "pipeline", "verify-spec", str(network), str(spec), "--witness", str(out)]
    start = time.monotonic()
    done = subprocess.run([*argv, "--timeout", str(timeout)], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    last = done.stderr.strip().splitlines()[-1] if done.stderr else ""
    print(f"{name}: {done.stdout.strip()} after {seconds:.1f} s; {last[:200]}", file=sys.stderr, flush=True)
    found = re.findall(r"\(X_\d+ ([^)]+)\)", out.read_text()) if out.is_file() else []
    return Said(done.stdout.strip(), seconds, last, np.array([float(value) for value in found]) if found else None)


def best(
    net: nn.Module,
    low: Tensor,
    high: Tensor,
    value: Callable[[Tensor], Tensor],
    rng: torch.Generator,
    seconds: float,
    enough: float = torch.inf,
) -> Array:
    """The point where value(y) [B] of outputs [B, K] is largest, of those that Adam from random points and corners
    met in the time."""
    end, most, found = time.monotonic() + seconds, -torch.inf, (low + high) / 2
    while time.monotonic() < end and most < enough:
        share = torch.rand(_STARTS, len(low), generator=rng)
        share[::4] = share[::4].round()
        share.requires_grad_()
        optimiser = torch.optim.Adam([share], 0.03)
        for _ in range(_STEPS):
            x = low + share.clamp(0, 1) * (high - low)
            values = value(net(x))
            top, place = values.detach().nan_to_num(-torch.inf).max(0)
            if float(top) > most:
                most, found = float(top), x[place].detach().clamp(low, high)
            optimiser.zero_grad()
            (-values.sum()).backward()
            optimiser.step()
            with torch.no_grad():
                share.clamp_(0, 1)
            if time.monotonic() > end or most >= enough:
                break
    return found.numpy()
