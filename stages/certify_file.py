"""Certified accuracy of the file that ships and of its float32 graph, and what exactly was proved of each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor

from pipeline.core.measurement import Measurement, exact
from pipeline.core.record import Outcomes
from stages.bounds.base import Certifier
from stages.bounds.branch_and_bound import BranchAndBound
from stages.data.base import Split
from stages.engine_kernels import spelled_out
from stages.evaluate import OnStep, outputs
from stages.measure import accuracy
from stages.method import kinds
from stages.nn.imported import Twin, imported
from stages.scene import shares
from stages.shipped import Shipped
from stages.threat import Threat
from stages.trial import prove
from stages.unproved import counts, settled

CERTIFIED = "accuracy.certified.shipped.test"
FLOAT, GAP = "accuracy.certified.float.test", "gap.certified"
_INT8 = "the int8 graph, in any order of sums and however kernels fuse its nodes, as onnxruntime runs it"
_FLOAT = (
    "the float32 graph, in any order of sums, each logit within twice the largest difference seen between it and "
    "onnxruntime (measured, not proved)"
)


@dataclass(frozen=True, slots=True)
class Certified:
    """The share that is proved, one bit per image; for the manifest what was proved; for the report how all images
    fared; findings that refuse the file."""

    measurements: tuple[Measurement, ...]
    outcomes: dict[str, Outcomes]
    contract: dict[str, Any]
    shares: tuple[dict[str, str | int | dict[str, int]], ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def certify_file(
    network: bytes,
    twin: Twin,
    shipped: Shipped,
    split: Split,
    alive: Tensor,
    threat: Threat,
    certifiers: Sequence[Certifier],
    on_step: OnStep,
    file: str,
    metric: str = CERTIFIED,
    seconds: float | None = None,
) -> Certified:
    """Every image of the split, by each certifier in turn; an image counts that one of them proves.

    `twin` is the file as imported, `alive` bool [N] what stood up to all attacks on it: a proof that an attack broke is
    no proof, and refuses. Of a graph that rounds only certifiers that cover rounding prove anything.
    """
    x, y = split.floats(), split.labels
    answers = outputs(shipped, x)
    right = answers.argmax(1) == y
    gap = 0.0 if twin.rounds else float((answers - outputs(twin, x)).abs().max())
    asked = dict(zip(kinds(certifiers), (_beyond(certifier, 2 * gap) for certifier in certifiers), strict=True))
    able = {name: certifier for name, certifier in asked.items() if certifier.covers_rounding or not twin.rounds}
    notes = [
        f'{name} proves nothing about a file that rounds; "quantised" covers rounding'
        for name in asked
        if name not in able
    ]
    model = onnx.load_model_from_string(network)
    meant, strange = spelled_out(model)
    twin = twin if meant is model else imported(bytes(meant.SerializeToString()))
    if strange is not None:
        able = {}
        notes.append(f"{file}: nothing is proved, as {strange}")
    found = prove(twin, x, y, answers.shape[1], threat, able, lambda _: on_step, seconds)
    notes += [finding.text for finding in found.findings if finding.ok]
    failed = [f"{file}: {finding.text}" for finding in found.findings if not finding.ok]
    hits = torch.zeros_like(right)
    for margins in found.margins.values():
        hits |= right & (margins > 2 * gap)
    broken = int((hits & ~alive).sum())
    number, outcomes = accuracy(metric, hits, split.indices)
    told = {
        "file": file,
        "sha256": hashlib.sha256(network).hexdigest(),
        "covers": _INT8 if twin.rounds else _FLOAT,
        "threat": threat.dump(),
        "certifiers": {name: certifier.dump() for name, certifier in able.items()},
        "images": len(x),
        "proved": int(hits.sum()),
        "unproved": counts(settled(found.why, hits, right & alive)),
        "slack": 2 * gap,
    }
    text = f"{broken} of {int(hits.sum())} images proved for {file} were broken on it; must be none"
    bar = shares(file, right, hits, alive, found.why)
    return Certified((number,), outcomes, told, (bar,), (*failed, *((text,) if broken else ())), tuple(notes))


def _beyond(certifier: Certifier, lead: float) -> Certifier:
    """The certifier, made to prove a lead of at least so much where it would stop at any."""
    return certifier.model_copy(update={"lead": lead}) if isinstance(certifier, BranchAndBound) else certifier


def beside(shipped: Certified, plain: Certified) -> Certified:
    """The certificate of the file that runs, with that of the float32 graph on the same images and the gap."""
    lowered, float32 = (
        [bits for outcomes in one.outcomes.values() for bits in outcomes.hits()] for one in (shipped, plain)
    )
    lost = sum(before and not after for before, after in zip(float32, lowered, strict=True))
    gained = sum(after and not before for before, after in zip(float32, lowered, strict=True))
    gap = {"lost": lost, "gained": gained, "share": (lost - gained) / len(lowered)}
    return Certified(
        (*shipped.measurements, *plain.measurements, exact(GAP, gap["share"], "fraction")),
        shipped.outcomes | plain.outcomes,
        {**shipped.contract, "float": plain.contract, "gap": gap},
        (*plain.shares, *shipped.shares),
        (*shipped.findings, *plain.findings),
        (*shipped.notes, *(f"the float32 graph: {note}" for note in plain.notes)),
    )
