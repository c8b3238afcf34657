"""Images as the network wants them: float32 [N, C, H, W] in [0, 1]; anything else is refused in words."""

from typing import Any

import numpy as np
import numpy.typing as npt

from targets.runtime.errors import BadImages

Array = npt.NDArray[np.float32]


def as_images(images: npt.NDArray[Any], shape: tuple[int, int, int]) -> Array:
    """uint8 [N, C, H, W] (or one image [C, H, W]) in 0..255, or floats in [0, 1], as contiguous float32 [N, C, H, W].

    Raises `BadImages` for another shape or type, no image at all, NaN, infinity, or values outside [0, 1].
    """
    array = np.asarray(images)
    if array.shape == shape:
        array = array[None]
    if array.ndim != 4 or array.shape[1:] != shape:
        raise BadImages(f"images: expected shape [N, {_dims(shape)}], got [{_dims(array.shape)}]{_hint(array, shape)}")
    if not len(array):
        raise BadImages("images: expected at least one, got none")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array, np.float32) / np.float32(255)
    if array.dtype.kind != "f":
        raise BadImages(f"images: expected uint8 or floats, got {array.dtype}")
    floats = np.ascontiguousarray(array, np.float32)
    low, high = float(floats.min()), float(floats.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BadImages("images: expected finite values, got NaN or infinity")
    if low < 0 or high > 1:
        hint = "; divide by 255, or pass uint8" if low >= 0 and high <= 255 else ""
        raise BadImages(f"images: expected values within [0, 1], got {low:g}..{high:g}{hint}")
    return floats


def _hint(array: npt.NDArray[Any], shape: tuple[int, int, int]) -> str:
    channels, height, width = shape
    if array.shape[-3:] == (height, width, channels):
        return "; channels come first: transpose to NCHW"
    return ""


def _dims(shape: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in shape)
