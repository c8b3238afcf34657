"""`verify BUNDLE`: every digest, the manifest's form, the model, and the probe outputs it must reproduce."""

import argparse
import sys

import numpy as np
import numpy.typing as npt

from targets.runtime.bundle import Bundle, open_manifest, verify_files
from targets.runtime.errors import TamperedError
from targets.runtime.predictor import on_onnxruntime


def run(args: argparse.Namespace) -> int:
    """Raises `BundleError` (status 2) at the first thing that is not as the manifest says."""
    bundle = open_manifest(args.bundle)
    files = verify_files(bundle)
    predictor = on_onnxruntime(bundle, args.threads, "cpu")
    inputs, expected = bundle.probe()
    answer = predictor.answer(inputs)
    gap = float(np.abs(answer.logits - expected).max())
    allowed = bundle.tolerance * float(np.abs(expected).max())
    if not gap <= allowed:
        raise TamperedError(
            f"{bundle.folder / bundle.model}: the probe outputs differ by {gap:.3g} from the recorded ones, and at "
            f"most {allowed:.3g} is allowed for {bundle.precision}; this runtime computes another function"
        )
    if answer.scores is not None and answer.flags is not None:
        _reproduces(bundle, answer.scores, answer.flags, allowed)
    owed = bundle.still_owed()
    sys.stdout.write(
        f"{bundle.name} for {bundle.target}: {files} files as recorded, {bundle.model} reproduces "
        f"{len(inputs)} probe outputs within {gap:.2g}\nmanifest sha256 {bundle.digest}\n"
    )
    if answer.flags is not None:
        sys.stdout.write(f"detector: the scores are reproduced, {int(answer.flags.sum())} of the probes are flagged\n")
    if owed:
        sys.stdout.write(f"owed on the device: {', '.join(owed)} (run `finish` there)\n")
    return 0


def _reproduces(bundle: Bundle, scores: npt.NDArray[np.float32], flags: npt.NDArray[np.bool_], allowed: float) -> None:
    """The recorded scores, and flags that follow from them.

    A change of every logit by at most d moves a softmax by at most d in the L1 norm, so a distance of two by 2 d; the
    logits of the copies are not recorded, but the same kernels compute them.
    """
    where = bundle.folder / bundle.model
    gap = float(np.abs(scores - bundle.probe_scores()).max())
    if not gap <= 2 * allowed:
        raise TamperedError(
            f"{where}: the detector's scores differ by {gap:.3g} from the recorded ones, and at most {2 * allowed:.3g} "
            f"is allowed for {bundle.precision}; this runtime computes another function"
        )
    threshold = np.float32(bundle.manifest["detector"]["threshold"])
    if not np.array_equal(flags, scores > threshold):
        raise TamperedError(f"{where}: a flag is not its score held against the manifest's threshold {threshold:.4g}")
