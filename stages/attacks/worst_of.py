"""Several attacks, and the strongest of them for each example."""

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks.base import ALL_NORMS, AnyAttack, Attack, Batches, Norm
from stages.oracle import Logits, narrow
from stages.seeding import generator
from stages.threat import Threat


class WorstOf(Attack):
    """Runs `attacks` in order, each on what the ones before it did not break; put cheap ones first.

    Every member draws from a generator of its own, seeded before the first strikes, so that what one of them breaks
    does not change what another draws.
    """

    attacks: tuple[AnyAttack, ...] = Field(min_length=1)

    @property
    def needs_gradients(self) -> bool:
        return any(attack.needs_gradients for attack in self.attacks)

    @property
    def norms(self) -> frozenset[Norm]:
        return ALL_NORMS.intersection(*(attack.norms for attack in self.attacks))

    def prepare(self, logits: Logits, data: Batches, rng: Generator) -> "WorstOf":
        batches = list(data)
        return WorstOf(attacks=tuple(attack.prepare(logits, batches, rng) for attack in self.attacks))

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        seeds: list[int] = torch.randint(2**62, (len(self.attacks),), generator=rng, device=rng.device).tolist()
        result = x.clone()
        alive = torch.arange(len(x), device=x.device)
        for attack, seed in zip(self.attacks, seeds, strict=True):
            found = attack(narrow(logits, alive), x[alive], y[alive], threat, generator(seed, device=x.device))
            # The call gives back x itself where it found nothing.
            broken = (found != x[alive]).flatten(1).any(1)
            result[alive[broken]] = found[broken]
            alive = alive[~broken]
            if len(alive) == 0:
                break
        return result
