"""Cutting a part off: seeded, stratified, disjoint; groups never cross."""

import numpy as np
import torch
from torch import Generator, Tensor


def cut(labels: Tensor, groups: Tensor | None, share: float, rng: Generator) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that are held out, both int64, ascending, together all of `labels` int64 [N].

    About `share` of each class is held out. A class of at least two units (images, or groups where there are any)
    is on both sides; one with a single unit stays. Only where groups mix classes can a class of several groups be
    missing from the held-out side, namely where every choice would take another class's last group; the side that
    stays always has every class.
    """
    held = _single(labels, share, rng) if groups is None else _grouped(labels, groups, share, rng)
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def subset(labels: Tensor, count: int, rng: Generator) -> Tensor:
    """`count` rows in ascending order, classes in proportion (largest remainders), each class at least once.

    Needs number of classes present <= count <= N.
    """
    counts = labels.bincount()
    classes = counts.nonzero().flatten()
    sizes = counts[classes]
    quota = (sizes.double() * count / len(labels)).clamp(min=1)
    take = quota.floor().long()
    # A class lifted to its one image can push the sum over; the largest shares give way.
    while int(take.sum()) > count:
        take[take.argmax()] -= 1
    short = count - int(take.sum())
    order = (quota - take).argsort(descending=True, stable=True)
    order = order[take[order] < sizes[order]]
    take[order[:short]] += 1
    chosen = [
        rows[torch.randperm(len(rows), generator=rng)[:n]]
        for rows, n in (
            ((labels == c).nonzero().flatten(), int(n)) for c, n in zip(classes.tolist(), take.tolist(), strict=True)
        )
    ]
    return torch.cat(chosen).sort().values


def _single(labels: Tensor, share: float, rng: Generator) -> Tensor:
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c in range(int(labels.max()) + 1):
        rows = (labels == c).nonzero().flatten()
        n = len(rows)
        if n >= 2:
            take = min(max(round(share * n), 1), n - 1)
            held[rows[torch.randperm(n, generator=rng)[:take]]] = True
    return held


def _grouped(labels: Tensor, groups: Tensor, share: float, rng: Generator) -> Tensor:
    """Greedy in a seeded order: a group goes out where that brings the classes nearer to their shares."""
    group = torch.from_numpy(np.unique(groups.numpy(), return_inverse=True)[1])
    table = torch.zeros(int(group.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    table.index_put_((group, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    total = table.sum(0)
    goal, out, stays = share * total, torch.zeros_like(total), total.clone()
    gone = torch.zeros(len(table), dtype=torch.bool)

    def gain(g: int) -> float:
        before, after = goal - out, goal - out - table[g]
        return float(((before**2 - after**2) / total.clamp(min=1)).sum())

    def spare(g: int) -> bool:
        return bool((stays > table[g])[table[g] > 0].all())

    def take(g: int) -> None:
        out.add_(table[g])
        stays.sub_(table[g])
        gone[g] = True

    order: list[int] = torch.randperm(len(table), generator=rng).tolist()
    for g in order:
        if gain(g) > 0 and spare(g):
            take(g)
    for c in ((out == 0) & ((table > 0).sum(0) >= 2)).nonzero().flatten().tolist():
        possible = [g for g in order if table[g, c] > 0 and not gone[g] and spare(g)]
        if out[c] == 0 and possible:
            take(max(possible, key=gain))
    return gone[group]
