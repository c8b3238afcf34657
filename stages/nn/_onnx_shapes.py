"""The operators that move values about, as torch functions of (attributes, inputs); the names are those of ONNX.

Integers of 64 bits are shapes and indices: they live on the CPU, whatever the device of the network.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stages.nn._onnx_values import Attributes

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
# Half precision is computed in single precision on half-precision values, as onnxruntime does on a CPU.
_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    11: torch.float64,
}
_HALVES = {10: torch.float16, 16: torch.bfloat16}


def whole(values: Tensor) -> list[int]:
    """Sizes, axes, steps as numbers; one by one, since a recording of the graph holds no list of them."""
    return [int(value) for value in values]


def castable(number: int) -> bool:
    """Is there a twin of a cast to this ONNX type?"""
    return number in _TYPES or number in _HALVES


def cast(a: Attributes, x: Tensor) -> Tensor:
    if a["to"] in _HALVES:
        # Straight through: a gradient cast to half precision would underflow to zero.
        x, rounded = x.float(), x.to(_HALVES[a["to"]]).float()
        return torch.where(x.isfinite(), x + (rounded - x).detach(), rounded)
    return x.to(_TYPES[a["to"]])


def shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end", None)], dtype=torch.int64)


def reshape(a: Attributes, x: Tensor, target: Tensor) -> Tensor:
    sizes = whole(target)
    if not a.get("allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)  # reads no sizes, so that bounds can follow it for any batch
    return x.reshape(x.shape[: axis % x.dim() if x.dim() else 0].numel(), -1)


def squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _listed(a, "axes", axes)
    return x.squeeze() if found is None else x.squeeze(tuple(found))


def unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    found = _listed(a, "axes", axes) or []
    rank = x.dim() + len(found)
    for axis in sorted(axis % rank for axis in found):
        x = x.unsqueeze(axis)
    return x


def transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm", tuple(reversed(range(x.dim())))))


def concat(a: Attributes, *parts: Tensor) -> Tensor:
    axis = a["axis"] % parts[0].dim()
    if axis and any(part.shape[0] == 1 for part in parts):
        # In a graph made for one image a constant (a class token) has a batch of one, whatever ours is.
        batch = max(part.shape[0] for part in parts)
        parts = tuple(part.expand(batch, *part.shape[1:]) for part in parts)
    return torch.cat(parts, axis)


def split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, found = a.get("axis", 0), _listed(a, "split", sizes)
    if found is not None:
        return torch.split_with_sizes(x, found, axis)
    return torch.tensor_split(x, [i * -(-x.shape[axis] // a["num_outputs"]) for i in range(1, a["num_outputs"])], axis)


def slice_(
    a: Attributes,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = _listed(a, "starts", starts) or [], _listed(a, "ends", ends) or []
    where = _listed(a, "axes", axes) or range(len(first))
    by = [1] * len(first) if steps is None else whole(steps)
    for start, end, axis, step in zip(first, last, where, by, strict=True):
        chosen = range(x.shape[axis])[start:end:step]
        if step > 0:
            x = x.narrow(axis, chosen.start, max(0, chosen.stop - chosen.start))
            x = x if step == 1 else x.index_select(axis, torch.arange(0, x.shape[axis], step, device=x.device))
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    positive = torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device)
    taken = x.index_select(axis, positive.flatten())
    return taken.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def gather_elements(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices).to(x.device))


def gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    same, count = a.get("batch_dims", 0), indices.shape[-1]
    sizes = torch.tensor(x.shape[: same + count], dtype=torch.int64)
    places = torch.where(indices < 0, indices + sizes[same:], indices)
    for axis in reversed(range(same)):  # an example's own index is one more index
        own = torch.arange(int(sizes[axis])).view([-1, *[1] * (indices.dim() - axis - 1)])
        places = torch.cat([own.expand(*indices.shape[:-1], 1), places], -1)
    steps = sizes.flip(0).cumprod(0).flip(0).roll(-1)
    steps[-1] = 1
    taken = x.flatten(0, same + count - 1).index_select(0, (places * steps).sum(-1).flatten().to(x.device))
    return taken.reshape((*indices.shape[:-1], *x.shape[same + count :]))


def scatter_nd(a: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A choice from all entries, old and new: the same for whatever images, as the indices are."""
    del a
    count = indices.shape[-1]
    sizes = torch.tensor(x.shape[:count], dtype=torch.int64)
    places = torch.where(indices < 0, indices + sizes, indices)
    steps = torch.cat([sizes[1:], torch.ones(1, dtype=torch.int64)]).flip(0).cumprod(0).flip(0)
    old = x.flatten(0, count - 1)
    new = updates.reshape(-1, *x.shape[count:])
    fresh = torch.arange(old.shape[0], old.shape[0] + new.shape[0])
    taken = torch.arange(old.shape[0]).scatter(0, (places * steps).sum(-1).flatten(), fresh)
    return torch.cat([old, new]).index_select(0, taken.to(x.device)).reshape(x.shape)


