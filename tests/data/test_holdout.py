"""The held-out part of a data set, and what a model remembers of the images that it has seen."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbclip.data.dataset import Item, file_digest
from fbclip.data.holdout import MOST, Seen, split
from fbclip.data.layouts import open_dataset
from fbclip.errors import UsageError
from helpers.own_data import make_own


def digests(items: tuple[Item, ...]) -> set[str]:
    return {file_digest(item.image) for item in items}


def test_every_class_gives_its_share_of_good_and_of_defective_images(tmp_path: Path) -> None:
    parts = split(make_own(tmp_path, {"bolt": (10, 5), "nut": (20, 10)}), 0.2)
    assert Counter((i.class_name, i.label) for i in parts.held_out) == {
        ("bolt", 0): 2,
        ("bolt", 1): 1,
        ("nut", 0): 4,
        ("nut", 1): 2,
    }
    assert len(parts.trained) == 36
    assert not digests(parts.trained) & digests(parts.held_out)
    (line,) = parts.lines(Seen())
    assert line.startswith("6 good and 3 defective of 45 images are held out")


def test_the_images_themselves_decide_not_their_names(tmp_path: Path) -> None:
    before = split(make_own(tmp_path / "a", {"bolt": (10, 10)}), 0.3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for number, image in enumerate(sorted((tmp_path / "b/bolt/test/good").iterdir(), reverse=True)):
        image.rename(image.with_name(f"z{number}.png"))
    after = split(open_dataset(tmp_path / "b", "mvtec"), 0.3)
    assert digests(before.held_out) == digests(after.held_out)


def test_copies_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    make_own(tmp_path, {"bolt": (10, 10)})
    for image in sorted((tmp_path / "bolt/test/good").iterdir()):
        shutil.copy(image, image.with_name(f"copy-{image.name}"))
        shutil.copy(image, tmp_path / "bolt/test" / "spot" / f"mislabelled-{image.name}")
        masks = tmp_path / "bolt/ground_truth/spot"
        shutil.copy(masks / "010_mask.png", masks / f"mislabelled-{image.stem}_mask.png")
    parts = split(open_dataset(tmp_path, "mvtec"), 0.2)
    assert parts.held_out
    assert not digests(parts.trained) & digests(parts.held_out)


def test_too_few_images_are_all_trained_on_and_it_is_said(tmp_path: Path) -> None:
    data = make_own(tmp_path, {"bolt": (20, 4)})
    parts = split(data, 0.2)  # one defective image
    assert (len(parts.trained), parts.held_out) == (24, ())
    assert "20% of 20 good and 4 defective are too few to judge by" in parts.lines(Seen())[0]
    assert split(data, 0.5).held_out
    assert "none is held out" in split(data, 0).lines(Seen())[0]


def test_images_of_the_train_split_are_counted(tmp_path: Path) -> None:
    make_own(tmp_path, {"bolt": (10, 10)})
    shutil.copytree(tmp_path / "bolt/test/good", tmp_path / "bolt/train/good")
    lines = split(open_dataset(tmp_path, "mvtec"), 0.2).lines(Seen())
    assert "10 images of the train split are not used" in lines[-1]


@pytest.mark.parametrize(("good", "defective", "lacking"), [(4, 0, "defective"), (0, 4, "good")])
def test_one_kind_of_images_alone_is_refused(tmp_path: Path, good: int, defective: int, lacking: str) -> None:
    data = make_own(tmp_path, {"bolt": (good, defective)})
    with pytest.raises(UsageError, match=f"no {lacking} ones in its test split"):
        split(data, 0.2)


def test_held_out_images_that_were_trained_on_before_are_told(tmp_path: Path) -> None:
    data = make_own(tmp_path, {"bolt": (10, 10)})
    everything, parts = split(data, 0).seen, split(data, 0.2)
    assert "4 held-out images were trained on before" in "\n".join(parts.lines(everything))
    assert len(parts.lines(parts.seen)) == 1


def hex_digests(seed: int, count: int) -> list[str]:
    return [bytes(row).hex() for row in np.random.default_rng(seed).integers(0, 256, (count, 32), np.uint8)]


@given(st.integers(0, 50), st.integers(0, 50))
def test_what_was_seen_comes_back(trained: int, chosen: int) -> None:
    every = hex_digests(0, 150)
    seen = Seen.of(every[:trained], every[100 : 100 + chosen])
    again = Seen.from_dict(seen.to_dict(), Path("b"))
    assert again == seen
    assert again.count(every) == (trained, chosen)
    assert again.complete


def test_stages_add_up() -> None:
    first, second = hex_digests(0, 30), hex_digests(1, 30)
    seen = Seen.of(first[:20], first[20:]) | Seen.of(second + first[20:25], [])
    assert seen.count(first) == (25, 5)
    assert seen.images == 55


def test_of_more_images_the_rest_is_not_known_but_counted() -> None:
    every = hex_digests(0, MOST + 500)
    seen = Seen.from_dict(Seen.of(every, []).to_dict(), Path("b"))
    assert not seen.complete
    assert seen.count(every) == (MOST, 0)
    assert len(str(seen.to_dict())) < 100_000
    assert (seen | Seen.of(hex_digests(1, 3), [])).images == MOST + 503


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "x",
        {},
        {"images": 1, "trained": 5, "chosen_by": ""},
        {"images": "1", "trained": "", "chosen_by": ""},
        {"images": True, "trained": "", "chosen_by": ""},
        {"images": -1, "trained": "", "chosen_by": ""},
        {"images": 3, "trained": "AAAA", "chosen_by": ""},
        {"images": 3, "trained": "äöü", "chosen_by": ""},
        {"images": 0, "trained": "AAAAAAAA", "chosen_by": ""},
        {"images": 10**6, "trained": "AAAAAAAA" * (MOST + 1), "chosen_by": ""},
    ],
)
def test_what_is_not_intelligible_is_refused(values: object) -> None:
    with pytest.raises(UsageError, match="b doesn't say"):
        Seen.from_dict(values, Path("b"))
