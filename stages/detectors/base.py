"""The contract of a detector: copies of an input to ask the network about, and how far its answers are apart."""

from abc import abstractmethod
from typing import Annotated, final

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.detectors._adaptive import Adaptive
from stages.detectors._threshold import Threshold, at_rate
from stages.method import Method, polymorphic
from stages.nn.to_onnx import traced
from stages.oracle import Logits, narrow

FOLDER = "stages.detectors"


class Detector(Method):
    """Flags an input x where score(x) = max_i suspicions_i(z(x), z(copy_1(x)), ..., z(copy_m(x))) > threshold.

    Nothing is trained: the threshold is an order statistic of the scores of clean images, so that at most a share of
    `false_alarms` of such images is flagged. Every part is differentiable or offers a substitute for its gradient, so
    that `adaptive`, the attack that knows the detector, can be run against it.
    """

    false_alarms: float = Field(default=0.05, gt=0, lt=1)
    adaptive: Adaptive = Adaptive()

    @abstractmethod
    def copies(self, x: Tensor) -> Tensor:
        """Altered copies [m, B, C, H, W] of images [B, C, H, W] in [0, 1], within [0, 1]; m is at least 1.

        Values are those that ship, to the last bit; gradients pass straight through what has none. It must be
        exportable to ONNX: no shape but the batch may be symbolic, and B is never 0.
        """

    @abstractmethod
    def suspicions(self, z: Tensor, others: Tensor) -> Tensor:
        """[n, B], larger where more suspicious, from the logits z [B, K] of x and those of its copies [m, B, K]."""

    @final
    def examine(self, logits: Logits, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and suspicions [n, B] of images [B, C, H, W]; the score is the largest of each column.

        x is asked about by itself, as without a detector, so that its logits are the same bits. An oracle is charged
        1 + m passes.
        """
        return self.inspect(logits, x)[:2]

    @final
    def inspect(self, logits: Logits, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `examine`, and the logits of the copies [m, B, K]: what the attack that knows the detector is told."""
        z = logits(x)
        copies = self.copies(x)
        rows = torch.arange(len(x), device=x.device).repeat(len(copies))
        others = narrow(logits, rows)(copies.flatten(0, 1)).view(len(copies), *z.shape)
        return z, self.suspicions(z, others), others

    @final
    def scores(self, logits: Logits, x: Tensor, batch: int = 64) -> Tensor:
        """Scores float32 [N] of images [N, C, H, W], uint8 or float in [0, 1], in batches and without gradients."""
        found = []
        with torch.no_grad():
            for at in range(0, len(x), batch):
                part = x[at : at + batch]
                part = part.to(torch.float32) / 255 if part.dtype == torch.uint8 else part
                found.append(self.examine(logits, part)[1].amax(0))
        return torch.cat(found)

    @final
    def fit(self, scores: Tensor) -> Threshold:
        """The threshold from the scores [N] of clean images that nothing else was fitted on; misread ones stay in."""
        return at_rate(scores, self.false_alarms)


AnyDetector = Annotated[Detector, *polymorphic(FOLDER, Detector)]


def guard(detector: Detector, threshold: float, input_shape: tuple[int, int, int], classes: int) -> bytes:
    """ONNX of what a detector adds to a network, for `targets/lowering/attach.py`:

    input [batch, C, H, W], logits [batch, K], copies_logits [m batch, K] -> copies [m batch, C, H, W], score [batch],
    flag [batch] bool. Raises `InputError` where the detector takes no such images.
    """
    example, z = torch.zeros(2, *input_shape), torch.zeros(2, classes)
    others = torch.zeros(2 * len(detector.copies(example)), classes)
    return traced(
        _Guard(detector, threshold),
        {"input": (example, "batch"), "logits": (z, "batch"), "copies_logits": (others, "copies_batch")},
        {"copies": "copies_batch", "score": "batch", "flag": "batch"},
    )


class _Guard(nn.Module):
    threshold: Tensor

    def __init__(self, detector: Detector, threshold: float) -> None:
        super().__init__()
        self._detector = detector
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))

    def forward(self, x: Tensor, z: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        copies = self._detector.copies(x)
        # Whole numbers, not the tracer's symbols: shapes are then constants of the graph, whatever the batch.
        count, classes, image = int(copies.shape[0]), int(z.shape[1]), [int(size) for size in x.shape[1:]]
        score = self._detector.suspicions(z, others.reshape(count, -1, classes)).amax(0)
        return copies.reshape(-1, *image), score, score > self.threshold
