"""Signs of ReLUs split until the answer is known: against going through every activation pattern."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.seeding import generator
from stages.verification.branching import Branching
from stages.verification.cases import Cases
from stages.verification.clock import Clock
from stages.verification.falsify import Hunt
from stages.verification.model import Model
from stages.verification.vnnlib import parse
from tests.specs import any_of, layers, mlp, reachable, spec


@pytest.mark.parametrize("seed", range(2))
def test_what_is_refuted_cannot_be_reached_and_most_of_it_is_found(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    net = layers([[2, 5, 2], [2, 3, 3, 2]][seed], seed + 10)
    low, high = np.array([-1.0, -0.5]), np.array([1.0, 1.5])
    model = Model(mlp(tmp_path / "net.onnx", net, (1, 2)), 2)
    rows = [rng.integers(-2, 3, 2).astype(float).tolist() for _ in range(2)]
    refuted = safe = 0
    for row in [row for row in rows if any(row)]:
        # Bounds that bracket the true minimum, found by enumeration to a hundredth.
        inside, outside = -30.0, 30.0
        while outside - inside > 0.01:
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if reachable(net, low, high, [(row, middle)], 0.0) else (middle, outside)
        conjunctions = [[(row, inside - gap)] for gap in (0.1, 0.3)] + [[(row, outside + 0.02)]]
        cases = Cases.of(parse(spec(low.tolist(), high.tolist(), 2, any_of(conjunctions))), 2)
        hunt = Hunt(model.net, cases, lambda _: False, generator(seed, "hunt"))
        hunt.particles = 1
        left, witness = Branching(model.net, cases, hunt).run(torch.arange(3), Clock(200.0))
        assert witness is None
        assert 2 in left.tolist()  # it can be reached
        safe += 2
        refuted += 3 - len(left)
    assert refuted == safe
