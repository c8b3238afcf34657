"""What was found about a network on a set of images, and how it is written: evidence, adversarial inputs, figures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from stages import evidence
from stages.attacks.base import Attack
from stages.data.base import Split
from stages.early import Early
from stages.evaluate import confusion, correct, outputs
from stages.finding import Finding, Point
from stages.nn import _atomic
from stages.oracle import Spent
from stages.pictures import difference, png
from stages.threat import Threat
from stages.trial import Hit, Proved
from stages.unproved import Reason, counts, settled
from stages.validity import PROBE


@dataclass(frozen=True, slots=True)
class Scene:
    """The network, the images it is judged on, their indices in file order, and which are right without an attack."""

    net: nn.Module
    x: Tensor
    y: Tensor
    indices: Tensor
    threat: Threat
    right: Tensor

    @staticmethod
    def of(net: nn.Module, split: Split, threat: Threat, device: str = "cpu") -> "Scene":
        x, y = split.floats().to(device), split.labels.to(device)
        return Scene(net, x, y, split.indices, threat, correct(net, x, y))


@dataclass(frozen=True, slots=True)
class Struck:
    """What each attack did, by name; then the strongest adversarial input per image and whose it is."""

    attacks: dict[str, Attack]
    hits: dict[str, Hit]
    x_adv: Tensor
    stored: list[str | None]
    early: Early | None = None

    @property
    def open(self) -> Tensor:
        """bool [N]: no attack broke it, and not all of them tried, because the gate's verdict was certain before."""
        return torch.zeros_like(self.alive) if self.early is None else self.early.open

    @property
    def alive(self) -> Tensor:
        """bool [N]; with what was wrong from the start it has nothing to do."""
        return torch.stack([hit.survived for hit in self.hits.values()]).all(0)


