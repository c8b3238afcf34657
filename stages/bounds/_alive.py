"""Channels that are off: a ReLU whose box is 0 in a whole channel, for every image of a group, leaves it out.

Networks that are trained for intervals have many. Such a channel is exactly 0, so
convolutions that read it do without it and their weights for it, which must be finite. On the way back its coefficients
are 0 after the ReLU, so what the ReLU reads does without it too, down to the convolutions that it is a sum of. Sums are
taken in another order then: the last digits of an image's bound may depend on the images beside it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stages.bounds import _layout, _slack
from stages.bounds._interval import Interval
from stages.bounds._trace import Op, Ref, fill

if TYPE_CHECKING:
    from stages.bounds._channels import Channelwise

_WORTH = 7 / 8  # of the channels that are left, or more: not worth it
_LEAST = 2  # one alone would lie in either order (`_layout.last`)


def channels(chain: "Channelwise", op: Op) -> Tensor | None:
    """Those of a ReLU's result that are on anywhere; none where too few are off, or others need them all.

    The box must be finite.
    """
    result = op.result
    readers = [reader for reader in chain.graph.ops if result in reader.reads()]
    if not (chain.owned(result) and chain.images(result) and all(_plain(reader, result) for reader in readers)):
        return None
    if not _sources(chain, op.reads()[0]):
        return None
    most = chain.peak(result, near=True).amax(0)
    kept = max(_LEAST, int((most > 0).sum()))
    if kept > _WORTH * len(most) or not all(_finite(chain, reader) for reader in readers):
        return None
    return (most > 0).int().argsort(descending=True, stable=True)[:kept].sort()[0]


def keep(chain: "Channelwise", op: Op, on: Tensor) -> None:
    """Leaves a ReLU's result, and coefficients of what it reads, with the channels `on` alone."""
    result = op.result
    box = chain.values[result]
    chain.values[result] = Interval.above_zero(pick(box.low, on), pick(box.high, on))
    chain.set_peak(result, chain.peaks[result][:, on])
    chain.alive[result] = on
    for name in _sources(chain, op.reads()[0]):
        chain.alive[name] = on
        if chain.made[name].kind == "convolution":
            chain.slim[name] = _with(chain, chain.made[name], "out", lambda weight: weight[on])


def reading(chain: "Channelwise", op: Op) -> Op:
    """An operation as it reads what is left of its operand."""
    first = op.args[0] if op.kind == "convolution" else None
    on = chain.alive.get(first.name) if isinstance(first, Ref) else None
    return op if on is None else _with(chain, op, "in", lambda weight: weight[:, on])


def pick(value: Tensor, on: Tensor) -> Tensor:
    """[B, len(on), H, W], channels-last: some of the channels."""
    batch, channels, height, width = value.shape
    flat = value.permute(0, 2, 3, 1).reshape(-1, channels).index_select(1, on)
    return flat.view(batch, height, width, len(on)).permute(0, 3, 1, 2)


def _with(chain: "Channelwise", op: Op, side: str, part: Any) -> Op:
    name = f"{op.result}.weight.{side}"
    chain.values[name] = _layout.last(part(fill(op.args[1], chain.values)))
    return replace(op, args=(op.args[0], Ref(name), *op.args[2:]))


def _finite(chain: "Channelwise", op: Op) -> bool:
    """A weight that is not a number makes one of the logits, even times 0."""
    weight = fill(op.args[1], chain.values)
    return isinstance(weight, Tensor) and bool(weight.isfinite().all())


def _plain(op: Op, name: str = "") -> bool:
    """Whether an operation is a convolution of one group, and, of a value `name`, by fixed weights."""
    if op.kind != "convolution" or op.args[6] or op.args[8] != 1:
        return False
    return not name or (op.args[0] == Ref(name) and op.reads().count(name) == 1)


def _sources(chain: "Channelwise", name: str) -> list[str]:
    """`name` and what it is a sum of, down to convolutions; nothing where anybody else reads one, or there is more."""
    op = chain.made.get(name)
    if op is None or chain.readers(name) != 1 or name in chain.settled or not chain.images(name):
        return []
    if op.kind == "add" and len(op.args) == 2 and _slack.alike(chain, op) and op.args[0] != op.args[1]:
        one, two = (_sources(chain, operand) for operand in chain.operands(op))
        return [name, *one, *two] if one and two else []
    return [name] if _plain(op) and len(chain.shape(op.args[0].name)) == 4 else []
