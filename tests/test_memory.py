from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fbclip.errors import BundleError, UsageError
from fbclip.learning import Learned, Seen, add_up, coreset, learn, one_view
from fbclip.memory import (
    ABOUT,
    FIXED,
    FLIPS,
    NEAREST,
    POSITIONS,
    WHITEN,
    About,
    Memory,
    Recipe,
    Shape,
    Tensors,
    Weight,
    hashes,
)

SHAPE, IMAGE_SIZE = Shape(4, 2, 8), 32
WHITENED, NEAR, PLACED = (
    Recipe(WHITEN, FLIPS, 0, 0.2),
    Recipe(NEAREST, FLIPS, 0, 0.2),
    Recipe(POSITIONS, FIXED, 1, 0.2),
)
Contents = dict[str, bytes]


def seen(count: int, recipe: Recipe, seed: int = 0) -> list[Seen]:
    """References of random features, whose layers have length 1."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        parts = SHAPE.grouped(rng.standard_normal((1, SHAPE.grid**2, SHAPE.features)) + 1)
        unit = np.concatenate(list(parts / np.linalg.norm(parts, axis=-1, keepdims=True)), axis=-1).astype(np.float32)
        logits = rng.standard_normal(1 + SHAPE.grid**2).astype(np.float32)
        found.append(
            Seen(f"{seed}-{number}.png", f"{number:064x}", one_view(unit[0], logits), add_up(recipe, SHAPE, unit))
        )
    return found


def described(recipe: Recipe, learned: Learned) -> Memory:
    about = About(
        recipe.mode,
        recipe.orientation,
        recipe.reach,
        recipe.weight,
        learned.map_line,
        learned.score_line,
        learned.references,
        "0" * 64,
        "fp32",
        "cpu",
        None,
        hashes(learned.sums),
    )
    return Memory(about, learned.sums, SHAPE)


def memory(recipe: Recipe = WHITENED, count: int = 4) -> Memory:
    return described(recipe, learn(recipe, SHAPE, IMAGE_SIZE, seen(count, recipe)))


@pytest.mark.parametrize("recipe", [WHITENED, NEAR, PLACED])
def test_what_is_written_is_read(tmp_path: Path, recipe: Recipe) -> None:
    made = memory(recipe)
    made.save(tmp_path / "memory.npz")
    read = Memory.load(tmp_path / "memory.npz", SHAPE)
    assert (read.about, read.name, len(read.name)) == (made.about, made.name, 12)
    for name, value in made.tensors.named().items():
        assert np.array_equal(value, read.tensors.named()[name]), name
    assert read.tensors.checked(SHAPE)


def contents(path: Path) -> Contents:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path: Path, members: Contents, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def with_about(path: Path, **values: object) -> None:
    members = contents(path)
    pack(path, {**members, ABOUT: json.dumps({**json.loads(members[ABOUT]), **values}).encode()})


def with_array(path: Path, name: str, array: NDArray[np.generic], pickled: bool = False) -> None:
    """Another array, whose hash the description has."""
    members = contents(path)
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    about = json.loads(members[ABOUT])
    members[f"{name}.npy"] = file.getvalue()
    about["arrays"][name] = hashlib.sha256(file.getvalue()).hexdigest()
    pack(path, {**members, ABOUT: json.dumps(about).encode()})


def patched(path: Path, offset_from_central: int, value: bytes) -> None:
    """Bytes of the central directory's first entry."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02") + offset_from_central
    data[start : start + len(value)] = value
    path.write_bytes(data)


def one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(ABOUT, b"{}")


def longer(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**40)


