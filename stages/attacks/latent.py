"""Images decoded from beyond the linear boundaries of a latent space (LADDER)."""

from dataclasses import dataclass

import torch
from pydantic import Field, PrivateAttr
from torch import Generator, Tensor, nn

from stages.attacks._layers import watched
from stages.attacks._learn import descend, fits, minibatches, sampled, seeded, unprepared
from stages.attacks.base import Attack, Batches
from stages.oracle import Logits, Oracle, narrow, reachable
from stages.threat import Threat

_BATCH = 128
_RIDGE = 0.01
_ROUNDS = 200
_LOST = 1e-12


class Latent(Attack):
    """Move the latent along the normal of a linear boundary to another class, decode, and take the change over to x.

        z = g(x),   z' = z + a ||mu_t - mu_y|| v_{y -> t},   x' = project(x + G(z') - G(z))

    g(x) is what the network's head reads (x itself where no layer is seen), mu_c the mean latent of class c, and
    v_{s -> t} = -v_{t -> s} the unit normal of a linear support vector machine between the latents of s and t. For the
    `targets` classes whose boundaries are nearest, a grows in `tries` even steps up to `reach`, until the answer is
    wrong. `prepare` fits the machines (hinge + 0.005 ||w||^2, on up to `samples` latents per class) and the decoder G
    (least squares, Adam) on `images` training images. Striking costs no gradient, and 1 + targets * tries queries at
    most; it needs to see a network's layers, so not an engine.

    It asks what is semantic to the network. For screening: far weaker than PGD, and no evidence of robustness.

    Source: Zhou, Tsang and Yin 2022, "Latent boundary-guided adversarial training", and their released code.
    Departures: the change of the decoded image is added to x and projected onto the threat, where theirs is the
    decoded image itself, far outside any small ball by the decoder's error alone; their attention, which lies within
    1.5 % of the identity, is left out; normals have unit length and a is in multiples of the distance of class means;
    every nearby class is tried, not one at random; G is a perceptron of one hidden layer, for images of any shape.
    """

    targets: int = Field(default=9, ge=1)
    tries: int = Field(default=10, ge=1)
    reach: float = Field(default=4.0, gt=0)
    samples: int = Field(default=200, ge=2)
    images: int = Field(default=5000, ge=2)
    epochs: int = Field(default=30, ge=0)
    hidden: int = Field(default=512, ge=1)

    _bank: "_Bank | None" = PrivateAttr(default=None)

    @property
    def needs_gradients(self) -> bool:
        return False

    def prepare(self, logits: Logits, data: Batches, rng: Generator) -> "Latent":
        network = logits.logits if isinstance(logits, Oracle) else logits
        x, y = sampled(data, self.images, rng)
        with torch.no_grad():
            passes = [watched(network, part) for part in torch.split(x, _BATCH)]
        z, classes = torch.cat([one[2] for one in passes]).float(), passes[0][0].shape[1]
        decoder = (
            nn.Identity() if z.shape[1] == x[0].numel() and torch.equal(z, x.flatten(1)) else self._decoder(z, x, rng)
        )
        twin = self.model_copy()
        twin._bank = _Bank(decoder, *boundaries(z, y, classes, self.samples, rng), tuple(x.shape[1:]))
        return twin

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        bank = self._bank
        if bank is None:
            raise unprepared(self)
        with torch.no_grad():
            answers, _, z = watched(logits, x)
            fits(self, bank.shape, x, answers.shape[1], len(bank.means))
            z = z.float()
            away = bank.distances(z, y).masked_fill(~reachable(logits, answers.shape[1], y), float("inf"))
            order = away.sort(dim=1)
            home = bank.decode(z)
            result, alive = x.clone(), torch.arange(len(x), device=x.device)
            for rank in range(min(self.targets, answers.shape[1] - 1)):
                for number in range(1, self.tries + 1):
                    rows = alive[order.values[alive, rank] < float("inf")]
                    if len(rows) == 0:
                        break
                    moved = bank.moved(z[rows], y[rows], order.indices[rows, rank], self.reach * number / self.tries)
                    change = (bank.decode(moved) - home[rows]).view_as(x[rows]).to(x.dtype)
                    point = threat.project(x[rows] + change, x[rows])
                    broken = narrow(logits, rows)(point).argmax(1) != y[rows]
                    result[rows[broken]] = point[broken]
                    alive = alive[~torch.isin(alive, rows[broken])]
        return result

    def _decoder(self, z: Tensor, x: Tensor, rng: Generator) -> nn.Module:
        """min_G ||G(z) - x||^2 over the images, with latents standardised inside G."""
        low, high = float(x.min()), float(x.max())
        with torch.random.fork_rng(devices=[]):
            body = nn.Sequential(nn.Linear(z.shape[1], self.hidden), nn.ReLU(), nn.Linear(self.hidden, x[0].numel()))
        net = _Decoder(seeded(body, rng, x.device), z.mean(0), z.std(0, unbiased=False), low, high)
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        flat = x.flatten(1)
        with torch.enable_grad():
            for _, rows in minibatches(len(x), _BATCH, self.epochs, rng, x.device):
                descend(adam, (net(z[rows]) - flat[rows]).square().mean())
        return net.requires_grad_(False)


