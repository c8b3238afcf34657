"""Which inputs a linear bound owes its losses to: what is gained where a box is cut across one of them.

The lines of a neuron k with pre-activation z_k lose l_k (the width between them in the middle of the box of z_k), in
the bound |a_k| l_k. That loss is due to the range of z_k, and of its half width the input j has the share |dz_k/de_j|,
which the columns of the forward pass say (`_forward.Band`). So the loss of a bound that is owed to input j is

    sum_k |a_k| l_k |m_kj| / sum_i (|m_ki| + |d_ki|).

An input that the bound itself hardly depends on may still be what makes its neurons cross zero. Nothing here has to be
sound: it chooses where to cut.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from stages.bounds._backward import Chain
from stages.bounds._forward import Band, Bands
from stages.bounds._interval import TINY
from stages.bounds._trace import Op


def shares(chain: Chain, bands: Bands, op: Op) -> Tensor | None:
    """[B, live inputs, n]: of what the lines of an operation that was just followed lose, what each input is at fault
    for; None where it has no lines between bands."""
    lines = chain.lines.get(op.result)
    if lines is None or not all(isinstance(bands.held.get(name), Band) for name in lines.slopes):
        return None
    lost: Tensor = (lines.high - lines.low).to(chain.kind).expand(chain.shape(op.result))
    turned, width = lost.new_zeros(()), lost.new_zeros(())
    for name, (down, up) in lines.slopes.items():
        band, box = bands.held[name], chain.values[name]
        lost = lost + (up - down) * (box.low + box.high) / 2
        turned = turned + band.middle[:, :-1].abs()
        width = width + (band.middle[:, :-1].abs() + band.spread[:, :-1].abs()).sum(1) + band.spread[:, -1].abs()
    weight = lost.clamp(min=0) / width.clamp(min=TINY)
    return (turned * weight.unsqueeze(1)).flatten(2)


def owed(chain: Chain, parts: Mapping[str, Tensor], watch: Mapping[str, Tensor], rows: int, live: int) -> Tensor:
    """[R, B, live inputs]: what the bounds with coefficients `watch` of results lose to each of the inputs."""
    total = torch.zeros(rows, chain.batch, live, dtype=chain.kind)
    for name, part in parts.items():
        if name in watch:
            total = total + torch.einsum("rbn,bfn->rbf", chain.flat(name, watch[name]).abs(), part)
    return total
