"""Every example's verdict: proved, broken or standing. Attacks and bounds meet here; neither knows the other."""

import time
from collections.abc import Callable, Mapping, Sequence
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
from stages.unproved import REASONS, Reason, counts

_BATCH, _PIECE = 256, 32
_LATE = 0.9  # of its own time, and what a certifier has left open it had no time for
_TESTED = 8
_SHORT = PGD(steps=10, loss="margin", start="zero")


@dataclass(frozen=True, slots=True)
class Proved:
    """By certifier: sound lower bounds of z_y - z_k, [N, K], +inf at k = y, -inf where it says nothing.

    `findings` says which certifier has no rule for the network, or failed on it: it proves nothing, which is sound.
    `why` has a word for every image, None where proved; attacks that come later may add to those that are broken.
    """

    certifiers: dict[str, Certifier]
    leads: dict[str, Tensor]
    findings: tuple[Finding, ...]
    why: tuple[Reason | None, ...] = ()

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
    capped: bool = False,
) -> Proved:
    """Bound every lead of every example [N, C, H, W]; `on_step(name)(done, total)` counts images.

    A cascade: put the cheapest first. Each certifier is asked about the examples that those before it left open, and
    says nothing of the others. Before the first that is dearer than a short attack, such an attack has its turn: what
    it breaks, and what is read wrongly anyway, is put to no dear one but for 8 images, as a test: one that proves such
    an image has a finding that fails.

    With `seconds`, what is proved by then counts, and the rest is open: the clock is looked at between pieces of 32
    images, of a dear certifier as many as it will likely do in time, and certifiers with a clock of their own get no
    more than is left. Fewer images are bounded at once where memory is short; a certifier whose memory holds not one
    leaves them to the others. `why` and the finding "unproved" say why what is open is open.

    Raises `InputError` for a method that proves nothing, by whatever way it came here, and where no certifier's memory
    holds a single image, or one's does not and it was asked for (`capped`); `Contradiction` where bounds and a point
    contradict each other.
    """
    certifiers = {name: certifier(method) for name, method in certifiers.items()}
    leads, findings, scant = {}, [], list[TooLittleMemory]()
    wrong = torch.arange(classes, device=x.device).unsqueeze(0) != y.unsqueeze(1)
    left, rank = torch.arange(len(x), device=x.device), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    refuted = left[:0]
    end = None if seconds is None else time.monotonic() + seconds
    struck = False

    def ask(method: Certifier, rows: Tensor) -> Tensor:
        bounds = method.lower(net, Box.around(x[rows], threat), lead_rows(net, x[rows], y[rows])).detach()
        if bool(bounds.isnan().any()):
            raise InputError("its bounds are NaN")
        return bounds

    for name, method in certifiers.items():
        if not (struck or method.cheap) and len(left) and not _over(end):
            struck = True
            held, _ = under_attack(net, _SHORT, x[left], y[left], threat, 0)
            refuted = left[~held]
            left = torch.cat([left[held], refuted[:_TESTED]])
        found = torch.full((len(x), classes), float("inf"), device=x.device)
        found[wrong] = float("-inf")
        try:
            way = _through(method, left, end, ask, on_step(name))
        except (Contradiction, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # one that torch raises inside a certifier says no more than that it has no rule
            reason = str(error) if isinstance(error, InputError) else _first_line(error)
            findings.append(Finding(f"covers_{name}", True, f"{name} proves nothing about this network: {reason}"))
        else:
            for rows, bounds in way.pieces:
                found[rows] = found[rows].masked_scatter(wrong[rows], bounds)
            for word, rows in (("loose", way.bounded), ("memory", way.scant), ("time", way.late)):
                rank[rows] = rank[rows].clamp(min=REASONS.index(word))
            if way.error is not None:
                scant.append(way.error)
                text = f"{name} leaves {len(way.scant)} images as they are: {way.error}"
                findings.append(Finding(f"memory_{name}", True, text))
        leads[name] = found
        left = left[~(found[left] > 0).all(1)]
        if claimed := int((found[refuted] > 0).all(1).sum()):
            text = f"{claimed} images that {name} proved are read wrongly, as they are or after a few gradient steps"
            findings.append(Finding(f"refuted_{name}", False, f"{text}; must be none"))
    if scant and (capped or len(scant) == len(certifiers)):
        raise scant[0]
    rank[refuted] = REASONS.index("broken")
    left = torch.cat([left[~torch.isin(left, refuted)], refuted])
    why: list[Reason | None] = [None] * len(x)
    for image in left.tolist():
        why[image] = REASONS[int(rank[image])]
    if len(left) and certifiers:
        lacking = {finding.name for finding in findings}
        ran = {name: method for name, method in certifiers.items() if f"covers_{name}" not in lacking}
        findings.append(_unproved(why, ran, seconds))
    return Proved(dict(certifiers), leads, tuple(findings), tuple(why))


@dataclass(slots=True)
class _Way:
    """One certifier's way through images: its bounds piece by piece; then which images it bounded, which it had no time
    for, its own clock counted, and which its memory does not hold, `error` says why."""

    pieces: list[tuple[Tensor, Tensor]]
    bounded: Tensor
    late: Tensor
    scant: Tensor
    error: TooLittleMemory | None = None


def _through(
    method: Certifier,
    left: Tensor,
    end: float | None,
    ask: Callable[[Certifier, Tensor], Tensor],
    on_step: OnStep,
) -> _Way:
    at, size = 0, _BATCH if end is None else _PIECE if method.cheap else 1
    pieces, late = list[tuple[Tensor, Tensor]](), list[Tensor]()
    while at < len(left) and not _over(end):
        rows, start = left[at : at + size], time.monotonic()
        able = _hurried(method, end, len(rows))
        try:
            pieces.append((rows, ask(able, rows)))
        except TooLittleMemory as error:
            if len(rows) == 1:
                return _Way(pieces, left[:at], torch.cat([left[:0], *late]), left[at:], error)
            size = len(rows) // 2
            continue
        at += len(rows)
        on_step(at, len(left))
        took, own = time.monotonic() - start, _clock(able)
        if own is not None and took > _LATE * own * len(rows):
            late.append(rows)
        if end is not None and not method.cheap:
            fits = int(len(rows) * (end - start - took) / max(took, 1e-6))
            size = max(1, min(fits, 2 * len(rows), _PIECE))
    return _Way(pieces, left[:at], torch.cat([left[at:], *late]), left[:0])


def _over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def _hurried(method: Certifier, end: float | None, images: int) -> Certifier:
    """A certifier with a clock of its own, which must not run past `end`."""
    own = _clock(method)
    if end is None or own is None:
        return method
    return method.model_copy(update={"seconds": min(own, max(end - time.monotonic(), 1e-3) / images)})


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"


def _unproved(why: Sequence[Reason | None], certifiers: Mapping[str, Certifier], seconds: float | None) -> Finding:
    clocks = [] if seconds is None else [f"the {seconds:g} s for certifying"]
    clocks += [f"{name}'s {own:g} s an image" for name, method in certifiers.items() if (own := _clock(method))]
    said: dict[Reason, str] = {
        "loose": f"no lower bound of their lead is above 0 ({', '.join(certifiers)})",
        "time": f"{' or '.join(clocks)} were over",
        "memory": "a certifier's memory does not hold them",
        "uncovered": "no certifier has a rule for the network",
        "broken": "they are read wrongly, as they are or after a few gradient steps",
    }
    found = counts(why)
    reasons = ", ".join(f"{found[word]} because {text}" for word, text in said.items() if word in found)
    text = f"{sum(found.values())} of {len(why)} images, those read wrongly among them, are not proved: {reasons}"
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
