"""A folder per class: what is read, how it is cut, and every way in which it is refused."""

import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages.data.folder import Folder
from stages.method import InputError


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "I;16") else (value, 2 * value % 256, 7)).save(path, **options)  # type: ignore[arg-type]


def classes(root: Path, count: int = 10, names: tuple[str, ...] = ("b", "a")) -> Path:
    """Class a is 100 and up, class b is 0 and up; i is the number of the file."""
    for name in names:
        for i in range(count):
            picture(root / "own" / name / f"{i:03d}.png", i + (100 if name == "a" else 0))
    return root / "own"


def test_classes_are_sorted_and_the_cut_is_stratified(tmp_path: Path) -> None:
    base = classes(tmp_path)
    data = Folder(path="own", test=0.3)
    source = data.read(tmp_path)
    assert source.classes == ("a", "b")
    assert data.files(tmp_path) == tuple(base / k / f"{i:03d}.png" for k in "ab" for i in range(10))
    assert source.train.images.shape == (14, 3, 8, 8)
    assert source.test.labels.bincount().tolist() == [3, 3]
    for split in (source.train, source.test):
        first = split.images[:, 0, 0, 0].long()
        assert (first == split.indices + torch.where(split.labels == 0, 100, -10)).all()
    assert set(source.train.indices.tolist()) | set(source.test.indices.tolist()) == set(range(20))


def test_cut_follows_its_own_seed(tmp_path: Path) -> None:
    classes(tmp_path)
    first, again, other = (Folder(path="own", split_seed=s).read(tmp_path).test.indices.tolist() for s in (0, 0, 1))
    assert first == again != other


def test_absolute_path_ignores_the_data_root(tmp_path: Path) -> None:
    base = classes(tmp_path)
    assert len(Folder(path=str(base)).files(Path("elsewhere"))) == 20


def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, n in (("train", 3), ("test", 2)):
        for name in "ab":
            for i in range(n):
                picture(tmp_path / "own" / part / name / f"{i}.png", i)
    source = Folder(path="own").read(tmp_path)
    assert (len(source.train), len(source.test)) == (6, 4)
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "own" / "val").mkdir()
    with pytest.raises(InputError, match=r"has train/ and test/ and beside them val"):
        Folder(path="own").files(tmp_path)


