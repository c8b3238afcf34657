"""No wrong answer: the verdict on random tiny networks against going through every activation pattern."""

from pathlib import Path

import numpy as np
import pytest

from stages.verification.cases import Cases
from stages.verification.clock import Clock
from stages.verification.model import Model
from stages.verification.verdict import Trial
from stages.verification.vnnlib import parse
from tests.specs import Constraint, any_of, layers, mlp, reachable, spec

_NEAR = 1e-4  # a case that rounding can tip either way may be answered `unknown`, never wrongly


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_equal_enumeration(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = layers([[2, 5, 3], [2, 3, 3, 2], [1, 7, 2], [2, 4, 2, 3]][seed], seed)
    inputs = net[0][0].shape[0]
    low = rng.uniform(-2, 0, (inputs,)).astype(np.float32).astype(np.float64)
    high = (low + rng.uniform(0.5, 3, (inputs,))).astype(np.float32).astype(np.float64)
    outputs = net[-1][0].shape[1]
    model = Model(mlp(tmp_path / "net.onnx", net, (1, len(low))), len(low))
    decided = {"sat": 0, "unsat": 0}
    for _ in range(6):
        conjunctions: list[list[Constraint]] = [
            [(rng.integers(-2, 3, outputs).astype(float).tolist(), float(rng.normal(-1.5, 1.5))) for _ in range(count)]
            for count in rng.integers(1, 3, rng.integers(1, 3))
        ]
        conjunctions = [[row for row in rows if any(row[0])] or [([1.0] * outputs, 0.0)] for rows in conjunctions]
        text = spec(low.tolist(), high.tolist(), outputs, any_of(conjunctions))
        cases = Cases.of(parse(text), model.classes)
        answer = Trial(model, cases, Clock(6.0), lambda _: None).answer()
        surely = any(reachable(net, low, high, rows, -_NEAR) for rows in conjunctions)
        maybe = any(reachable(net, low, high, rows, _NEAR) for rows in conjunctions)
        assert answer.word != "unsat" or not surely
        assert answer.word != "sat" or maybe
        if answer.word == "unknown":
            assert surely is not maybe, "neither near a tie nor decided"
        else:
            decided[answer.word] += 1
        if answer.witness is not None:
            assert cases.witnessed(answer.witness.x, model.outputs(answer.witness.x))
    assert min(decided.values()) > 0
