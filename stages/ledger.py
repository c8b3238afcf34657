"""What an audit says: on the terminal, as JSON (docs/audit.md) and as an evidence file."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.core.measurement import wilson
from stages import evidence
from stages.apart import Apart
from stages.bounds.smoothing import Smoothing
from stages.evaluate import OnStep, outputs
from stages.finding import Finding
from stages.oracle import Logits
from stages.scene import examples
from stages.subject import Subject
from stages.threat import Threat
from stages.verdicts import Verdicts

SCHEMA = 1
ESTIMATE = "an estimate, not a proof"
_EVERY = 0.5
_TIMED = 500


@dataclass(frozen=True, slots=True)
class Told:
    """What is audited: the file, which images, the threat, and whether the attacks may be called standard."""

    model: Path
    data: str
    threat: Threat
    strength: evidence.Strength
    subject: Subject
    notes: tuple[str, ...]


def opening(told: Told) -> str:
    """The first lines, before anything long starts."""
    subject = told.subject
    lines = [
        f"{told.model}  sha256 {subject.digest[:16]}, {subject.classes} outputs",
        f"{told.data}; {told.threat.norm} eps {told.threat.eps:.6g} in pixels of [0, 1]; attacks: {told.strength}",
    ]
    if subject.twin is None:
        lines.append(f"BLACK BOX ONLY: it has no torch twin: {subject.why}")
    else:
        lines.append(f"imported and compared with onnxruntime {subject.text}")
    return "\n".join(lines + [f"note: {note}" for note in told.notes])


def closing(told: Told, verdicts: Verdicts, aside: Apart, findings: Sequence[Finding], seconds: float) -> str:
    """Accuracies, what is reported apart from them, the table of attacks, the findings."""
    box = ", black box only" if told.subject.twin is None else ""
    lines = ["", *(_accuracy(name, hits) for name, hits in _shares(verdicts).items())]
    if (early := verdicts.struck.early) is not None:
        value, low, high = early.interval()
        lines[2] = (
            f"{'robust':<10}{value:.4f}  95 % {low:.4f} to {high:.4f}, {early.low} to {early.high} of "
            f"{len(early.open)}, {int(early.open.sum())} of them open: the verdict was certain"
        )
    lines[2] += f"  ({told.strength}{box})"
    lines += _aside(told, verdicts, aside)
    names = {"attack": [line.name for line in verdicts.lines]}
    columns: dict[str, list[str]] = {
        **names,
        "tried": [str(line.tried) for line in verdicts.lines],
        "broke": [str(line.broke) for line in verdicts.lines],
        "left": [str(line.tried - line.broke) for line in verdicts.lines],
        "queries": [str(line.queries) for line in verdicts.lines],
        "gradients": [str(line.gradients) for line in verdicts.lines],
        "seconds": [f"{line.seconds:.1f}" for line in verdicts.lines],
    }
    widths = {head: max(len(head), *(len(cell) for cell in cells)) for head, cells in columns.items()}
    lines += ["", _row(columns.keys(), widths)]
    lines += [_row(cells, widths) for cells in zip(*columns.values(), strict=True)]
    lines += ["", *(f"{'ok    ' if f.ok else 'FAILED'}  {f.name}: {f.text}" for f in findings)]
    failed = sum(not finding.ok for finding in findings)
    ending = f"{failed} findings FAILED: the robust accuracy is not to be believed as it stands; " if failed else ""
    return "\n".join([*lines, "", f"{ending}{seconds:.1f} s"])


def document(
    told: Told,
    verdicts: Verdicts,
    aside: Apart,
    findings: Sequence[Finding],
    seconds: float,
    settings: Mapping[str, Any],
) -> bytes:
    """By docs/audit.schema.json; fractions lie in [0, 1]."""
    data: dict[str, Any] = {"schema_version": SCHEMA, "clean": None, "robust": None, "certified": None}
    data |= {name: _numbers(hits) for name, hits in _shares(verdicts).items()}
    data["unproved"], data["early"] = verdicts.unproved, None
    if (early := verdicts.struck.early) is not None:
        value, low, high = early.interval()
        judged = len(early.open) - int(early.open.sum())
        data["robust"] = {"value": value, "low": low, "high": high, "samples": judged}
        data["early"] = {"met": early.met, "open": int(early.open.sum()), "low": early.low, "high": early.high}
    data["strength"], data["black_box_only"] = told.strength, told.subject.twin is None
    data["model"] = {"path": str(told.model), "sha256": told.subject.digest, "outputs": told.subject.classes}
    data["data"], data["threat"] = told.data, told.threat.dump()
    data["attacks"] = [
        {
            "name": line.name,
            "settings": attack.dump(),
            "tried": line.tried,
            "broke": line.broke,
            "left": line.tried - line.broke,
            "twin_only": line.twin_only,
            "queries": line.queries,
            "gradients": line.gradients,
            "seconds": round(line.seconds, 3),
        }
        for line, attack in zip(verdicts.lines, verdicts.struck.attacks.values(), strict=True)
    ]
    data["estimates"] = [
        {"name": name, "settings": aside.estimators[name].dump(), "label": ESTIMATE, **_estimated(verdicts, leads)}
        for name, leads in aside.leads.items()
    ]
    data["smoothed"] = _smoothed(told, verdicts, aside)
    data["findings"] = [{"name": finding.name, "ok": finding.ok, "text": finding.text} for finding in findings]
    data["notes"], data["seconds"], data["settings"] = list(told.notes), round(seconds, 3), dict(settings)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_evidence(path: Path, told: Told, verdicts: Verdicts, aside: Apart, split: str, seed: int) -> None:
    """One line an image, by docs/evidence.md; `model` is the digest of the file."""
    header = evidence.Header(
        threat=told.threat.dump(),
        split=split,
        strength=told.strength,
        attacks={name: attack.dump() for name, attack in verdicts.struck.attacks.items()},
        certifiers={name: certifier.dump() for name, certifier in verdicts.proved.certifiers.items()},
        estimators={name: estimator.dump() for name, estimator in aside.estimators.items()},
        smoothing=None if aside.smoothing is None else aside.smoothing.dump(),
        seed=seed,
        model=told.subject.digest,
        examples=len(verdicts.scene.x),
    )
    rows = examples(verdicts.scene, verdicts.struck, verdicts.proved)
    evidence.write(path, header, (row.model_copy(update=more) for row, more in zip(rows, beside(aside), strict=False)))


def promise(smoothing: Smoothing, file: Logits, x: Tensor, threat: Threat) -> Iterator[str]:
    """What smoothing is about to say of which classifier, at what cost; and where it can say nothing."""
    copies = x[:1].expand(min(_TIMED, smoothing.passes), *x.shape[1:]).contiguous()
    start = time.perf_counter()
    outputs(file, copies)
    seconds = (time.perf_counter() - start) / len(copies) * smoothing.passes * len(x)
    yield (
        f"smoothing judges {_classifier(smoothing)}, not the file; {smoothing.passes:,} forward passes for each of "
        f"{len(x)} images, about {seconds:.0f} s"
    )
    if smoothing.reach <= threat.eps:
        yield (
            f"no radius beyond {smoothing.reach:.4g} can come of {smoothing.n:,} copies with sigma {smoothing.sigma:g} "
            f"and alpha {smoothing.alpha:g}, so nothing can hold at eps {threat.eps:g}: raise --sigma or --n"
        )


def progress(strength: str) -> Callable[[str], OnStep]:
    """`progress(strength)(label)(done, total)`: one line on a terminal, with an estimate; nothing elsewhere."""

    def labelled(label: str) -> OnStep:
        start = last = time.perf_counter()

        def step(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if not sys.stderr.isatty() or (now - last < _EVERY and done < total):
                return
            last = now
            ahead = (now - start) / max(done, 1) * (total - done)
            text = f"{label} ({strength}): {done} of {total}, about {ahead:.0f} s left" if done < total else ""
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()

        return step

    return labelled


def _aside(told: Told, verdicts: Verdicts, aside: Apart) -> Iterator[str]:
    """Neither proofs nor the file's: each line says so itself."""
    scene, smoothing, smoothed = verdicts.scene, aside.smoothing, aside.smoothed
    if smoothing is not None and smoothed is not None:
        share, held = smoothed.right(scene.y), smoothed.certified(scene.y, told.threat.eps)
        yield f"\n{_classifier(smoothing)} (not the file), at confidence {1 - smoothing.alpha:g} for each image:"
        yield f"  {_accuracy('right', share)}; {int(smoothed.abstained.sum())} abstained"
        yield f"  {_accuracy('certified', held)}, at l2 eps {told.threat.eps:g}; {aside.seconds:.1f} s"
    for name, leads in aside.leads.items():
        found = _estimated(verdicts, leads)
        yield (
            f"\n{name}: {ESTIMATE}: {found['positive']} of {found['images']} images are right with an estimated lead "
            f"above 0; an attack broke {found['broken']} of these"
        )


