"""Hidden representations of any network that computes with torch, read off one of its passes.

What is watched are torch's own operations, not modules: that reaches networks of modules, functions around them, and
the twins of ONNX files, which are one module each; and nothing is attached to anything, so nothing can be left behind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from stages.oracle import Logits

_WEIGHTED = frozenset(f"{name}{axes}d" for name in ("conv", "conv_transpose") for axes in (1, 2, 3)) | {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
}


class _Watch(TorchFunctionMode):
    """Keeps what weighted operations read and give, where both have the batch as their first axis."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _WEIGHTED and self._fits(out):
            read = next((value for value in args if self._fits(value)), None)
            if read is not None:
                self.seen.append((read, out))
        return out

    def _fits(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.dim() > 1 and len(value) == self.batch


def watched(logits: Logits, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """One pass: logits [B, K], hidden representations [B, ...], and the latent, [B, d].

    Hidden are the outputs of all convolutions, linear layers and matrix products in order, without the last, which is
    taken to be the head; the latent is what the head reads, flattened. Where no such operation is seen (a network
    compiled or run elsewhere, a sum of products) nothing is hidden, and the latent is x itself.
    """
    with _Watch(len(x)) as watch:
        z = logits(x)
    latent = watch.seen[-1][0] if watch.seen else x
    return z, [out for _, out in watch.seen[:-1]], latent.flatten(1)


def spread(hidden: Tensor) -> Tensor:
    """Variance over an example's own units, [B], never below 1e-12."""
    return hidden.detach().flatten(1).float().var(dim=1, unbiased=False).clamp(min=1e-12)
