"""The standard ensemble at its reference settings (AutoAttack)."""

from collections.abc import Sequence

from pydantic import Field
from torch import Generator, Tensor

from stages.attacks.apgd import APGD
from stages.attacks.base import Attack
from stages.attacks.fab import FAB
from stages.attacks.square import Square
from stages.attacks.worst_of import WorstOf
from stages.oracle import Logits
from stages.threat import Threat

_L1_RESTARTS, _L1_TARGETS = 5, 5


class Auto(Attack):
    """APGD on cross-entropy, targeted APGD on DLR, targeted FAB, then Square; each on what those before it left.

    linf and l2: 100 steps and one start each, min(targets, K - 1) target classes, `queries` outputs. l1: five starts of
    APGD on cross-entropy, and at most five target classes of APGD, as that norm's reference has it. The settings as
    they stand are the reference ones; with any other this is a lighter or a heavier ensemble, not the standard one
    (`standard` tells). Each member draws from a generator of its own.

    Source: Croce and Hein 2020, section 6, and 2021 for l1; settings as in the code released with them. Departures are
    those of the members: broken examples leave at once, classes proved unreachable are not targeted, and FAB asks the
    network once a step. With fewer than four classes targeted APGD climbs the margin, since DLR is not defined.
    """

    steps: int = Field(default=100, ge=1)
    targets: int = Field(default=9, ge=1)
    queries: int = Field(default=5000, ge=1)

    def members(self, threat: Threat) -> WorstOf:
        """The ensemble under this threat's norm."""
        l1 = threat.norm == "l1"
        aims = min(self.targets, _L1_TARGETS) if l1 else self.targets
        return WorstOf(
            attacks=(
                APGD(steps=self.steps, restarts=_L1_RESTARTS if l1 else 1),
                APGD(steps=self.steps, loss="dlr", targets=aims),
                FAB(steps=self.steps, targets=self.targets),
                Square(queries=self.queries, stretch=False),
            )
        )

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        return self.members(threat).perturb(logits, x, y, threat, rng)


def standard(attacks: Sequence[Attack]) -> bool:
    """Whether a set of attacks, all of which strike, holds the standard ensemble at exactly its reference settings."""
    return Auto() in attacks
