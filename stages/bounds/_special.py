"""Linear bounds of operations that are not elementwise: products of matrices here, the others in files of their own."""

from torch import Tensor

from stages.bounds import _attention, _largest, _linear, _logsumexp, _norms, _relax
from stages.bounds._backward import SPECIAL, Chain, Pull
from stages.bounds._interval import gamma
from stages.bounds._trace import Op, fill


def matrices(chain: Chain, op: Op) -> Pull:
    """x y in m_x y + x m_y - m_x m_y +- r_x r_y: the bound of a product of numbers, summed."""
    args = fill(op.args, chain.values)
    (ma, ra), (mb, rb) = _relax.middle(args[0], chain.kind), _relax.middle(args[1], chain.kind)
    first, second = (arg.name for arg in op.args[:2])
    terms = max(args[0].low.shape[-2], args[0].low.shape[-1], args[1].low.shape[-1])
    size = chain.reach(first) @ chain.reach(second)
    share = chain.rounding.share(terms) + 4 * chain.own * chain.readers(op.result)
    reach = ra @ rb + 4 * (share + gamma(4 * terms + 64, chain.own)) * size
    floor, gap = chain.ends_of_lines(-(ma @ mb) - reach, reach - ma @ mb, size)
    left, right = ma.to(chain.kind), mb.to(chain.kind)
    shapes = args[0].low.shape, args[1].low.shape

    def pull(chain: Chain, slopes: Tensor, lower: Tensor | None) -> tuple[_linear.Pulled, Tensor]:
        del lower
        bias = chain.dot(op.result, slopes, floor) + chain.dot(op.result, slopes.clamp(max=0), gap)
        parts = (
            (first, _linear.sum_to(slopes @ right.transpose(-1, -2), shapes[0])),
            (second, _linear.sum_to(left.transpose(-1, -2) @ slopes, shapes[1])),
        )
        found: _linear.Pulled = {}
        for name, part in parts:
            bias = bias + chain.start(name, part)
            found[name] = found[name] + part if name in found else part
        return found, bias

    return pull


_LARGEST = ("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "amax", "amin")
SPECIAL.update(dict.fromkeys(_LARGEST, _largest.front))
SPECIAL.update({"mm": matrices, "bmm": matrices, "matmul": matrices})
SPECIAL.update({"_softmax": _attention.front, "_safe_softmax": _attention.front, "native_layer_norm": _norms.front})
SPECIAL["logsumexp"] = _logsumexp.front
