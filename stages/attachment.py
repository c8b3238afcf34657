"""A fitted detector on its way into the bundle: what validate writes of it, and its graph around a lowered network."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from pipeline.core.stage import Files
from stages.detectors._threshold import Threshold
from stages.detectors.base import AnyDetector, guard
from stages.method import InputError, Value
from stages.nn import _atomic
from stages.oracle import Logits

TABLE, ARRAYS = "detector.json", "detector.safetensors"
# Scores on the hold-out that are as near as this were given by one network; farther apart, its threshold is not theirs.
SAME = 1e-5


class Fitted(Value):
    """`detector.json`. `network` is the SHA-256 of evidence's header; `adaptive` counts images: misled by any attack,
    and evading the detector, in all and by what found it first."""

    schema_version: Literal[1] = 1
    detector: AnyDetector
    threshold: Threshold
    network: str
    adaptive: dict[str, int]


def write(out: Path, fitted: Fitted, arrays: Mapping[str, Tensor]) -> dict[str, Path]:
    """`detector.json` and `detector.safetensors` in `out`, by name; equal contents give equal bytes.

    `arrays`: holdout_scores [M]; x_adaptive [N, C, H, W], misled, evaded and flagged bool [N], of the images whose
    numbers `adversarial.safetensors` lists.
    """
    table = json.dumps(fitted.dump(), sort_keys=True, indent=1, allow_nan=False)
    _atomic.write(out / TABLE, table.encode())
    _atomic.write(out / ARRAYS, bytes_of({name: value.cpu().contiguous() for name, value in arrays.items()}))
    return {TABLE: out / TABLE, ARRAYS: out / ARRAYS}


class Attachment:
    """The detector's graph for any lowered form of a network, with a threshold that holds for that form.

    A file whose scores on the hold-out are those of validate's network keeps validate's threshold. Any other one is
    another network: the same rule on the same images sets its own.
    """

    def __init__(
        self,
        files: Files,
        holdout: Tensor,
        classes: int,
        logits: Callable[[bytes], Logits],
        note: Callable[[str], None],
    ) -> None:
        """`files` are validate's, `holdout` float32 [M, C, H, W]; `logits` runs a lowered network as it ships.

        Raises `InputError` where the files were not written by validate.
        """
        try:
            self.fitted = Fitted.model_validate_json(files[TABLE].read_bytes())
        except (ValidationError, UnicodeDecodeError) as error:
            raise InputError(f"{TABLE}: expected a detector fitted by validate, got: {error}") from error
        self.arrays = tensors_of(files[ARRAYS].read_bytes())
        self._holdout, self._classes, self._logits, self._note = holdout, classes, logits, note
        self._known: dict[bytes, Threshold] = {}

    def threshold(self, network: bytes) -> Threshold:
        """For a lowered network without the detector; asked once for each."""
        if network not in self._known:
            scores, before = self.fitted.detector.scores(self._logits(network), self._holdout), self.fitted.threshold
            if float((scores - self.arrays["holdout_scores"]).abs().max()) <= SAME:
                self._known[network] = before
            else:
                found = self._known[network] = self.fitted.detector.fit(scores)
                self._note(
                    f"detector: fitted again on the lowered file: threshold {found.value:.4g}, was {before.value:.4g}"
                )
        return self._known[network]

    def __call__(self, network: bytes) -> bytes:
        _, channels, height, width = self._holdout.shape
        return guard(self.fitted.detector, self.threshold(network).value, (channels, height, width), self._classes)

    def contract(self, network: bytes) -> dict[str, Any]:
        """What a reader of the bundle must know of it."""
        found, settings = self.threshold(network), self.fitted.detector.dump()
        return {
            "kind": settings.pop("kind"),
            "settings": {key: value for key, value in settings.items() if key not in ("adaptive", "false_alarms")},
            "false_alarms": found.rate,
            # The graph compares in float32, so what it holds is told, not the number before rounding.
            "threshold": float(torch.tensor(found.value, dtype=torch.float32)),
            "outputs": ["score", "flag"],
        }
