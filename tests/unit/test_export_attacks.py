"""The file that ships meets every attack that its float network met."""

from pathlib import Path

from stages import evidence
from stages.attacks.pgd import PGD
from stages.attacks.square import Square
from stages.remeasure import same_attacks


def told(folder: Path, **attacks: PGD | Square) -> evidence.Evidence:
    path = folder / "evidence"
    header = evidence.Header(
        threat={"norm": "linf", "eps": 0.1},
        split="test",
        strength="quick",
        attacks={name: attack.dump() for name, attack in attacks.items()},
        certifiers={},
        seed=0,
        model="",
        examples=0,
    )
    evidence.write(path, header, [])
    return evidence.read(path)


def test_what_validate_ran_beyond_exports_own_is_added_once(tmp_path: Path) -> None:
    # With only its own few steps an honest int8 file withstood 7 attacks that broke the float network and lost none,
    # and was refused for masked gradients (digits, small_cnn, 400 images).
    weak, strong, square = PGD(steps=5), PGD(steps=100, restarts=5, loss="margin"), Square(queries=300)
    found = told(tmp_path, square=square, pgd=strong)
    assert set(same_attacks((weak, square), found)) == {weak, square, strong}
    assert same_attacks((weak, square), found)[:2] == (weak, square)


def test_the_same_set_stays_as_it_is(tmp_path: Path) -> None:
    attacks = (PGD(steps=5), Square(queries=300))
    assert same_attacks(attacks, told(tmp_path, pgd=attacks[0], square=attacks[1])) == attacks
