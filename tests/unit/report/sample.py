"""A realistic record with its figures, made from nothing but a seed: what the renderers are tested and looked at on."""

import hashlib
import json
import math
import random
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.gate import Budget, Limit, judge
from pipeline.core.measurement import Measurement, exact, fraction
from pipeline.core.record import Artifact, Outcomes, RunRecord, StageRecord
from pipeline.core.spec import Spec

CLASSES = tuple(str(digit) for digit in range(10))
N = 1000
CONFIG: dict[str, dict[str, Any]] = {
    "search": {"kind": "fixed", "arch": {"builder": "small_cnn", "width": 32}},
    "train": {"kind": "trades", "beta": 6.0, "epochs": 30},
    "compress": {"kind": "prune", "ratio": 0.5},
    "validate": {"attacks": ["pgd", "apgd", "square"], "certify": ["ibp"]},
    "export": {"precision": "int8"},
}
BUDGET: dict[str, Budget] = {
    "train": (Limit(metric="accuracy.robust.holdout", at_least=0.75),),
    "compress": (
        Limit(metric="accuracy.robust.holdout", max_loss=0.03),
        Limit(metric="cost.macs", at_most=6_000_000),
    ),
    "validate": (
        Limit(metric="accuracy.robust.test", at_least=0.7),
        Limit(metric="accuracy.clean.test", at_least=0.93),
    ),
    "export": (
        Limit(metric="size.model", at_most=250_000),
        Limit(metric="accuracy.robust.shipped.test", at_least=0.68),
        Limit(metric="latency.p95", at_most=5.0, on_device=True),
    ),
}
REGRESSION: dict[str, Budget] = {"validate": (Limit(metric="accuracy.robust.test", max_loss=0.02),)}


def passed(robust: float = 0.79, seed: int = 0, examples: Sequence[int] = tuple(range(N))) -> RunRecord:
    """A complete run with two compression attempts set aside; `robust` is the share that survives validation."""
    rng = random.Random(seed)
    clean = _hits(rng, 0.963, None)
    strong = _hits(rng, robust, clean)
    shipped_clean, shipped = _flip(clean, 3), _flip(strong, 7)
    stages = [
        _stage(
            "search", [exact("cost.params", 187_402, "count"), exact("cost.macs", 11_204_096, "count")], {}, 0.4, ()
        ),
        _train(0.971, 0.823),
        *_compressions(),
        _stage(
            "validate",
            [
                fraction("accuracy.clean.test", sum(clean), N),
                fraction("accuracy.robust.test", sum(strong), N),
                fraction("accuracy.robust.pgd.test", sum(strong) + 21, N),
                fraction("accuracy.robust.apgd.test", sum(strong) + 4, N),
                fraction("accuracy.robust.square.test", sum(strong) + 63, N),
                fraction("accuracy.certified.test", 412, N),
            ],
            {
                "accuracy.clean.test": Outcomes.of(examples, clean),
                "accuracy.robust.test": Outcomes.of(examples, strong),
            },
            71.3,
            (),
        ),
        _stage("export", _shipped(shipped_clean, shipped), _outcomes(examples, shipped_clean, shipped), 18.9, ()),
    ]
    return _record(stages, complete=True)


def refused() -> RunRecord:
    """Both compressions lost too much; the gentler one was the closest."""
    stages = [
        _stage(
            "search", [exact("cost.params", 187_402, "count"), exact("cost.macs", 11_204_096, "count")], {}, 0.4, ()
        ),
        _train(0.971, 0.823),
        *_compressions()[:2],
    ]
    stages[-1] = stages[-1].model_copy(update={"chosen": True})
    return _record(stages, refused="compress")


def unfinished() -> RunRecord:
    """Killed during training: nothing but the search is known."""
    return _record([_stage("search", [exact("cost.params", 187_402, "count")], {}, 0.4, ())])


