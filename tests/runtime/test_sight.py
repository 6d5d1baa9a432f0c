"""Frames that show nothing which good parts could judge: dark, bright, green, out of focus."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rich.console import Console

from fbclip.bundle import Bundle
from fbclip.runtime.calibrate import calibrate
from fbclip.runtime.calibration import Calibration
from fbclip.runtime.predictor import Predictor
from fbclip.runtime.sight import EXPLAINED, Look, Usual, look
from fbclip.tasks import adapt
from fbclip.tasks import calibrate as calibrate_bundle
from fbclip.untrusted import build

Picture = NDArray[np.uint8]
HEIGHT, WIDTH = 480, 640


def plate(seed: int, blur: float = 0.5, gain: float = 1.0, noise: float = 3.0) -> Picture:
    """A lettered plate somewhere on a belt, from a camera with a sensor's noise."""
    rng = np.random.default_rng(seed)
    drawn = np.full((HEIGHT, WIDTH), 50, np.uint8)
    x, y = (int(each) for each in rng.integers((20, 20), (240, 160)))
    cv2.rectangle(drawn, (x, y), (x + 360, y + 280), 120, -1)
    cv2.circle(drawn, (x + 290, y + 80), 40, 50, -1)
    cv2.putText(drawn, "A-17", (x + 30, y + 200), cv2.FONT_HERSHEY_SIMPLEX, 3, 85, 8, cv2.LINE_AA)
    image = cv2.GaussianBlur(drawn.astype(np.float32), (0, 0), blur) * gain + noise * rng.standard_normal(drawn.shape)
    return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def stained(image: Picture) -> Picture:
    """With a large dark stain that has no sharp edge."""
    spot = np.zeros((HEIGHT, WIDTH), np.float32)
    cv2.circle(spot, (330, 250), 70, 1, -1)
    return np.asarray(image * (1 - 0.9 * cv2.GaussianBlur(spot, (0, 0), 15)[..., None]), np.uint8)


@pytest.fixture(scope="module")
def usual() -> Usual:
    learned = Usual.learn([look(plate(seed)) for seed in range(12)])
    assert learned is not None
    return learned


@pytest.mark.parametrize(
    ("fault", "image"),
    [
        ("blurred", plate(50, blur=2)),
        ("blurred", plate(51, blur=3)),
        ("blurred", plate(52, blur=8)),
        ("dark", plate(53, gain=0.2)),
        ("bright", plate(54, gain=3)),
        (None, plate(55)),
        (None, plate(56, gain=0.8)),
        (None, plate(57, gain=1.2)),
        (None, stained(plate(58))),
        (None, plate(59, noise=6)),
    ],
)
def test_what_good_parts_say_of_a_frame(usual: Usual, fault: str | None, image: Picture) -> None:
    assert usual.find_fault(look(image)) == fault
    assert fault is None or fault in EXPLAINED


@pytest.mark.parametrize("share", [0.25, 0.5, 1])
@pytest.mark.parametrize(
    "empty",
    [
        cv2.cvtColor(np.zeros((4, 4, 3), np.uint8), cv2.COLOR_YCrCb2RGB)[0, 0],
        cv2.cvtColor(np.zeros((6, 4), np.uint8), cv2.COLOR_YUV2RGB_I420)[0, 0],
        cv2.cvtColor(np.zeros((4, 4, 2), np.uint8), cv2.COLOR_YUV2RGB_YUY2)[0, 0],
        (0, 76, 0),  # FFmpeg's of BT.709
    ],
    ids=str,
)
def test_what_a_decoder_has_no_data_for(usual: Usual, empty: tuple[int, int, int], share: float) -> None:
    image = plate(60)
    image[int(HEIGHT * (1 - share)) :] = empty
    assert usual.find_fault(look(image)) == "green"


def test_green_parts_are_usual() -> None:
    """A part that happens to have that green, drawn without noise, is as good as any."""
    image = plate(61)
    image[HEIGHT // 2 :] = (0, 135, 0)
    learned = Usual.learn([look(image)] * 5)
    assert learned is not None
    assert learned.find_fault(look(image)) is None


def test_sharpness_is_of_the_lens() -> None:
    """It falls with defocus as of a step edge, wherever the part lies, and neither light nor noise changes it much."""
    for sigma in (1.5, 2, 3, 4):
        seen = [look(plate(seed, blur=sigma)).sharpness for seed in range(6)]
        assert np.median(seen) == pytest.approx(np.log2((sigma**2 + 9) / (sigma**2 + 1)), abs=0.25)
        assert np.ptp(seen) < 0.3
    sharp = look(plate(7)).sharpness
    for other in (plate(7, gain=0.5), plate(7, gain=2), plate(7, noise=1), plate(7, noise=8), plate(8)):
        assert look(other).sharpness == pytest.approx(sharp, abs=0.4)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 9), (64, 64), (5000, 20_000)])
def test_a_look_is_bounded_whatever_the_frame(size: tuple[int, int]) -> None:
    frame = np.broadcast_to(np.array((200, 30, 90), np.uint8), (*size, 3))
    tracemalloc.start()
    try:
        seen = look(frame)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert (seen.blown, seen.green, seen.sharpness) == pytest.approx((0, 0, 0), abs=1e-3)
    assert seen.light == pytest.approx(0.299 * 200 + 0.587 * 30 + 0.114 * 90, abs=1)


LOOKS = st.builds(Look, st.floats(0, 255), st.floats(0, 1), st.floats(0, 1), st.floats(-36, 36))


