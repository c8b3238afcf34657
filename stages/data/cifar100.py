"""CIFAR-100 from the official binary files."""

from pathlib import Path

import numpy as np
import torch

from stages.data._cifar import records
from stages.data._files import PLACE, present
from stages.data.base import Dataset, Source, Split, check
from stages.method import InputError

_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASSES = tuple(_NAMES.split())
# The superclass of each class, as the official files pair them.
_COARSE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)
_FOLDERS = ("cifar-100-binary", "cifar100/cifar-100-binary")


class Cifar100(Dataset):
    """50,000 photographs to train on, 10,000 to test on, 32x32 colour, a hundred classes (Krizhevsky, 2009).

    Reads `train.bin` and `test.bin` of the official `cifar-100-binary`, in file order, with the fine labels. No
    checksum of these files is known to us; the number of records, the number of images per class, and the superclass
    byte that goes with every fine label are held against the originals. `original = false` reads other images in the
    same format: any number of records, any superclass.
    """

    original: bool = True

    def files(self, root: Path) -> tuple[Path, ...]:
        folder = next((root / f for f in _FOLDERS if (root / f).is_dir()), root / _FOLDERS[0])
        return present((folder / "train.bin", folder / "test.bin"), f"looked for {_FOLDERS[0]} in {root}; {PLACE}")

    def read(self, root: Path) -> Source:
        train, test = self.files(root)
        return Source(self._part(train, 50_000), self._part(test, 10_000), CLASSES)

    def _part(self, path: Path, count: int) -> Split:
        labels, images = records(path, 2, count if self.original else None)
        coarse, fine = labels[:, 0], labels[:, 1]
        y = torch.from_numpy(fine.astype(np.int64))
        split = check(Split(torch.from_numpy(images.copy()), y, torch.arange(len(y))), 100, str(path))
        if self.original:
            wrong = (coarse != np.asarray(_COARSE)[fine]).nonzero()[0]
            if len(wrong):
                i = int(wrong[0])
                raise InputError(
                    f'{path}: corrupt: record {i}: "{CLASSES[fine[i]]}" belongs to superclass {_COARSE[fine[i]]}, '
                    f"got {coarse[i]}; fetch the file again"
                )
            sizes = np.bincount(fine, minlength=100)
            if (sizes != count // 100).any():
                k = int((sizes != count // 100).nonzero()[0][0])
                raise InputError(
                    f'{path}: corrupt: expected {count // 100} images of "{CLASSES[k]}", got {sizes[k]}; fetch it again'
                )
        return split
