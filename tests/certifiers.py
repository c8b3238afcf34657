"""Every certifier of float32 networks, at settings that take little time: for tests of soundness."""

from stages.bounds.alpha_crown import AlphaCrown
from stages.bounds.base import Certifier
from stages.bounds.branch_and_bound import BranchAndBound
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP

ALL: tuple[Certifier, ...] = (
    IBP(),
    CrownIBP(),
    Crown(),
    CrownForward(),
    CrownForward(double=False),
    AlphaCrown(steps=2, box_steps=1),
    BranchAndBound(seconds=300, limit=4),
)
