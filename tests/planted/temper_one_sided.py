"""A third party's attack that has a version for linf alone."""

from stages.attacks.base import Norm
from stages.attacks.fgsm import FGSM


class OneSided(FGSM):
    """One steepest step, under linf or not at all."""

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(("linf",))
