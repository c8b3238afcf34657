"""All attacks of a stage on all images: one after the other, or only until the gate's verdict is certain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from stages import evidence
from stages.attacks.base import Attack
from stages.data.base import Split
from stages.early import Demand, early
from stages.evaluate import OnStep
from stages.members import named
from stages.method import kinds
from stages.nn import _atomic
from stages.oracle import Spent
from stages.scene import Scene, Struck
from stages.seeding import derive, generator
from stages.trial import Hit, Proved, joined, spared, strike

_BATCH = 256


@dataclass(slots=True)
class Striker:
    """Attacks `scene`, all but what needs none; finished pieces lie in `scratch`, and are read instead of made again.

    `train` teaches attacks that learn; `progress(label)` counts images.
    """

    scene: Scene
    proved: Proved
    train: Split
    scratch: Path
    seed: int
    progress: Callable[[str], OnStep]
    _ready: dict[str, Attack] = field(default_factory=dict)

    def all(self, attacks: Sequence[Attack], sequence: bool) -> Struck:
        """Every attack on every image that needs one, or, in a sequence, on those that the ones before it left."""
        table = dict(zip(kinds(attacks), attacks, strict=True))
        rows, hits = self._rows(), dict[str, Hit]()
        for name, attack in table.items():
            attack.accept(self.scene.threat)
            hits[name] = self._strike(name, attack, rows, "", self.progress(f"attack: {name}"))
            if sequence:
                rows = rows & hits[name].survived
        return self._struck(table, hits)

    def early(self, attacks: Sequence[Attack], bound: float, confidence: float) -> Struck:
        """Until it is certain whether the share that all of them leave has its 95 % interval above `bound`."""
        scene, rows = self.scene, self._rows()
        table = named(attacks, scene.threat)
        first, *others = table
        pieces: dict[str, list[Hit]] = {name: [self._nothing()] for name in table}

        def opening(chunk: Tensor, number: int) -> Tensor:
            hit = self._strike(first, table[first], chunk, f"-{number}", self.progress(f"attack: {first}"))
            pieces[first].append(hit)
            return hit.survived

        def rest(chunk: Tensor, number: int) -> Tensor:
            for name in others:
                hit = self._strike(name, table[name], chunk, f"-{number}", None)
                pieces[name].append(hit)
                chunk = chunk & hit.survived
            return chunk

        demand = Demand.of(bound, len(rows), confidence)
        sure = int((scene.right & ~rows).sum())
        rng = generator(self.seed, "early")
        verdict = early(rows, sure, demand, opening, rest, rng, self.progress("attack until the verdict is certain"))
        struck = self._struck(table, {name: reduce(joined, hits) for name, hits in pieces.items()})
        return replace(struck, early=verdict)

    def _rows(self) -> Tensor:
        right = self.scene.right
        return right & ~spared(self.proved, right, generator(self.seed, "doubt"))

    def _nothing(self) -> Hit:
        x = self.scene.x
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return Hit(none.bool(), ~none.bool(), x.clone(), Spent(none, none.clone()))

    def _strike(self, name: str, attack: Attack, rows: Tensor, piece: str, step: OnStep | None) -> Hit:
        scene, kept = self.scene, self.scratch / f"attack-{name}{piece}.safetensors"
        if not kept.exists():
            seed = derive(self.seed, "attack", name + piece)
            hit = strike(
                scene.net,
                self._prepared(name, attack),
                scene.x,
                scene.y,
                rows,
                scene.threat,
                seed,
                self.proved.unproved,
                step,
            )
            _atomic.write(kept, _bytes(hit))
        return _hit(kept.read_bytes(), scene.x.device)

    def _prepared(self, name: str, attack: Attack) -> Attack:
        if name not in self._ready:
            rng = generator(self.seed, "prepare", name)
            self._ready[name] = attack.prepare(self.scene.net, _batches(self.train, self.scene.x.device), rng)
        return self._ready[name]

    def _struck(self, table: dict[str, Attack], hits: dict[str, Hit]) -> Struck:
        scene = self.scene
        for hit in hits.values():
            hit.survived.logical_and_(scene.right)
        x_adv, by = evidence.worst(scene.x, {name: hit.x_adv for name, hit in hits.items()}, scene.net, scene.y)
        return Struck(table, hits, x_adv, by)


def _bytes(hit: Hit) -> bytes:
    tensors = {"tried": hit.tried, "survived": hit.survived, "x_adv": hit.x_adv.contiguous()}
    tensors |= {"queries": hit.spent.queries, "gradients": hit.spent.gradients}
    return bytes_of({name: value.cpu() for name, value in tensors.items()})


def _hit(stored: bytes, device: torch.device) -> Hit:
    tensors = {name: value.to(device) for name, value in tensors_of(stored).items()}
    spent = Spent(tensors["queries"], tensors["gradients"])
    return Hit(tensors["tried"], tensors["survived"], tensors["x_adv"], spent)


def _batches(split: Split, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for at in range(0, len(split), _BATCH):
        rows = slice(at, at + _BATCH)
        yield split.floats(rows).to(device), split.labels[rows].to(device)
