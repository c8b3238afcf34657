"""A detector around a network: fitted on the hold-out, attacked with and without knowledge of it, and measured.

Counted is the worst: an image counts as robust only where its clean form is right and not flagged, and no point was
found within the threat that is wrong and not flagged. So a false alarm is a loss, and a flag saves a wrong answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from pipeline.core.measurement import Measurement
from pipeline.core.record import Outcomes
from pipeline.core.stage import Context
from stages import attachment, doubted
from stages.attachment import Attachment, Fitted
from stages.data.base import Split
from stages.detectors.base import Detector
from stages.evaluate import OnStep, correct
from stages.finding import Finding
from stages.measure import accuracy
from stages.nn import _atomic
from stages.oracle import Logits
from stages.scene import Scene, Struck
from stages.seeding import derive, generator
from stages.threat import Threat
from targets.runtime.ort import OrtEngine

_BATCH = 64
_START, _NOTHING, _OUTSIDE = -2, -1, -3


def names(part: str) -> frozenset[str]:
    """What `Judged.measure` may report for a part such as "test"; detection only where something was misled."""
    rates = {f"detector.{what}.{part}" for what in ("false_alarms", "detected.plain", "detected.adaptive")}
    accuracies = ("clean.detected", "robust.detected.plain", "robust.detected")
    return frozenset(rates | {f"accuracy.{what}.{part}" for what in accuracies})


@dataclass(frozen=True, slots=True)
class Judged:
    """Of N images: what is right, flagged, misled by plain attacks (`wrong_plain`) and not flagged then
    (`slipped_plain`), misled by any attack, and evading the detector; all bool [N]. `x_adv` and `score` [N] are the
    best points that were found, `by` says how: the number of a weight (`detectors/_adaptive.py`), -2 by a plain attack,
    -3 by the black box, -1 not at all. `asked` are the images that the black box tried, `outside` those it broke."""

    right: Tensor
    flagged: Tensor
    wrong_plain: Tensor
    slipped_plain: Tensor
    wrong: Tensor
    evaded: Tensor
    x_adv: Tensor
    score: Tensor
    by: Tensor
    asked: Tensor
    outside: Tensor

    @staticmethod
    def kept(path: Path, make: "Callable[[], Judged]", device: str) -> "Judged":
        """What an earlier run left at `path`; else made now, and left there."""
        if not path.exists():
            made = make()
            named = {field.name: getattr(made, field.name) for field in fields(made)}
            _atomic.write(path, bytes_of({name: value.cpu().contiguous() for name, value in named.items()}))
        return Judged(**{name: value.to(device) for name, value in tensors_of(path.read_bytes()).items()})

    @property
    def robust(self) -> Tensor:
        """bool [N]: right and accepted as it is, and no undetected wrong answer was found."""
        return self.right & ~self.flagged & ~self.evaded

    def measure(self, indices: Tensor, part: str) -> tuple[tuple[Measurement, ...], dict[str, Outcomes]]:
        accepted = self.right & ~self.flagged
        hits = {
            f"accuracy.clean.detected.{part}": accepted,
            f"accuracy.robust.detected.plain.{part}": accepted & ~self.slipped_plain,
            f"accuracy.robust.detected.{part}": self.robust,
        }
        alarms, _ = accuracy(f"detector.false_alarms.{part}", self.flagged.cpu(), indices)
        measured, outcomes = [alarms.model_copy(update={"better": "lower"})], dict[str, Outcomes]()
        for name, misled, slipped in (
            ("plain", self.wrong_plain, self.slipped_plain),
            ("adaptive", self.wrong, self.evaded),
        ):
            if bool(misled.any()):
                rows = misled.cpu()
                found, _ = accuracy(f"detector.detected.{name}.{part}", ~slipped.cpu()[rows], indices[rows])
                measured.append(found)
        for name, right in hits.items():
            found, bits = accuracy(name, right.cpu(), indices)
            measured.append(found)
            outcomes |= bits
        return tuple(measured), outcomes

    def sentence(self, robust: Tensor) -> str:
        """What the detector is worth; `robust` bool [N] are the images that stood up to everything without it."""
        count, plain, adaptive = len(self.right), self.wrong_plain & ~self.slipped_plain, self.wrong & ~self.evaded
        return (
            f"detector: {int(self.flagged.sum())} of {count} clean images flagged; of misled ones {int(plain.sum())} "
            f"of {int(self.wrong_plain.sum())} where the attack does not know it, {int(adaptive.sum())} of "
            f"{int(self.wrong.sum())} where it does; right and robust with it {int(self.robust.sum())} of {count}, "
            f"without it {int(robust.sum())}"
        )

    def counts(self, weights: Sequence[float]) -> dict[str, int]:
        """Images misled by any attack, and evading the detector, in all and by what found it first."""
        by = {"a plain attack": _START, **{f"weight {weight:g}": i for i, weight in enumerate(weights)}}
        by |= {"selective": len(weights), "a common class": len(weights) + 1, "black box": _OUTSIDE}
        evaded = {f"evaded by {name}": int((self.evaded & (self.by == number)).sum()) for name, number in by.items()}
        return {"misled": int(self.wrong.sum()), "evaded": int(self.evaded.sum()), **evaded}


def judge(
    detector: Detector,
    threshold: float,
    logits: Logits,
    x: Tensor,
    y: Tensor,
    plain: Tensor,
    threat: Threat,
    seed: int,
    spared: Tensor | None = None,
    starts: tuple[Tensor, ...] = (),
    on_step: OnStep | None = None,
) -> Judged:
    """Images float32 [N, C, H, W]; `plain` are the strongest points that attacks found without knowing the detector,
    x itself where they found none; `starts` are further points to begin from. All are projected onto the threat first.

    `spared` bool [N] are proved robust and not attacked. Batches of 64 draw from generators of their own. At most 200
    of the others, drawn at random, are tried by a black box besides; what it finds counts.
    """
    right, flagged = correct(logits, x, y), detector.scores(logits, x) > threshold
    plain, others = threat.project(plain, x), [threat.project(start, x) for start in starts]
    wrong_plain = right & ~correct(logits, plain, y)
    slipped = wrong_plain & (detector.scores(logits, plain) <= threshold)
    wrong, evaded = wrong_plain.clone(), slipped.clone()
    found, score = x.clone(), torch.full((len(x),), float("inf"), device=x.device)
    by = torch.full((len(x),), _NOTHING, dtype=torch.int64, device=x.device)
    todo = (right if spared is None else right & ~spared).nonzero().flatten()
    for number, at in enumerate(range(0, len(todo), _BATCH)):
        rows = todo[at : at + _BATCH]
        best = detector.adaptive.evade(
            lambda point, _: detector.inspect(logits, point),
            threshold,
            x[rows],
            y[rows],
            threat,
            generator(seed, "adaptive", number, device=x.device),
            [start[rows] for start in (plain, *others)],
        )
        wrong[rows] |= best.wrong
        evaded[rows] |= best.evaded
        found[rows], score[rows], by[rows] = best.x_adv, best.score, best.by
        if on_step is not None:
            on_step(min(at + _BATCH, len(todo)), len(todo))
    asked = doubted.some(todo, generator(seed, "asked"))
    stood, points = doubted.from_outside(
        detector, threshold, logits, x[asked], y[asked], threat, generator(seed, "outside", device=x.device)
    )
    tried, outside = torch.zeros_like(right), torch.zeros_like(right)
    tried[asked], outside[asked] = True, ~stood
    new = ~stood & ~evaded[asked]
    if bool(new.any()):
        rows = asked[new]
        found[rows], score[rows], by[rows] = points[new], detector.scores(logits, points[new]), _OUTSIDE
        wrong[rows] = evaded[rows] = True
    return Judged(right, flagged, wrong_plain, slipped, wrong, evaded, found, score, by, tried, outside)


def findings(
    detector: Detector, threshold: float, logits: Logits, x: Tensor, y: Tensor, threat: Threat, seed: int, made: Judged
) -> Iterator[Finding]:
    """Every reason to disbelieve what `judge` found; `x`, `y` and the rest are those it was asked with."""
    rows = (made.by != _NOTHING).nonzero().flatten()
    held = 0
    if len(rows):
        point = made.x_adv[rows]
        near = threat.distance(point, x[rows]) <= threat.eps * (1 + 1e-5) + 1e-6
        inside = ((point >= threat.low) & (point <= threat.high)).flatten(1).all(1)
        quiet = detector.scores(logits, point) <= threshold + attachment.SAME
        held = int((near & inside & quiet & ~correct(logits, point, y[rows])).sum())
    text = f"{held} of {len(rows)} inputs that evade the detector do so when checked again; must be all"
    yield Finding("detector_rechecked", held == len(rows), text)
    white = ~made.evaded | (made.by == _OUTSIDE)
    yield doubted.black_box(white[made.asked], ~made.outside[made.asked])
    todo = made.right.nonzero().flatten()
    few = doubted.some(todo, generator(seed, "few"))[: doubted.FEW]
    yield doubted.twins(detector, x[few])
    yield doubted.falls(detector, threshold, logits, x[few], y[few], derive(seed, "whole"))


@dataclass(frozen=True, slots=True)
class Guarded:
    """What a stage adds to its result where there is a detector."""

    files: dict[str, Path]
    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes]
    findings: tuple[Finding, ...]


def detect(
    detector: Detector, scene: Scene, struck: Struck, spared: Tensor, holdout: Tensor, model: str, ctx: Context
) -> Guarded:
    """Fit on the hold-out images uint8 [M, C, H, W], then attack all that is not `spared`, bool [N], because it is
    proved robust, from the strongest inputs that the attacks found. `model` is the network's digest."""
    seed = derive(ctx.seed, "detector")
    scores = detector.scores(scene.net, holdout.to(ctx.device))
    threshold = detector.fit(scores)

    def attack() -> Judged:
        return judge(
            detector,
            threshold.value,
            scene.net,
            scene.x,
            scene.y,
            struck.x_adv,
            scene.threat,
            seed,
            spared,
            on_step=lambda done, total: ctx.emit(
                "progress", {"label": "attack: detector (adaptive)", "done": done, "total": total}
            ),
        )

    judged = Judged.kept(ctx.scratch / "detector.safetensors", attack, ctx.device)
    found = findings(detector, threshold.value, scene.net, scene.x, scene.y, scene.threat, seed, judged)
    fitted = Fitted(
        detector=detector, threshold=threshold, network=model, adaptive=judged.counts(detector.adaptive.weights)
    )
    ctx.emit("note", {"text": judged.sentence(scene.right & struck.alive)})
    measured, outcomes = judged.measure(scene.indices, "test")
    arrays = {
        "holdout_scores": scores,
        "x_adaptive": judged.x_adv,
        "misled": judged.wrong,
        "evaded": judged.evaded,
        "flagged": judged.flagged,
    }
    (ctx.scratch / "out").mkdir(parents=True, exist_ok=True)
    return Guarded(attachment.write(ctx.scratch / "out", fitted, arrays), measured, outcomes, tuple(found))


