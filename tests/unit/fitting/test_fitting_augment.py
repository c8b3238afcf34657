"""Augmentation moves pixels and invents none."""

import torch

from stages.fitting.augment import Augment


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_off_by_default() -> None:
    x = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8, generator=_rng())
    assert torch.equal(Augment()(x, _rng()), x)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    x = torch.randint(1, 256, (64, 2, 5, 6), dtype=torch.uint8, generator=_rng())
    out = Augment(crop=2)(x, _rng(1))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    places = set()
    for before, after in zip(padded, out, strict=True):
        fits = [(i, j) for i in range(5) for j in range(5) if torch.equal(before[:, i : i + 5, j : j + 6], after)]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 15
    assert out.dtype == torch.uint8


def test_a_flip_mirrors_about_half() -> None:
    x = torch.rand(200, 1, 3, 4, generator=_rng())
    out = Augment(flip=True)(x, _rng(2))
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert torch.equal(out[~mirrored], x[~mirrored])
    assert 60 < int(mirrored.sum()) < 140


def test_the_same_generator_gives_the_same_images() -> None:
    x = torch.rand(8, 1, 8, 8, generator=_rng())
    augment = Augment(crop=3, flip=True)
    assert torch.equal(augment(x, _rng(5)), augment(x, _rng(5)))
