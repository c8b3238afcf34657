"""The shipped digits: what they are, and that a changed byte is noticed."""

from pathlib import Path

import pytest

from stages.data import digits
from stages.data.digits import Digits
from stages.method import InputError


def test_first_digit_is_the_zero_of_the_original_file() -> None:
    source = Digits().read(Path("anywhere"))
    # The first row of optdigits.tes.
    row = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0, 0, 3, 15, 2, 0, 11, 8, 0, 0, 4, 12, 0, 0, 8, 8, 0]
    row += [0, 5, 8, 0, 0, 9, 8, 0, 0, 4, 11, 0, 1, 12, 7, 0, 0, 2, 14, 5, 10, 12, 0, 0, 0, 0, 6, 13, 10, 0, 0, 0]
    assert source.train.images[0].flatten().tolist() == [round(255 * v / 16) for v in row]
    assert int(source.train.labels[0]) == 0


def test_counts_per_class_are_the_published_ones() -> None:
    source = Digits().read(Path("anywhere"))
    counts = source.train.labels.bincount() + source.test.labels.bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    share = source.test.labels.bincount() / len(source.test)
    assert float(share.min()) > 0.08
    assert float(share.max()) < 0.12


def test_test_part_begins_with_a_form() -> None:
    """The cut lies where the sequence 0..9, three times over, begins again."""
    source = Digits().read(Path("anywhere"))
    assert source.test.labels[:30].tolist() == list(range(10)) * 3
    assert source.test.indices[0] == 1287


def test_a_changed_byte_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(digits._FILE.read_bytes())
    data[1000] ^= 1
    changed = tmp_path / "digits.npz"
    changed.write_bytes(data)
    monkeypatch.setattr(digits, "_FILE", changed)
    with pytest.raises(InputError, match=r"digits\.npz: corrupt"):
        Digits().read(tmp_path)
