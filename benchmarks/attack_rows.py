"""What `benchmarks/attacks.py` times: the network on a clock, our attacks and the peers', each as one function."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attack_nets import THREAT
from stages.attacks.auto import Auto
from stages.attacks.pgd import PGD
from stages.bounds.base import Box, lead_rows
from stages.bounds.ibp import IBP
from stages.early import Demand, early
from stages.evaluate import Strike, correct, under_attack
from stages.nn.brisk import brisk
from stages.nn.fold import dense, fold
from stages.nn.to_onnx import export
from stages.oracle import Oracle
from stages.seeding import derive, generator
from stages.shipped import Relay
from targets.runtime.ort import OrtEngine

SEED = 0
BATCH = 200
LIMIT, CONFIDENCE = 0.6, 0.95
_PGD = {"steps": 100, "step": 0.025}
_PIECE = 50


class Clock:
    """Time and images in the network's own passes, forward and backward; `answers`, where given, is what is asked."""

    def __init__(self, net: nn.Module, answers: Callable[[Tensor], Tensor] | None = None) -> None:
        self.net, self.answers = net, answers or net
        self.seconds, self.forward, self.backward = 0.0, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        start = time.process_time()
        if torch.is_grad_enabled() and x.requires_grad:
            z: Tensor = _Pass.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            z = self.answers(x)
        self.forward += len(x)
        self.seconds += time.process_time() - start
        return z


class _Pass(torch.autograd.Function):
    """The network with its backward pass on the clock."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock) -> Tensor:
        with torch.enable_grad():
            ctx.point = x.detach().requires_grad_()
            ctx.z, ctx.clock = clock.answers(ctx.point), clock
        z: Tensor = ctx.z.detach()
        return z

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        start = time.process_time()
        # Kept, since some attacks draw several gradients from one pass.
        (slope,) = torch.autograd.grad(ctx.z, ctx.point, slopes[0], retain_graph=True)
        ctx.clock.backward += len(slope)
        ctx.clock.seconds += time.process_time() - start
        return slope, None


class _Module(nn.Module):
    """A clock as a module, for peers that ask for one."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.inner, self.clock = clock.net, clock

    def forward(self, x: Tensor) -> Tensor:
        return self.clock(x)


def ours(net: nn.Module) -> Clock:
    """As `audit` attacks a file: gradients from its torch twin, folded and laid out for them, answers from the file."""
    twin = brisk(dense(fold(net))).requires_grad_(False)
    with TemporaryDirectory() as folder:
        export(net, (1, 28, 28), Path(folder) / "net.onnx")
        engine = OrtEngine((Path(folder) / "net.onnx").read_bytes(), threads=1)
    return Clock(twin, Relay(engine, twin))


def theirs(net: nn.Module) -> Clock:
    """The network itself, in eval mode and without gradients for its weights, which peers do not see to themselves."""
    return Clock(net.eval().requires_grad_(False))


Row = Callable[[Clock, Tensor, Tensor], Tensor]
"""(clock, x, y) -> which images are still right, bool [N]."""


def _attacked(strike: Strike) -> Row:
    return lambda clock, x, y: under_attack(clock, strike, x, y, THREAT, SEED, batch=BATCH)[0]


def exact(clock: Clock, x: Tensor, y: Tensor) -> Tensor:
    """Images that interval bounds prove are robust; the others are attacked, at the classes not proved unreachable."""
    unproved = proved(clock.net, x, y)
    return _struck(clock, Auto(), x, y, unproved, unproved.any(1), SEED)


