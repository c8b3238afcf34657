"""What this folder holds: certifiers, which prove, and beside them methods that say something else of a network.

A certifier gives a sound lower bound on linear functions of the logits over a box. Only a `Certifier` may feed a
certified figure; a spec and `stages.trial.prove`, through which all such figures come, take nothing else (`certifier`).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor, nn

from stages.method import InputError, Method, load
from stages.threat import Threat

FOLDER = "stages.bounds"


@dataclass(frozen=True, slots=True)
class Ball:
    """All x with ||x - centre|| <= eps; centre is [B, ...]."""

    centre: Tensor
    norm: Literal["l2", "l1"]
    eps: float


@dataclass(frozen=True, slots=True)
class Box:
    """Per-pixel bounds [B, C, H, W], low <= high, finite; where a ball is given, only its points in the box count.

    A certifier may leave the ball aside (its bounds hold for the whole box then); linear bounds use it.
    """

    low: Tensor
    high: Tensor
    ball: Ball | None = None

    @staticmethod
    def around(x: Tensor, threat: Threat) -> "Box":
        """The smallest box that holds the threat around x, cut with the data range; and the ball, if it is smaller."""
        ball = None if threat.norm == "linf" else Ball(x, threat.norm, threat.eps)
        return Box((x - threat.eps).clamp(min=threat.low), (x + threat.eps).clamp(max=threat.high), ball)


class TooLittleMemory(InputError):
    """A certifier's memory does not hold one row of coefficients for so many images; fewer at once may fit."""


class Contradiction(RuntimeError):
    """Bounds prove what a point refutes, so one of the two is wrong: a fault of ours, never a verdict."""


class Bounds(Method):
    """Any method of this folder. `instead` says in a clause what one does that proves nothing about the network."""

    instead: ClassVar[str] = "proves nothing about the network"


class Certifier(Bounds):
    """`covers_rounding` says that the bounds hold for graphs that round to codes, however kernels sum.

    `cheap` says that they cost no more than a short attack, so that none need come first.
    """

    covers_rounding: ClassVar[bool] = False
    cheap: ClassVar[bool] = False

    @abstractmethod
    def lower(self, net: nn.Module, box: Box, rows: Tensor) -> Tensor:
        """[B, R] sound lower bounds of rows @ logits over the box; rows is [B, R, K]. Net in eval mode."""

    @final
    def margins(self, net: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
        """[B] sound lower bound on the true class's lead over the best other class; positive is a proof."""
        if net.training:
            raise InputError("certifier: expected a network in eval mode, got one in training mode; call .eval()")
        return self.lower(net, Box.around(x, threat), lead_rows(net, x, y)).amin(1)


class Estimator(Bounds):
    """Says roughly what range the logits have over a box. It has no `lower` and no `margins`: it is no certifier."""

    instead: ClassVar[str] = "estimates bounds and proves nothing"

    @abstractmethod
    def estimate(self, net: nn.Module, box: Box, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high), [B, R] each, of rows @ logits over the box; rows is [B, R, K]. Either may be wrong."""


def certifier(data: object) -> Certifier:
    """A certifier from a name, a table or itself. Raises `InputError` for a method that is none."""
    found: Bounds = load(FOLDER, Bounds, data)
    if not isinstance(found, Certifier):
        raise InputError(
            f"{found.kind} {found.instead}: it never counts as certified; take a certifier (`list bounds`), and "
            f"`audit --certify {found.kind}` for what it says, which is kept apart"
        )
    return found


AnyCertifier = Annotated[
    Certifier,
    BeforeValidator(certifier),
    PlainSerializer(lambda method: method.dump(), return_type=dict[str, Any]),
]


def lead_rows(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[B, K-1, K] rows e_y - e_k for every k != y; K is read off one forward pass.

    Raises `InputError` for images that are no floats, and for labels that are not one class for each image.
    """
    if not x.is_floating_point() or y.shape != x.shape[:1] or y.dtype not in (torch.int64, torch.int32):
        got = f"{tuple(x.shape)} of {x.dtype} and {tuple(y.shape)} of {y.dtype}"
        raise InputError(f"certifier: expected images [B, ...] of floats and labels [B] of whole numbers, got {got}")
    with torch.no_grad():
        classes = net(x[:1]).shape[1]
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise InputError(f"certifier: expected labels from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    eye = torch.eye(classes, device=x.device, dtype=x.dtype)
    leads = eye[y].unsqueeze(1) - eye.unsqueeze(0)
    others = torch.arange(classes, device=x.device).unsqueeze(0) != y.unsqueeze(1)
    return leads[others].view(len(y), classes - 1, classes)
