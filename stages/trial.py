"""Every example's verdict: proved, broken or standing. Attacks and bounds meet here; neither knows the other."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from stages.attacks.pgd import PGD
from stages.bounds.base import Box, Certifier, Contradiction, TooLittleMemory, certifier, lead_rows
from stages.evaluate import OnStep, Strike, under_attack
from stages.finding import Finding
from stages.method import InputError
from stages.oracle import Logits, Oracle, Spent
from stages.threat import Threat

_BATCH, _PIECE = 256, 32
_TESTED = 8
_SHORT = PGD(steps=10, loss="margin", start="zero")


@dataclass(frozen=True, slots=True)
class Proved:
    """By certifier: sound lower bounds of z_y - z_k, [N, K], +inf at k = y, -inf where it says nothing.

    `findings` says which certifier has no rule for the network, or failed on it: it proves nothing, which is sound.
    """

    certifiers: dict[str, Certifier]
    leads: dict[str, Tensor]
    findings: tuple[Finding, ...]

    @property
    def margins(self) -> dict[str, Tensor]:
        """[N] each: lower bounds of the true class's lead over the best other class."""
        return {name: leads.amin(1) for name, leads in self.leads.items()}

    def certified(self, right: Tensor) -> dict[str, Tensor]:
        """bool [N] each: right, and proved to stay so."""
        return {name: (margins > 0) & right for name, margins in self.margins.items()}

    @property
    def unproved(self) -> Tensor | None:
        """bool [N, K]: the wrong classes that no certifier proved unreachable; None without certifiers."""
        if not self.leads:
            return None
        return torch.stack([~(leads > 0) for leads in self.leads.values()]).all(0)


