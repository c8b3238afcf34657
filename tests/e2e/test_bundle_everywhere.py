"""The bundle that a build left, served over HTTP by a process of its own."""

import io
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np

from tests.real_line import ROOT, manifest


def test_a_built_bundle_is_served_and_answers_as_recorded(runs: Path, tmp_path: Path) -> None:
    bundle, log = runs / "small-x86_cpu" / "bundle", tmp_path / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "serve", str(bundle), "--port", "0"], cwd=ROOT, stderr=file
        )
    try:
        while "running on http://" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.02)
        address = log.read_text().partition("running on ")[2].split()[0]
        probe, body = np.load(bundle / "probe.npz"), io.BytesIO()
        np.save(body, probe["inputs"])
        with urllib.request.urlopen(f"{address}/predict", body.getvalue(), timeout=60) as reply:
            answer = json.load(reply)
        with urllib.request.urlopen(f"{address}/health", timeout=60) as reply:
            health = json.load(reply)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
    expected = probe["logits"].argmax(1)
    assert answer["classes"] == expected.tolist()
    assert answer["labels"] == [manifest(bundle)["labels"][i] for i in expected]
    assert (health["status"], health["name"], health["owed"]) == ("ok", "small", [])
