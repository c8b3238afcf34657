"""A generator that learns to attack: one forward pass per example and target (AI-GAN)."""

import math
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Generator, Tensor, nn

from stages.attacks._learn import descend, fits, minibatches, sampled, seeded, unprepared
from stages.attacks._losses import margin
from stages.attacks.base import Attack, Batches, Norm
from stages.method import InputError
from stages.oracle import Logits, Oracle, narrow, reachable
from stages.threat import Threat

_ATTACKER_STEPS = 10
_CONFIDENT = -1.0


class AIGAN(Attack):
    """A generator conditioned on image, target and radius gives the perturbation; a discriminator keeps it plain.

        x_G = clip(x + G(x, t, eps), 0, 1),   G = eps tanh(.),   t uniform over the other classes
        G: min  max(m(f(x_G), t), -1) + gan softplus(-D(x_G)) + hinge max(0, ||G||_2 / (eps sqrt(D)) - 1/2)
        D: min  softplus(-D(real)) + softplus(D(x_G)),   m(z, t) = max_{k != t} z_k - z_t

    In the first `stage` of the `epochs`, what D takes for real are targeted PGD images (10 steps), so that G learns
    their statistics; later they are natural images. `prepare` trains on `images` training images with radii drawn
    log-uniformly from `radii`; naming the one radius of the threat, (eps, eps), gives the stronger generator. Striking
    tries the `targets` most likely wrong classes in turn: 1 + targets queries at most, no gradient, any callable.

    An amortised attack for screening: weaker than PGD at the same eps, and no evidence of robustness.

    Source: Bai et al. 2020/2021, "AI-GAN: attack-inspired generation of adversarial examples"; after a reading note
    with the losses of the first version. Departures: margin loss on logits and the non-saturating loss for G; the
    generator is told eps, since `prepare` knows no threat, and a map of its own for each target enters at the
    bottleneck; no normalisation layers; `gan` 0.1, and `hinge` 0 where the paper bounds visibility, which the ball
    bounds here. The public code's detached discriminator, which gives G no gradient at all, is not followed.
    """

    targets: int = Field(default=1, ge=1)
    radii: tuple[float, float] = (1 / 255, 0.5)
    images: int = Field(default=10_000, ge=2)
    epochs: int = Field(default=10, ge=0)
    stage: float = Field(default=0.2, ge=0, le=1)
    batch: int = Field(default=128, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    width: int = Field(default=16, ge=1)
    gan: float = Field(default=0.1, ge=0)
    hinge: float = Field(default=0.0, ge=0)

    _generator: "_Generator | None" = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.radii
        if not 0 < low <= high:
            raise ValueError(f"radii: expected 0 < lowest <= highest, got {low:g} and {high:g}")
        return self

    @property
    def needs_gradients(self) -> bool:
        return False

    @property
    def norms(self) -> frozenset[Norm]:
        return frozenset(("linf",))

    def prepare(self, logits: Logits, data: Batches, rng: Generator) -> "AIGAN":
        network = logits.logits if isinstance(logits, Oracle) else logits
        x, y = sampled(data, self.images, rng)
        _images(x)
        with torch.no_grad():
            classes = network(x[:1]).shape[1]
        with torch.random.fork_rng(devices=[]):
            generator, judge = (
                _Generator(tuple(x.shape[1:]), classes, self.width),
                _discriminator(x.shape[1], self.width),
            )
        seeded(generator, rng, x.device)
        seeded(judge, rng, x.device)
        generator.start()
        own, other = (torch.optim.Adam(net.parameters(), lr=self.lr, betas=(0.5, 0.999)) for net in (generator, judge))
        with torch.enable_grad():
            for epoch, rows in minibatches(len(x), self.batch, self.epochs, rng, x.device):
                image = x[rows]
                target, eps = self._draw(y[rows], classes, rng)
                delta = generator(image, target, eps)
                fake = (image + delta).clamp(0, 1)
                attacked = epoch < self.stage * self.epochs
                real = _targeted(network, image, target, eps) if attacked and self.gan else image
                descend(other, F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean())
                descend(own, self._loss(network, judge, fake, delta, target, eps))
        twin = self.model_copy()
        twin._generator = generator.requires_grad_(False)
        return twin

    def perturb(self, logits: Logits, x: Tensor, y: Tensor, threat: Threat, rng: Generator) -> Tensor:
        del rng
        generator = self._generator
        if generator is None:
            raise unprepared(self)
        with torch.no_grad():
            z = logits(x)
            fits(self, generator.shape, x, z.shape[1], generator.classes)
            likely = (
                z.float().masked_fill(~reachable(logits, z.shape[1], y), float("-inf")).sort(dim=1, descending=True)
            )
            eps = torch.full((len(x),), threat.eps, device=x.device)
            result, alive = x.clone(), torch.arange(len(x), device=x.device)
            for rank in range(min(self.targets, z.shape[1] - 1)):
                rows = alive[likely.values[alive, rank] > float("-inf")]
                if len(rows) == 0:
                    break
                delta = generator(x[rows], likely.indices[rows, rank], eps[rows]).to(x.dtype)
                point = threat.project(x[rows] + delta, x[rows])
                broken = narrow(logits, rows)(point).argmax(1) != y[rows]
                result[rows] = point
                alive = alive[~torch.isin(alive, rows[broken])]
        return result

    def _draw(self, y: Tensor, classes: int, rng: Generator) -> tuple[Tensor, Tensor]:
        """A wrong class and a radius for every example."""
        other = torch.randint(1, classes, y.shape, generator=rng, device=rng.device).to(y.device)
        share = torch.rand(y.shape, generator=rng, device=rng.device).to(y.device)
        low, high = (math.log(radius) for radius in self.radii)
        return (y + other) % classes, (low + (high - low) * share).exp()

    def _loss(
        self, network: Logits, judge: nn.Module, fake: Tensor, delta: Tensor, target: Tensor, eps: Tensor
    ) -> Tensor:
        missed = margin(network(fake), target).clamp(min=_CONFIDENT).mean()
        seen = F.softplus(-judge(fake)).mean()
        size = delta.flatten(1).norm(dim=1) / (eps * math.sqrt(delta[0].numel()))
        loss: Tensor = missed + self.gan * seen + self.hinge * (size - 0.5).clamp(min=0).mean()
        return loss


class _Generator(nn.Module):
    """(images [B, C, H, W], targets [B], radii [B]) -> perturbations within the radii, for images of any size."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        channels, height, breadth = shape
        self.place = (2 * width, (height + 3) // 4, (breadth + 3) // 4)
        self.read = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.down1 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.target = nn.Embedding(classes, math.prod(self.place))
        self.block1 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.block2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.write = nn.Conv2d(width, channels, 3, padding=1)

    def start(self) -> None:
        """Small outputs at first, so that tanh is not saturated before anything is learnt."""
        with torch.no_grad():
            self.write.weight.mul_(0.1)

    def forward(self, x: Tensor, target: Tensor, eps: Tensor) -> Tensor:
        wide = eps.view(-1, 1, 1, 1)
        plane = (wide.log() / 5).expand(-1, 1, *x.shape[2:]).clamp(min=-2)
        h0 = F.relu(self.read(torch.cat([x, plane], 1)))
        h1 = F.relu(self.down1(h0))
        h2 = F.relu(self.down2(h1) + self.target(target).view(-1, *self.place))
        h2 = h2 + self.block2(F.relu(self.block1(h2)))
        h3 = F.relu(self.up1(h2)[..., : h1.shape[2], : h1.shape[3]] + h1)
        h4 = F.relu(self.up2(h3)[..., : x.shape[2], : x.shape[3]] + h0)
        return wide * torch.tanh(self.write(h4))


def _discriminator(channels: int, width: int) -> nn.Module:
    """Images -> realness, [B, 1]."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 1),
    )


def _targeted(network: Logits, x: Tensor, target: Tensor, eps: Tensor) -> Tensor:
    """Targeted PGD on the cross-entropy from x, one radius per example; steps of 2.5 eps / 10."""
    wide = eps.view(-1, 1, 1, 1)
    point = x
    for _ in range(_ATTACKER_STEPS):
        point = point.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(network(point), target, reduction="sum"), point)
        moved = point.detach() - 2.5 / _ATTACKER_STEPS * wide * slope.sign()
        point = torch.maximum(torch.minimum(moved, x + wide), x - wide).clamp(0, 1)
    return point


def _images(x: Tensor) -> None:
    if x.dim() != 4:
        raise InputError(f"ai_gan: expected images [B, C, H, W], got {tuple(x.shape)}")