def prove(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: int,
    threat: Threat,
    certifiers: Mapping[str, Certifier],
    on_step: Callable[[str], OnStep],
    seconds: float | None = None,
) -> Proved:
    """Bound every lead of every example [N, C, H, W]; `on_step(name)(done, total)` counts images.

    A cascade: put the cheapest first. Each certifier is asked about the examples that those before it left open, and
    says nothing of the others. Before the first that is dearer than a short attack, such an attack has its turn: what
    it breaks, and what is read wrongly anyway, is put to no dear one but for 8 images, as a test: one that proves such
    an image has a finding that fails.

    With `seconds`, what is proved by then counts, and the rest is open: the clock is looked at between pieces of 32
    images, and certifiers with a clock of their own get no more than is left. Fewer images are bounded at once where
    memory is short. The finding "unproved" says why what is open is open.

    Raises `InputError` for a method that proves nothing, by whatever way it came here, and where a certifier's memory
    does not hold a single image; `Contradiction` where bounds and a point contradict each other.
    """
    for method in certifiers.values():
        certifier(method)
    leads, findings = {}, []
    wrong = torch.arange(classes, device=x.device).unsqueeze(0) != y.unsqueeze(1)
    left, late = torch.arange(len(x), device=x.device), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    refuted: Tensor | None = None
    end = None if seconds is None else time.monotonic() + seconds
    for name, method in certifiers.items():
        if refuted is None and not method.cheap and len(left) and (end is None or time.monotonic() < end):
            held, _ = under_attack(net, _SHORT, x[left], y[left], threat, 0)
            refuted = left[~held]
            left = torch.cat([left[held], refuted[:_TESTED]])
        found = torch.full((len(x), classes), float("inf"), device=x.device)
        found[wrong] = float("-inf")
        at, size = 0, _BATCH if end is None else _PIECE
        try:
            while at < len(left) and (end is None or time.monotonic() < end):
                rows = left[at : at + size]
                ends, labels = Box.around(x[rows], threat), y[rows]
                try:
                    able = _hurried(method, end, len(rows))
                    bounds = able.lower(net, ends, lead_rows(net, x[rows], labels)).detach()
                except TooLittleMemory:
                    if len(rows) == 1:
                        raise
                    size = len(rows) // 2
                    continue
                if bool(bounds.isnan().any()):
                    raise InputError("its bounds are NaN")
                found[rows] = found[rows].masked_scatter(wrong[rows], bounds)
                at += len(rows)
                on_step(name)(at, len(left))
            late[left[at:]] = True
        except (TooLittleMemory, Contradiction, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # one that torch raises inside a certifier says no more than that it has no rule
            reason = str(error) if isinstance(error, InputError) else _first_line(error)
            found[wrong] = float("-inf")
            findings.append(Finding(f"covers_{name}", True, f"{name} proves nothing about this network: {reason}"))
        leads[name] = found
        left = left[~(found[left] > 0).all(1)]
        if refuted is not None and (claimed := int((found[refuted] > 0).all(1).sum())):
            text = f"{claimed} images that {name} proved are read wrongly, as they are or after a few gradient steps"
            findings.append(Finding(f"refuted_{name}", False, f"{text}; must be none"))
    lost = 0 if refuted is None else len(refuted)
    left = left if refuted is None else left[~torch.isin(left, refuted)]
    ran = {name: method for name, method in certifiers.items() if f"covers_{name}" not in {f.name for f in findings}}
    if len(left) + lost and ran:
        findings.append(_unproved(len(x), len(left), int(late[left].sum()), lost, ran, seconds))
    return Proved(dict(certifiers), leads, tuple(findings))


def _hurried(method: Certifier, end: float | None, images: int) -> Certifier:
    """A certifier with a clock of its own, which must not run past `end`."""
    own = _clock(method)
    if end is None or own is None:
        return method
    return method.model_copy(update={"seconds": min(own, max(end - time.monotonic(), 1e-3) / images)})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"


def _unproved(
    total: int, left: int, late: int, lost: int, certifiers: Mapping[str, Certifier], seconds: float | None
) -> Finding:
    clocks = [f"{name} has {own:g} s an image" for name, method in certifiers.items() if (own := _clock(method))]
    names, loose = ", ".join((*certifiers, *clocks)), left - late
    why = [f"{loose} because no lower bound of their lead is above 0 ({names})"] if loose else []
    why += [f"{late} because the {seconds:g} s for certifying were over"] if late else []
    why += [f"{lost} because they are read wrongly, as they are or after a few gradient steps"] if lost else []
    text = f"{left + lost} of {total} images, those read wrongly among them, are not proved: {', '.join(why)}"
    return Finding("unproved", True, text)


def _clock(method: Certifier) -> float | None:
    return getattr(method, "seconds", None)


def spared(proved: Proved, right: Tensor, rng: Generator) -> Tensor:
    """bool [N]: examples that need no attack because every wrong class is proved unreachable.

    A random twentieth of them, at least 50, is attacked all the same: a proof that an attack breaks is no proof.
    """
    if proved.unproved is None:
        return torch.zeros_like(right)
    rows = (right & ~proved.unproved.any(1)).nonzero().flatten()
    doubted = rows[torch.randperm(len(rows), generator=rng, device=rng.device).to(rows.device)]
    kept = torch.zeros_like(right)
    kept[doubted[max(50, len(rows) // 20) :]] = True
    return kept


@dataclass(frozen=True, slots=True)
class Hit:
    """What one attack did: whom it tried and what was left, bool [N]; its inputs [N, C, H, W]; what it spent."""

    tried: Tensor
    survived: Tensor
    x_adv: Tensor
    spent: Spent


def strike(
    logits: Logits,
    attack: Strike,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    threat: Threat,
    seed: int,
    unproved: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Hit:
    """One attack on the examples `rows`, bool [N]; the others survive untried.

    `unproved` bool [N, K] keeps targeted attacks from classes that cannot be reached.
    """
    oracle = Oracle.of(logits, len(x), x.device, unproved)
    survived, x_adv = torch.ones_like(rows), x.clone()
    chosen = rows.nonzero().flatten()
    if len(chosen):
        held, found = under_attack(oracle[chosen], attack, x[chosen], y[chosen], threat, seed, _BATCH, on_step)
        survived[chosen], x_adv[chosen] = held, found
    return Hit(rows, survived, x_adv, oracle.spent)


def joined(first: Hit, second: Hit) -> Hit:
    """One attack's doings on two sets of examples that share none."""
    wide = second.tried.view((-1,) + (1,) * (first.x_adv.dim() - 1))
    return Hit(
        first.tried | second.tried,
        first.survived & second.survived,
        torch.where(wide, second.x_adv, first.x_adv),
        Spent(first.spent.queries + second.spent.queries, first.spent.gradients + second.spent.gradients),
    )
