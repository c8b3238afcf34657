"""Stored adversarial examples, replayed."""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from torch import Generator, Tensor

from stages.attacks.base import Attack
from stages.method import InputError
from stages.oracle import Logits, narrow
from stages.threat import Threat

_ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}
_TENSOR = "x_adv"


class Transfer(Attack):
    """Try the stored examples nearest to x, projected onto the threat: what fooled another network may fool this one.

        x' = project(s_j),  s_1, s_2, .. the stored images in the order of their distance to x, s_j != x

    `path` names an `adversarial.safetensors` as the validate stage writes it (its tensor `x_adv`, [N, ...]); `sha256`
    is the digest of its bytes, so that equal settings mean equal attacks wherever the file lies. Distance, in the
    threat's norm, is what tells which stored example is an image's own: it lies within the other network's eps, while
    other images lie far beyond. So neither a file's order nor a subset of the images matters, and any file of images
    will do. Costs `nearest` queries at most, needs no gradients, and runs on engines. `InputError` where the file is
    missing, is another one, holds no such images, or images of another shape.

    Source: transfer as in Papernot, McDaniel and Goodfellow 2016, "Transferability in machine learning". It finds only
    what another attack found elsewhere: evidence that a network is weak, never that it is robust.
    """

    path: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    nearest: int = Field(default=1, ge=1)

    @property
    def needs_gradients(self) -> bool:
        return False

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        stored = _stored(self.path, self.sha256).to(x)
        if stored.shape[1:] != x.shape[1:]:
            raise InputError(
                f"transfer: {self.path} holds images {list(stored.shape[1:])}, expected {list(x.shape[1:])}; "
                "give a file that was written for this data set"
            )
        away = torch.cdist(
            x.flatten(1), stored.flatten(1), p=_ORDER[threat.norm], compute_mode="donot_use_mm_for_euclid_dist"
        )
        # What is stored for an unbroken example is the image itself.
        order = torch.where(away > 0, away, float("inf")).topk(min(self.nearest, len(stored)), largest=False)
        result, alive = x.clone(), torch.arange(len(x), device=x.device)
        for rank in range(order.indices.shape[1]):
            alive = alive[order.values[alive, rank].isfinite()]
            if len(alive) == 0:
                break
            point = threat.project(stored[order.indices[alive, rank]], x[alive])
            with torch.no_grad():
                broken = narrow(logits, alive)(point).argmax(1) != y[alive]
            result[alive[broken]] = point[broken]
            alive = alive[~broken]
        return result


@lru_cache(maxsize=2)
def _stored(path: str, sha256: str) -> Tensor:
    """The images [N, ...] of a file; kept, since an evaluation asks once a batch."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"transfer: cannot read {path} ({error.strerror}); expected what validate writes, adversarial.safetensors"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise InputError(f"transfer: {path}: expected the file with sha256 {sha256}, got {digest}; it was replaced")
    try:
        tensors = tensors_of(data)
    except SafetensorError as error:
        raise InputError(f"transfer: {path} is no safetensors file ({error}); validate writes one") from None
    images = tensors.get(_TENSOR)
    if images is None or images.dim() < 2 or len(images) == 0 or not images.is_floating_point():
        shape = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise InputError(f'transfer: {path}: expected a float tensor "{_TENSOR}" [N, ...] with N >= 1, got {shape}')
    if not bool(images.isfinite().all()):
        raise InputError(f'transfer: {path}: "{_TENSOR}" holds NaN or infinite pixels; write the file anew')
    return images