def figures(folder: Path, classes: Sequence[str] = CLASSES, seed: int = 0) -> Path:
    """Write figures.json, training.json, compression.json and small PNG files as the stages do; returns `folder`."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    points = []
    for attack, drop in (("pgd", 1.0), ("square", 0.55)):
        for k in range(11):
            eps = k * 0.03
            fall = (1 + math.exp(-3.4)) / (1 + math.exp(18 * drop * eps - 3.4))
            hits = round(N * (0.05 + 0.913 * fall))
            m = fraction("x", hits, N)
            points.append({"eps": eps, "value": m.value, "low": m.low, "high": m.high, "attack": attack})
    images = []
    for i in range(6):
        label = (3, 8, 1, 7, 5, 9)[i]
        clean = _glyph(label, rng)
        attacked = [min(255, max(0, p + rng.choice((-25, 0, 25)))) for p in clean]
        difference = [min(255, max(0, 128 + 4 * (a - c))) for a, c in zip(attacked, clean, strict=True)]
        for name, pixels in (("clean", clean), ("adversarial", attacked), ("difference", difference)):
            (folder / "images" / f"{i}_{name}.png").write_bytes(_png(pixels))
        names = {name: f"images/{i}_{name}.png" for name in ("clean", "adversarial", "difference")}
        fooled = (8, 3, 7, 7, 6, 4)[i]
        images.append({**names, "label": label, "clean_prediction": label, "adversarial_prediction": fooled})
    data = {
        "curve": points,
        "confusion": {
            "classes": list(classes),
            "clean": _matrix(rng, len(classes), 0.963),
            "attacked": _matrix(rng, len(classes), 0.79),
        },
        "images": images,
        "verdicts": [
            {"of": "the float32 network", "images": N, "proved": 412, "open": 378, "broken": 210, "wrong": 37},
            {"of": "model.onnx", "images": N, "proved": 412, "open": 378, "broken": 210, "wrong": 37},
            {"of": "model.int8.onnx", "images": N, "proved": 31, "open": 752, "broken": 217, "wrong": 40},
        ],
        "validity": [
            {"name": "eps 0 equals clean", "ok": True, "text": "0 of 1000 answers differ at eps 0"},
            {"name": "monotone in eps", "ok": True, "text": "accuracy never rises by more than its interval"},
            {"name": "eps 1 at chance", "ok": True, "text": "10.2 % at eps 1, the commonest answer has 11.4 %"},
            {"name": "white box at least as strong", "ok": True, "text": "square alone broke 0 images (p = 1)"},
        ],
        "attacks": [
            {"name": name, "label": "quick", "settings": {"kind": name, **settings}, "broken": broken}
            for name, settings, broken in (
                ("pgd", {"steps": 40, "restarts": 2}, 152),
                ("apgd", {"steps": 50, "loss": "ce"}, 169),
                ("square", {"queries": 1000}, 110),
            )
        ],
    }
    (folder / "figures.json").write_text(json.dumps(data))
    rows = [
        {
            "epoch": e + 1,
            "loss": round(2.1 * math.exp(-e / 9) + 0.31, 4),
            "accuracy.train": round(0.86 - 0.7 * math.exp(-e / 5), 4),
            "accuracy.robust.holdout": round(0.823 - 0.6 * math.exp(-e / 6), 4),
        }
        for e in range(30)
    ]
    (folder / "training.json").write_text(json.dumps(rows))
    layers = [
        {"layer": f"conv{i}", "channels_before": c, "channels_after": c // 2, "macs": 1_400_000 // i}
        for i, c in ((1, 32), (2, 64), (3, 64), (4, 128))
    ]
    (folder / "compression.json").write_text(json.dumps(layers))
    return folder


def _record(stages: Sequence[StageRecord], complete: bool = False, refused: str | None = None) -> RunRecord:
    spec = Spec(
        name="digits",
        target="jetson",
        task={
            "data": {"kind": "digits"},
            "threat": {"norm": "linf", "eps": 0.1, "low": 0.0, "high": 1.0},
            "holdout": 0.1,
        },
        stages=CONFIG,
        budget=BUDGET,
        regression=REGRESSION,
    )
    environment = {"commit": "1f0c2d", "cores": "2", "machine": "x86_64", "python": "CPython 3.11.7", "temper": "0.1.0"}
    return RunRecord(
        name="digits",
        spec=spec,
        spec_digest=_sha("spec"),
        data_digest=_sha("data"),
        environment={**environment, "version.torch": "2.13.0+cpu", "version.onnxruntime": "1.31.1"},
        stages=tuple(stages),
        complete=complete,
        refused=refused,
    )


def _train(clean: float, robust: float) -> StageRecord:
    numbers = [
        fraction("accuracy.clean.holdout", round(500 * clean), 500),
        fraction("accuracy.robust.holdout", round(500 * robust), 500),
        exact("size.weights", 749_608, "bytes"),
    ]
    return _stage("train", numbers, {}, 48.2, ())


def _compressions() -> list[StageRecord]:
    found = []
    for i, (ratio, clean, robust, macs, size) in enumerate(
        ((0.75, 461, 327, 1_302_528, 98_120), (0.6, 472, 381, 3_010_560, 211_376), (0.5, 478, 403, 4_816_896, 330_248))
    ):
        numbers = [
            fraction("accuracy.clean.holdout", clean, 500),
            fraction("accuracy.robust.holdout", robust, 500),
            exact("cost.macs", macs, "count"),
            exact("size.weights", size, "bytes"),
        ]
        found.append(_stage("compress", numbers, {}, 21.0 + i, _train(0.971, 0.823).measurements, i, {"ratio": ratio}))
    return [stage.model_copy(update={"chosen": i == 2}) for i, stage in enumerate(found)]


def _shipped(clean: Sequence[bool], robust: Sequence[bool]) -> list[Measurement]:
    return [
        fraction("accuracy.clean.shipped.test", sum(clean), N),
        fraction("accuracy.robust.shipped.test", sum(robust), N),
        exact("parity.logits", 0.0831, "logit"),
        fraction("parity.top1", 997, N),
        Measurement(name="latency.p50", value=0.41, low=0.40, high=0.43, unit="ms", samples=500, better="lower"),
        Measurement(name="latency.p95", value=0.62, low=0.58, high=0.71, unit="ms", samples=500, better="lower"),
        exact("size.model", 96_844, "bytes"),
        exact("size.bundle", 201_114, "bytes"),
        exact("memory.peak", 61_865_984, "bytes"),
    ]


def _outcomes(examples: Sequence[int], clean: Sequence[bool], robust: Sequence[bool]) -> dict[str, Outcomes]:
    return {
        "accuracy.clean.shipped.test": Outcomes.of(examples, clean),
        "accuracy.robust.shipped.test": Outcomes.of(examples, robust),
    }


def _stage(
    name: str,
    numbers: Sequence[Measurement],
    outcomes: Mapping[str, Outcomes],
    seconds: float,
    before: Sequence[Measurement],
    attempt: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> StageRecord:
    return StageRecord(
        name=name,
        attempt=attempt,
        overrides=dict(overrides or {}),
        key=_sha(f"{name} {attempt}"),
        reused=name in ("search", "train"),
        seconds=seconds,
        config={**CONFIG[name], **(overrides or {})},
        artifact=Artifact(
            stage=name, files={"arch.json": _sha("arch"), "weights.safetensors": _sha(f"weights {attempt}")}
        ),
        measurements=tuple(numbers),
        outcomes=dict(outcomes),
        verdict=judge(numbers, BUDGET.get(name, ()), {m.name: m for m in before}),
    )


def _hits(rng: random.Random, share: float, within: Sequence[bool] | None) -> list[bool]:
    """Exactly round(N * share) hits, only where `within` has them."""
    places = [i for i in range(N) if within is None or within[i]]
    right = set(rng.sample(places, round(N * share)))
    return [i in right for i in range(N)]


def _flip(hits: Sequence[bool], count: int) -> list[bool]:
    """The first `count` hits lost, as rounding to int8 loses some."""
    lost = {i for i, hit in enumerate(hits) if hit and sum(hits[:i]) < count}
    return [hit and i not in lost for i, hit in enumerate(hits)]


def _matrix(rng: random.Random, n: int, right: float) -> list[list[int]]:
    rows = []
    for i in range(n):
        total = N // n
        row = [0] * n
        for _ in range(total):
            near = (i + rng.choice((1, 2, 5))) % n
            row[i if rng.random() < right else (near if rng.random() < 0.6 else rng.randrange(n))] += 1
        rows.append(row)
    return rows


_STROKES = {
    1: "00011000 00111000 01111000 00011000 00011000 00011000 00011000 01111110",
    3: "01111100 00000110 00000110 00111100 00000110 00000110 00000110 01111100",
    5: "01111110 01100000 01100000 01111100 00000110 00000110 01100110 00111100",
    7: "01111110 00000110 00001100 00001100 00011000 00011000 00110000 00110000",
    8: "00111100 01100110 01100110 00111100 01100110 01100110 01100110 00111100",
    9: "00111100 01100110 01100110 00111110 00000110 00000110 00001100 00111000",
}


def _glyph(digit: int, rng: random.Random) -> list[int]:
    bits = _STROKES[digit].replace(" ", "")
    return [min(255, max(0, (215 if bit == "1" else 18) + rng.randint(-18, 18))) for bit in bits]


def _png(pixels: Sequence[int], side: int = 8) -> bytes:
    """A greyscale PNG of 8 bits, by the standard's book."""
    raw = b"".join(b"\0" + bytes(pixels[row * side : (row + 1) * side]) for row in range(side))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw, 9)),
        (b"IEND", b""),
    )
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
