"""`verify BUNDLE`: every digest, the manifest's form, the model, and the probe outputs it must reproduce."""

import argparse
import sys

import numpy as np

from targets.runtime.bundle import open_manifest, verify_files
from targets.runtime.errors import TamperedError
from targets.runtime.predictor import on_onnxruntime


def run(args: argparse.Namespace) -> int:
    """Raises `BundleError` (status 2) at the first thing that is not as the manifest says."""
    bundle = open_manifest(args.bundle)
    files = verify_files(bundle)
    predictor = on_onnxruntime(bundle, args.threads, "cpu")
    inputs, expected = bundle.probe()
    gap = float(np.abs(predictor(inputs) - expected).max())
    allowed = bundle.tolerance * float(np.abs(expected).max())
    if not gap <= allowed:
        raise TamperedError(
            f"{bundle.folder / bundle.model}: the probe outputs differ by {gap:.3g} from the recorded ones, and at "
            f"most {allowed:.3g} is allowed for {bundle.precision}; this runtime computes another function"
        )
    owed = bundle.still_owed()
    sys.stdout.write(
        f"{bundle.name} for {bundle.target}: {files} files as recorded, {bundle.model} reproduces "
        f"{len(inputs)} probe outputs within {gap:.2g}\nmanifest sha256 {bundle.digest}\n"
    )
    if owed:
        sys.stdout.write(f"owed on the device: {', '.join(owed)} (run `finish` there)\n")
    return 0
