"""Attacks on chosen class pairs, the costliest first."""

import torch
from pydantic import Field, field_validator
from torch import Generator, Tensor

from stages.attacks._losses import gradient, margin
from stages.attacks.base import Attack
from stages.method import InputError
from stages.oracle import Logits, narrow, reachable
from stages.threat import Threat


class CostTargeted(Attack):
    """Projected ascent towards the wrong class of highest cost, then the next, and the costliest find of all.

        classes j with C_yj > 0, in the order of C_yj (the likelier first among equals):
        climb  z_j - max_{k != j} z_k  from a random start, until the answer costs C_yj or more

    `cost` is C [K, K]: row the true class, column the answer, 0 on the diagonal and for confusions that do no harm;
    left out, every wrong answer costs 1. An example is done when its find costs no less than every class not yet tried.
    So a wrong answer does not end its search unless nothing costs more; and an example of a class whose errors cost
    nothing is not attacked. Wrong answers met on the way count with their own costs. At most `targets` classes per
    example, none that is proved unreachable; `step` is a share of eps, left out 2.5 / steps. What comes back for each
    example is what its costliest answer was given to: score it with C, not only by whether it is wrong.

    Source: reconstruction after the abstract of Shen et al. 2022, "Adversarial learning with cost-sensitive classes";
    targets and margins as in Zhang and Evans 2019. Departure: they sum or log-weigh costs into one objective, which may
    trade a costly answer for a likely one; trying classes in order of cost cannot.
    """

    cost: tuple[tuple[float, ...], ...] | None = None
    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=1, ge=1)
    targets: int = Field(default=9, ge=1)
    step: float | None = Field(default=None, gt=0)

    @field_validator("cost")
    @classmethod
    def _is_a_cost(cls, cost: tuple[tuple[float, ...], ...] | None) -> tuple[tuple[float, ...], ...] | None:
        if cost is None:
            return None
        if len(cost) < 2 or any(len(row) != len(cost) for row in cost):
            raise ValueError(f"expected as many columns as rows, at least 2, got rows of {[len(row) for row in cost]}")
        for k, row in enumerate(cost):
            if row[k] != 0 or min(row) < 0:
                raise ValueError(f"row {k}: expected 0 on the diagonal and no negative cost, got {list(row)}")
        if not any(map(any, cost)):
            raise ValueError("expected at least one positive cost, got none")
        return cost

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        with torch.no_grad():
            z = logits(x).float()
        price = self._prices(z, y)
        classes = _costliest_first(z, price)[:, : self.targets]
        open_ = (reachable(logits, z.shape[1], y) & (price > 0)).gather(1, classes)
        # A wrong answer that costs nothing is still better than none.
        best, result = torch.full_like(price[:, 0], -1.0), x.clone()
        for _ in range(self.restarts):
            for goal, tried in zip(classes.unbind(1), open_.unbind(1), strict=True):
                start = threat.random(x, rng)
                worth = price.gather(1, goal.unsqueeze(1)).squeeze(1)
                rows = (tried & (best < worth)).nonzero().flatten()
                self._climb(logits, x, y, threat, rows, start[rows], goal, worth, price, best, result)
        return result

    def _prices(self, z: Tensor, y: Tensor) -> Tensor:
        """What every answer costs, [B, K]."""
        classes = z.shape[1]
        if self.cost is None:
            return torch.ones_like(z).scatter_(1, y.unsqueeze(1), 0.0)
        if len(self.cost) != classes:
            size = len(self.cost)
            raise InputError(
                f"cost_targeted: expected a cost matrix of {classes} x {classes}, one row per output of the network, "
                f"got {size} x {size}"
            )
        return torch.tensor(self.cost, dtype=z.dtype, device=z.device)[y]

    def _climb(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        rows: Tensor,
        point: Tensor,
        goal: Tensor,
        worth: Tensor,
        price: Tensor,
        best: Tensor,
        result: Tensor,
    ) -> None:
        """From `point` [M, ...] towards `goal` [B] for the examples `rows` [M]; writes `best` [B] and `result`."""
        length = threat.eps * (self.step if self.step is not None else 2.5 / self.steps)

        def record(z: Tensor) -> Tensor:
            answer = z.argmax(1)
            paid = price[rows, answer]
            dearer = (answer != y[rows]) & (paid > best[rows])
            best[rows[dearer]], result[rows[dearer]] = paid[dearer], point[dearer]
            return best[rows] < worth[rows]

        for _ in range(self.steps):
            if len(rows) == 0:
                return
            z, _, slope = gradient(narrow(logits, rows), point, goal[rows], lambda z, j: -margin(z, j))
            going = record(z)
            rows, point, slope = rows[going], point[going], slope[going]
            point = threat.project(threat.ascend(point, slope, length), x[rows])
        if len(rows):
            with torch.no_grad():
                record(narrow(logits, rows)(point))


def _costliest_first(z: Tensor, price: Tensor) -> Tensor:
    """The classes of each example by falling price, and by falling logit among equals, int64 [B, K]."""
    likely = z.argsort(dim=1, descending=True, stable=True)
    return likely.gather(1, price.gather(1, likely).argsort(dim=1, descending=True, stable=True))
