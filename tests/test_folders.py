"""What is taken from folders, and what names mean."""

from __future__ import annotations

import os
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run
from PIL import Image

from fbclip.errors import ImageError, UsageError
from fbclip.folders import MAX_DEPTH, images_below, list_images, locate, walk
from fbclip.images import read_image
from fbclip.terminal import printable


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((6, 4)).save(root / name)


def listed(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_images([str(root)])]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.png", ".b.png", ".thumbs/c.png", "sub/.ipynb_checkpoints/d.png", "sub/e.png", "@eaDir/f.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7")  # macOS's resource fork
    assert listed(tmp_path) == ["a.png", "sub/e.png"]
    inside = tmp_path / ".thumbs"
    assert list_images([str(inside)]) == [inside / "c.png"]  # it was named


def test_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path, "nas/1.png", "nas/deep/2.png", "in/3.png", "in/real/4.png")
    root = tmp_path / "in"
    (root / "linked").symlink_to(tmp_path / "nas")
    (root / "again").symlink_to(tmp_path / "nas")
    (root / "also").symlink_to(root / "real")
    (root / "up").symlink_to(root)
    (root / "5.png").symlink_to(tmp_path / "nas/1.png")
    assert listed(root) == ["3.png", "5.png", "again/1.png", "again/deep/2.png", "real/4.png"]
    assert list_images([str(root / "**" / "4.png")]) == [root / "also/4.png"]  # a glob would give it many times


def test_what_leads_nowhere_is_listed_and_so_reported(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path, "in/a.png")
    (tmp_path / "in/gone.png").symlink_to("/nowhere/x.png")
    (tmp_path / "in/nas").symlink_to("/nowhere")
    (tmp_path / "in/loop.png").symlink_to(tmp_path / "in/loop.png")
    done = fbclip("infer", "in", "--no-save", code=2)
    assert "in/gone.png is a link to /nowhere/x.png, which is not there" in done.stdout
    assert "in/nas is a link to /nowhere, which is not there" in done.stdout
    assert "in/loop.png can't be read: Too many levels of symbolic links" in done.stdout
    assert "3 skipped" in done.stdout


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Path]:
    """A folder with a picture and 1,100 folders within folders: longer than a path may be, deeper than Python recurses."""
    put(tmp_path, "a/1.png")
    here = os.open(tmp_path, os.O_RDONLY)
    for depth in range(1100):
        if depth:
            os.mkdir("a", dir_fd=here)
        here, above = os.open("a", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "a"], check=True)  # pytest can't


def test_folders_within_folders_without_end(endless: Path) -> None:
    found = listed(endless)
    assert found == ["a/1.png", "/".join("a" * (MAX_DEPTH + 1))]
    with pytest.raises(ImageError, match="is a folder that isn't looked into"):
        read_image(endless / found[1])
    with pytest.raises(UsageError, match=r"matches none|goes too deep"):
        list_images([str(endless / "**" / "*.nothing")])


def test_other_suffixes_are_told(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path, "in/a.png", "in/b.gif")
    for name in ("c.jp2", "d.JP2", "e.heic", "f", "notes.txt", "labels.csv", ".hidden.jp2"):
        (tmp_path / "in" / name).write_bytes(b"x")
    done = fbclip("infer", "in", "--no-save")
    assert "4 files with other suffixes than images have were left out: none, .heic, .jp2\n" in done.stdout
    assert "2 images" in done.stdout
    lines: list[str] = []
    list_images([str(tmp_path / "in/a.png")], lines.append)
    assert lines == []
    (tmp_path / "in/a.png").unlink()
    (tmp_path / "in/b.gif").unlink()
    with pytest.raises(UsageError, match=r"matches none; 4 files with other suffixes .* \.heic, \.jp2"):
        list_images([str(tmp_path / "in")])


def test_an_empty_source_is_no_folder(fbclip: Run, tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    assert "got an empty one" in fbclip("infer", "", "--no-save", code=2).stderr


def test_names_that_a_shell_would_read(tmp_path: Path) -> None:
    put(tmp_path, "part[left].png", "part[right].png", "*.png")
    for name in ("part[left].png", "*.png"):
        assert list_images([str(tmp_path / name)]) == [tmp_path / name]
    with pytest.raises(UsageError, match="can't be listed"):
        list_images(["x" * 300 + ".png"])


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        list(walk(tmp_path / "gone"))
    with pytest.raises(OSError, match="Not a directory"):
        put(tmp_path, "a.png")
        images_below(tmp_path / "a.png", Counter())


def test_names_for_people() -> None:
    assert printable("Stück 1×2.png") == "Stück 1×2.png"
    assert printable("Ri\udcdf\n\x1b[2J.png") == r"Ri\xdf\n\x1b[2J.png"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bilder/1.png", "bilder/1.png"),
        ("bilder/1.png", r"bilder\1.png"),
        ("bilder/1.png", r"..\x\bilder\1.PNG"),
        (unicodedata.normalize("NFD", "Gut_ü/ä.jpg"), "Gut_ü/ä.jpg"),
        ("Gut_ü/ä.jpg", unicodedata.normalize("NFD", "Gut_ü/ä.jpg")),
        (unicodedata.normalize("NFD", "Gut_ü") + "/ä.jpg", "Gut_ü/ä.jpg"),
        (r"one\name.png", r"one\name.png"),
    ],
)
def test_files_that_an_index_means(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path / "x", name)
    assert locate(tmp_path / "x", text).samefile(tmp_path / "x" / name)
    assert locate(tmp_path / "x", str(tmp_path / "x" / name)) == tmp_path / "x" / name


def test_what_an_index_may_mean_in_two_ways_is_not_guessed(tmp_path: Path) -> None:
    put(tmp_path, "A.png", "a.png")
    assert locate(tmp_path, "a.png") == tmp_path / "a.png"
    assert locate(tmp_path, "A.PNG") == tmp_path / "A.PNG"
    assert locate(tmp_path, r"C:\bilder\1.png") == tmp_path / r"C:\bilder\1.png"
