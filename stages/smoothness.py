"""Do gradients tell how the network really changes? Where they do not, gradient attacks look in the wrong place.

A network with rounding, thresholds, dead bands or shattered slopes has a gradient almost everywhere, and it says little
about what a step of finite length does. The fundamental theorem of calculus is the test: along a straight path the
integral of the gradient must give back the change. It does so for everything continuous and piecewise smooth (ReLU,
max-pooling), and for parts whose backward pass is a differentiable twin of the forward pass (straight-through
rounding); it does not where change hides in jumps.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from stages.attacks._losses import gradient, margin
from stages.finding import Finding, Point
from stages.oracle import Logits
from stages.seeding import generator
from stages.threat import Threat

_POINTS = 16
_TOLD = (0.9, 1.15)
_BLUR = 0.25
_RANDOM = 0.2


@dataclass(frozen=True, slots=True)
class Told:
    """The share of change that gradients tell, 1 where they tell all of it, and its standard error over the paths."""

    share: float
    error: float

    @property
    def ok(self) -> bool:
        """False where the share is surely out of bounds, or so blurred that integral and change are hardly related."""
        low, high = _TOLD
        return self.error <= _BLUR and self.share + 2 * self.error >= low and self.share - 2 * self.error <= high


def gradients_explain(logits: Logits, x: Tensor, y: Tensor, threat: Threat) -> Finding:
    """The margin's change from each image towards another, to the edge of the ball, against its gradient's integral.

    Where they differ and the network is a module, the parts responsible are named; each must offer its differentiable
    twin, as rounding does with a straight-through gradient.
    """
    end = threat.project(x.roll(1, 0), x)
    found = told(lambda at: margin(logits(at), y), lambda at: gradient(logits, at, y, "margin")[2], x, end)
    text = (
        f"along {len(x)} straight paths to the edge of the ball, gradients tell {found.share:.0%} of the change of the "
        f"margin (standard error {found.error:.0%}, must be <= {_BLUR:.0%}); must be {_TOLD[0]:.0%} to {_TOLD[1]:.0%}"
    )
    if not found.ok:
        parts = "; ".join(hidden_parts(logits, x)) if isinstance(logits, nn.Module) else ""
        named = f" ({parts})" if parts else ""
        text += f": the rest hides in jumps{named}; a part that is not smooth must offer a differentiable twin"
    return Finding("gradients_explain", found.ok, text)


def told(value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], start: Tensor, end: Tensor) -> Told:
    """How much of value(end) - value(start), [B], the integral of the slope [B, ...] gives back (midpoint rule).

    The share is the inverse of the least-squares factor from integral to change, because rounding with a
    straight-through gradient adds noise to the change alone; its error is that of a ratio of two means.
    """
    way = end - start
    with torch.no_grad():
        real = (value(end) - value(start)).double()
    integral = torch.zeros_like(real)
    for point in range(_POINTS):
        integral += (slope(start + way * ((point + 0.5) / _POINTS)) * way).flatten(1).double().sum(1) / _POINTS
    squares, products = integral.square(), integral * real
    if not bool(real.any()):
        return Told(1.0, 0.0)
    if float(products.sum()) == 0:
        return Told(0.0, 0.0)
    share = float(squares.sum() / products.sum())
    error = float((squares - share * products).square().sum().sqrt() / products.sum().abs())
    return Told(share, error)


def hidden_parts(net: nn.Module, x: Tensor) -> list[str]:
    """Innermost modules without parameters whose own gradient hides their change, as `name (class) tells 0%`.

    Each is walked from its activations for one image to those for the next, under a fixed random projection.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
                inputs.setdefault(name, arguments[0].detach())

        return hook

    leaves = {
        name: module
        for name, module in net.named_modules()
        if not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    }
    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, start in inputs.items():
        part = _told_by_part(leaves[name], start)
        if not part.ok:
            found.append(f"{name or 'network'} ({type(leaves[name]).__name__}) tells {part.share:.0%}")
    return found


def rises_along_gradient(logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Finding:
    """A quarter of eps along the gradient raises the margin loss more than a random direction of that length.

    On networks that hide nothing the random direction wins for hardly any image; where the gradient is zero or noise it
    wins for half of them.
    """
    quarter = threat.model_copy(update={"eps": threat.eps / 4})
    rng = generator(seed, "directions", device=x.device)
    blind = torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    ways = (gradient(logits, x, y, "margin")[2], blind)
    steep, blind = (quarter.project(quarter.ascend(x, way, quarter.eps), x) for way in ways)
    with torch.no_grad():
        start, along, random = (margin(logits(at), y) for at in (x, steep, blind))
    lost = Point(0.0, int((random > along).sum()), len(x))
    text = (
        f"a quarter of eps along the gradient lowers the lead by {float((along - start).mean()):.3g} on average, a "
        f"random direction by {float((random - start).mean()):.3g}; the random one does more for {lost.hits} of "
        f"{lost.total} images (95 % low {lost.interval[0]:.3f}, must be <= {_RANDOM:g})"
    )
    return Finding("rises_along_gradient", lost.interval[0] <= _RANDOM, text)


def no_inner_optimiser(logits: Logits, x: Tensor) -> Finding:
    """A forward pass must not differentiate: defences that optimise at inference need attacks of their own."""
    calls = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        del frame
        if event == "c_call" and getattr(argument, "__name__", "") == "run_backward":
            calls += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        with torch.no_grad():
            logits(x[:2])
    finally:
        sys.setprofile(before)
    text = f"one forward pass made {calls} backward passes; must make none"
    if calls:
        text += ", or the attack must differentiate through that optimisation"
    return Finding("no_inner_optimiser", calls == 0, text)


def _told_by_part(module: nn.Module, start: Tensor) -> Told:
    with torch.no_grad():
        shape = module(start).shape
    weights = torch.randn(shape[1:], generator=generator(0, "projection", device=start.device), device=start.device)

    def value(point: Tensor) -> Tensor:
        total: Tensor = (module(point) * weights).flatten(1).sum(1)
        return total

    def slope(point: Tensor) -> Tensor:
        with torch.enable_grad():
            at = point.detach().requires_grad_(True)
            total = value(at).sum()
            if not total.requires_grad:
                return torch.zeros_like(point)
            (found,) = torch.autograd.grad(total, at, allow_unused=True)
        return torch.zeros_like(point) if found is None else found

    return told(value, slope, start, start.roll(1, 0))
