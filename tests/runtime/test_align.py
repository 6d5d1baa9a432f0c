"""Parts that move: found where they lie, absent where they don't, and inspected as they lie in the picture of the part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from fbclip.errors import UsageError
from fbclip.runtime.align import Align
from fbclip.runtime.predictor import Predictor
from helpers.moved import HOME, SIDE, Frame, Matrix, board, lying, mask, photograph, points

PART = board()
PLACES = {
    "as it was": lying(),
    "shifted": lying(x=200, y=180),
    "turned a little": lying(5),
    "turned": lying(-40, x=340),
    "turned by a right angle": lying(90),
    "upside down": lying(180, x=300),
    "smaller": lying(10, 0.8),
    "larger": lying(-15, 1.2),
    "in perspective": lying(20, 1, slant=0.12),
}


@pytest.fixture(scope="module")
def align() -> Align:
    return Align.parse(photograph(PART, HOME), mask())


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_the_part_is_found_wherever_it_lies(align: Align, place: Matrix) -> None:
    for light, seed in ((1.0, 1), (0.6, 2), (1.3, 3)):
        pose = align.find(photograph(PART, place, light, seed))
        assert pose
        assert np.linalg.norm(points(pose.matrix @ HOME) - points(place), axis=1).max() < 2  # pixels
        area = np.abs(np.cross(*np.diff(points(place)[[1, 0, 3]], axis=0)))
        assert pose.scale == pytest.approx(np.sqrt(area) / SIDE, rel=0.1)


def test_a_defect_hides_no_part(align: Align) -> None:
    broken = PART.copy()
    broken[60:120, 40:150] = 255
    pose = align.find(photograph(broken, lying(25)))
    assert pose
    assert np.linalg.norm(points(pose.matrix @ HOME) - points(lying(25)), axis=1).max() < 2


@pytest.mark.parametrize("kind", ["empty", "another", "half outside", "black"])
def test_no_part_is_no_pose(align: Align, kind: str) -> None:
    for seed in range(8):
        part = {"empty": None, "another": board(7 + seed), "half outside": PART, "black": None}[kind]
        place = lying(10 * seed, x=0) if kind == "half outside" else lying(10 * seed)
        frame = photograph(part, place, seed=seed)
        assert align.find(np.zeros_like(frame) if kind == "black" else frame) is None


def test_the_same_frame_has_the_same_pose_from_any_thread(align: Align) -> None:
    frame = photograph(PART, lying(33, 0.9))
    first = align.find(frame)
    assert first
    with ThreadPoolExecutor(4) as pool:
        for pose in pool.map(align.find, [frame] * 8):
            assert pose and (pose.matrix == first.matrix).all()


def test_maps_and_masks_go_to_the_reference_and_back(align: Align) -> None:
    frame = photograph(PART, lying(30, 1.1))
    pose = align.find(frame)
    assert pose
    back = pose.onto_reference(frame, (0, 0, 640, 480))
    inside = mask() > 0
    assert np.abs(back.astype(float) - align.image)[inside].mean() < 12  # of 255 grey levels, noise and light included
    part = pose.onto_reference(frame, (192, 112, 448, 368))
    assert np.abs(back[112:368, 192:448].astype(int) - part).max() <= 1  # OpenCV's steps of 1/32 pixel
    spot = np.zeros((480, 640), np.float32)
    spot[200:210, 300:310] = 0.8
    found = pose.onto_frame(spot, (480, 640))
    y, x = np.argwhere(found > 0.4).mean(0)
    assert pose.place((x + 0.5, y + 0.5)) == pytest.approx((305 / 640, 205 / 480), abs=0.003)
    assert set(np.unique(pose.onto_frame(mask(), (480, 640)))) == {0, 1}


def refused_reference(image: Frame, part: object = None) -> str:
    with pytest.raises(UsageError) as error:
        Align.parse(image, part)  # type: ignore[arg-type]
    return str(error.value)


def test_pictures_that_are_no_reference(tmp_path: Path) -> None:
    reference = photograph(PART, HOME)
    assert "shows too few" in refused_reference(np.full((480, 640, 3), 90, np.uint8))
    y, x = np.mgrid[:480, :640]
    ring = np.where(abs(np.hypot(x - 320, y - 240) - 120) < 30, 150, 50).astype(np.uint8)
    assert "looks the same when it is turned" in refused_reference(np.repeat(ring[..., None], 3, axis=2))
    assert "the size of its picture, 640x480; got 10x20" in refused_reference(reference, np.ones((20, 10), np.uint8))
    assert "black all over" in refused_reference(reference, np.zeros((480, 640), np.uint8))
    assert "a mask is uint8 (H, W)" in refused_reference(reference, np.ones((480, 640)))
    with pytest.raises(UsageError, match="no picture of the part"):
        Align.parse(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match=r"a picture is uint8 \(H, W, 3\)"):
        Align.parse(reference[..., 0])


@pytest.fixture(scope="module")
def predictor(align: Align) -> Iterator[Predictor]:
    with Predictor(memory=None, align=align) as found:
        yield found


def test_a_frame_is_inspected_where_the_part_lies(predictor: Predictor) -> None:
    place = lying(35, 0.9, x=260, y=230)
    found = predictor(photograph(PART, place))
    assert found.verdict in ("good", "defect") and not found.absent
    assert found.part is not None and found.anomaly_map.shape == (480, 640)
    corners = points(place)
    assert np.linalg.norm(found.part - corners, axis=1).max() < 16  # the mask leaves eight pixels around the part
    outside = np.ones((480, 640), bool)
    x0, y0 = np.floor(found.part.min(0)).astype(int) - 1
    x1, y1 = np.ceil(found.part.max(0)).astype(int) + 1
    outside[max(y0, 0) : y1, max(x0, 0) : x1] = False
    assert not found.anomaly_map[outside].any()
    # what the model says is of the part in its place, however it lies
    home = predictor(photograph(PART, HOME))
    assert found.score == pytest.approx(home.score, abs=0.1)


def test_a_frame_without_the_part_is_absent(predictor: Predictor) -> None:
    found = predictor(photograph(None, lying()))
    assert (found.verdict, found.absent, found.regions, found.part) == ("absent", True, (), None)
    assert found.is_anomalous and not found.anomaly_map.any()


def test_places_and_sizes_are_of_the_part(align: Align) -> None:
    """A hole of 24 x 24 pixels, which are 1.2 x 1.2 mm, at (150, 60) of a part of 240 x 240."""
    spotted = PART.copy()
    spotted[60:84, 150:174] = 255
    areas = []
    for place in (lying(), lying(70, 1.2)):
        with Predictor(memory=None, align=align, mm_per_pixel=0.05, threshold=0.0) as predictor:
            found = predictor(photograph(spotted, place))
            assert found.regions and found.regions[0].place is not None
            areas.append(sum(region.area_mm2 or 0 for region in found.regions))
    assert areas[1] == pytest.approx(areas[0], rel=0.1)  # with a threshold of 0 it is all that is inspected


def test_a_mask_and_a_region_are_one_too_many() -> None:
    reference = photograph(PART, HOME)
    with pytest.raises(UsageError, match="the part's mask is the region of interest; got another one"):
        Predictor(align=Align.parse(reference, mask()), roi=(0, 0, 50, 50))
    with pytest.raises(UsageError, match="the region lies in its picture, of 640x480"):
        Predictor(align=reference, roi=(0, 0, 800, 50))


def test_what_was_taught_counts_for_this_picture_of_the_part(fbclip: Run, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    for number in range(4):
        frame = photograph(PART, lying(20 * number, 0.9 + 0.05 * number), seed=number)
        Image.fromarray(frame).save(tmp_path / "good" / f"{number}.png")
    Image.fromarray(photograph(PART, HOME)).save(tmp_path / "part.png")
    Image.fromarray(photograph(PART, HOME, seed=9)).save(tmp_path / "other.png")
    Image.fromarray(mask() * np.uint8(255)).save(tmp_path / "mask.png")
    Image.fromarray(photograph(None, HOME)).save(tmp_path / "empty.png")
    here = ("--align", "part.png", "--mask", "mask.png")
    fbclip("adapt", "good", *here, "--positions", 1, "--out", "line.fbclip")
    fbclip("calibrate", "good", *here, "--bundle", "line.fbclip", "--false-alarm-rate", 0.3)
    stored = json.loads((tmp_path / "line.fbclip" / "calibration.json").read_text())
    assert stored["align"].startswith("a picture of the part (sha256 ")
    bundle = ("--bundle", "line.fbclip", "--no-save")
    assert "good" in fbclip("infer", "good/0.png", *bundle, *here).stdout
    assert "--align: memory" in fbclip("infer", "good", *bundle, code=2).stderr
    assert "--align: memory" in fbclip("infer", "good", *bundle, "--align", "other.png", code=2).stderr
    assert (
        "--align: a mask of the part goes with a picture"
        in fbclip("infer", "good", "--mask", "mask.png", code=2).stderr
    )
    done = fbclip("infer", "empty.png", "good/1.png", *bundle, *here, "--json", "out.jsonl", code=2)
    verdicts = [json.loads(line)["verdict"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert verdicts == ["absent", "good"], done.stdout
    assert (
        "left out: empty.png"
        in fbclip("calibrate", "good", "empty.png", *here, "--bundle", "line.fbclip", code=0).stdout
    )
