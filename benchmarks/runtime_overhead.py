"""What the device runtime adds to numpy and onnxruntime: seconds to start, bytes in memory. Fresh processes, medians.

    python benchmarks/runtime_overhead.py [--repeats 7]

Both processes load the same model and run it once; one through onnxruntime alone, one through `open_bundle`, digests
and all. Promised: under 0.2 s and under 10 MiB. Ends in status 1 where that does not hold.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.graphs import make_bundle  # noqa: E402  the path must be set first

END = """
seconds = time.process_time() - start
rows = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(seconds, int(rows["VmRSS"].split()[0]) * 1024)
"""
ALONE = """
import os, sys, time
start = time.process_time()
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
session.run(["logits"], {"input": np.zeros((1, 1, 8, 8), np.float32)})
"""
OURS = """
import sys, time
start = time.process_time()
import numpy as np
from targets.runtime.predictor import open_bundle
open_bundle(sys.argv[1]).predict(np.zeros((1, 1, 8, 8), np.float32))
"""


def median(program: str, bundle: Path, repeats: int) -> tuple[float, float]:
    """Processor seconds (a busy machine stretches wall time) and resident bytes."""
    rows = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", program + END, str(bundle)], capture_output=True, text=True, cwd=ROOT, check=True
        )
        rows.append([float(word) for word in done.stdout.split()])
    return statistics.median(row[0] for row in rows), statistics.median(row[1] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_bundle(Path(folder) / "bundle")
        alone, ours = median(ALONE, bundle, repeats), median(OURS, bundle, repeats)
    seconds, size = ours[0] - alone[0], ours[1] - alone[1]
    print(f"numpy + onnxruntime   {alone[0]:.3f} s   {alone[1] / 2**20:.1f} MiB")
    print(f"with the runtime      {ours[0]:.3f} s   {ours[1] / 2**20:.1f} MiB")
    print(f"added                 {seconds:.3f} s   {size / 2**20:.1f} MiB   (at most 0.2 s, 10 MiB)")
    return 0 if seconds < 0.2 and size < 10 * 2**20 else 1


if __name__ == "__main__":
    sys.exit(main())