@given(looks=st.lists(LOOKS, min_size=5, max_size=40))
def test_what_was_learned_from_is_usual(looks: list[Look]) -> None:
    learned = Usual.learn(looks)
    assert learned is not None
    assert [learned.find_fault(each) for each in looks] == [None] * len(looks)
    assert build(Usual, json.loads(json.dumps(asdict(learned)))) == learned  # every bound in its range


def test_few_frames_do_not_say_how_far_good_ones_go() -> None:
    assert Usual.learn([look(plate(seed)) for seed in range(4)]) is None


def test_real_photographs(real_images: Path) -> None:
    """Of parts in any light and focus: hardly a good one and hardly a defect is unusable."""

    def looks(pattern: str) -> list[Look]:
        return [look(np.asarray(cv2.imread(str(path)), np.uint8)) for path in sorted(real_images.glob(pattern))]

    learned = Usual.learn(looks("train/good/*"))
    assert learned is not None
    for pattern in ("good/*", "[!g]*/*"):
        seen = looks(f"test/{pattern}")
        assert len(seen) > 10
        assert sum(learned.find_fault(each) is not None for each in seen) <= 0.01 * len(seen)


def write(folder: Path, pictures: list[Picture]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number:02}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        cv2.imwrite(str(path), picture)
    return paths


def test_a_camera_out_of_focus(fbclip: Run, tmp_path: Path) -> None:
    """The real command: an unusable picture isn't judged, and is told with its cure."""
    write(tmp_path / "good", [plate(seed) for seed in range(12)])
    write(tmp_path / "new", [plate(20), plate(20, blur=4), plate(20, gain=0.2)])
    fbclip("calibrate", "good", "--name", "line")
    seen = json.loads((tmp_path / "line.fbclip" / "calibration.json").read_text())["usual"]
    assert seen.keys() == asdict(Look(0, 0, 0, 0)).keys() - {"light"} | {"darkest", "brightest"}
    records = map(
        json.loads, fbclip("infer", "new/00.png", "--bundle", "line.fbclip", "--json", "-").stdout.splitlines()
    )
    assert [record["unusable"] for record in records if record["kind"] == "result"] == [None]
    for name, fault in (("01", "blurred"), ("02", "dark")):
        done = fbclip("infer", f"new/{name}.png", "--bundle", "line.fbclip", code=2)
        assert " ".join(EXPLAINED[fault].split()[:4]) in " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Calibration]:
    """A bundle that frames of a camera calibrated in a region."""
    folder = tmp_path_factory.mktemp("sight")
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, folder / "part.fbclip"))
    predictor = Predictor(bundle, roi=(40, 40, 600, 440))
    calibration, _, _ = calibrate(predictor, [plate(seed) for seed in range(12)], None, [], Console(quiet=True))
    calibration.save(bundle)
    return bundle, calibration


def test_frames_are_judged_in_the_region(line: tuple[Bundle, Calibration]) -> None:
    predictor = Predictor(line[0], roi=(40, 40, 600, 440))
    beside = plate(30)
    beside[:40] = beside[:, 600:] = (0, 135, 0)
    assert predictor(beside).unusable is None
    assert predictor(plate(30, blur=4)).to_dict()["unusable"] == "blurred"
    elsewhere = Predictor(line[0], threshold=0.5)  # whose frames look otherwise
    assert elsewhere(plate(30, blur=4)).unusable is None
    assert Predictor(line[0], calibrated=False)(plate(30, blur=4)).unusable is None


def test_calibrations_of_older_releases_say_nothing(line: tuple[Bundle, Calibration], tmp_path: Path) -> None:
    bundle = Bundle.load(shutil.copytree(line[0].path, tmp_path / "old.fbclip"))
    replace(line[1], usual=None).save(bundle)
    assert "usual" not in json.loads(bundle.calibration.read_text())
    assert Predictor(bundle, roi=(40, 40, 600, 440))(plate(30, blur=4)).unusable is None


def test_what_a_memory_was_learned_from_says_it_too(tmp_path: Path) -> None:
    images = write(tmp_path / "good", [plate(seed) for seed in range(8)])
    path = adapt(None, images, out=tmp_path / "line.fbclip").bundle.path
    made = calibrate_bundle(path, images).calibration
    assert made.method == "jackknife"
    assert made.usual == Usual.learn([look(plate(seed)) for seed in range(8)])
    assert Predictor(path)(plate(30, blur=4)).unusable == "blurred"


def test_frames_without_the_part_are_no_good_parts(tmp_path: Path) -> None:
    """They teach neither the threshold nor how good parts look; and their own look, of a belt, is no fault."""
    bundle = Bundle.load(shutil.copytree(Bundle.load().path, tmp_path / "part.fbclip"))
    predictor = Predictor(bundle, align=plate(1))
    belt = np.full((HEIGHT, WIDTH, 3), 50, np.uint8)
    belt[:, :] += np.random.default_rng(0).integers(0, 6, (HEIGHT, WIDTH, 1), np.uint8)
    console = Console(quiet=True)
    calibration, good, _ = calibrate(predictor, [plate(seed) for seed in range(2, 10)] + [belt], None, [], console)
    assert (calibration.count, good.absent, len(good.looks)) == (8, 1, 8)
    calibration.save(bundle)
    judged = Predictor(bundle, align=plate(1))
    assert (judged(belt).verdict, judged(belt).unusable) == ("absent", None)
    assert judged(plate(11)).unusable is None
    assert judged(plate(11, gain=0.3)).unusable == "dark"
