"""`audit MODEL.onnx`: clean, attacked and certified accuracy of any classifier, ours or not, on the file itself."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.core.errors import BadInput
from stages import evidence, ledger
from stages.adapter import Form
from stages.apart import apart
from stages.attacks.base import FOLDER as ATTACKS
from stages.attacks.base import QUICK, STANDARD, Attack
from stages.attacks.square import Square
from stages.bounds.base import FOLDER as BOUNDS
from stages.bounds.base import Bounds, Certifier, Estimator
from stages.bounds.smoothing import Smoothing
from stages.data.base import Split
from stages.doubts import findings, gridded
from stages.early import Demand
from stages.exhibits import Images, images
from stages.finding import Finding
from stages.members import named
from stages.method import InputError, load, type_of
from stages.nn import _atomic
from stages.seeding import derive, generator
from stages.subject import Subject, opened
from stages.threat import Threat
from stages.verdicts import Plan, Verdicts, check_labels, judge

_BATCH = 256
_POWERS = {"linf": 0.0, "l2": 0.5, "l1": 1.0}
_OF_SMOOTHING = ("sigma", "n0", "n", "alpha")


def run(args: argparse.Namespace) -> int:
    """0 it ran, 1 `--at-least` was not reached; raises `BadInput` and `InputError` (2)."""
    start = time.perf_counter()
    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    for out in (args.json, args.evidence):
        _writable(out, args.model)
    _asks_early(args)
    threat, form, asked_bounds = _threat(args.threat), _form(args), _bounds(args)
    certifiers = {name: bounds for name, bounds in asked_bounds.items() if isinstance(bounds, Certifier)}
    estimators = {name: bounds for name, bounds in asked_bounds.items() if isinstance(bounds, Estimator)}
    smoothing = next((bounds for bounds in asked_bounds.values() if isinstance(bounds, Smoothing)), None)
    if smoothing is not None:
        smoothing.accept(threat)
    asked = _attacks(args.attack)
    root = (args.data_root or Path(os.environ.get("TEMPER_DATA") or "data")).resolve()
    shown = images(args.data, root, args.split, args.limit, args.indices, args.seed)
    _within(threat, shown.x)
    subject = opened(args.model, shown.x, form, threads)
    chosen = asked if subject.twin is not None else _blind(asked)
    demand, clock = _demand(args, len(shown.x)), args.certify_seconds
    plan = Plan(
        threat,
        named(chosen, threat),
        certifiers,
        args.shortcuts,
        args.seed,
        demand,
        clock,
        args.certify_memory is not None,
    )
    strength = evidence.strength(chosen)
    notes = (*subject.notes, *shown.notes, *_notes(subject, threat, shown, asked, chosen))
    if smoothing is not None:
        notes = (*notes, *ledger.promise(smoothing, subject.file, shown.x, threat))
    told = ledger.Told(args.model, shown.text, threat, strength, subject, notes)
    print(ledger.opening(told), flush=True)
    step = ledger.progress(strength)
    try:
        verdicts = judge(subject, shown.x, shown.y, shown.indices, plan, _ready(subject, shown, args.seed), step)
        found = tuple(findings(subject, verdicts, *shown.examined, derive(args.seed, "findings"), step("validity")))
        aside = apart(subject, verdicts.scene, estimators, smoothing, args.seed, step)
        found = (*found, *aside.findings)
    except InputError as error:
        raise InputError(f"{args.model}: on images within the threat: {error}") from error
    if args.grid:
        found = (*found, gridded(verdicts.scene, verdicts.struck))
    seconds = time.perf_counter() - start
    print(ledger.closing(told, verdicts, aside, found, seconds))
    if args.json is not None:
        _atomic.write(args.json, ledger.document(told, verdicts, aside, found, seconds, _settings(args, threads, root)))
    if args.evidence is not None:
        ledger.write_evidence(args.evidence, told, verdicts, aside, args.split, args.seed)
    return 0 if args.at_least is None or _reached(verdicts, found, strength, args.at_least) else 1


def _demand(args: argparse.Namespace, total: int) -> Demand | None:
    return None if args.early is None else Demand.share(args.at_least, total, args.early)


def _asks_early(args: argparse.Namespace) -> None:
    if args.early is None:
        return
    if args.at_least is None:
        raise BadInput("audit: --early: expected --at-least F too, whose verdict it is that comes early")
    if not args.shortcuts:
        raise BadInput("audit: expected --early or --no-shortcuts, got both; early verdicts are shortcuts")
    if not 0.5 < args.early < 1:
        raise BadInput(f"audit: --early: expected a confidence above 0.5 and below 1, got {args.early:g}")


def _reached(verdicts: Verdicts, found: tuple[Finding, ...], strength: str, at_least: float) -> bool:
    told, failed = verdicts.struck.early, [finding.name for finding in found if not finding.ok]
    robust = float(verdicts.robust.double().mean()) if told is None else told.high / len(told.open)
    if robust < at_least if told is None else not told.met:
        what = f"{'' if told is None else 'at most '}{robust:.4f} ({strength})"
        print(f"temper: robust accuracy is {what}, at least {at_least:g} was asked", file=sys.stderr)
        return False
    if failed:
        print(f"temper: robust accuracy is not to be believed: {', '.join(failed)} failed", file=sys.stderr)
        return False
    return True


def _notes(
    subject: Subject, threat: Threat, shown: Images, asked: tuple[Attack, ...], chosen: tuple[Attack, ...]
) -> Iterator[str]:
    """What a reader would not expect."""
    beyond = check_labels(subject, shown.y, shown.source.classes)
    if beyond is not None:
        yield beyond
    if threat.eps == 0:
        yield "eps is 0: nothing can be changed, so robust accuracy is clean accuracy"
    elif threat.eps == _farthest(threat, shown.x):
        yield "eps reaches from every image to every other: only a constant answer could stand"
    if asked != chosen:
        kinds = ", ".join(attack.kind for attack in asked if attack not in chosen)
        yield f"without gradients {kinds} cannot run; what runs is {', '.join(attack.kind for attack in chosen)}"


def _threat(text: str) -> Threat:
    norm, _, eps = text.partition(":")
    try:
        return Threat.load({"norm": norm, "eps": eps})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise BadInput(
            f'audit: --threat: expected NORM:EPS such as linf:8/255, l2:0.5 or l1:12, got "{text}": '
            f"{problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}"
        ) from error


def _within(threat: Threat, x: Tensor) -> None:
    farthest = _farthest(threat, x)
    if threat.eps > farthest:
        hint = f'; pixels lie in [0, 1], did you mean "{threat.eps:g}/255"?' if threat.norm == "linf" else ""
        raise BadInput(
            f"audit: --threat: expected eps of at most {farthest:g}, the {threat.norm} distance between a black and a "
            f"white image, got {threat.eps:g}{hint}"
        )


def _farthest(threat: Threat, x: Tensor) -> float:
    return float(x[0].numel() ** _POWERS[threat.norm])


def _form(args: argparse.Namespace) -> Form:
    if args.pixels is not None and (args.mean is not None or args.std is not None):
        raise BadInput("audit: expected --pixels or --mean and --std, got both; give what the file wants")
    if args.std is not None and 0 in args.std:
        raise BadInput("audit: --std: expected numbers other than 0, got 0")
    return Form(args.mean, args.std, args.pixels, args.layout)


def _attacks(text: str) -> tuple[Attack, ...]:
    sets: dict[str, tuple[Any, ...]] = {"quick": QUICK, "standard": STANDARD}
    items = [item for name in text.split(",") for item in sets.get(name, (name,))]
    try:
        return tuple(load(ATTACKS, Attack, item) for item in items)  # type: ignore[type-abstract]
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadInput(
            f"audit: --attack {text}: {where}: {problem['msg']}; audit takes attacks as they stand"
        ) from error


def _blind(asked: tuple[Attack, ...]) -> tuple[Attack, ...]:
    """Those that need no gradients, and Square where none is left."""
    kept = tuple(attack for attack in asked if not attack.needs_gradients)
    return kept or (Square(stretch=False),)


def _bounds(args: argparse.Namespace) -> dict[str, Bounds]:
    """What `--certify` names: certifiers, estimators, smoothing."""
    listed = [] if args.certify == "none" else args.certify.split(",")
    given = {name: value for name in _OF_SMOOTHING if (value := getattr(args, name)) is not None}
    if given and "smoothing" not in listed:
        raise BadInput(f"audit: --{next(iter(given))}: expected --certify smoothing too, whose setting it is")
    if twice := sorted({name for name in listed if listed.count(name) > 1}):
        raise BadInput(f"audit: --certify: {twice[0]} is named twice")
    types = {name: type_of(BOUNDS, Bounds, name) for name in listed}
    able = [name for name, kind in types.items() if "memory" in kind.model_fields]
    if args.certify_memory is not None and not able:
        raise BadInput(f"audit: --certify-memory: none of {args.certify} has a memory to cap")
    own = {name: {"memory": args.certify_memory} for name in able if args.certify_memory is not None}
    own["smoothing"] = given
    try:
        return {name: load(BOUNDS, Bounds, {"kind": name, **own.get(name, {})}) for name in listed}
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadInput(f"audit: --certify: {where}: {problem['msg']}, got {problem['input']}") from error


def _ready(subject: Subject, shown: Images, seed: int) -> Any:
    """Attacks that learn do so on the training part."""
    return lambda attack: attack.prepare(
        subject.attacked, _batches(shown.source.train), generator(seed, "prepare", attack.kind)
    )


def _batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    for at in range(0, len(split), _BATCH):
        yield split.floats(slice(at, at + _BATCH)), split.labels[at : at + _BATCH]


def _settings(args: argparse.Namespace, threads: int, root: Path) -> dict[str, Any]:
    """What was asked, in plain JSON data; defaults as they were taken."""
    plain = {name: value for name, value in vars(args).items() if name not in ("json", "evidence")}
    plain |= {"threads": threads, "data_root": root}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def _writable(out: Path | None, model: Path) -> None:
    """Found out before the work, not after."""
    if out is None:
        return
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise BadInput(f"{out}: expected a file in a folder that exists, got {'a folder' if out.is_dir() else 'none'}")
    if out.resolve() == model.resolve():
        raise BadInput(f"{out}: this is the model; writing there would destroy it")
    if not os.access(out.resolve().parent, os.W_OK):
        raise BadInput(f"{out}: its folder cannot be written to; choose another place")
