"""Resize and Upsample: images made larger or smaller, axis by axis, by repeating or by interpolating entries.

Place p of an axis that goes from n to m entries reads at x(p), for a scale s (m / n where the node gives sizes)

    asymmetric           p / s
    half_pixel           (p + 1/2) / s - 1/2
    pytorch_half_pixel   the same, 0 where m = 1
    align_corners        p (n - 1) / (m - 1)

`nearest` takes the entry that x is rounded to, `linear` the line between the two entries around x, `cubic` the cubic
through the four around it, with weights by distance d and a coefficient a,

    (a + 2) d^3 - (a + 3) d^2 + 1 up to 1,        a d^3 - 5 a d^2 + 8 a d - 4 a from there to 2;

beyond the ends stands the last entry. Source: ONNX operator Resize-19; Upsample and Resize-10 are asymmetric and round
down, but up where the axis gets shorter, as onnxruntime has it. Computed in float32, as there, for places just between
two entries.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.nn._onnx_shapes import whole
from stages.nn._onnx_values import Attributes

Places = NDArray[np.float32]
_ROUND: dict[str, Callable[[Places], Places]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
}
_COORDINATES = {"asymmetric", "half_pixel", "pytorch_half_pixel", "align_corners"}
# What a node says by saying nothing; older opsets knew nothing else than the second.
NEWER = {"coordinate_transformation_mode": b"half_pixel", "nearest_mode": b"round_prefer_floor", "mode": b"nearest"}
OLDER = {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"simple", "mode": b"nearest"}


def upsample(a: Attributes, x: Tensor, scales: Tensor | None = None) -> Tensor:
    given = torch.tensor(a["scales"]) if scales is None else scales
    return resize(a, x, None, given)


def resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """Axes whose scale is 1 and whose size stays are not touched, the batch among them.

    Opset 10 has the scales where newer ones have `roi`, which only a refused mode reads.
    """
    if scales is None and sizes is None:
        scales = roi
    axes = [axis % x.dim() for axis in a.get("axes", range(x.dim()))]
    ratios = [None] * len(axes) if scales is None or scales.numel() == 0 else [float(s) for s in scales]
    targets = [None] * len(axes) if sizes is None else whole(sizes)
    for axis, ratio, target in zip(axes, ratios, targets, strict=True):
        if ratio == 1 or (axis == 0 and ratio is None):
            continue
        size = x.shape[axis]
        wanted = int(np.floor(np.float32(size) * np.float32(ratio))) if target is None else int(target)
        if wanted != size:
            scale = ratio or wanted / size
            x = _along(a, x, axis, _read_at(a, size, wanted, scale), "ceil" if scale < 1 else "floor")
    return x


def objection(a: Attributes) -> str | None:
    """Why a node has no twin; None where it has one."""
    mode, where = (a[name].decode() for name in ("mode", "coordinate_transformation_mode"))
    if mode not in {"nearest", "linear", "bilinear", "cubic"}:
        return f'its mode is "{mode}"; expected nearest, linear or cubic'
    if where not in _COORDINATES:
        return f'its coordinates are "{where}"; expected one of {", ".join(sorted(_COORDINATES))}'
    if a.get("antialias", 0) or a.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        return "it smooths (antialias) or keeps the aspect ratio; set plain scales or sizes"
    return None


def _read_at(a: Attributes, size: int, wanted: int, ratio: float) -> Places:
    p, scale, half = np.arange(wanted, dtype=np.float32), np.float32(ratio), np.float32(0.5)
    where = a["coordinate_transformation_mode"].decode()
    if where == "align_corners":
        return p * np.float32(size - 1) / np.float32(max(wanted - 1, 1))
    if where == "asymmetric":
        return p / scale
    return np.zeros_like(p) if where == "pytorch_half_pixel" and wanted == 1 else (p + half) / scale - half


def _along(a: Attributes, x: Tensor, axis: int, places: Places, simple: str) -> Tensor:
    last = x.shape[axis] - 1
    if a["mode"] == b"nearest":
        index = _ROUND.get(a["nearest_mode"].decode(), _ROUND[simple])(places).clip(0, last)
        return x.index_select(axis, torch.from_numpy(index.astype(np.int64)).to(x.device))
    if a["mode"] == b"cubic":
        return _cubic(a, x, axis, places)
    places = places.clip(0, last)
    lower = np.floor(places).astype(np.int64)
    share = torch.from_numpy(places - lower).to(x).view(-1, *(1,) * (x.dim() - axis - 1))
    first, second = (torch.from_numpy(i).to(x.device) for i in (lower, np.minimum(lower + 1, last)))
    return x.index_select(axis, first) * (1 - share) + x.index_select(axis, second) * share


def _cubic(a: Attributes, x: Tensor, axis: int, places: Places) -> Tensor:
    last, near = x.shape[axis] - 1, np.float32(a.get("cubic_coeff_a", -0.75))
    lower = np.floor(places)
    around = [lower + np.float32(offset) for offset in (-1, 0, 1, 2)]
    shares = [_weight(near, np.abs(places - place)) for place in around]
    if a.get("exclude_outside", 0):
        shares = [
            np.where((place < 0) | (place > last), np.float32(0), w) for place, w in zip(around, shares, strict=True)
        ]
        total = np.sum(shares, 0)
        shares = [share / total for share in shares]
    found: Tensor | None = None
    for place, share in zip(around, shares, strict=True):
        index = torch.from_numpy(place.clip(0, last).astype(np.int64)).to(x.device)
        part = x.index_select(axis, index) * torch.from_numpy(share).to(x).view(-1, *(1,) * (x.dim() - axis - 1))
        found = part if found is None else found + part
    assert found is not None
    return found


def _weight(a: np.float32, d: Places) -> Places:
    inner = ((a + 2) * d - (a + 3)) * d * d + 1
    outer = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, inner, outer).astype(np.float32)