def write(
    out: Path,
    scene: Scene,
    struck: Struck,
    proved: Proved,
    header: evidence.Header,
    points: Sequence[Point],
    findings: Sequence[Finding],
    classes: Sequence[str],
    images: int,
) -> dict[str, Path]:
    """Everything below `out`, each file atomically; name -> path. Equal findings give equal bytes."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = examples(scene, struck, proved)
    evidence.write(out / "evidence.jsonl", header, rows)
    tensors = {"x_adv": struck.x_adv, "indices": scene.indices, "survived": struck.alive, "open": struck.open}
    _atomic.write(out / "adversarial.safetensors", bytes_of({k: v.cpu().contiguous() for k, v in tensors.items()}))
    names = _pictures(scene, struck, images, out)
    figures = {
        "curve": [_curve_point(point) for point in points],
        "confusion": {
            "classes": list(classes),
            "clean": confusion(scene.net, scene.x, scene.y, len(classes)).tolist(),
            "attacked": confusion(scene.net, struck.x_adv, scene.y, len(classes)).tolist(),
        },
        "images": [{**picture, **_labels(rows[row])} for row, picture in names],
        "validity": [{"name": f.name, "ok": f.ok, "text": f.text} for f in findings],
        "attacks": [
            {
                "name": name,
                "label": evidence.strength([attack]),
                "settings": attack.dump(),
                "broken": int((scene.right & ~struck.hits[name].survived).sum()),
            }
            for name, attack in struck.attacks.items()
        ],
    }
    if proved.leads:
        any_proved = torch.stack(list(proved.certified(scene.right).values())).any(0)
        figures["verdicts"] = [shares("the float32 network", scene.right, any_proved, struck.alive, proved.why)]
    _atomic.write(out / "figures.json", json_bytes(figures))
    pictures = [name for _, picture in names for name in picture.values()]
    return {name: out / name for name in ("evidence.jsonl", "adversarial.safetensors", "figures.json", *pictures)}


def shares(
    of: str, right: Tensor, proved: Tensor, alive: Tensor, why: Sequence[Reason | None]
) -> dict[str, str | int | dict[str, int]]:
    """One bar of the report: every image is proved, broken or open; `wrong` of the broken ones needed no attack, and
    `why` counts the reasons that keep others open.

    right, proved, alive: bool [N]. A proof that an attack broke is none.
    """
    standing = right & alive
    held = int((proved & standing).sum())
    return {
        "of": of,
        "images": len(right),
        "proved": held,
        "open": int(standing.sum()) - held,
        "broken": int((~standing).sum()),
        "wrong": int((~right).sum()),
        "why": {word: count for word, count in counts(settled(why, proved, standing)).items() if word != "broken"},
    }


def examples(scene: Scene, struck: Struck, proved: Proved) -> list[evidence.Example]:
    """One row per image, in the scene's order."""
    open_ = struck.open.tolist()
    z, attacked = outputs(scene.net, scene.x), outputs(scene.net, struck.x_adv)
    before, after = evidence.lead(z, scene.y), evidence.lead(attacked, scene.y)
    distance = scene.threat.distance(struck.x_adv, scene.x)
    certified = proved.certified(scene.right)
    why: list[Reason | None] = [None] * len(scene.x)
    if certified:
        why = settled(proved.why, torch.stack(list(certified.values())).any(0), scene.right & struck.alive)
    rows = []
    for i, index in enumerate(scene.indices.tolist()):
        # What is wrong without an attack survived none; what was proved, or broken before, was not tried.
        tried = {name: hit for name, hit in struck.hits.items() if bool(hit.tried[i]) or not bool(scene.right[i])}
        survived = {name: bool(hit.survived[i]) for name, hit in tried.items()}
        first = next((name for name, held in survived.items() if not held), None)
        rows.append(
            evidence.Example(
                index=index,
                label=int(scene.y[i]),
                clean=int(z[i].argmax()),
                attacked=int(attacked[i].argmax()),
                survived=survived,
                spent={name: _spending(hit.spent, i) for name, hit in tried.items()},
                broken_by=first if bool(scene.right[i]) else evidence.CLEAN,
                stored=struck.stored[i],
                margin=float(before[i]),
                margin_attacked=float(after[i]),
                distance=float(distance[i]),
                certified={name: bool(bits[i]) for name, bits in certified.items()},
                certified_margin={name: _finite(float(margins[i])) for name, margins in proved.margins.items()},
                unproved=why[i],
                open=open_[i],
            )
        )
    return rows


def _pictures(scene: Scene, struck: Struck, count: int, out: Path) -> list[tuple[int, dict[str, str]]]:
    """Row and file names of the first `count` broken images, or of the first ones where too few were broken."""
    broken = [row for row, name in enumerate(struck.stored) if name is not None]
    whole = [row for row, name in enumerate(struck.stored) if name is None]
    shown = []
    for number, row in enumerate((broken + whole)[:count]):
        clean, adversarial = scene.x[row], struck.x_adv[row]
        parts = {"clean": clean, "adversarial": adversarial, "difference": difference(adversarial, clean)}
        short = {"clean": "clean", "adversarial": "adv", "difference": "diff"}
        names = {part: f"images/{number}_{short[part]}.png" for part in parts}
        for part, image in parts.items():
            _atomic.write(out / names[part], png(image))
        shown.append((row, names))
    return shown


def _labels(row: evidence.Example) -> dict[str, int]:
    return {"label": row.label, "clean_prediction": row.clean, "adversarial_prediction": row.attacked}


def _curve_point(point: Point) -> dict[str, float | str]:
    low, high = point.interval
    label = f"{PROBE.kind} ({evidence.strength([PROBE])})"
    return {"eps": point.at, "value": point.value, "low": low, "high": high, "attack": label}


def _spending(spent: Spent, row: int) -> evidence.Spending:
    return evidence.Spending(queries=int(spent.queries[row]), gradients=int(spent.gradients[row]))


def _finite(value: float) -> float | None:
    return value if value > float("-inf") else None


def json_bytes(data: dict[str, Any]) -> bytes:
    """Equal data gives equal bytes."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
