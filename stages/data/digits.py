"""1,797 real handwritten digits, shipped in the package; the embedded default."""

from pathlib import Path

import torch

from stages.data._files import arrays, content, expect, present
from stages.data.base import Dataset, Source, Split, check

_FILE = Path(__file__).with_name("digits.npz")
_SHA256 = "79994bf9909c01b5c887408b0a4b61006926c6f1dcec64f097b75825a0d4679e"
_TEST_FROM = 1287


class Digits(Dataset):
    """The UCI digits (Alpaydin and Kaynak, 1998), 8x8 grey, classes 0..9: 1,287 to train on, 510 to test on.

    A pixel is the number v of ink dots in a 4x4 block, 0..16, stored as round(255 v / 16). The test part is the end of
    the original order, from row 1,287 on. That order repeats the same form of about 130 digits fourteen times over, so
    it runs writer by writer, and the cut lies where a form begins: no test form has a digit in training, and the test
    asks about other people's hands, which a shuffled cut would not. Classes are balanced in both parts to within 20 %.
    That the repeats are forms is our reading of the label sequence; the makers state thirteen writers and no order.

    Licence CC BY 4.0; see `digits.txt` beside this file.
    """

    def files(self, root: Path) -> tuple[Path, ...]:
        del root
        return present([_FILE], "it is part of the package; install it again")

    def read(self, root: Path) -> Source:
        (path,) = self.files(root)
        expect(path, content(path), "sha256", _SHA256, "it is part of the package; install it again")
        stored = arrays(path)
        counts = torch.from_numpy(stored["counts"])
        images = (counts.double() * 255 / 16).round().to(torch.uint8).unsqueeze(1)
        whole = Split(images, torch.from_numpy(stored["labels"]).long(), torch.arange(len(images)))
        check(whole, 10, str(path))
        rows = torch.arange(len(whole))
        return Source(
            whole.select(rows[:_TEST_FROM]), whole.select(rows[_TEST_FROM:]), tuple(str(digit) for digit in range(10))
        )
