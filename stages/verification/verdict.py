"""The whole way from two files to a verdict: search a little, prove what is cheap to prove, then both in turn."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from stages.bounds.base import Contradiction
from stages.bounds.crown import Crown
from stages.bounds.crown_forward import CrownForward
from stages.bounds.crown_ibp import CrownIBP
from stages.method import InputError
from stages.nn._atomic import write
from stages.seeding import generator
from stages.verification import prove
from stages.verification.branching import Branching
from stages.verification.cases import Array, Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt
from stages.verification.model import Model, opened
from stages.verification.vnnlib import parse

Word = Literal["sat", "unsat", "unknown"]
Say = Callable[[str], None]
_ALIKE = 1e-4
_LONGER = 0.03  # of the time goes to a search where cheap bounds have left something open
_FEW = 24  # free inputs that are worth splitting


@dataclass(frozen=True, slots=True)
class Witness:
    """An unsafe input float32 [n], and what onnxruntime answers to it, float32 [K]."""

    x: Array
    y: Array

    def text(self) -> str:
        """The competition's form: ((X_0 0.5) ... (Y_0 1.25)), every number exactly as it is in float32."""
        entries = [f"(X_{i} {float(value)!r})" for i, value in enumerate(self.x)]
        entries += [f"(Y_{k} {float(value)!r})" for k, value in enumerate(self.y)]
        return f"({chr(10).join(entries)})\n"


@dataclass(frozen=True, slots=True)
class Answer:
    word: Word
    reason: str
    witness: Witness | None = None


def decide(network: Path, specification: Path, clock: Clock, say: Say) -> Answer:
    """`sat` where onnxruntime confirms a witness, `unsat` where bounds refute every case, `unknown` with the reason.

    Raises `InputError` for files that cannot be used.
    """
    spec = parse(_text(specification), str(specification))
    model = Model(network, spec.inputs, spec.outputs)
    cases = Cases.of(spec, model.classes)
    if not spec.regions:
        return Answer("unsat", "unsat: the constraints contradict each other, whatever the network computes")
    trial = Trial(model, cases, clock, say)
    say(f"{spec.inputs} inputs, {spec.outputs} outputs, {len(spec.regions)} boxes, {len(cases.bounds)} cases")
    return trial.answer()


class Trial:
    """One network, one specification, and the cases int64 `still` that nothing has refuted yet."""

    def __init__(self, model: Model, cases: Cases, clock: Clock, say: Say) -> None:
        self.model, self.cases, self.clock, self.say = model, cases, clock, say
        self.still = torch.arange(len(cases.bounds))
        self.hunt = Hunt(model.net, cases, self._confirms, generator(0, "verify-spec"))
        self.why = ""

    def answer(self) -> Answer:
        witness = self._hunt(rounds=3, part=0.25)
        if witness is not None:
            return self._sat(witness)
        gap = self.model.disagreement(self._points())
        if not torch.equal(self.cases.rows.float().double(), self.cases.rows):
            self.why = "a constraint has factors of more digits than float32 holds, so nothing is proved"
            self.say(self.why)
        elif self.model.strange is not None:
            self.why = f"nothing is proved, as {self.model.strange}"
            self.say(self.why)
        elif gap <= _ALIKE:
            witness = self._prove()
            if witness is not None:
                return self._sat(witness)
            if len(self.still) == 0:
                return Answer("unsat", f"unsat: all {len(self.cases.bounds)} cases are refuted")
        else:
            away = f"the torch twin is {gap:.1e} of the largest output away from onnxruntime"
            strange = "outputs on points of the box are infinite or no numbers" if isnan(gap) else away
            self.why = f"{strange}, so nothing is proved"
            self.say(self.why)
        witness = self._hunt(rounds=None, part=1.0)
        if witness is not None:
            return self._sat(witness)
        done = len(self.cases.bounds) - len(self.still)
        reason = f"unknown: {done} of {len(self.cases.bounds)} cases are refuted, no witness was found"
        return Answer("unknown", f"{reason}; {self.why or 'time is up'}")

    def _prove(self) -> Array | None:
        """Refutes what bounds can refute; returns a witness where the search inside boxes met one."""
        try:
            for certifier in (CrownIBP(), Crown()):
                if len(self.still) and self.clock.left() > 0:
                    self.still = prove.on_regions(self.model.net, self.cases, self.still, certifier, self.clock)
                    self.say(f"{certifier.kind}: {len(self.still)} of {len(self.cases.bounds)} cases are open")
            if len(self.still) == 0:
                return None
            witness = self._hunt(rounds=None, part=_LONGER)
            if witness is not None:
                return witness
            return self._split() if self._free() <= _FEW else self._branch()
        except Contradiction as error:
            self.still = torch.arange(len(self.cases.bounds))  # what wrong bounds refuted is refuted no more
            self.why = (
                f"A BOUND IS WRONG, so nothing counts as proved: {error}. It is a fault of Temper, not of your files: "
                "please report it, with both of them and what is printed here"
            )
            self.say(self.why)
            return None
        except Exception as error:  # whatever keeps bounds from being formed, the search can go on
            self.why = str(error) if isinstance(error, InputError) else f"bounds: {type(error).__name__}: {error}"
            self.say(self.why)
            return None

    def _free(self) -> int:
        """How many inputs an open box lets move, by more than the step of float32 that a decimal may be rounded by."""
        regions = torch.unique(self.cases.region[self.still])
        low, high = self.cases.low[regions], self.cases.high[regions]
        return int((torch.nextafter(low, high) < high).sum(1).max())

    def _split(self) -> Array | None:
        quick = CrownForward(double=False)
        try:
            self.still = prove.on_regions(self.model.net, self.cases, self.still, quick, self.clock)
        except InputError as error:  # an operation moves the batch
            self.say(str(error))
            return self._branch()
        if len(self.still) == 0:
            return None
        splitting = prove.Splitting(self.model.net, self.cases, quick, CrownForward(), self.hunt)
        done, witness = splitting.run(self.still, self.clock)
        self.say(f"splitting: {splitting.boxes} boxes bounded")
        if done:
            self.still = self.still[:0]
        elif self.clock.left() > 0:
            self.why = "boxes between neighbouring float32 numbers stay open, and cannot be cut any further"
        return witness

    def _branch(self) -> Array | None:
        branching = Branching(self.model.net, self.cases, self.hunt)
        self.still, witness = branching.run(self.still, self.clock)
        self.say(f"branching: {len(self.still)} of {len(self.cases.bounds)} cases are open")
        return witness

    def _hunt(self, rounds: int | None, part: float) -> Array | None:
        clock = self.clock.share(part)
        count = 0
        while clock.left() > 0 and len(self.still) and count != rounds:
            witness = self.hunt.round(self.still, clock)
            if witness is not None:
                return witness
            count += 1
        return None

    def _points(self) -> Tensor:
        low, high = self.cases.inner_low[:1], self.cases.inner_high[:1]
        share = torch.rand(4, low.shape[1], generator=generator(0, "points"))
        return torch.cat([low, high, (low + share * (high - low)).clamp(low, high)])

    def _confirms(self, x: Array) -> bool:
        return self.cases.witnessed(x, self.model.outputs(x))

    def _sat(self, x: Array) -> Answer:
        return Answer("sat", "sat: onnxruntime confirms the witness", Witness(x, self.model.outputs(x)))


def write_witness(witness: Witness, path: Path) -> None:
    write(path, witness.text().encode())


def _text(path: Path) -> str:
    found = opened(path)
    try:
        return (found.read_bytes() if isinstance(found, Path) else found).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
