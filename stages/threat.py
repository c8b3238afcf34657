"""The threat: a norm ball of radius eps around an input, cut with the data range. Input units are pixels in [0, 1]."""

from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Generator, Tensor

from stages.method import Value

_TINY = 1e-12


def _number(value: object) -> object:
    """`"8/255"` is a number too."""
    if isinstance(value, str):
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f'expected a number or a fraction such as "8/255", got "{value}"') from None
    return value


class Threat(Value):
    """All points x' with ||x' - x|| <= eps and low <= x' <= high. Images are [B, ...]; norms run over all but B.

    eps 0 is allowed for validity checks; a spec's task refuses it.
    """

    norm: Literal["linf", "l2", "l1"]
    eps: Annotated[float, BeforeValidator(_number), Field(ge=0)]
    low: float = 0.0
    high: float = 1.0

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the ball and the range close to `x_adv`: the nearest one for linf and within the ball's interior.

        For l2 and l1 the ball projection is followed by the clip; since x lies in the range, clipping moves every
        coordinate towards x or not at all, so the result stays in the ball.
        """
        if self.norm == "linf":
            low = (x - self.eps).clamp_(min=self.low)
            high = (x + self.eps).clamp_(max=self.high)
            return torch.maximum(torch.minimum(x_adv, high), low)
        delta = x_adv - x
        if self.norm == "l2":
            delta = delta * (self.eps / _norms(delta, 2).clamp(min=_TINY)).clamp(max=1.0)
        else:
            delta = _project_l1(delta, self.eps)
        return (x + delta).clamp_(self.low, self.high)

    def random(self, x: Tensor, rng: Generator) -> Tensor:
        """A random point, uniform in the ball, then cut with the range."""
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype)
            return self.project(x + (2 * noise - 1) * self.eps, x)
        size = x[0].numel()
        radius = torch.rand(x.shape[0], generator=rng, device=x.device, dtype=x.dtype) ** (1 / size)
        if self.norm == "l2":
            noise = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
            unit = noise / _norms(noise, 2).clamp(min=_TINY)
        else:
            # Exponential magnitudes with random signs, divided by their sum, are uniform on the l1 sphere.
            noise = -torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype).clamp_(min=_TINY).log()
            signs = torch.randint(0, 2, x.shape, generator=rng, device=x.device, dtype=x.dtype) * 2 - 1
            unit = signs * noise / _norms(noise, 1)
        return self.project(x + self.eps * radius.view(_column(x)) * unit, x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step: float) -> Tensor:
        """One steepest-ascent step of length `step` in this norm, not projected.

        linf: step * sign(grad). l2: step * grad / ||grad||. l1: the whole step on the coordinate of largest
        |grad| that can still move within the range. Where the gradient is zero, x_adv stays.
        """
        if self.norm == "linf":
            return x_adv + step * grad.sign()
        if self.norm == "l2":
            return x_adv + step * grad / _norms(grad, 2).clamp(min=_TINY)
        free = torch.where(grad > 0, x_adv < self.high, x_adv > self.low)
        score = (grad.abs() * free).flatten(1)
        best = score.argmax(1, keepdim=True)
        move = torch.zeros_like(score).scatter_(1, best, (score.gather(1, best) > 0).to(score.dtype))
        return x_adv + step * move.view_as(grad) * grad.sign()

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """[B] distance of each example from its origin, in this norm."""
        return self.length((x_adv - x).flatten(1))

    def length(self, delta: Tensor) -> Tensor:
        """This norm of vectors [..., D], [...]."""
        if self.norm == "l2":
            norms: Tensor = torch.linalg.vector_norm(delta, dim=-1)
            return norms
        # `vector_norm` takes several times as long for these two.
        size = delta.abs()
        return size.amax(-1) if self.norm == "linf" else size.sum(-1)


def _column(x: Tensor) -> tuple[int, ...]:
    return (-1,) + (1,) * (x.dim() - 1)


def _norms(x: Tensor, order: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), ord=order, dim=1)
    return norms.view(_column(x))


def _project_l1(delta: Tensor, eps: float) -> Tensor:
    """Nearest point of the l1 ball, by the sorted-threshold rule (Duchi et al. 2008, figure 1)."""
    flat = delta.flatten(1)
    magnitude = flat.abs()
    inside = magnitude.sum(1, keepdim=True) <= eps
    ordered, _ = magnitude.sort(dim=1, descending=True)
    excess = ordered.cumsum(1) - eps
    ranks = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    active = (ordered * ranks > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = excess.gather(1, active - 1) / active
    shrunk = flat.sign() * (magnitude - threshold).clamp(min=0)
    return torch.where(inside, flat, shrunk).view_as(delta)