def running_sum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis)
    x = x.flip(along) if a.get("reverse", 0) else x
    y = x.cumsum(along)
    if a.get("exclusive", 0):
        y = torch.cat([torch.zeros_like(x.narrow(along, 0, 1)), y.narrow(along, 0, x.shape[along] - 1)], along)
    return y.flip(along) if a.get("reverse", 0) else y


def pad(
    a: Attributes, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    sides = _listed(a, "pads", pads) or []
    value = a.get("value", value)
    where = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in whole(axes)]
    pairs = {axis: (sides[i], sides[len(where) + i]) for i, axis in enumerate(where)}
    mode = _PAD_MODES[a.get("mode", b"constant").decode()]
    lowest = min((axis for axis, pair in pairs.items() if pair != (0, 0)), default=x.dim())
    # torch pads the last axes, named from the last to the first; other modes than "constant" want 2 of 4, say.
    first = lowest if mode == "constant" else min(lowest, 2)
    flat = [side for axis in reversed(range(first, x.dim())) for side in pairs.get(axis, (0, 0))]
    if not flat or lowest == x.dim():
        return x
    return F.pad(x, flat, mode, 0.0 if value is None else float(value)) if mode == "constant" else F.pad(x, flat, mode)


def expand(a: Attributes, x: Tensor, target: Tensor) -> Tensor:
    del a
    wanted = whole(target)
    sizes = [1] * (x.dim() - len(wanted)) + wanted
    own = [1] * (len(sizes) - x.dim()) + list(x.shape)
    # ONNX broadcasts both ways: a 1 in the target keeps the input's size.
    return x.expand([max(size, mine) for size, mine in zip(sizes, own, strict=True)])


def trilu(a: Attributes, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if a.get("upper", 1) else torch.tril(x, diagonal)


def tile(a: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    del a
    return x.repeat(whole(repeats))


def constant_of_shape(a: Attributes, sizes: Tensor) -> Tensor:
    value = a["value"] if "value" in a else torch.zeros(1)
    return value.expand(whole(sizes)) if sizes.numel() else value.reshape(())


def range_(a: Attributes, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    del a
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def where(a: Attributes, condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    del a
    return torch.where(condition, yes, no)


def identity(a: Attributes, x: Tensor, *ignored: Tensor | None) -> Tensor:
    del a, ignored
    return x


def size(a: Attributes, x: Tensor) -> Tensor:
    del a
    return torch.tensor(x.numel(), dtype=torch.int64)


def depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    side, (depth, height, width) = a["blocksize"], x.shape[1:]
    channels = depth // side**2
    if a.get("mode", b"DCR") == b"CRD":
        parts = x.reshape(-1, channels, side, side, height, width).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = x.reshape(-1, side, side, channels, height, width).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(-1, channels, height * side, width * side)


def space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    side, (channels, height, width) = a["blocksize"], x.shape[1:]
    parts = x.reshape(-1, channels, height // side, side, width // side, side)
    parts = parts.permute(0, 1, 3, 5, 2, 4) if a.get("mode", b"DCR") == b"CRD" else parts.permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(-1, channels * side**2, height // side, width // side)


def _listed(a: Attributes, name: str, given: Tensor | None) -> list[int] | None:
    """Whole numbers that older opsets keep in an attribute and newer ones in an input."""
    return list(a[name]) if given is None and name in a else None if given is None else whole(given)
