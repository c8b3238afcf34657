"""Small PNG files of images, with repeatable bytes."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

_SIDE = 64


def png(image: Tensor) -> bytes:
    """A float image [C, H, W] in [0, 1] as PNG, whole pixels enlarged until both sides have 64 or more.

    Three channels are colour, one is grey; any other number is shown by its mean.
    """
    channels = image if image.shape[0] in (1, 3) else image.mean(0, keepdim=True)
    values = (channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    factor = max(1, -(-_SIDE // min(values.shape[:2])))
    large = np.ascontiguousarray(values.repeat(factor, axis=0).repeat(factor, axis=1))
    picture = Image.fromarray(large[..., 0] if large.shape[2] == 1 else large)
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=False, compress_level=6)
    return out.getvalue()


def difference(x_adv: Tensor, x: Tensor) -> Tensor:
    """What was changed, [C, H, W]: mid-grey is nothing, black and white are the largest change of this image."""
    delta = x_adv - x
    largest = float(delta.abs().max())
    return delta / (2 * largest) + 0.5 if largest > 0 else delta + 0.5
