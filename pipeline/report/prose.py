"""What a report says in sentences: the verdict, the summary, and what the numbers mean and do not mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core.measurement import Measurement
from pipeline.core.record import RunRecord
from pipeline.core.stage import ORDER
from pipeline.report import words

PURPOSE = {
    "search": "choose a network",
    "train": "train it under attack",
    "compress": "make it smaller",
    "validate": "attack and certify it",
    "export": "lower it and measure the file that ships",
}


def headline(record: RunRecord, owed: bool) -> str:
    """The verdict in one sentence."""
    if record.complete:
        return "Passed: every gate held." + (" Some limits are still owed on the device." if owed else "")
    if record.refused:
        return f"Refused: the gate after {record.refused} did not open."
    done = {stage.name for stage in record.chosen()}
    waiting = [name for name in ORDER if name not in done]
    return f"Unfinished: the line stopped before {waiting[0]} ended." if waiting else "Unfinished."


def summary(record: RunRecord, latest: Mapping[str, Measurement]) -> tuple[str, ...]:
    """Two or three sentences under the verdict: why, and how good the model is."""
    said = []
    if record.refused:
        said.append(_refusal(record, record.refused))
    shipped = "shipped." if "accuracy.clean.shipped.test" in latest else ""
    clean, robust = (latest.get(f"accuracy.{kind}.{shipped}test") for kind in ("clean", "robust"))
    if clean is not None and robust is not None:
        said.append(
            f"The {'shipped file' if shipped else 'network'} is right on {words.quantity(clean.value, 'fraction')} of "
            f"{clean.samples:,} test images, and stays right on {words.quantity(robust.value, 'fraction')} of "
            f"{robust.samples:,} under the worst of {robust.under or 'quick'} attacks, with "
            f"{words.threat(record.spec.task)}."
        )
    certified = latest.get("accuracy.certified.test")
    if certified is not None:
        file = latest.get("accuracy.certified.shipped.test")
        rest = "the proof does not cover the rounding of a lowered file"
        if file is not None:
            rest = f"for {_share(file)} it is proved of the shipped file (the manifest says what that covers)"
        said.append(f"For {_share(certified)} it is proved that no such change can fool the float network; {rest}.")
    return tuple(said)


def _share(certified: Measurement) -> str:
    return words.quantity(certified.value, "fraction") if certified.value else "none of the images"


def _refusal(record: RunRecord, name: str) -> str:
    tried = [stage for stage in record.stages if stage.name == name]
    closest = next((stage for stage in tried if stage.chosen), None)
    reasons = "; ".join(reason.text for reason in closest.verdict.refusals) if closest else ""
    if not reasons or closest is None:
        return "No reason was recorded."
    if len(tried) == 1:
        return f"{reasons}."
    which = f"attempt {closest.attempt + 1} of {len(tried)} ({words.settings(closest.overrides)})"
    if any(stage.verdict.passed for stage in tried):
        return f"{which}: {reasons}."
    return f"None of {len(tried)} attempts passed. The closest was {which}: {reasons}."


def method(config: Mapping[str, Any]) -> str:
    """The method that a stage's section names."""
    for key in ("kind", "searcher", "compressor", "recipe", "precision"):
        value = config.get(key)
        if isinstance(value, Mapping):
            value = value.get("kind")
        if isinstance(value, str):
            return value
    attacks = config.get("attacks")
    if isinstance(attacks, list | tuple) and attacks:
        return ", ".join(str(a.get("kind")) if isinstance(a, Mapping) else str(a) for a in attacks)
    for value in config.values():
        if isinstance(value, Mapping) and isinstance(value.get("kind"), str):
            return str(value["kind"])
    return ""


def radius(task: Mapping[str, Any]) -> float | None:
    """The radius of the threat where the task states one as a number."""
    threat = task.get("threat")
    eps = threat.get("eps") if isinstance(threat, Mapping) else None
    return float(eps) if isinstance(eps, int | float) and not isinstance(eps, bool) else None


def meaning(
    record: RunRecord, latest: Mapping[str, Measurement], attacks: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, str], ...]:
    """Pairs of a term and what it does and does not say."""
    samples = max((m.samples for m in latest.values() if m.name.endswith(".test")), default=0)
    on = f" of {samples:,} test images" if samples else ""
    return (
        (
            "Robust accuracy",
            f"the share{on} on which no attack that was tried found a wrong answer within "
            f"{words.threat(record.spec.task)}. It is an upper bound: a stronger attack can only lower it. It says "
            "nothing about larger changes, other kinds of change (rotation, blur, stickers), or an attacker who alters "
            "the training data.",
        ),
        ("Strength of the attacks", _strength(attacks)),
        (
            "Certified accuracy",
            "the share for which a sound bound proves that no change within the threat alters the answer. It is a "
            "lower bound on what any attack could leave of the float network, whose true robust accuracy lies between "
            "its certified and its measured one; a file lowered to int8 or float16 is another network, "
            + (
                "for which its own certified accuracy was measured."
                if "accuracy.certified.shipped.test" in latest
                else "and not covered."
            )
            + ("" if "accuracy.certified.test" in latest else " It was not measured in this run."),
        ),
        (
            "Intervals",
            "95 % Wilson score intervals: what other test images of the same kind would give. Limits are held against "
            "the end of the interval, not against the number in the middle. They do not cover another training seed or "
            "images of another kind.",
        ),
        (
            "Hold-out and test",
            "networks, settings and attempts are chosen on a hold-out cut from the training part; nothing is chosen on "
            "the test split, which only validate and export read. A limit refused on the test split ends the build. "
            "Hold-out numbers are those that choices were made on, so they flatter a little.",
        ),
        (
            "What was measured",
            "numbers named shipped were measured on the very ONNX file in the bundle, run by onnxruntime on the "
            "machine named below; an engine that the device builds from it, or an .ort file beside it, may round "
            "otherwise. The others are of the network before it was lowered. Latency is of that machine too, unless "
            "it was settled on the device.",
        ),
    )


def _strength(attacks: Sequence[Mapping[str, Any]]) -> str:
    """Standard is claimed only where one of the attacks that were run says so itself: others add to it."""
    rule = '"Standard" means the published ensemble at its reference settings; anything lighter is called quick. '
    if not attacks:
        return rule + "Take an attack for quick unless the record says that its settings were the standard ones."
    if any(row.get("label") == "standard" for row in attacks):
        return rule + "That ensemble was run on the test images of this run."
    return rule + (
        "Attacks in this run were quick ones: good for telling two builds apart, too weak for a claim beside published "
        "numbers, which are usually lower for the same network."
    )
