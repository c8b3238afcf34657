"""Ascent of a quadratic model of the loss within a Krylov subspace."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor

from stages.attacks._losses import cross_entropy, gradient, margin
from stages.attacks.base import Attack
from stages.method import InputError
from stages.oracle import Logits, charge, narrow
from stages.threat import Threat

Product = Callable[[Tensor, Tensor], Tensor]
"""(v [B, D], active bool [B]) -> H v [B, D], one Hessian per example; rows that are not active are not read."""

_FLAT = 1e-7
_EXHAUSTED = 1e-6
_BISECTIONS = 60
_COOL = 10.0
_TINY = 1e-30


class Krylov(Attack):
    """Every step goes to the maximum of a quadratic model over a ball, in the space that a few Hessian products span.

        q(d) = g^T d + d^T H d / 2 over ||d||_2 <= r,   d in span{g, H g, ..., H^(m-1) g}
        Lanczos:  V^T V = I,  V^T H V = T tridiagonal,  v_1 = g / ||g||
        d = ||g|| V (mu I - T)^-1 e_1,   mu > max(lambda_max(T), 0) with ||d|| = r,  or mu = 0 where T < 0 and d fits

    g and H are gradient and Hessian of the cross-entropy at the current point, m is `subspace`. The step moves by
    `step` * eps along d (its sign for linf, d itself for l2, its largest coordinate for l1), and r is the l2 length of
    such a step. The steepest step along g is tried too, and the one of higher true loss is taken, so a step is never
    worse than that of PGD. Random starts, projection and the default `step` are those of `pgd`.

    The literal Newton step -H^-1 g is not used: it goes downhill wherever H >= 0. For networks of ReLU and other
    piecewise linear parts H = J^T (diag p - p p^T) J >= 0 almost everywhere, of rank K - 1 at most, and next to nothing
    is gained over g; Lanczos then ends early, and where H = 0, or ||g|| < 1e-7, the step is that of PGD.
    `curvature = "secant"` takes H v ~ (g(x + h v) - g(x)) / h for ||v||_2 = 1 with h half the l2 radius of the ball: it
    feels the kinks of such networks, is not symmetric (the tridiagonal part is used), and needs no second derivative.
    A part that has none is named in an `InputError`; an `autograd.Function` marked once differentiable drops out of H
    unnoticed, which the comparison with the plain step makes harmless.

    Cost of a step: one gradient, two more for every exact product (a backward pass through the graph of g; charged as
    such) or one query and one gradient for every secant one, and two queries where the two steps differ.

    Source: Qian et al. 2022, "Hessian-free second-order adversarial examples"; only the abstract was read, and the
    formulas are standard numerical analysis, reconstructed: the trust region in place of the paper's Newton system, and
    Lanczos in place of GMRES, since Hessians are symmetric. Departures: the cross-entropy is that of logits divided by
    max(1, lead / 10), since where it saturates g and H vanish and their quotient is noise; broken examples stop.
    """

    steps: int = Field(default=10, ge=1)
    restarts: int = Field(default=1, ge=1)
    subspace: int = Field(default=3, ge=1)
    step: float | None = Field(default=None, gt=0)
    curvature: Literal["exact", "secant"] = "exact"

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        result = x.clone()
        alive = torch.arange(len(x), device=x.device)
        for _ in range(self.restarts):
            start = threat.random(x, rng)[alive]
            point, right = self._climb(narrow(logits, alive), x[alive], y[alive], threat, start)
            result[alive] = point
            alive = alive[right]
            if len(alive) == 0:
                break
        return result

    def _climb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, start: Tensor) -> tuple[Tensor, Tensor]:
        """One start: the wrong or else the last point of each example, and which are still right, bool [B]."""
        length = threat.eps * (self.step if self.step is not None else 2.5 / self.steps)
        result, alive = start.clone(), torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            here, origin, labels = narrow(logits, alive), x[alive], y[alive]
            z, heat, slope, product = self._expand(here, result[alive], labels, threat)
            right = z.argmax(1) == labels
            basis, tridiagonal, size = lanczos(product, slope.flatten(1), right, self.subspace)
            radius = length * (math.sqrt(basis.shape[2]) if threat.norm == "linf" else 1.0)
            share = trust_region(tridiagonal, slope.flatten(1).norm(dim=1), radius).to(x.dtype)
            best = torch.einsum("bmd,bm->bd", basis, share).view_as(x[alive])

            now, kept = result[alive], right & (size > 1)
            ahead = threat.project(threat.ascend(now, slope, length), origin)
            curved = threat.project(now + best if threat.norm == "l2" else threat.ascend(now, best, length), origin)
            ahead[kept] = _better(narrow(here, kept), ahead[kept], curved[kept], labels[kept], heat[kept])
            result[alive[right]] = ahead[right]
            alive = alive[right]
            if len(alive) == 0:
                break
        still = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if len(alive):
            with torch.no_grad():
                still[alive] = narrow(logits, alive)(result[alive]).argmax(1) == y[alive]
        return result, still

    def _expand(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat) -> tuple[Tensor, Tensor, Tensor, Product]:
        """Logits [B, K], temperature [B], gradient of the loss at x, and products with its Hessian there."""
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            z = logits(point)
            with torch.autocast(x.device.type, enabled=False):
                heat = (-margin(z.detach(), y) / _COOL).clamp(min=1.0)
                loss = cross_entropy(z.float() / heat.unsqueeze(1), y).sum()
            slope = _derivative(loss, point, None, graph=self.curvature == "exact")

        def exact(v: Tensor, active: Tensor) -> Tensor:
            charge(narrow(logits, active), gradients=2)
            return _derivative(slope, point, v.view_as(point), graph=False).flatten(1)

        def secant(v: Tensor, active: Tensor) -> Tensor:
            reach = threat.eps * (math.sqrt(v.shape[1]) if threat.norm == "linf" else 1.0) / 2
            ahead = x[active] + reach * v[active].view_as(x[active])
            there = gradient(
                lambda moved: narrow(logits, active)(moved) / heat[active].unsqueeze(1), ahead, y[active], "ce"
            )[2]
            change = torch.zeros_like(v)
            change[active] = (there - slope[active]).flatten(1) / reach
            return change

        return z.detach(), heat, slope.detach(), exact if self.curvature == "exact" else secant


def lanczos(product: Product, g: Tensor, active: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Basis V [B, m, D] of the Krylov space of g [B, D], T = V H V^T [B, m, m] in float64, and its dimension int64 [B].

    Re-orthogonalised twice against everything before. An example ends where the next vector is no more than 1e-6 of
    the largest entry of T, or where ||g|| < 1e-7; further vectors are zero, and their place in T is so negative that
    no maximum goes there.
    """
    size = min(size, g.shape[1])
    length = g.norm(dim=1)
    active = active & (length > _FLAT)
    basis = g.new_zeros(len(g), size, g.shape[1])
    t = torch.zeros(len(g), size, size, dtype=torch.float64, device=g.device)
    scale, count = torch.zeros_like(length), torch.zeros(len(g), dtype=torch.int64, device=g.device)
    v = torch.where(active.unsqueeze(1), g / length.clamp(min=_FLAT).unsqueeze(1), 0)
    for j in range(size):
        if not bool(active.any()):
            break
        basis[:, j] = v
        count += active
        w = torch.where(active.unsqueeze(1), product(v, active), 0)
        t[:, j, j] = (v * w).sum(1)
        for _ in range(2):
            w = w - torch.einsum("bmd,bm->bd", basis, torch.einsum("bmd,bd->bm", basis, w))
        rest = w.norm(dim=1)
        scale = torch.maximum(scale, t[:, j, j].abs().to(scale.dtype))
        active = active & (rest > _EXHAUSTED * scale)
        if j + 1 < size:
            t[:, j, j + 1] = t[:, j + 1, j] = torch.where(active, rest, 0).double()
            scale = torch.maximum(scale, rest)
            v = torch.where(active.unsqueeze(1), w / rest.clamp(min=_TINY).unsqueeze(1), 0)
    beyond = torch.arange(size, device=g.device) >= count.unsqueeze(1)
    t -= torch.diag_embed(beyond * (1 + scale.double()).unsqueeze(1))
    return basis, t, count


