"""Is an attack's result believable? Sentences with numbers; one that fails refuses the gate, whatever the accuracy.

A network can hide from gradients without being robust: its parts are flat, saturated, random or rounded. Such
networks betray themselves, because more budget does not help the attacker, or because asking for outputs alone breaks
more than following gradients (Carlini et al. 2019, "On evaluating adversarial robustness", section 5; the five warning
flags of the ensemble of Croce and Hein 2020, from memory: outputs that vary, probabilities, zero gradients, a black
box that beats gradients, optimisation at inference). Robust accuracies here come from one plain attack on few
examples: they judge the evidence, they are not it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.attacks._losses import raw_gradient
from stages.attacks.base import Attack
from stages.attacks.fgsm import FGSM
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.attacks.worst_of import WorstOf
from stages.evaluate import OnStep, outputs, under_attack
from stages.finding import Finding, Point, binomial_tail
from stages.oracle import Logits
from stages.seeding import derive
from stages.smoothness import gradients_explain, no_inner_optimiser, rises_along_gradient
from stages.threat import Threat

PROBE = PGD(steps=20, loss="margin")
"""The plain attack behind the curve and the checks on it. On adversarially trained networks the margin finds several
points more than cross-entropy does (`tests/unit/test_validity_masked.py` shows it on digits)."""

_STRONG = WorstOf(attacks=(PGD(steps=20), PGD(steps=20, loss="margin")))
# From the image itself: at eps 1 a random start is noise, and breaks any network without a single gradient.
_WALK = WorstOf(attacks=(PGD(steps=20, start="zero"), PGD(steps=20, loss="margin", start="zero")))
_BLACK = Square(queries=200)
_STEPS = (5, 20, 60)
_RESTARTS = (1, 3)
_LEVEL = 0.05
_FLAT_SHARE = 0.05
_SAME = 1e-4
_ALONE = 16


def curve(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    multiples: Sequence[float],
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[Point, ...]:
    """Accuracy under `PROBE` at eps times each of `multiples`, 0 added, cut at the radius that reaches every image.

    Every radius is attacked from scratch, so that a curve which does not fall shows.
    """
    reach = {"linf": 1.0, "l2": x[0].numel() ** 0.5, "l1": float(x[0].numel())}[threat.norm]
    radii = sorted({0.0, *(min(multiple * threat.eps, reach) for multiple in multiples)})
    points = []
    for done, eps in enumerate(radii, 1):
        points.append(_point(eps, logits, PROBE, x, y, threat.model_copy(update={"eps": eps}), seed))
        if on_step is not None:
            on_step(done, len(radii))
    return tuple(points)


def checks(
    logits: Logits,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    seed: int,
    points: Sequence[Point],
    pair: tuple[Tensor, Tensor] | None = None,
    on_step: OnStep | None = None,
) -> tuple[Finding, ...]:
    """Every check, on images [N, C, H, W] in [0, 1]; 100 to 200 are enough.

    `points` is the `curve` on the same images. `pair` holds, bool [M] each and on the same M examples, what survived
    all gradient attacks and what survived the black-box ones; without it both are run here, shortly.
    """
    steps: tuple[Callable[[], Finding], ...] = (
        lambda: repeatable(logits, x),
        lambda: batch_free(logits, x),
        lambda: not_probabilities(logits, x),
        lambda: gradients_present(logits, x, y),
        lambda: no_inner_optimiser(logits, x),
        lambda: gradients_explain(logits, x, y, threat),
        lambda: rises_along_gradient(logits, x, y, threat, seed),
        lambda: eps_zero(logits, x, y, threat, seed),
        lambda: falls_with_eps(points),
        lambda: falls_with_steps(step_curve(logits, x, y, threat, seed)),
        lambda: falls_with_restarts(restart_curve(logits, x, y, threat, seed)),
        lambda: falls_to_chance(logits, x, y, seed),
        lambda: _compare(logits, x, y, threat, seed, pair),
    )
    found = []
    for done, step in enumerate(steps, 1):
        found.append(step())
        if on_step is not None:
            on_step(done, len(steps))
    return tuple(found)


def repeatable(logits: Logits, x: Tensor) -> Finding:
    """The same input twice gives the same output."""
    gap = float((outputs(logits, x) - outputs(logits, x)).abs().max())
    text = f"the same {len(x)} images twice give logits that differ by {gap:.3g}; must be <= {_SAME:g}"
    return Finding("repeatable", gap <= _SAME, text)


def batch_free(logits: Logits, x: Tensor) -> Finding:
    """An image's output does not depend on its neighbours in the batch, nor on its place among them."""
    together, some = outputs(logits, x), x[:_ALONE]
    turned = float((together - outputs(logits, x.flip(0)).flip(0)).abs().max())
    alone = float((together[: len(some)] - outputs(logits, some, batch=1)).abs().max())
    # Sums run in another order for another number of images, and round otherwise.
    same = _SAME * max(1.0, float(together.abs().max()))
    text = (
        f"the same {len(x)} images in reverse order give logits that differ by {turned:.3g}, {len(some)} of them each "
        f"on its own by {alone:.3g}; must be <= {same:.3g}"
    )
    return Finding("batch_free", max(turned, alone) <= same, text)


