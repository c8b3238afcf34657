"""Compressed layers are bounded as what they are: primitives. No form below is known to the bounds by name."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from stages.bounds.base import Box, Certifier
from stages.bounds.crown import Crown
from stages.bounds.crown_ibp import CrownIBP
from stages.bounds.ibp import IBP
from stages.seeding import generator

CHANNELS, SIDE, K = 3, 4, 4


class Separable(nn.Module):
    """Y = A X B^T + b: a fully connected layer whose matrix is a Kronecker product (Wei et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, CHANNELS)), nn.Parameter(torch.randn(6, SIDE * SIDE))
        self.offset = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (self.a @ x.flatten(2) @ self.b.T + self.offset).flatten(1)


class ModeProducts(nn.Module):
    """The same with three factors, one along each axis, and a sum of two such terms."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        sizes = ((4, CHANNELS), (3, SIDE), (2, SIDE))
        self.terms = nn.ParameterList([nn.Parameter(torch.randn(m, n)) for _ in range(2) for m, n in sizes])
        self.einsum = einsum

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | float = 0.0
        for at in (0, 3):
            a, b, c = self.terms[at], self.terms[at + 1], self.terms[at + 2]
            if self.einsum:
                total = total + torch.einsum("ai,bj,ck,nijk->nabc", a, b, c, x)
            else:
                y = F.linear(x.movedim(1, 3), a).movedim(3, 1)
                total = total + F.linear(F.linear(y.transpose(2, 3), b).transpose(2, 3), c)
        assert isinstance(total, Tensor)
        return total.flatten(1)


class LowRankPlusSparse(nn.Module):
    """W = L R + S with a masked S, the weight formed in the forward pass (as CSTAR and masked pruning train)."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, CHANNELS * 9))
        self.sparse = nn.Parameter(torch.randn(6, CHANNELS * 9))
        self.register_buffer("mask", (torch.rand(6, CHANNELS * 9) > 0.7).float())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.left @ self.right + self.sparse * self.mask
        return F.conv2d(x, weight.view(6, CHANNELS, 3, 3), padding=1).flatten(1)


class Masked(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def tucker() -> nn.Module:
    """A convolution as 1x1, 3x1, 1x3, 1x1."""
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 2, 1, bias=False),
        nn.Conv2d(2, 2, (3, 1), padding=(1, 0), bias=False),
        nn.Conv2d(2, 2, (1, 3), padding=(0, 1), bias=False),
        nn.Conv2d(2, 6, 1),
        nn.Flatten(),
    )


def masked() -> nn.Module:
    conv = nn.Conv2d(CHANNELS, 6, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Masked((torch.rand_like(conv.weight) > 0.5).float()))
    return nn.Sequential(conv, nn.Flatten())


FORMS = {
    "separable": Separable,
    "mode products": lambda: ModeProducts(einsum=False),
    "mode products, einsum": lambda: ModeProducts(einsum=True),
    "low rank and sparse": LowRankPlusSparse,
    "tucker": tucker,
    "masked": masked,
}


def dense(form: nn.Module) -> nn.Linear:
    """The fully connected layer that a form is, its matrix read off the images of the unit vectors."""
    zero = torch.zeros(1, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    with torch.no_grad():
        offset = form(zero)[0]
        columns = form(torch.eye(zero.numel(), dtype=torch.float64).view(-1, CHANNELS, SIDE, SIDE)) - offset
    layer = nn.Linear(zero.numel(), len(offset)).double()
    with torch.no_grad():
        layer.weight.copy_(columns.T)
        layer.bias.copy_(offset)
    return layer


@pytest.mark.parametrize("name", FORMS)
def test_a_compressed_layer_is_bounded_as_the_dense_one_it_stands_for(name: str) -> None:
    form = FORMS[name]().double().eval()
    whole = dense(form)
    tail = nn.Sequential(nn.ReLU(), nn.Linear(whole.out_features, K)).double()
    rng = generator(0, name)
    x = torch.rand(2, CHANNELS, SIDE, SIDE, generator=rng, dtype=torch.float64)
    rows = torch.randn(2, 3, K, generator=rng, dtype=torch.float64)
    certifiers: list[Certifier] = [method(arithmetic="real") for method in (CrownIBP, Crown)]
    box = Box(x - 0.1, x + 0.1)
    with torch.no_grad():
        for certifier in certifiers:
            found = certifier.lower(nn.Sequential(form, tail), box, rows)
            same = certifier.lower(nn.Sequential(nn.Flatten(), whole, tail), box, rows)
            # CROWN-IBP reads the ReLU's range off intervals, and intervals of a product of factors are wider.
            assert bool((found <= same + 1e-9).all())
            assert isinstance(certifier, CrownIBP) or torch.allclose(found, same, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_escapes_a_network_of_compressed_layers(name: str) -> None:
    form = FORMS[name]().eval()
    with torch.no_grad():
        width = form(torch.zeros(1, CHANNELS, SIDE, SIDE)).shape[1]
    net = nn.Sequential(form, nn.ReLU(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, K)).eval()
    rng = generator(1, name)
    x = torch.rand(2, CHANNELS, SIDE, SIDE, generator=rng)
    box = Box(x - 0.05, x + 0.05)
    rows = torch.eye(K).repeat(2, 1, 1)
    least = torch.full((2, K), torch.inf)
    for k in range(K):
        point = x + 0.1 * (torch.rand(x.shape, generator=rng) - 0.5)
        for _ in range(6):
            point = point.detach().requires_grad_()
            value = net(point)
            least = torch.minimum(least, value.detach())
            (grad,) = torch.autograd.grad(value[:, k].sum(), point)
            point = torch.where(grad > 0, box.low, box.high)
    for certifier in (IBP(), CrownIBP(), Crown()):
        with torch.no_grad():
            bound = certifier.lower(net, box, rows)
        assert bool((bound <= least).all())
        assert isinstance(certifier, IBP) or bool((bound > least - 20).all())
