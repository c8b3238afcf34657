"""HTTP bodies to arrays: `.npy`, raw numbers, PNG or JPEG. Sizes are checked before anything is decoded."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from targets.runtime.errors import BadImages

_DTYPES: dict[str, np.dtype[Any]] = {"uint8": np.dtype("u1"), "float32": np.dtype("<f4")}
_MODES = ("1", "L", "LA", "RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
_NPY, _PNG, _JPEG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def decode(body: bytes, headers: Mapping[str, str], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    """The array in a body; what it is, its first bytes tell, and else `X-Dtype` (float32 where absent) and `X-Shape`.

    Raw numbers are little-endian, row by row, images one after another. Without `X-Shape` they are images of the
    bundle's shape. Raises `BadImages`; whether the array fits the network is `as_images`' business.
    """
    if not body:
        raise BadImages("body: expected an image, a .npy file or raw numbers, got no bytes")
    if body.startswith(_NPY):
        return _npy(body)
    if body.startswith((_PNG, _JPEG)):
        return _picture(body, shape)
    kind = headers.get("content-type", "")
    if kind.startswith("image/") or kind in ("application/x-npy", "application/json"):
        raise BadImages(f"body: {kind} cannot be read; send .npy, PNG, JPEG, or raw numbers as octet-stream")
    return _raw(body, headers, shape)


def _npy(body: bytes) -> npt.NDArray[Any]:
    stream = io.BytesIO(body)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        header: Any = read(stream)
    except (ValueError, KeyError, EOFError) as error:
        raise BadImages(f"body: the .npy header cannot be read: {error}") from error
    shape, fortran = header[0], header[1]
    dtype: np.dtype[Any] = np.dtype(header[2])
    if dtype.hasobject:
        raise BadImages("body: a .npy file of Python objects would have to be unpickled, which is never done")
    if dtype.itemsize == 0 or not all(type(size) is int and size >= 0 for size in shape):
        raise BadImages(f"body: the .npy header says {dtype} {list(shape)}, which is no array of numbers")
    # The header names a shape that nobody has paid for yet: compare it with the bytes that really came.
    rest = len(body) - stream.tell()
    if math.prod(shape) * dtype.itemsize != rest:
        raise BadImages(f"body: the .npy header says {dtype} {list(shape)}, but {rest} bytes follow it")
    array = np.frombuffer(body, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _raw(body: bytes, headers: Mapping[str, str], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    name = headers.get("x-dtype", "float32")
    if name not in _DTYPES:
        raise BadImages(f"X-Dtype: expected {' or '.join(_DTYPES)}, got {name!r}")
    dtype = _DTYPES[name]
    if "x-shape" in headers:
        sizes = [part.strip() for part in headers["x-shape"].split(",")]
        if not all(size.isdecimal() and len(size) < 10 for size in sizes):
            raise BadImages(f"X-Shape: expected whole numbers such as 1,1,28,28, got {headers['x-shape']!r}")
        wanted = tuple(int(size) for size in sizes)
        if math.prod(wanted) * dtype.itemsize != len(body):
            raise BadImages(f"body: expected {math.prod(wanted) * dtype.itemsize} bytes for X-Shape, got {len(body)}")
        return np.frombuffer(body, dtype).reshape(wanted)
    one = math.prod(shape) * dtype.itemsize
    if len(body) % one:
        raise BadImages(f"body: expected a multiple of {one} bytes ({name} images {list(shape)}), got {len(body)}")
    return np.frombuffer(body, dtype).reshape(-1, *shape)


def _picture(body: bytes, shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    """uint8 [1, C, H, W], read as pictures were read for training: the camera's orientation mark is obeyed,
    transparency dropped, and what has more than 8 bits a channel or several frames refused.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise BadImages(f"body: a picture has 1 or 3 channels and this network takes {channels}; send .npy")
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise BadImages("body: reading pictures needs Pillow, which is not installed; send .npy or raw") from None
    try:
        with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise BadImages("body: expected one picture, got several frames")
            if picture.mode not in _MODES:
                raise BadImages(
                    f'body: expected 8 bits a channel, got mode "{picture.mode}"; send .npy with values in [0, 1]'
                )
            _fits(picture.size, width, height)
            upright = ImageOps.exif_transpose(picture)
            pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    except BadImages:
        raise
    except UnidentifiedImageError:
        raise BadImages("body: the picture cannot be read: it is damaged or cut short") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and their own
        raise BadImages(f"body: the picture cannot be read: {error}") from error
    _fits((pixels.shape[1], pixels.shape[0]), width, height, exact=True)
    return pixels.reshape(1, 1, height, width) if channels == 1 else pixels.transpose(2, 0, 1)[None]


def _fits(size: tuple[int, int], width: int, height: int, exact: bool = False) -> None:
    """Before decoding, which costs memory, a picture may still lie on its side."""
    if size == (width, height) or (not exact and size == (height, width)):
        return
    raise BadImages(
        f"body: expected a picture of {width} x {height}, got {size[0]} x {size[1]}; "
        "how to resize is part of the model and not guessed"
    )