def proved(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """bool [N, K], False for the true class and for those whose logit stays below the true one's in the whole box."""
    return torch.cat([_open(net, x[at : at + _PIECE], y[at : at + _PIECE]) for at in range(0, len(x), _PIECE)])


def _open(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = lead_rows(net, x, y)
    open_ = IBP().lower(net, Box.around(x, THREAT), rows) <= 0
    classes = torch.arange(rows.shape[2]).expand(len(x), -1)
    others = classes[classes != y.unsqueeze(1)].view(len(x), -1)
    return torch.zeros(len(x), rows.shape[2], dtype=torch.bool).scatter_(1, others, open_)


def _struck(clock: Clock, strike: Strike, x: Tensor, y: Tensor, unproved: Tensor, chosen: Tensor, seed: int) -> Tensor:
    """bool [N]: what is right after `strike` had its turn on the `chosen` ones; the others count as right."""
    right, rows = torch.ones(len(x), dtype=torch.bool), chosen.nonzero().flatten()
    if len(rows):
        oracle = Oracle.of(clock, len(rows), unproved=unproved[rows])
        right[rows], _ = under_attack(oracle, strike, x[rows], y[rows], THREAT, seed, batch=BATCH)
    return right


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a gate that asks for `LIMIT` is met, the images it needs and between how many stand; how many were open.

    Wrong with probability at most 1 - `CONFIDENCE` about what all attacks on all images would say.
    """

    met: bool
    needed: int
    low: int
    high: int
    open: int


def gate(clock: Clock, x: Tensor, y: Tensor) -> Verdict:
    """As `validate` with `early`: proofs, the first attack on all images, the others on some, until it is certain."""
    right = correct(clock, x, y)
    unproved = proved(clock.net, x, y)
    rows = right & unproved.any(1)
    first, *others = Auto().members(THREAT).attacks

    def opening(chunk: Tensor, number: int) -> Tensor:
        return _struck(clock, first, x, y, unproved, chunk, derive(SEED, "first", number))

    def rest(chunk: Tensor, number: int) -> Tensor:
        def also(left: Tensor, one: int) -> Tensor:
            return left & _struck(clock, others[one], x, y, unproved, left, derive(SEED, "rest", number, one))

        return reduce(also, range(len(others)), chunk)

    demand = Demand.of(LIMIT, len(x), CONFIDENCE)
    sure = int((right & ~rows).sum())
    found = early(rows, sure, demand, opening, rest, generator(SEED, "early"), _quiet)
    return Verdict(found.met, demand.needed, found.low, found.high, int(found.open.sum()))


def _quiet(done: int, total: int) -> None:
    """Nobody watches: a row is timed."""
    del done, total


def pyautoattack(clock: Clock, x: Tensor, y: Tensor) -> Tensor:
    from pyautoattack import AutoAttack

    made = AutoAttack(_Module(clock).eval(), norm="Linf", eps=THREAT.eps, version="standard", seed=SEED)
    found, _ = made.run_standard_evaluation(x, y, batch_size=BATCH)
    return _standing(clock, x, y, found)


def torchattacks(clock: Clock, x: Tensor, y: Tensor) -> Tensor:
    from torchattacks import AutoAttack

    made = AutoAttack(_Module(clock).eval(), norm="Linf", eps=THREAT.eps, version="standard", n_classes=10, seed=SEED)
    return _standing(clock, x, y, made(x, y))


def foolbox(clock: Clock, x: Tensor, y: Tensor) -> Tensor:
    import foolbox as fb

    seen = fb.PyTorchModel(_Module(clock).eval(), bounds=(0, 1), device="cpu")
    made = fb.attacks.LinfPGD(steps=int(_PGD["steps"]), rel_stepsize=_PGD["step"], random_start=True)
    _, found, _ = made(seen, x, y, epsilons=THREAT.eps)
    return _standing(clock, x, y, found)


def _standing(clock: Clock, x: Tensor, y: Tensor, found: Tensor) -> Tensor:
    """Judged here, on points put into the ball, whatever the peer says of itself."""
    return correct(clock, x, y) & correct(clock, THREAT.project(found, x), y)


REFERENCE = "pyautoattack"
EXACT = "ours, exact"
ROWS: dict[str, Row] = {
    EXACT: exact,
    REFERENCE: pyautoattack,
    "ours, no shortcuts": _attacked(Auto()),
    "Foolbox PGD 100": foolbox,
    "ours PGD 100": _attacked(PGD.load(_PGD)),
    "torchattacks AutoAttack": torchattacks,
}
NEEDS = {REFERENCE: "pyautoattack", "torchattacks AutoAttack": "torchattacks", "Foolbox PGD 100": "foolbox"}