def trust_region(t: Tensor, length: Tensor, radius: float) -> Tensor:
    """The maximum of length * c_1 + c^T T c / 2 over ||c|| <= radius, [B, m], for T [B, m, m] and `length` [B] >= 0.

    Eigenvalues turn ||c(mu)|| = radius into one equation, solved by bisection over mu in
    (lambda_max, lambda_max + length / radius]. An unreduced tridiagonal T has no hard case: e_1 has a part in every
    eigenvector.
    """
    values, vectors = torch.linalg.eigh(t)
    share = length.double().unsqueeze(1) * vectors[:, 0]
    low = values[:, -1].clamp(min=0)
    high = low + length.double() / radius

    def at(mu: Tensor) -> Tensor:
        return torch.where(share == 0, 0, share / (mu.unsqueeze(1) - values).clamp(min=_TINY))

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        long = at(middle).norm(dim=1) > radius
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    c: Tensor = torch.einsum("bij,bj->bi", vectors, at(high))
    return c


def _better(logits: Logits, first: Tensor, second: Tensor, y: Tensor, heat: Tensor) -> Tensor:
    """Of two points the one of higher loss, an answer that is wrong above all; two queries each."""
    if len(first) == 0:
        return first
    values = []
    for point in (first, second):
        with torch.no_grad():
            z = logits(point)
            loss = cross_entropy(z.float() / heat.unsqueeze(1), y)
        values.append(torch.where(z.argmax(1) == y, loss, math.inf))
    return torch.where((values[1] > values[0]).view(-1, *[1] * (first.dim() - 1)), second, first)


def _derivative(of: Tensor, at: Tensor, along: Tensor | None, graph: bool) -> Tensor:
    """The derivative of `of` (along a vector) in `at`; zero where no path leads from one to the other."""
    if not of.requires_grad:
        return torch.zeros_like(at)
    try:
        (found,) = torch.autograd.grad(
            of, at, along, create_graph=graph, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise InputError(
            f'krylov: the network has a part without a second derivative ({error}); set curvature = "secant"'
        ) from error
    return found
