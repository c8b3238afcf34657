"""Free slopes of ReLUs, and multipliers of split ones, chosen by gradient ascent on the bound itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.bounds._backward import Chain
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


def optimised(steps: int, rate: float) -> Callable[[Chain | Neurons, str, Tensor], Tensor]:
    """`Chain.bound` with free slopes optimised."""

    def best(chain: Chain | Neurons, name: str, slopes: Tensor) -> Tensor:
        first = chain.drawn() if isinstance(chain, Neurons) else drawn(chain, name, len(slopes))
        return ascend(chain, name, slopes, first, {}, steps if first else 0, rate).best

    return best


@dataclass(frozen=True, slots=True)
class Ascent:
    """[R, B] best bound seen; slopes and multipliers at the end; coefficients of the last bound."""

    best: Tensor
    lower: dict[str, Tensor]
    multipliers: dict[str, Tensor]
    watch: dict[str, Tensor]


def ascend(
    chain: Chain | Neurons,
    name: str,
    slopes: Tensor,
    lower: Mapping[str, Tensor],
    signs: Mapping[str, Tensor],
    steps: int,
    rate: float,
    goal: Tensor | None = None,
    start: Mapping[str, Tensor] | None = None,
) -> Ascent:
    """The best bound seen in `steps` of Adam, from slopes `lower` and multipliers `start` (0 if not given) on.

    max over alpha in [0, 1], beta >= 0 of min over the box of  slopes . value - sum_j beta_j s_j z_j,
    where s_j z_j >= 0 is known of the split z_j (`signs` in {-1, 0, 1}, by ReLU result). Every step's bound is sound,
    so the best is kept. Ends early where all bounds pass `goal`.
    """
    alphas = {key: value.detach().clone().requires_grad_() for key, value in lower.items()}
    betas = {key: torch.zeros_like(sign, dtype=chain.kind) for key, sign in signs.items()}
    betas = {key: (start or {}).get(key, beta).detach().clone().requires_grad_() for key, beta in betas.items()}
    moving = [*alphas.values(), *betas.values()]
    best = torch.full((len(slopes), chain.batch), -torch.inf, dtype=torch.float64, device=slopes.device)
    watch: dict[str, Tensor] = {}
    climb = _Adam(moving)
    for step in range(steps + 1):
        with torch.enable_grad():
            push = {key: -(beta * signs[key]).unsqueeze(0) for key, beta in betas.items()}
            watch = {}
            found = chain.bound(name, slopes, lower=alphas, push=push, watch=watch)
            total = found.sum()
        best = torch.maximum(best, found.detach())
        # Nothing moves a bound whose way does not pass by what is free.
        if not moving or not total.requires_grad or step == steps or (goal is not None and bool((best > goal).all())):
            break
        climb.step(torch.autograd.grad(total, moving, allow_unused=True, materialize_grads=True), rate * 0.97**step)
        with torch.no_grad():
            for value in alphas.values():
                value.clamp_(0, 1)
            for value in betas.values():
                value.clamp_(min=0)
    return Ascent(best, *({key: value.detach() for key, value in part.items()} for part in (alphas, betas, watch)))


class _Adam:
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
