"""The contract of an attack: a sealed call around one abstract verb."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any, Literal, final

import torch
from pydantic import BeforeValidator
from torch import Generator, Tensor

from stages.method import InputError, Method, polymorphic
from stages.oracle import Logits, Oracle, narrow
from stages.threat import Threat

FOLDER = "stages.attacks"

Batches = Iterable[tuple[Tensor, Tensor]]

Norm = Literal["linf", "l2", "l1"]

ALL_NORMS: frozenset[Norm] = frozenset(("linf", "l2", "l1"))


class Attack(Method):
    """Looks for a point of the threat that is classified wrongly. Randomness comes from the passed generator alone."""

    @property
    def needs_gradients(self) -> bool:
        """False for attacks that only query outputs and so run on exported engines too."""
        return True

    @property
    def norms(self) -> frozenset[Norm]:
        """The threats that it can strike under; a call under any other raises `InputError`."""
        return ALL_NORMS

    def prepare(self, logits: Logits, data: Batches, rng: Generator) -> "Attack":
        """Fit whatever the attack learns before it strikes (a generator, directions); most learn nothing."""
        del logits, data, rng
        return self

    @final
    def __call__(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        """Adversarial examples [B, C, H, W] within the threat; an example that was not broken comes back as x itself.

        Examples that are wrong already come back as they are. Raises `InputError` where x leaves the data range or is
        not finite, or where y does not fit. An `Oracle` over the B examples is charged for what the attack itself asks;
        the passes before and after it, which judge the result, are not counted.
        """
        _check(x, y, threat)
        self.accept(threat)
        with torch.no_grad():
            judge = logits.logits if isinstance(logits, Oracle) else logits
            right = judge(x).argmax(1) == y
        result = x.clone()
        rows = right.nonzero().flatten()
        if len(rows) == 0 or threat.eps == 0:
            return result
        x_adv = self.perturb(narrow(logits, rows), x[rows], y[rows], threat, rng).detach()
        x_adv = threat.project(x_adv, x[rows])
        with torch.no_grad():
            broken = judge(x_adv).argmax(1) != y[rows]
        result[rows[broken]] = x_adv[broken]
        return result

    @final
    def accept(self, threat: Threat) -> None:
        """Raise `InputError` where this attack has no version for the threat's norm; a plan asks before work starts."""
        if threat.norm not in self.norms:
            raise InputError(
                f"{self.kind}: expected a threat in {' or '.join(sorted(self.norms))}, got {threat.norm}; "
                '"pgd", "apgd", "fab" and "square" know every norm'
            )

    @abstractmethod
    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        """The attack itself, on examples that are still classified rightly; [B, C, H, W] back, any device as x.

        An attack that drops examples asks `narrow(logits, alive)` for the rest; an oracle then charges the right ones.
        """


AnyAttack = Annotated[Attack, *polymorphic(FOLDER, Attack)]

QUICK: tuple[dict[str, Any], ...] = (
    {"kind": "pgd", "steps": 20, "restarts": 2, "loss": "margin"},
    {"kind": "apgd", "steps": 50},
    {"kind": "square", "queries": 500},
)
"""What `attacks = "quick"` stands for: far lighter than the reference ensemble, and never called anything else."""

STANDARD: tuple[dict[str, Any], ...] = ({"kind": "auto"},)
"""What `attacks = "standard"` stands for: the standard ensemble at its reference settings."""


def _named_set(data: object) -> object:
    items = [data] if isinstance(data, str) else data
    if not isinstance(items, list | tuple):
        return data
    sets = {"quick": QUICK, "standard": STANDARD}
    return tuple(one for item in items for one in (sets.get(item, (item,)) if isinstance(item, str) else (item,)))


AttackSet = Annotated[tuple[AnyAttack, ...], BeforeValidator(_named_set)]
"""Attacks by name or table; `"quick"` and `"standard"`, alone or among others, stand for those sets."""


def _check(x: Tensor, y: Tensor, threat: Threat) -> None:
    if x.dim() < 2 or y.shape != x.shape[:1]:
        raise InputError(f"attack: expected images [B, ...] and labels [B], got {tuple(x.shape)} and {tuple(y.shape)}")
    low, high = (float(x.min()), float(x.max())) if x.numel() else (threat.low, threat.high)
    if not (threat.low <= low and high <= threat.high):
        raise InputError(
            f"attack: expected pixels within [{threat.low:g}, {threat.high:g}], got {low:g}..{high:g}; "
            "keep normalisation inside the network"
        )