def test_unknown_test_class_is_refused(tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "test/a", "test/c"):
        picture(tmp_path / "own" / place / "0.png", 1)
    with pytest.raises(InputError, match=r'test: class "c" is not in train/'):
        Folder(path="own").read(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".ppm", ".PNG"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    pixels = {name: rng.integers(0, 256, (6, 9, 3), np.uint8) for name in "ab"}
    for name, x in pixels.items():
        for i in range(2):
            path = tmp_path / name / f"{i}{suffix}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(x).save(path, **({"lossless": True} if suffix == ".webp" else {}))  # type: ignore[arg-type]
    source = Folder(path=str(tmp_path), test=0.5).read(tmp_path)
    assert torch.equal(source.train.images[1], torch.from_numpy(pixels["b"]).permute(2, 0, 1))


def test_jpeg_is_read_and_its_orientation_obeyed(tmp_path: Path) -> None:
    half = np.zeros((16, 32, 3), np.uint8)
    half[:, 16:] = 255
    turn = Image.Exif()
    turn[0x0112] = 3  # upside down
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(half).save(tmp_path / name / "0.jpg", quality=95)
        Image.fromarray(half).save(tmp_path / name / "1.jpeg", quality=95, exif=turn)
    source = Folder(path=str(tmp_path), test=0.5).read(tmp_path)
    images = torch.cat([source.train.images, source.test.images])
    indices = torch.cat([source.train.indices, source.test.indices])
    left = images[:, 0, :, 2].float().mean(1)
    assert ((left > 128) == (indices % 2 == 1)).all()


def test_grey_stays_grey_and_mixtures_become_colour(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(2):
            picture(tmp_path / name / f"{i}.png", 50 + i, mode="L")
    assert Folder(path=str(tmp_path)).read(tmp_path).train.images.shape[1:] == (1, 8, 8)
    picture(tmp_path / "b" / "2.png", 9)
    source = Folder(path=str(tmp_path), test=0.5).read(tmp_path)
    assert source.train.images.shape[1:] == (3, 8, 8)
    assert source.train.images[0].unique().numel() == 1  # type: ignore[no-untyped-call]


def test_size_resizes_and_without_it_sizes_must_agree(tmp_path: Path) -> None:
    base = classes(tmp_path)
    picture(base / "b" / "odd.png", 3, size=(20, 10))
    with pytest.raises(InputError, match=r"odd\.png: 20 x 10 pixels, but 000\.png has 8 x 8; set size"):
        Folder(path="own").read(tmp_path)
    assert Folder(path="own", size=16).read(tmp_path).train.images.shape[1:] == (3, 16, 16)


def test_groups_never_cross(tmp_path: Path) -> None:
    for name in "ab":
        for track in range(5):
            for frame in range(4):
                picture(tmp_path / name / f"{name}_{track}_{frame}.png", track)
    data = Folder(path=str(tmp_path), groups=r"^(\w_\d)_", test=0.4)
    source = data.read(tmp_path)
    assert source.train.groups is not None
    assert source.test.groups is not None
    assert not set(source.train.groups.tolist()) & set(source.test.groups.tolist())
    assert len(set(source.train.groups.tolist()) | set(source.test.groups.tolist())) == 10
    assert source.test.labels.bincount().tolist() == [8, 8]


def test_groups_may_be_folders_below_the_class(tmp_path: Path) -> None:
    for name in "ab":
        for patient in range(3):
            picture(tmp_path / name / f"p{patient}" / "x.png", patient)
            picture(tmp_path / name / f"p{patient}" / "y.png", patient)
    source = Folder(path=str(tmp_path), groups=r"^p(\d+)/", test=0.3).read(tmp_path)
    assert source.test.groups is not None
    assert len(set(source.test.groups.tolist())) == 1
    assert source.test.labels.tolist() == [0, 0, 1, 1]


def test_group_in_train_and_test_is_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            picture(tmp_path / part / name / f"{part if name == 'a' else 'same'}_1.png", 1)
    with pytest.raises(InputError, match=r'group "same" has pictures in both train/ and test/'):
        Folder(path=str(tmp_path), groups=r"^(\w+)_").read(tmp_path)


def test_a_name_outside_the_group_pattern_is_refused(tmp_path: Path) -> None:
    classes(tmp_path)
    with pytest.raises(InputError, match=r'000\.png: "000\.png" does not match the group pattern "\^\(x\)"'):
        Folder(path="own", groups="^(x)").read(tmp_path)


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("abc", "at least one group")])
def test_bad_group_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Folder(path="own", groups=pattern)


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    base = classes(tmp_path)
    (base / ".DS_Store").write_bytes(b"x")
    (base / "a" / ".thumb.txt").write_bytes(b"x")
    (base / ".cache").mkdir()
    assert len(Folder(path="own").files(tmp_path)) == 20


@pytest.mark.parametrize("place", ["a/notes.txt", "labels.csv", "a/deep/clip.mp4", "stray.png"])
def test_a_file_that_is_no_picture_of_a_class_is_named(tmp_path: Path, place: str) -> None:
    path = classes(tmp_path) / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=Path(place).name):
        Folder(path="own").files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"GIF89a\1\0\1\0\0\0\0;", b"\x89PNG\r\n\x1a\n", None])
def test_a_picture_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = classes(tmp_path) / "b" / "004.png"
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(InputError, match=r"b/004\.png: not a readable picture"):
        Folder(path="own").read(tmp_path)


def test_sixteen_bits_and_films_are_refused(tmp_path: Path) -> None:
    base = classes(tmp_path)
    picture(base / "a" / "000.png", 500, mode="I;16")
    with pytest.raises(InputError, match=r"a/000\.png: expected 8 bits a channel"):
        Folder(path="own").read(tmp_path)
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in (0, 200)]
    frames[0].save(base / "a" / "000.png", save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"a/000\.png: expected one picture, got 2 frames"):
        Folder(path="own").read(tmp_path)


def test_one_class_none_and_empty_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own: does not exist; a relative path is looked for below the data root"):
        Folder(path="own").files(tmp_path)
    base = classes(tmp_path, names=("a",))
    with pytest.raises(InputError, match="at least two classes, got 1"):
        Folder(path="own").files(tmp_path)
    (base / "b").mkdir()
    with pytest.raises(InputError, match="own/b: expected pictures of this class, got none"):
        Folder(path="own").files(tmp_path)


def test_a_folder_without_read_permission_is_refused(tmp_path: Path) -> None:
    base = classes(tmp_path)
    (base / "a").chmod(0)
    try:
        if any(True for _ in (base / "a").iterdir()):
            pytest.skip("this user reads every folder, whatever its mode")
    except PermissionError:
        with pytest.raises(InputError, match="cannot be read"):
            Folder(path="own").files(tmp_path)
    finally:
        (base / "a").chmod(stat.S_IRWXU)
