"""What an attack asks of a network, counted per example; and what is already proved about it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.method import InputError

Logits = Callable[[Tensor], Tensor]
"""[B, C, H, W] in [0, 1] -> [B, K]: a network, a network behind a detector, or an exported engine."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Forward and backward passes per example, int64 [N] each; a pass over a batch costs each of its examples one."""

    queries: Tensor
    gradients: Tensor


@dataclass(frozen=True, slots=True)
class Oracle:
    """A network seen by an attack on N examples: `oracle[rows]` answers for those rows and charges them.

    `rows` [M] are places among the N examples, repeated ones charged each time. A pass whose input asks for a gradient
    counts as one query and one gradient; a caller that draws more gradients from one pass says so with `charge`.
    `unproved` bool [N, K], where given, is False for classes that were proved unreachable within the threat: targeting
    them is wasted, and leaving them out changes no verdict.
    """

    logits: Logits
    rows: Tensor
    spent: Spent
    unproved: Tensor | None = None

    @staticmethod
    def of(
        logits: Logits, examples: int, device: torch.device | str = "cpu", unproved: Tensor | None = None
    ) -> "Oracle":
        none = torch.zeros(examples, dtype=torch.int64, device=device)
        return Oracle(logits, torch.arange(examples, device=device), Spent(none, none.clone()), unproved)

    def __getitem__(self, rows: Tensor) -> "Oracle":
        """The same network for some of this oracle's rows: places, int64 [M], or a mask, bool [len(self.rows)]."""
        return Oracle(self.logits, self.rows[rows], self.spent, self.unproved)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.rows):
            raise InputError(f"oracle: expected {len(self.rows)} examples, got {len(x)}; ask oracle[rows] for some")
        self.charge(queries=1, gradients=int(torch.is_grad_enabled() and x.requires_grad))
        return self.logits(x)

    def charge(self, queries: int = 0, gradients: int = 0) -> None:
        """Add to what each of the rows has spent."""
        for spent, amount in ((self.spent.queries, queries), (self.spent.gradients, gradients)):
            if amount:
                spent.index_add_(0, self.rows, torch.full_like(self.rows, amount))


def narrow(logits: Logits, rows: Tensor) -> Logits:
    """`logits[rows]` of an oracle; any other callable, which takes whatever examples come, is itself."""
    return logits[rows] if isinstance(logits, Oracle) else logits


def charge(logits: Logits, queries: int = 0, gradients: int = 0) -> None:
    """Tell an oracle of passes that it could not see; any other callable keeps no books."""
    if isinstance(logits, Oracle):
        logits.charge(queries, gradients)


def reachable(logits: Logits, classes: int, y: Tensor) -> Tensor:
    """bool [B, K]: the wrong classes that may still be reached; all of them where nothing is proved."""
    wrong = torch.ones(len(y), classes, dtype=torch.bool, device=y.device)
    if isinstance(logits, Oracle) and logits.unproved is not None:
        wrong &= logits.unproved[logits.rows]
    return wrong.scatter_(1, y.unsqueeze(1), False)
