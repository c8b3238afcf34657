"""The one training loop."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from stages.data.base import to_float
from stages.fitting import resume
from stages.fitting.ema import Average
from stages.fitting.optim import Fit, optimiser
from stages.fitting.precision import choose, layout, prepare
from stages.method import InputError
from stages.seeding import generator

Loss = Callable[[nn.Module, Tensor, Tensor, Generator, float], tuple[Tensor, Mapping[str, Tensor]]]
"""loss(net, x, y, rng, progress) -> (scalar, named scalars); x float [B, C, H, W], progress in [0, 1)."""

OnStep = Callable[[int, int], None]

Row = dict[str, float]
"""One epoch in numbers: "epoch", "step", "lr", "loss", what the loss names, and what `after_epoch` adds."""

AfterEpoch = Callable[[nn.Module, int, int], tuple[Mapping[str, float], float | None]]
"""after_epoch(net, step, total) -> (numbers for the row, score or None); net in eval mode, averaged if averaging is on.
"""


class Diverged(ArithmeticError):
    """The loss is not a finite number."""


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    config: Fit,
    seed: int,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
    *,
    after_epoch: AfterEpoch | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> nn.Module:
    """Train `net` in place and return it in eval mode, with averaged weights where `config.ema` is set.

    x is uint8 [N, C, H, W] (converted batch by batch) or float in [0, 1], y int64 [N]. Every epoch visits a seeded
    permutation in N // batch whole batches, one smaller batch where N < batch; the rest waits for the next permutation.
    The permutation depends on (seed, epoch) and the generator of a step on (seed, step) alone, so that going on needs
    no more than weights, optimiser state and the step number.

    With `scratch`, work is kept every `config.checkpoint_seconds`, and a later call with the same network, data,
    settings and seed goes on where the last one stopped, to the same weights bit for bit. A finished training stays
    there too and is then returned at once, until `stages.fitting.resume.clear(scratch)` or until the folder goes.

    `after_epoch` measures between epochs; where it gives scores, the weights of the best (first of equals) are the
    result instead of the last. `on_row` receives one row per epoch, those from before an interruption included.

    Raises `Diverged` with the step where the loss is not finite, `InputError` for data that do not fit.
    """
    if x.shape[0] == 0 or y.shape != x.shape[:1]:
        raise InputError(
            f"training: expected images [N, C, H, W] and labels [N], got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    run = _Run(net, x, y, loss, config, seed, scratch)
    run.restore()
    for row in run.rows:
        if on_row is not None:
            on_row(row)
    if on_step is not None and run.step:
        on_step(run.step, run.total)
    saved = time.monotonic()
    while run.step < run.total:
        run.advance()
        if on_step is not None:
            on_step(run.step, run.total)
        if run.step % run.per_epoch == 0:
            row = run.close_epoch(after_epoch)
            if on_row is not None:
                on_row(row)
        if run.step < run.total and time.monotonic() - saved >= config.checkpoint_seconds:
            run.keep()
            saved = time.monotonic()
    return run.finish()


class _Run:
    """The state of one training: everything that a checkpoint holds, and how a step changes it."""

    def __init__(
        self, net: nn.Module, x: Tensor, y: Tensor, loss: Loss, config: Fit, seed: int, scratch: Path | None
    ) -> None:
        self.net, self.x, self.y, self.loss, self.config, self.seed, self.scratch = (
            net,
            x,
            y,
            loss,
            config,
            seed,
            scratch,
        )
        self.size = min(config.batch, x.shape[0])
        self.per_epoch = x.shape[0] // self.size
        self.total = config.epochs * self.per_epoch
        self.device = next(net.parameters()).device
        self.owner = "" if scratch is None else resume.identity(net, x, y, {"fit": config.dump(), "seed": seed})
        self.seen = prepare(net, choose(net, config)) if self.total else net
        self.optimiser = optimiser(net, config)
        self.average = None if config.ema is None else Average(net, config.ema, self.total)
        self.step = 0
        self.rows: list[Row] = []
        self.sums: dict[str, list[float]] = {}
        self.best_score: float | None = None
        self.best: dict[str, Tensor] = {}
        self.order = torch.empty(0, dtype=torch.int64)

    def advance(self) -> None:
        """One batch: loss, gradient, step, average."""
        epoch, place = divmod(self.step, self.per_epoch)
        if place == 0 or len(self.order) == 0:
            self.order = torch.randperm(len(self.x), generator=generator(self.seed, "epoch", epoch))
        rows = self.order[place * self.size : (place + 1) * self.size]
        x = self.config.augment(self.x[rows].to(self.device), generator(self.seed, "augment", self.step))
        x = to_float(x) if x.dtype == torch.uint8 else x
        rng = generator(self.seed, "step", self.step, device=self.device)
        rate = self.config.rate(self.step, self.total)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.seen.train()
        self.optimiser.zero_grad(set_to_none=True)
        value, logs = self.loss(self.seen, x, self.y[rows].to(self.device), rng, self.step / self.total)
        number = float(value.detach())
        if not math.isfinite(number):
            raise Diverged(
                f"training: expected a finite loss, got {number} at step {self.step} of {self.total} (epoch {epoch}, "
                f"lr {rate:g}); lower lr, or set clip_norm"
            )
        value.backward()  # type: ignore[no-untyped-call]
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.config.clip_norm)
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.net, self.step)
        for name, log in {"loss": value, **logs}.items():
            self.sums.setdefault(name, []).append(float(log.detach()))
        self.step += 1

    def close_epoch(self, after_epoch: AfterEpoch | None) -> Row:
        """The row of the epoch that just ended, and the best weights so far."""
        result = self.result.eval()
        extra, score = ({}, None) if after_epoch is None else after_epoch(result, self.step, self.total)
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score = score
            self.best = {name: value.detach().clone() for name, value in result.state_dict().items()}
        row = {
            "epoch": float(self.step // self.per_epoch),
            "step": float(self.step),
            "lr": self.config.rate(self.step - 1, self.total),
            **{name: math.fsum(values) / len(values) for name, values in self.sums.items()},
            **extra,
        }
        self.sums = {}
        self.rows.append(row)
        return row

    @property
    def result(self) -> nn.Module:
        return self.net if self.average is None else self.average.net

    def finish(self) -> nn.Module:
        """Put the resulting weights into the network, keep them, and hand it back in eval mode."""
        if self.best:
            self.net.load_state_dict(self.best)
        elif self.average is not None and self.total:
            self.net.load_state_dict(self.average.net.state_dict())
        layout(self.net, torch.contiguous_format)
        self.net.zero_grad(set_to_none=True)
        if self.scratch is not None:
            counters = {"owner": self.owner, "step": self.total, "rows": self.rows, "finished": True}
            resume.save(self.scratch, _named("net", self.net.state_dict()), counters)
        return self.net.eval()

    def keep(self) -> None:
        """Write the checkpoint, where there is a place for it."""
        if self.scratch is None:
            return
        tensors = _named("net", self.net.state_dict()) | _named("best", self.best)
        if self.average is not None:
            tensors |= _named("mean", self.average.net.state_dict())
        for number, entries in self.optimiser.state_dict()["state"].items():
            tensors |= _named(f"optimiser.{number}", {k: v for k, v in entries.items() if isinstance(v, Tensor)})
        counters = {
            "owner": self.owner,
            "step": self.step,
            "rows": self.rows,
            "sums": self.sums,
            "best_score": self.best_score,
        }
        resume.save(self.scratch, tensors, counters)

    def restore(self) -> None:
        """Go on from the checkpoint, if there is one of this very training."""
        found = None if self.scratch is None else resume.load(self.scratch, self.owner)
        if found is None:
            return
        tensors, counters = found
        self.net.load_state_dict(_part("net", tensors))
        self.step, self.rows = counters["step"], counters["rows"]
        if counters.get("finished"):
            self.average, self.best = None, {}
            return
        self.sums, self.best_score, self.best = counters["sums"], counters["best_score"], _part("best", tensors)
        if self.average is not None:
            self.average.net.load_state_dict(_part("mean", tensors))
        self._restore_optimiser(tensors)
        epoch = self.step // self.per_epoch
        self.order = torch.randperm(len(self.x), generator=generator(self.seed, "epoch", epoch))

    def _restore_optimiser(self, tensors: dict[str, Tensor]) -> None:
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(parameters):
            entries = _part(f"optimiser.{number}", tensors)
            for name, value in entries.items():
                # The layout of the parameter, so that sums over it run in the same order as without interruption.
                shaped = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else None
                entries[name] = value if shaped is None else shaped.copy_(value)
            if entries:
                state[number] = entries
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
