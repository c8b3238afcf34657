"""A small network trained on the digits that ship with the package: right on most of them, and easy to break."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.data.digits import Digits
from stages.seeding import generator


@cache
def digits_net() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """The network in eval mode, 1,000 training images with labels, and 60 test images that it reads rightly."""
    source = Digits().read(Path())
    x, y = source.train.floats(slice(0, 1000)), source.train.labels[:1000]
    rng = generator(0, "digits net")
    pixels = x[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter[0].numel() ** 0.5)
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        adam.zero_grad()
        F.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        adam.step()
    net.eval().requires_grad_(False)
    x_test, y_test = source.test.floats(), source.test.labels
    right = (net(x_test).argmax(1) == y_test).nonzero().flatten()[:60]
    return net, x, y, x_test[right], y_test[right]


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[at : at + 200], y[at : at + 200]) for at in range(0, len(x), 200)]
