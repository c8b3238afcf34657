"""Pictures through Pillow: decoded to 8 bits, or refused with the file's name."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stages.method import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".pnm")
_GREY = ("1", "L", "LA")
_COLOUR = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")


def pixels(path: Path, size: int | None = None) -> NDArray[np.uint8]:
    """uint8 [H, W, 1] for a grey picture, [H, W, 3] for a coloured one; `size` resizes to a square with Lanczos.

    The camera's orientation mark is obeyed; transparency is dropped. Raises `InputError` where the file is no picture
    of the known formats, is damaged, holds several frames, or has more than 8 bits a channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise InputError(f"{path}: expected one picture, got {getattr(image, 'n_frames', 1)} frames")
                if image.mode not in _GREY + _COLOUR:
                    raise InputError(f'{path}: expected 8 bits a channel, got mode "{image.mode}"; convert it first')
                if size is not None:
                    # A JPEG decoder can skip detail that the resize would throw away.
                    image.draft(None, (2 * size, 2 * size))
                upright = ImageOps.exif_transpose(image)
                plain = upright.convert("L" if image.mode in _GREY else "RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: too large to decode safely: {error}") from error
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable picture ({', '.join(FORMATS)}): {error}") from error
    if size is not None and plain.size != (size, size):
        plain = plain.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(plain)
    return array[:, :, None] if array.ndim == 2 else array


def dimensions(path: Path) -> tuple[int, int]:
    """(width, height), read off the file's header. Raises `InputError` where it is no picture."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable picture ({', '.join(FORMATS)}): {error}") from error


def tiles(path: Path, rows: int, columns: int, side: int) -> NDArray[np.uint8]:
    """uint8 [rows * columns, 3, side, side]: the tiles of one RGB sheet, row by row."""
    sheet = pixels(path)
    if sheet.shape != (rows * side, columns * side, 3):
        raise InputError(
            f"{path}: expected an RGB sheet of {columns * side} x {rows * side} pixels, "
            f"got {sheet.shape[1]} x {sheet.shape[0]} with {sheet.shape[2]} channels"
        )
    cut = sheet.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cut.reshape(-1, 3, side, side))