def _classifier(smoothing: Smoothing) -> str:
    return f"the smoothed classifier, which is the file's commonest answer under Gaussian noise of {smoothing.sigma:g}"


def _estimated(verdicts: Verdicts, leads: Tensor) -> dict[str, int]:
    positive = verdicts.right & (leads > 0)
    broken = positive & ~verdicts.struck.alive
    return {"images": len(leads), "positive": int(positive.sum()), "broken": int(broken.sum())}


def _smoothed(told: Told, verdicts: Verdicts, aside: Apart) -> dict[str, Any] | None:
    smoothing, smoothed, y = aside.smoothing, aside.smoothed, verdicts.scene.y
    if smoothing is None or smoothed is None:
        return None
    return {
        "of": _classifier(smoothing),
        "settings": smoothing.dump(),
        "confidence": 1 - smoothing.alpha,
        "passes": smoothing.passes,
        "reach": smoothing.reach,
        "right": _numbers(smoothed.right(y)),
        "certified": _numbers(smoothed.certified(y, told.threat.eps)),
        "abstained": int(smoothed.abstained.sum()),
        "seconds": round(aside.seconds, 3),
    }


def beside(aside: Apart) -> Iterator[dict[str, Any]]:
    """Image by image what an evidence line says of estimates and of the smoothed classifier; without end."""
    for i in count():
        found: dict[str, Any] = {
            "estimated_margin": {name: _finite(float(leads[i])) for name, leads in aside.leads.items()}
        }
        if aside.smoothed is not None:
            made = aside.smoothed
            found["smoothed"] = evidence.OfSmoothed(
                answer=int(made.classes[i]),
                count=int(made.counts[i]),
                radius=float(made.radii[i]),
                abstained=bool(made.abstained[i]),
            )
        yield found


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _shares(verdicts: Verdicts) -> dict[str, Tensor]:
    found = {"clean": verdicts.right, "robust": verdicts.robust}
    return found if verdicts.certified is None else {**found, "certified": verdicts.certified}


def _numbers(hits: Tensor) -> dict[str, float | int]:
    low, high = wilson(int(hits.sum()), len(hits))
    return {"value": int(hits.sum()) / len(hits), "low": low, "high": high, "samples": len(hits)}


def _accuracy(name: str, hits: Tensor) -> str:
    found = _numbers(hits)
    return (
        f"{name:<10}{found['value']:.4f}  95 % {found['low']:.4f} to {found['high']:.4f}, "
        f"{int(hits.sum())} of {len(hits)}"
    )


def _row(cells: Any, widths: Mapping[str, int]) -> str:
    parts = [
        f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
        for i, (cell, w) in enumerate(zip(cells, widths.values(), strict=True))
    ]
    return "  ".join(parts).rstrip()
