"""Frames that are looked at in tiles: how they are cut, what comes of them, and that what was taught counts there alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

import fbclip
from fbclip.commands import groups
from fbclip.data.procedural import ProceduralDefects
from fbclip.errors import ImageError, UsageError
from fbclip.memory import Memory
from fbclip.metrics import PRO_LIMITS
from fbclip.resample import resize
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.tiles import DETAIL, MOST_TILES, Layout, Tiles, _Mosaic, combined

GRID = 24  # patches along a side of the included model's input


@pytest.fixture(scope="module")
def plain() -> Iterator[Predictor]:
    with Predictor(memory=None) as predictor:
        yield predictor


def large(seed: int, height: int = 300, width: int = 420) -> NDArray[np.uint8]:
    """A rendered surface."""
    image = ProceduralDefects(max(height, width), 64, seed=3, defective_share=0)[seed].image
    return np.ascontiguousarray(image[:height, :width])


@pytest.mark.parametrize(
    ("text", "grid", "side"),
    [("3x4", (3, 4), None), (" 2 X 2 ", (2, 2), None), ("512", None, 512), (512, None, 512), ("auto", None, None)],
)
def test_tiles_as_people_ask_for_them(text: str | int, grid: tuple[int, int] | None, side: int | None) -> None:
    tiles = Tiles.parse(text)
    assert (tiles.grid, tiles.side) == (grid, side)
    assert Tiles.parse(tiles) is tiles


@pytest.mark.parametrize("text", ["", "0x3", "3x0", "x", "3", "-512", "70000", "999x999", "1e3", "3x4x5", None])
def test_tiles_that_are_none(text: object) -> None:
    with pytest.raises(UsageError, match="tiles are ROWSxCOLUMNS like 3x4"):
        Tiles.parse(text)  # type: ignore[arg-type]


def test_what_goes_with_tiles_has_bounds() -> None:
    for overlap in (-0.1, 0.8, float("nan")):
        with pytest.raises(UsageError, match=r"an overlap is a share of a tile's side, 0 to 0\.75"):
            Tiles.parse("2x2", overlap)
    with pytest.raises(UsageError, match="a detail is the pixels"):
        Tiles.parse("auto", detail=0.5)
    with pytest.raises(UsageError, match="a detail is for tiles that are chosen by it"):
        Tiles.parse("2x2", detail=8)
    with pytest.raises(ImageError, match=f"at most {MOST_TILES:,} tiles"):
        Tiles.parse("16").cut(20_000, 20_000, GRID)
    with pytest.raises(ImageError, match="16 pixels a side or more; 100x100"):
        Tiles.parse("100x100").cut(500, 500, GRID)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("tiles", ["1x1", "1x7", "3x4", "64", "auto"])
@pytest.mark.parametrize("hw", [(300, 421), (97, 1500), (120, 120)])
def test_tiles_cover_a_frame_and_their_windows_add_up_to_one(hw: tuple[int, int], tiles: str, overlap: float) -> None:
    layout = Tiles.parse(tiles, overlap, 4 if tiles == "auto" else None).cut(*hw, GRID)
    if layout is None:
        return
    total = np.zeros(hw, np.float64)
    down, across = layout.windows()
    for number, (x0, y0, x1, y1) in enumerate(layout.boxes):
        assert (y1 - y0, x1 - x0) == layout.tile_hw
        row, column = divmod(number, len(layout.lefts))
        total[y0:y1, x0:x1] += down[row][:, None] * across[column]
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (layout.tops[-1] + layout.tile_hw[0], layout.lefts[-1] + layout.tile_hw[1]) == hw
    for starts, side in zip((layout.tops, layout.lefts), layout.tile_hw, strict=True):
        assert all(0 < b - a <= side * (1 - overlap) + 1 for a, b in pairwise(starts))


def test_the_help_names_the_usual_detail() -> None:
    assert groups.DETAIL == DETAIL


def test_auto_makes_patches_of_at_most_the_detail() -> None:
    layout = Tiles.parse("auto", detail=8).cut(3000, 4000, GRID)
    assert layout and layout.tile_hw == (192, 192)  # the included model's own size: nothing is resized
    assert Tiles.parse("auto", detail=200).cut(3000, 4000, GRID) is None  # the whole frame has that already
    narrow = Tiles.parse("auto", detail=32).cut(100, 4000, GRID)
    assert narrow and narrow.tile_hw == (100, 100)


def test_more_tiles_dont_mean_a_higher_score() -> None:
    rng = np.random.default_rng(0)
    for count in (4, 64, 1024):  # odds of mean 1 where nothing is wrong: the mean of odds has the same mean
        odds = rng.exponential(1, (4000, count + 1))
        scores = (odds / (1 + odds)).astype(np.float32)
        alarms = np.mean([combined(each) >= 0.9 for each in scores])
        assert alarms <= 1 / 9, count  # Markov's bound for odds of 9
    assert combined(np.full(50, 0.25, np.float32)) == np.float32(0.25)
    assert combined(np.array([0.1, 0.1, 1.0, 0.1], np.float32)) > 0.999
    assert combined(np.array([0, 0, 0], np.float32)) == 0


def test_a_map_has_no_seams() -> None:
    """A picture of smooth values, cut, and put together again."""
    layout = Tiles.parse("3x4").cut(300, 420, GRID)
    assert layout
    y, x = np.mgrid[:300, :420]
    smooth = (0.3 + 0.2 * np.sin(x / 60) * np.cos(y / 45)).astype(np.float32)
    mosaic = _Mosaic(layout)
    for number, (x0, y0, x1, y1) in enumerate(layout.boxes):
        mosaic.add(number, smooth[y0:y1, x0:x1])
    found = mosaic.finish(np.full((8, 8), 0.3, np.float32))
    odds = (smooth / (1 - smooth) + 3 / 7) / 2
    np.testing.assert_allclose(found, odds / (1 + odds), atol=1e-6)


def test_a_frame_in_tiles_is_what_the_model_says_of_them(plain: Predictor) -> None:
    frame = large(0)
    with Predictor(memory=None, tiles="2x3", batch=3) as predictor:
        found = predictor(frame)
    layout = Tiles.parse("2x3").cut(300, 420, GRID)
    assert layout and found.tiles == layout.boxes and len(found.tiles) == 6
    crops = [frame, *(frame[y0:y1, x0:x1] for x0, y0, x1, y1 in layout.boxes)]
    scores, maps = plain.backend.run(np.stack([resize(np.ascontiguousarray(crop), 192) for crop in crops]))
    odds = (scores / (1 - scores)).astype(float)
    mean = odds.mean()
    assert found.score == pytest.approx(mean / (1 + mean), abs=1e-6)
    assert found.anomaly_map.shape == (300, 420)
    mosaic = _Mosaic(layout)
    for number, each in enumerate(maps[1:]):
        mosaic.add(number, each)
    np.testing.assert_allclose(found.anomaly_map, mosaic.finish(maps[0]), atol=1e-6)


def test_a_frame_no_larger_than_a_tile_is_looked_at_as_without(plain: Predictor) -> None:
    frame = large(1, 180, 180)
    with Predictor(memory=None, tiles="auto") as predictor:
        found, expected = predictor(frame), plain(frame)
    assert found.score == expected.score and found.tiles == ()
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_a_region_of_interest_is_cut_itself() -> None:
    frame = large(2)
    with (
        Predictor(memory=None, tiles="2x2", roi="100,60,400,280") as within,
        Predictor(memory=None, tiles="2x2") as alone,
    ):
        found, expected = within(frame), alone(np.ascontiguousarray(frame[60:280, 100:400]))
    assert found.score == expected.score
    np.testing.assert_array_equal(found.anomaly_map[60:280, 100:400], expected.anomaly_map)
    assert found.tiles[0][:2] == (100, 60) and not found.anomaly_map[:60].any()


def test_the_map_of_a_moved_frame_is_the_moved_map() -> None:
    """Within bounds: the model sees another cut. Neighbouring pixels differ no more where tiles meet than elsewhere."""
    wide = large(4, 384, 1152)
    side, half = 192, 96
    with Predictor(memory=None, tiles=Tiles.parse(side, 0.5)) as predictor:
        first = predictor(np.ascontiguousarray(wide[:, :960])).anomaly_map
        moved = predictor(np.ascontiguousarray(wide[:, half : 960 + half])).anomaly_map
    inner = np.abs(first[:, half:] - moved[:, :-half])[:, side:-side]
    assert inner.mean() < 0.03 and inner.max() < 0.25
    steps = np.abs(np.diff(first, axis=1)).max(axis=0)
    borders = steps[half - 1 :: half]
    assert borders.max() <= steps.max() and steps.max() < 0.05


def test_tiles_are_refused_where_a_graph_takes_whole_frames() -> None:
    bundle = fbclip.Bundle.load()
    of_frames = replace(bundle, manifest=replace(bundle.manifest, frame_size=(480, 640)))
    with pytest.raises(UsageError, match=r"tiles are for models .* takes 480x640"):
        Predictor(of_frames, tiles="2x2")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "good"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(large(10 + number, 200, 280)).save(folder / f"{number}.png")
    return folder


def test_what_was_taught_in_tiles_counts_in_these_alone(fbclip: Run, good: Path, tmp_path: Path) -> None:
    fbclip("adapt", good, "--tiles", "1x2", "--out", "line.fbclip")
    bundle = ("--bundle", "line.fbclip", "--no-save")
    refused = fbclip("infer", good, *bundle, code=2).stderr
    assert "--tiles: memory" in refused and "for whole frames and tiles of 1x2, overlap 0.25" in refused
    fbclip("calibrate", good, *bundle[:2], "--tiles", "1x2", "--false-alarm-rate", "0.3")
    stored = json.loads((tmp_path / "line.fbclip" / "calibration.json").read_text())
    assert stored["tiles"] == "1x2, overlap 0.25" and "align" not in stored
    fbclip("infer", good, *bundle, "--tiles", "1x2", "--json", "found.jsonl")
    refused = fbclip("infer", good, *bundle, "--tiles", "1x2", "--overlap", "0.5", code=2).stderr
    assert "--tiles: memory" in refused
    refused = fbclip("infer", good, *bundle, "--tiles", "1x2", "--overlap", "0.5", "--memory", "off").stdout
    assert "the calibration is of another memory" in refused


def test_each_place_has_expectations_of_its_own(good: Path, tmp_path: Path) -> None:
    paths = sorted(good.iterdir())
    done = fbclip.adapt(None, paths[:3], tiles="1x2", positions=1, out=tmp_path / "placed.fbclip")
    memory = done.memory
    assert memory and memory.about.views == 3 and memory.sums["places"].shape == (3, GRID**2, 256)
    kept = Memory.load(done.bundle.memory_file, memory.shape)
    assert kept.sha256 == memory.sha256
    for view in range(3):
        np.testing.assert_array_equal(kept.tensors_of(view).places, memory.tensors_of(view).places)
    assert (kept.tensors_of(1).places != kept.tensors_of(2).places).any()
    with Predictor(done.bundle, tiles="1x2") as predictor:
        mirrored = np.ascontiguousarray(np.asarray(Image.open(paths[0]))[:, ::-1])
        same, other = predictor(paths[0]), predictor(mirrored)  # each of whose tiles lies in another's place
        assert same.score < other.score
        with pytest.raises(ImageError, match="knows each place of frames with 2 tiles; this frame has 3"):
            predictor.memory.require_views(4)  # type: ignore[union-attr]
        predictor(np.full((200, 280, 3), 128, np.uint8))  # shows nothing: it is looked at whole
        assert predictor(paths[0]).score == same.score
    one = fbclip.adapt(None, paths[:1], tiles="1x2", positions=1, out=tmp_path / "one.fbclip")
    assert one.memory and len(one.memory.about.references) == 1


def test_a_memory_of_whole_frames_keeps_the_name_that_older_releases_gave_it(good: Path, tmp_path: Path) -> None:
    done = fbclip.adapt(None, sorted(good.iterdir()), out=tmp_path / "whole.fbclip")
    assert done.memory
    import zipfile

    with zipfile.ZipFile(done.bundle.memory_file) as archive:
        about = json.loads(archive.read("about.json"))
    assert not {"tiles", "align", "views"} & about.keys()


def test_a_mode_is_not_tried_in_tiles(good: Path) -> None:
    with pytest.raises(UsageError, match="a mode is tried on whole frames"):
        fbclip.adapt(None, good, tiles="1x2", mode="auto")


def test_eval_and_bench_have_tiles(fbclip: Run, tmp_path: Path) -> None:
    for kind, share in (("good", 0.0), ("spot", 1.0)):
        (tmp_path / "data" / "test" / kind).mkdir(parents=True)
        for number in range(2):
            sample = ProceduralDefects(240, 8, seed=1, defective_share=share)[number]
            Image.fromarray(sample.image).save(tmp_path / "data" / "test" / kind / f"{number}.png")
            if share and sample.mask is not None:
                (tmp_path / "data" / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                mask = Image.fromarray(sample.mask * np.uint8(255))
                mask.save(tmp_path / "data" / "ground_truth" / kind / f"{number}_mask.png")
    fbclip("eval", "data", "--tiles", "2x2", "--no-report", "--project", "runs")
    results = json.loads(next((tmp_path / "runs").rglob("results.json")).read_text())
    assert "2x2, overlap 0.25" in json.dumps(results)
    assert f"aupro_{PRO_LIMITS[0]:g}" in json.dumps(results)
    fbclip(
        "bench",
        "--tiles",
        "2x2",
        "--resolution",
        "400x300",
        "--runs",
        3,
        "--backends",
        "onnxruntime",
        "--json",
        "b.json",
    )
    report = json.loads((tmp_path / "b.json").read_text())
    assert "in 4 tiles (2x2, overlap 0.25)" in report["frames"]["source"]
    assert "pass a resolution" in fbclip("bench", "--tiles", "auto", "--runs", 3, code=2).stderr
    refused = fbclip("bench", "--tiles", "auto", "--runs", 3, "--resolution", "300x200", code=2).stderr
    assert "are no larger than a tile" in refused


def test_layouts_are_the_same_for_frames_of_the_same_size() -> None:
    assert isinstance(first := Tiles.parse("2x2").cut(100, 100, GRID), Layout)
    assert Tiles.parse("2x2").cut(100, 100, GRID) is first
