from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import Run

from fbclip.data.dataset import Item, Samples
from fbclip.data.procedural import ProceduralDefects
from fbclip.errors import FBClipError, UsageError
from fbclip.model.clip import ClipConfig, build_clip
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.training import loop as training
from fbclip.training import token_cache
from fbclip.training.step import Recipe, Trainer
from fbclip.training.token_cache import MISSING, STORED, UNREADABLE, TokenCache
from helpers.training import TINY, arguments, metrics, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen() -> FBCLIP:
    return tiny_model(train_tower=False)


def run(out: Path, cache: Path | None, **recipe: int) -> list[float]:
    execution = training.Execution(cache_tokens=cache)
    training.train(frozen(), ProceduralDefects(32, 10), Recipe(**{"epochs": 3, **recipe}), out, execution)
    return [row["total"] for row in metrics(out)]


def count_towers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that went through the tower, one entry per pass."""
    seen: list[int] = []
    whole = Trainer.tokens

    def tokens(self: Trainer, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.dtype == torch.uint8:
            seen.append(len(inputs))
        return whole(self, inputs)

    monkeypatch.setattr(Trainer, "tokens", tokens)
    return seen


def test_cached_tokens_give_the_same_losses_and_skip_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_towers(monkeypatch)
    plain = run(tmp_path / "plain", None)
    assert sum(seen) == 30
    seen.clear()
    cached = run(tmp_path / "cached", tmp_path / "tokens")
    assert sum(seen) == 10
    np.testing.assert_allclose(cached, plain, rtol=2e-3)
    again = run(tmp_path / "again", tmp_path / "tokens")
    assert sum(seen) == 10 and again == cached
    stored = np.load(tmp_path / "tokens/tokens.npy", mmap_mode="r")
    assert stored.shape == (10, 2, 17, 64) and stored.dtype == np.float16


def test_a_partial_cache_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole", tmp_path / "tokens")
    for name in ("state", "tokens"):  # as if killed after four images
        np.load(tmp_path / f"tokens/{name}.npy", mmap_mode="r+")[4:] = MISSING
    seen = count_towers(monkeypatch)
    assert run(tmp_path / "resumed", tmp_path / "tokens") == whole
    assert sum(seen) == 6


def test_the_key_tells_whatever_changes_a_token(tmp_path: Path) -> None:
    def key(model: FBCLIP, data: object, precision: str = "no") -> str:
        return token_cache.cache_key(model, data, precision)  # type: ignore[arg-type]

    data = ProceduralDefects(32, 10)
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 50, 3), 90, np.uint8))
    items = tuple(Item(tmp_path / f"{name}.png", 0, None, "part", "good", "test") for name in ("a", "b"))
    other_weights, other_noun = frozen(), frozen()
    with torch.no_grad():
        other_weights.visual.tower.blocks[0].mlp.c_fc.weight[0, 0] += 1  # type: ignore[index, union-attr, operator]
    other_noun.set_noun("bottle")
    config = ClipConfig("tiny", {**TINY, "quick_gelu": True})
    torch.manual_seed(0)
    other_activation = FBCLIP(default_config(config), build_clip(config, None))
    training.init_from_scratch(other_activation)
    keys = [
        key(frozen(), data),
        key(frozen(), data, "bf16"),
        key(other_weights, data),
        key(other_activation, data),
        key(frozen(), ProceduralDefects(32, 10, seed=1)),
        key(frozen(), ProceduralDefects(32, 11)),
        key(frozen(), Samples(items, 32)),
        key(frozen(), Samples(items[::-1], 32)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(other_noun, data) == keys[0]
    before = key(frozen(), Samples(items, 32))
    os.utime(items[1].image, (0, 0))
    assert key(frozen(), Samples(items, 32)) != before


def test_a_stale_cache_is_written_anew(tmp_path: Path) -> None:
    run(tmp_path / "one", tmp_path / "tokens")
    training.train(
        frozen(),
        ProceduralDefects(32, 4, seed=5),
        Recipe(epochs=1),
        tmp_path / "two",
        training.Execution(cache_tokens=tmp_path / "tokens"),
    )
    assert np.load(tmp_path / "tokens/state.npy").tolist() == [STORED] * 4


def test_an_unreadable_image_stays_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = []
    for name in "abcd":
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 50, 3), ord(name), np.uint8))
        items.append(Item(tmp_path / f"{name}.png", 0, None, "part", "good", "test"))
    items[2].image.write_bytes(b"no image")
    execution = training.Execution(cache_tokens=tmp_path / "tokens")
    took = training.train(frozen(), Samples(tuple(items), 32), Recipe(epochs=2), tmp_path / "run", execution)
    assert took.images == 6
    assert "c.png is no image" in capsys.readouterr().out
    assert np.load(tmp_path / "tokens/state.npy").tolist() == [STORED, STORED, UNREADABLE, STORED]


def test_refusals(fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        "--cache-tokens: a cache of tokens needs a frozen tower"
        in fbclip(*arguments(tmp_path, "run", 4), "--cache-tokens", "tokens", code=2).stderr
    )
    accelerator, data = training.accelerator_for("no"), ProceduralDefects(32, 10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with pytest.raises(UsageError, match="empty folder or an earlier cache"):
        TokenCache(tmp_path / "mine", frozen(), data, accelerator)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 53_000))
    with pytest.raises(UsageError, match=r"needs 0\.0 GB for 10 images.*0\.0 GB free"):
        TokenCache(tmp_path / "full", frozen(), data, accelerator)  # 10 · (2·17·64·2 + 32·32 + 1) = 53,770 bytes
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda path: usage(10**9, 0, 54_000))
    TokenCache(tmp_path / "full", frozen(), data, accelerator)
    monkeypatch.undo()
    big = frozen()
    with torch.no_grad():
        big.visual.tower.blocks[1].mlp.c_proj.bias += 1e6  # type: ignore[union-attr, operator]
    with pytest.raises(FBClipError, match="do not fit float16"):
        training.train(big, data, Recipe(), tmp_path / "big", training.Execution(cache_tokens=tmp_path / "t"))


def test_a_changed_note_is_no_cache(tmp_path: Path) -> None:
    run(tmp_path / "one", tmp_path / "tokens", epochs=1)
    note = json.loads((tmp_path / "tokens/cache.json").read_text())
    (tmp_path / "tokens/cache.json").write_text(json.dumps({**note, "format": 0}))
    cache = TokenCache(tmp_path / "tokens", frozen(), ProceduralDefects(32, 10), training.accelerator_for("no"))
    assert cache.missing == list(range(10))


@pytest.mark.parametrize("file", ["cache.json", "tokens.npy", "state.npy"])
def test_a_damaged_cache_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    whole = run(tmp_path / "one", tmp_path / "tokens", epochs=1)
    damaged = tmp_path / "tokens" / file
    damaged.write_bytes(damaged.read_bytes()[:20] + b"\xff")
    seen = count_towers(monkeypatch)
    assert run(tmp_path / "two", tmp_path / "tokens", epochs=1) == whole
    assert sum(seen) == 10


def test_the_room_of_a_cache_is_taken_at_once(tmp_path: Path) -> None:
    """A page that is written later and finds the disk full would end the process with SIGBUS."""
    cache = TokenCache(tmp_path / "tokens", frozen(), ProceduralDefects(32, 10), training.accelerator_for("no"))
    assert cache.missing == list(range(10))
    for name in cache.layout:
        status = (tmp_path / f"tokens/{name}.npy").stat()
        assert status.st_blocks * 512 >= status.st_size


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't write"):
        TokenCache(tmp_path / "file/tokens", frozen(), ProceduralDefects(32, 10), training.accelerator_for("no"))
