"""Adversarial examples in a file, as `transfer` replays them."""

import hashlib
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from stages.attacks.pgd import PGD
from stages.attacks.transfer import Transfer
from stages.evaluate import frozen, outputs
from stages.seeding import generator
from stages.threat import Threat
from tests.linear_nets import EPS, NORMS


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="temper-stored-", ignore_cleanup_errors=True)


def written(tensors: dict[str, Tensor], folder: Path | None = None) -> Transfer:
    """The attack that replays these tensors, from a file that lives as long as the process or as `folder`."""
    data = save(tensors)
    digest = hashlib.sha256(data).hexdigest()
    path = (folder or Path(_folder().name)) / f"{digest}.safetensors"
    path.write_bytes(data)
    return Transfer(path=str(path), sha256=digest)


def stored_for(net: nn.Module, x: Tensor) -> Transfer:
    """Replays what PGD makes of x under each norm, stored in one file."""
    with frozen(net):
        y = outputs(net, x).argmax(1)
        found = [
            PGD(steps=20, step=0.5).perturb(net, x, y, Threat(norm=norm, eps=max(EPS[norm], 0.15)), generator(0))
            for norm in NORMS
        ]
    return written({"x_adv": torch.cat(found)}).model_copy(update={"nearest": 3 * len(x)})
