"""What an audit says: on the terminal, as JSON (docs/audit.md) and as an evidence file."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.core.measurement import wilson
from stages import evidence
from stages.evaluate import OnStep
from stages.finding import Finding
from stages.scene import examples
from stages.subject import Subject
from stages.threat import Threat
from stages.verdicts import Verdicts

SCHEMA = 1
_EVERY = 0.5


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


def closing(told: Told, verdicts: Verdicts, findings: Sequence[Finding], seconds: float) -> str:
    """Accuracies, the table of attacks, the findings."""
    box = ", black box only" if told.subject.twin is None else ""
    lines = ["", *(_accuracy(name, hits) for name, hits in _shares(verdicts).items())]
    if (early := verdicts.struck.early) is not None:
        value, low, high = early.interval()
        lines[2] = (
            f"{'robust':<10}{value:.4f}  95 % {low:.4f} to {high:.4f}, {early.low} to {early.high} of "
            f"{len(early.open)}, {int(early.open.sum())} of them open: the verdict was certain"
        )
    lines[2] += f"  ({told.strength}{box})"
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
    told: Told, verdicts: Verdicts, findings: Sequence[Finding], seconds: float, settings: Mapping[str, Any]
) -> bytes:
    """By docs/audit.schema.json; fractions lie in [0, 1]."""
    data: dict[str, Any] = {"schema_version": SCHEMA, "clean": None, "robust": None, "certified": None}
    data |= {name: _numbers(hits) for name, hits in _shares(verdicts).items()}
    data["early"] = None
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
    data["findings"] = [{"name": finding.name, "ok": finding.ok, "text": finding.text} for finding in findings]
    data["notes"], data["seconds"], data["settings"] = list(told.notes), round(seconds, 3), dict(settings)
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write_evidence(path: Path, told: Told, verdicts: Verdicts, split: str, seed: int) -> None:
    """One line an image, by docs/evidence.md; `model` is the digest of the file."""
    header = evidence.Header(
        threat=told.threat.dump(),
        split=split,
        strength=told.strength,
        attacks={name: attack.dump() for name, attack in verdicts.struck.attacks.items()},
        certifiers={name: certifier.dump() for name, certifier in verdicts.proved.certifiers.items()},
        seed=seed,
        model=told.subject.digest,
        examples=len(verdicts.scene.x),
    )
    evidence.write(path, header, examples(verdicts.scene, verdicts.struck, verdicts.proved))


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