class _Decoder(nn.Module):
    """Latents [B, d] -> pixels [B, D] between the darkest and the brightest one seen."""

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor, low: float, high: float) -> None:
        super().__init__()
        self.body, self.mean, self.std = body, mean, std.clamp(min=1e-3 * float(std.max()) + _LOST)
        self.low, self.high = low, high

    def forward(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.body((z - self.mean) / self.std)
        image: Tensor = self.low + (self.high - self.low) * pixels.sigmoid()
        return image


@dataclass(frozen=True, slots=True, eq=False)
class _Bank:
    """The decoder; unit normals [K, K, d] and offsets [K, K] of u = v.z + b > 0 on the side of t; means [K, d]."""

    decoder: nn.Module
    normals: Tensor
    offsets: Tensor
    means: Tensor
    shape: tuple[int, ...]

    def distances(self, z: Tensor, y: Tensor) -> Tensor:
        """How far z lies before the boundary to every class, [B, K]; infinite where either class was never seen."""
        along = torch.einsum("bkd,bd->bk", self.normals[y], z) + self.offsets[y]
        found: Tensor = torch.nan_to_num(-along, nan=float("inf"))
        return found

    def moved(self, z: Tensor, y: Tensor, t: Tensor, share: float) -> Tensor:
        apart = (self.means[t] - self.means[y]).norm(dim=1, keepdim=True)
        there: Tensor = z + share * apart * self.normals[y, t]
        return there

    def decode(self, z: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(z)
        return pixels


def boundaries(z: Tensor, y: Tensor, classes: int, samples: int, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Unit normals [K, K, d] and offsets [K, K] of linear machines between all pairs of classes, and means [K, d].

    min_w mean max(0, 1 - y u(z)) + lambda/2 ||w||^2,  u = w.z + b, lambda = 0.01, by full-batch subgradient steps of
    length 1 / (lambda k) (Shalev-Shwartz et al. 2007, Pegasos), on latents centred and scaled to unit mean square; b is
    the weight of a constant. Classes seen fewer than twice are NaN. Every class enters with equally many latents.
    """
    shift, unit = z.mean(0), (z - z.mean(0)).square().mean().sqrt().clamp(min=_LOST)
    counts = y.bincount(minlength=classes)
    seen = (counts >= 2).nonzero().flatten()
    normals = z.new_full((classes, classes, z.shape[1]), float("nan"))
    offsets, means = z.new_full((classes, classes), float("nan")), z.new_full((classes, z.shape[1]), float("nan"))
    if len(seen) < 2:
        return normals, offsets, means
    size = min(samples, int(counts[seen].min()))
    shuffled = torch.randperm(len(z), generator=rng, device=rng.device).to(z.device)
    drawn = [shuffled[y[shuffled] == c][:size] for c in seen]
    points = torch.stack([torch.cat([(z[rows] - shift) / unit, z.new_ones(size, 1)], 1) for rows in drawn])
    for c, rows in zip(seen.tolist(), drawn, strict=True):
        means[c] = z[rows].mean(0)
    for place, s in enumerate(seen[:-1].tolist()):
        others = seen[place + 1 :]
        w = _machine(points[place + 1 :], points[place])
        v, length = w[:, :-1], w[:, :-1].norm(dim=1, keepdim=True).clamp(min=_LOST)
        normals[s, others], normals[others, s] = v / length, -v / length
        # u / ||w|| in units of the raw latent: v.(z - shift) + unit b / ||w||
        offset = unit * w[:, -1] / length.squeeze(1) - (v / length) @ shift
        offsets[s, others], offsets[others, s] = offset, -offset
    return normals, offsets, means


def _machine(positive: Tensor, negative: Tensor) -> Tensor:
    """Weights [P, d] between P classes [P, n, d] and one class [n, d]."""
    w = positive.new_zeros(len(positive), positive.shape[2])
    for k in range(1, _ROUNDS + 1):
        above = (torch.einsum("pnd,pd->pn", positive, w) < 1).to(w.dtype)
        below = (torch.einsum("nd,pd->pn", negative, w) > -1).to(w.dtype)
        pull = torch.einsum("pn,pnd->pd", above, positive) - torch.einsum("pn,nd->pd", below, negative)
        w = w - (w - pull / (2 * positive.shape[1]) / _RIDGE) / k
    return w