def not_probabilities(logits: Logits, x: Tensor) -> Finding:
    """Outputs are logits: after a softmax, gradients vanish where the network is sure."""
    z = outputs(logits, x)
    like = bool((z >= 0).all()) and bool(((z.sum(1) - 1).abs() <= 1e-4).all())
    # A sigmoid saturates as a softmax does; logits of that many images do not all lie in [0, 1].
    squashed = bool((z >= 0).all()) and bool((z <= 1).all())
    rule = "are not probabilities"
    if like or squashed:
        how = "are all >= 0 and sum to 1, as after a softmax" if like else "all lie in [0, 1], as after a sigmoid"
        rule = f"{how}; attack and ship logits"
    return Finding("not_probabilities", not (like or squashed), f"the outputs on {len(x)} images {rule}")


def gradients_present(logits: Logits, x: Tensor, y: Tensor) -> Finding:
    """The share of images with a cross-entropy gradient of exactly zero, or with an entry that is not finite, and the
    mean size of the gradient."""
    sizes = []
    for at in range(0, len(x), 256):
        slope = raw_gradient(logits, x[at : at + 256], y[at : at + 256], "ce")[2]
        sizes.append(slope.flatten(1).abs().sum(1))
    size = torch.cat(sizes)
    lost = ~torch.isfinite(size)
    zero, size = Point(0.0, int(((size == 0) | lost).sum()), len(x)), size[~lost]
    text = (
        f"{zero.hits} of {zero.total} images have a loss gradient of exactly zero"
        f"{f', or ({int(lost.sum())} of them) one with NaN or infinite entries' if bool(lost.any()) else ''} "
        f"(95 % low {zero.interval[0]:.3f}, must be <= {_FLAT_SHARE:g}); "
        f"mean l1 norm of the gradient {float(size.mean()) if len(size) else 0.0:.3g}"
    )
    return Finding("gradients_present", zero.interval[0] <= _FLAT_SHARE, text)