def detect_on_file(
    attached: Attachment,
    network: bytes,
    logits: Logits,
    engine: OrtEngine,
    split: Split,
    plain: Tensor,
    alive: Tensor,
    threat: Threat,
    ctx: Context,
) -> Guarded:
    """The detector around a lowered `network`, whose logits `logits` gives; `engine` is the file with the detector.

    `plain` [N, C, H, W] broke the file without knowing the detector, `alive` bool [N] stood up to everything there;
    what evaded the float network is tried too.
    """
    detector, threshold, seed = (
        attached.fitted.detector,
        attached.threshold(network).value,
        derive(ctx.seed, "detector"),
    )
    x, y = split.floats(), split.labels
    judged = judge(
        detector,
        threshold,
        logits,
        x,
        y,
        plain,
        threat,
        seed,
        starts=(attached.arrays["x_adaptive"],),
        on_step=lambda done, total: ctx.emit(
            "progress", {"label": "attack the file (detector)", "done": done, "total": total}
        ),
    )
    found = (
        *findings(detector, threshold, logits, x, y, threat, seed, judged),
        _in_the_file(engine, threshold, judged, y),
    )
    ctx.emit("note", {"text": judged.sentence(alive)})
    measured, outcomes = judged.measure(split.indices, "shipped.test")
    return Guarded({}, measured, outcomes, found)


def _in_the_file(engine: OrtEngine, threshold: float, judged: Judged, y: Tensor) -> Finding:
    """What evaded goes through the very file that ships; scores as near to the threshold as rounding may differ."""
    rows = judged.evaded.nonzero().flatten()
    held = 0
    if len(rows):
        answers = engine.outputs(judged.x_adv[rows].numpy())
        wrong = torch.from_numpy(answers["logits"]).argmax(1) != y[rows]
        held = int((wrong & (torch.from_numpy(answers["score"]) <= threshold + attachment.SAME)).sum())
    text = f"{held} of {len(rows)} inputs that evade the detector do so in the file that ships; must be all"
    return Finding("detector_in_the_file", held == len(rows), text)