PRODUCTS = np.zeros((SHAPE.groups, SHAPE.width, SHAPE.width))
DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no memory"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[:700]),
    "a byte altered": one_byte,
    "an array altered": lambda path: pack(
        path, {**(c := contents(path)), "count.npy": c["count.npy"][:-8] + b"\0" * 8}
    ),
    "compressed": lambda path: pack(path, contents(path), zipfile.ZIP_DEFLATED),
    "a member more": lambda path: pack(path, {**contents(path), "more.npy": b""}),
    "a path outside": lambda path: pack(path, {**contents(path), "../count.npy": b""}),
    "a member less": lambda path: pack(path, {k: v for k, v in contents(path).items() if k != "count.npy"}),
    "no description": lambda path: pack(path, {k: v for k, v in contents(path).items() if k != ABOUT}),
    "two descriptions": twice,
    "a size that lies": lambda path: patched(path, 24, struct.pack("<I", 2**31)),
    "sizes beyond the end": lambda path: patched(path, 20, struct.pack("<II", 9000, 9000)),
    "encrypted": lambda path: patched(path, 8, b"\1"),
    "an unknown compression": lambda path: patched(path, 10, b"\x63"),
    "a terabyte": longer,
    "objects": lambda path: with_array(path, "count", np.array([{}], object), pickled=True),
    "not a number": lambda path: with_array(path, "products", PRODUCTS * np.nan),
    "too large": lambda path: with_array(path, "total", np.full(SHAPE.features, 1e300)),
    "no patches": lambda path: with_array(path, "count", np.zeros(1)),
    "no covariance": lambda path: with_array(path, "products", PRODUCTS - 1e6),
    "integers": lambda path: with_array(path, "count", np.ones(1, np.int64)),
    "another shape": lambda path: with_array(path, "total", np.ones(3)),
    "another mode": lambda path: with_about(path, mode=NEAREST),
    "no mode": lambda path: with_about(path, mode="best"),
    "no references": lambda path: with_about(path, references=[]),
    "a name with a line end": lambda path: with_about(path, device="cpu\nfbclip: all is well"),
    "a hash that is none": lambda path: with_about(path, model_sha256="x"),
    "a later format": lambda path: with_about(path, format=2),
    "an endless line": lambda path: with_about(path, map_line=float("inf")),
    "deep JSON": lambda path: pack(path, {**contents(path), ABOUT: b"[" * 100_000}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_memory_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "memory.npz"
    memory().save(path)
    DAMAGE[damage](path)
    with pytest.raises(BundleError, match=r"is no memory of this model: .*; run fbclip adapt again") as caught:
        Memory.load(path, SHAPE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_memory_of_another_shape_is_refused(tmp_path: Path) -> None:
    memory().save(tmp_path / "memory.npz")
    for other in (SHAPE._replace(width=16), SHAPE._replace(groups=1), SHAPE._replace(width=4)):
        with pytest.raises(BundleError, match="is no memory of this model"):
            Memory.load(tmp_path / "memory.npz", other)
    for missing in (tmp_path, tmp_path / "missing.npz"):
        with pytest.raises(BundleError, match="it is no file"):
            Memory.load(missing, SHAPE)
    with pytest.raises(UsageError, match="a memory for this model is float32"):
        memory().tensors.checked(SHAPE._replace(grid=3))


@pytest.mark.parametrize("recipe", [WHITENED, PLACED])
def test_to_add_is_to_learn_all_at_once(recipe: Recipe) -> None:
    all_of_them = seen(7, recipe)
    whole = described(recipe, learn(recipe, SHAPE, IMAGE_SIZE, all_of_them))
    first = described(recipe, learn(recipe, SHAPE, IMAGE_SIZE, all_of_them[:4]))
    added = described(recipe, learn(recipe, SHAPE, IMAGE_SIZE, all_of_them[4:], first))
    assert [each.name for each in added.about.references] == [each.name for each in whole.about.references]
    for name in ("matrix", "places", "bank"):
        np.testing.assert_allclose(getattr(added.tensors, name), getattr(whole.tensors, name), rtol=1e-5, atol=1e-6)
    # what is new was judged by all others; what was there, by those that were there
    assert [r.score for r in added.about.references[4:]] == pytest.approx([r.score for r in whole.about.references[4:]])
    assert [r.score for r in added.about.references[:4]] == [r.score for r in first.about.references]


def test_another_reference_makes_another_memory() -> None:
    one, two = memory(), memory(count=5)
    assert one.sha256 != two.sha256
    assert one.sha256 != replace(one, about=replace(one.about, score_line=0.0)).sha256
    assert one.sha256 == memory().sha256


def test_the_neutral_memory_is_the_zero_shot_model() -> None:
    neutral = Tensors.neutral(SHAPE).checked(SHAPE)
    weights = dict(zip(Weight, neutral.weights, strict=True))
    assert {name for name, value in weights.items() if value} == {Weight.MAP_ZERO_SHOT, Weight.SCORE_CLASS}


def test_remembered_tokens_leave_none_far_away() -> None:
    clusters = np.repeat(np.eye(SHAPE.features, dtype=np.float32)[:6], 40, axis=0)
    assert len(np.unique(coreset(clusters, 6), axis=0)) == 6
    assert coreset(clusters[:3], 6) is not None and len(coreset(clusters[:3], 6)) == 3


def test_one_reference_can_be_compared_with_nothing() -> None:
    with pytest.raises(UsageError, match="two good parts or more; got one"):
        learn(WHITENED, SHAPE, IMAGE_SIZE, seen(1, WHITENED))


def test_a_reference_that_stands_out_is_odd_and_counts_for_no_line() -> None:
    usual = seen(6, WHITENED)
    ((features, logits),) = usual[2].views()
    far = usual[2]._replace(name="odd.png", views=one_view(features, logits + 200))
    learned = learn(WHITENED, SHAPE, IMAGE_SIZE, [*usual, far])
    assert [each.name for each in learned.references if each.odd] == ["odd.png"]
    assert learned.score_line < learned.references[-1].score
    assert asdict(learned.references[0])["odd"] is False
