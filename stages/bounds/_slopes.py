"""Free slopes of ReLUs, chosen by gradient ascent on the bound itself."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stages.bounds._backward import Chain
from stages.bounds._halfspace import Halfspace
from stages.bounds._neurons import Neurons


def relus(chain: Chain, name: str) -> list[str]:
    """The results of the ReLUs whose lines have a free slope somewhere, and that come before the value `name`."""
    found = []
    for op in chain.done:
        if op.result == name:
            break
        if op.kind == "relu":
            box = chain.values[op.reads()[0]]
            if bool(((box.low < 0) & (box.high > 0)).any()):
                found.append(op.result)
    return found


def drawn(chain: Chain, name: str, rows: int) -> dict[str, Tensor]:
    """The slopes that CROWN takes below each of these ReLUs, [rows, ...]."""
    first = {}
    for result in relus(chain, name):
        [(down, _)] = chain.lines[result].slopes.values()
        first[result] = down.detach().expand(rows, *down.shape).clone()
    return first


def optimised(
    steps: int, rate: float, against: Halfspace | None = None
) -> Callable[[Chain | Neurons, str, Tensor], Tensor]:
    """`Chain.bound` with free slopes optimised; of the points in a half-space where one is given."""

    def best(chain: Chain | Neurons, name: str, slopes: Tensor) -> Tensor:
        first = chain.drawn() if isinstance(chain, Neurons) else drawn(chain, name, len(slopes))
        return _ascended(chain, name, slopes, first, steps if first else 0, rate, against)

    return best


def _ascended(
    chain: Chain | Neurons,
    name: str,
    slopes: Tensor,
    lower: Mapping[str, Tensor],
    steps: int,
    rate: float,
    against: Halfspace | None,
) -> Tensor:
    """The best bound seen in `steps` of Adam, from slopes `lower` on. Every step's bound is sound."""
    alphas = {key: value.detach().clone().requires_grad_() for key, value in lower.items()}
    best = torch.full((len(slopes), chain.batch), -torch.inf, dtype=torch.float64, device=slopes.device)
    climb = Adam(list(alphas.values()))
    for step in range(steps + 1):
        watch: dict[str, Tensor] = {}
        with torch.enable_grad():
            found = chain.bound(name, slopes, lower=alphas, watch=watch)
            total = found.sum()
        best = torch.maximum(best, found.detach())
        # Nothing moves a bound whose way does not pass by what is free.
        if not alphas or not total.requires_grad or step == steps:
            break
        moving = list(alphas.values())
        climb.step(torch.autograd.grad(total, moving, allow_unused=True, materialize_grads=True), rate * 0.97**step)
        with torch.no_grad():
            for value in moving:
                value.clamp_(0, 1)
    image = (chain.chain if isinstance(chain, Neurons) else chain).graph.input
    if against is None or image not in watch:
        return best
    return torch.maximum(best, against.better(chain, found.detach(), watch[image].detach()))


class Adam:
    """Ascent by Adam (Kingma and Ba 2015) with their constants; torch's own loads a compiler, which takes seconds."""

    def __init__(self, moving: Sequence[Tensor]) -> None:
        self.moving = moving
        self.means = [torch.zeros_like(value) for value in moving]
        self.squares = [torch.zeros_like(value) for value in moving]
        self.count = 0

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], rate: float) -> None:
        self.count += 1
        reach = rate / (1 - 0.9**self.count)
        for value, grad, mean, square in zip(self.moving, grads, self.means, self.squares, strict=True):
            mean.lerp_(grad, 0.1)
            square.lerp_(grad.square(), 0.001)
            value.addcdiv_(mean, (square / (1 - 0.999**self.count)).sqrt_().add_(1e-8), value=reach)