def eps_zero(logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Finding:
    """At eps 0 the attack itself (not only the check around it) leaves clean accuracy as it is."""
    brief = PROBE.model_copy(update={"steps": 2})
    none = threat.model_copy(update={"eps": 0.0})
    clean = int((outputs(logits, x).argmax(1) == y).sum())
    survived, _ = under_attack(logits, brief.perturb, x, y, none, seed)
    hits = int(survived.sum())
    text = f"at eps 0, {hits} of {len(x)} images survive and {clean} are right without an attack; must be equal"
    return Finding("eps_zero", hits == clean, text)


def falls_with_eps(points: Sequence[Point]) -> Finding:
    """A larger ball contains the smaller one, so accuracy must not rise with eps beyond the interval."""
    return _falling("falls_with_eps", "eps", points)


def step_curve(logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int) -> tuple[Point, ...]:
    """Accuracy under one gradient step (FGSM) and under `PROBE` with ever more."""
    ladder: list[tuple[int, Attack]] = [(1, FGSM(loss="margin"))]
    ladder += [(steps, PROBE.model_copy(update={"steps": steps})) for steps in _STEPS]
    return tuple(_point(steps, logits, attack, x, y, threat, seed) for steps, attack in ladder)


def falls_with_steps(points: Sequence[Point]) -> Finding:
    """More steps must not break fewer beyond the interval; one step that beats many is the mark of masking."""
    return _falling("falls_with_steps", "steps", points)


def restart_curve(logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int) -> tuple[Point, ...]:
    """Accuracy under `PROBE` with ever more random starts, none of them shared."""
    ladder = {count: PROBE.model_copy(update={"restarts": count}) for count in _RESTARTS}
    return tuple(
        _point(count, logits, attack, x, y, threat, derive(seed, "restarts", count)) for count, attack in ladder.items()
    )


def falls_with_restarts(points: Sequence[Point]) -> Finding:
    """More starts must not break fewer beyond the interval."""
    return _falling("falls_with_restarts", "restarts", points)


def falls_to_chance(logits: Logits, x: Tensor, y: Tensor, seed: int) -> Finding:
    """At linf eps 1 every image is within reach of every other, so only a constant answer can survive.

    What may survive is the share of the commonest prediction or label, whichever is larger.
    """
    whole = Threat(norm="linf", eps=1.0)
    predicted = outputs(logits, x).argmax(1)
    common = max(int(predicted.bincount().max()), int(y.bincount().max())) / len(x)
    found = _point(1.0, logits, _WALK, x, y, whole, seed)
    text = (
        f"after gradient steps at linf eps 1, where every image can become any other, accuracy is {found.value:.3f} "
        f"(95 % low {found.interval[0]:.3f}); must be <= {common:.3f}, the share of the commonest class"
    )
    return Finding("falls_to_chance", found.interval[0] <= common, text)


def black_box(white: Tensor, black: Tensor, name: str = "the black-box attack") -> Finding:
    """Outputs alone must not break significantly more than gradients do; one-sided exact McNemar test.

    `white` and `black` bool [M]: what survived each, on the same examples.
    """
    only_black, only_white = int((white & ~black).sum()), int((black & ~white).sum())
    p = binomial_tail(only_black, only_black + only_white)
    text = (
        f"{name} alone breaks {only_black} of {len(white)} examples that no gradient attack breaks, gradient attacks "
        f"{only_white} that it does not (exact McNemar, one-sided p = {p:.2g}, must be >= {_LEVEL:g})"
    )
    if p < _LEVEL:
        text += '; gradients are masked, or the gradient attacks are weak: try pgd with loss = "margin" and more steps'
    return Finding("black_box", p >= _LEVEL, text)


def _compare(
    logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int, pair: tuple[Tensor, Tensor] | None
) -> Finding:
    if pair is not None:
        return black_box(*pair)
    if threat.norm not in _BLACK.norms:
        return Finding("black_box", True, f"no black-box attack for {threat.norm}: not compared")
    white, _ = under_attack(logits, _STRONG, x, y, threat, derive(seed, "white"))
    black, _ = under_attack(logits, _BLACK, x, y, threat, derive(seed, "black"))
    return black_box(white, black, f"square with {_BLACK.queries} queries")


def _point(at: float, logits: Logits, attack: Attack, x: Tensor, y: Tensor, threat: Threat, seed: int) -> Point:
    survived, _ = under_attack(logits, attack, x, y, threat, derive(seed, attack.kind))
    return Point(float(at), int(survived.sum()), len(x))


def _falling(name: str, what: str, points: Sequence[Point]) -> Finding:
    """No point lies above the 95 % high end of any point before it."""
    shown = ", ".join(f"{point.value:.3f} at {point.at:.4g}" for point in points)
    for i, later in enumerate(points):
        for earlier in points[:i]:
            if later.value > earlier.interval[1]:
                text = (
                    f"accuracy rises with {what}: {later.value:.3f} at {later.at:.4g} must be <= "
                    f"{earlier.interval[1]:.3f}, the 95 % high at {earlier.at:.4g} (all: {shown})"
                )
                return Finding(name, False, text)
    return Finding(name, True, f"accuracy does not rise with {what}: {shown}")
