"""`fbclip eval` on miniature trees, as installed; undefined figures, broken files, the report's escaping."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score

from fbclip.assets import EMBEDDED, NANO
from fbclip.bundle import Bundle
from fbclip.data.dataset import Dataset, Item, file_digest
from fbclip.data.holdout import Seen
from fbclip.errors import UsageError
from fbclip.files import sha256
from fbclip.runtime.evaluation.evaluate import (
    PICTURE_SIDE,
    PICTURES,
    VALUES,
    Evaluation,
    Subject,
    evaluate,
    to_evaluate,
)
from fbclip.runtime.evaluation.html import write_report
from fbclip.runtime.evaluation.tables import show, stamp, to_dict, write_results
from helpers.delivered import drawn_verdict, has_outlines

SIZE = 32


class Brightness:
    """A model that takes bright for broken: the map is the red channel, the score its mean."""

    device = "cpu"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        self.batches.append(len(images))
        maps = images[..., 0].astype(np.float32) / 255
        return maps.mean(axis=(1, 2)), maps


def subject() -> Subject:
    description = {"kind": "bundle", "name": "<b>", "sha256": "0" * 64, "device": "cpu", "precision": "fp32"}
    return Subject(
        Brightness(), SIZE, (0.5,) * 3, (0.5,) * 3, 0.45, "threshold 0.45 was given", description, "onnxruntime"
    )


def make_class(root: Path, name: str, good: int, defective: int, masks: bool = True) -> list[Item]:
    """MVTec AD's tree; the spot of a defect is brighter than its surface, noise blurs the ranking."""
    rng = np.random.default_rng(len(name))
    items = []
    for number in range(good + defective):
        label = int(number >= good)
        kind = "spot" if label else "good"
        image = rng.integers(60, 150, (SIZE, SIZE), np.uint8)
        mask = np.zeros((SIZE, SIZE), np.uint8)
        if label:
            mask[4:12, 4 : 8 + number] = 255
            image = np.where(mask > 0, image + 60, image).astype(np.uint8)
        path = root / name / "test" / kind / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        mask_path = None
        if label and masks:
            mask_path = root / name / "ground_truth" / kind / f"{number:03}_mask.png"
            mask_path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(mask_path)
        items.append(Item(path, label, mask_path, name, kind, "test"))
    return items


def run(items: list[Item], root: Path, batch_size: int = 3) -> Evaluation:
    data = Dataset("mini", "mvtec", root, tuple(items))
    return evaluate(subject(), [to_evaluate(data, None)], batch_size, Console(quiet=True))


def test_figures_are_those_of_all_pixels_at_once(tmp_path: Path) -> None:
    items = make_class(tmp_path, "bolt", 7, 6)
    (found,) = run(items, tmp_path).results[0].classes
    images = np.stack([np.asarray(Image.open(item.image)) for item in items]).astype(np.float32) / 255
    masks = np.stack([np.asarray(Image.open(i.mask)) > 0 if i.mask else np.zeros((SIZE, SIZE), bool) for i in items])
    labels = [item.label for item in items]
    assert found.values["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), images.ravel()))
    assert found.values["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), images.ravel()))
    assert found.values["image_auroc"] == pytest.approx(roc_auc_score(labels, images.mean(axis=(1, 2))))
    assert [scored.item for scored in found.scores] == items


def test_batches_are_filled(tmp_path: Path) -> None:
    items = make_class(tmp_path, "bolt", 4, 3)
    evaluation = run(items, tmp_path)
    assert evaluation.subject.backend.batches == [3, 3, 1]  # type: ignore[attr-defined]


def test_what_is_undefined_is_said_and_left_out_of_means(tmp_path: Path) -> None:
    items = make_class(tmp_path, "bolt", 4, 4) + make_class(tmp_path, "unmarked", 4, 4, masks=False)
    items += make_class(tmp_path, "flawless", 3, 0)
    evaluation = run(items, tmp_path)
    result = evaluation.results[0]
    bolt, flawless, unmarked = result.classes
    assert set(flawless.values.values()) == {None}
    assert unmarked.values["pixel_auroc"] is None
    assert unmarked.values["aupro_0.3"] is None
    assert result.mean["pixel_auroc"] == bolt.values["pixel_auroc"]
    assert result.mean["image_auroc"] == pytest.approx((bolt.image.auroc + unmarked.image.auroc) / 2)
    assert "4 defective images of unmarked have none" in "\n".join(unmarked.undefined)
    assert "3 good and 0 defective" in "\n".join(flawless.undefined)
    assert to_dict(evaluation)["results"][0]["classes"]["flawless"]["image_auroc"] is None
    screen = io.StringIO()
    show(evaluation, Console(width=100, file=screen))
    assert re.search(r"flawless +3 +0( +–){8}", screen.getvalue())
    assert "nan" not in screen.getvalue()


def test_only_the_telling_pictures_are_kept(tmp_path: Path) -> None:
    items = make_class(tmp_path, "bolt", 9, 9)
    (found,) = run(items, tmp_path).results[0].classes
    scores = {scored.item: scored.score for scored in found.scores}
    defects = sorted((s for item, s in scores.items() if item.label), reverse=True)
    assert [p.scored.score for p in found.pictures["best"]] == defects[:PICTURES]
    goods = sorted((s for item, s in scores.items() if not item.label), reverse=True)
    assert [p.scored.score for p in found.pictures["worst"]] == goods[:PICTURES]
    assert [p.scored.score for p in found.pictures["missed"]] == [s for s in reversed(defects) if s < 0.45][:PICTURES]
    for picture in found.pictures["best"] + found.pictures["worst"] + found.pictures["missed"]:
        overlay = np.asarray(Image.open(io.BytesIO(picture.jpeg)))[:, -PICTURE_SIDE:]
        assert drawn_verdict(overlay) == ("defect" if picture.scored.score >= 0.45 else "good")


def test_heat_maps_of_the_report_are_the_calibrations(tmp_path: Path) -> None:
    data = Dataset("mini", "mvtec", tmp_path, tuple(make_class(tmp_path, "bolt", 1, 1)))

    def best(**calibrated: Any) -> NDArray[np.uint8]:
        found = evaluate(replace(subject(), **calibrated), [to_evaluate(data, None)], 1, Console(quiet=True))
        picture = found.results[0].classes[0].pictures["best"][0]
        return np.asarray(Image.open(io.BytesIO(picture.jpeg)))[:, -PICTURE_SIDE:]

    assert has_outlines(best())
    assert not has_outlines(best(map_threshold=0.99))
    warm, cold = (best(map_threshold=0.99, map_scale=scale).astype(int) for scale in ((0.0, 0.5), (0.9, 1.0)))
    assert (warm - cold)[-300:, :, 0].mean() > 30


def test_unreadable_files_are_counted_and_left_out(tmp_path: Path) -> None:
    items = make_class(tmp_path, "bolt", 4, 4)
    items[1].image.write_bytes(b"no image")
    items[6].mask.unlink()  # type: ignore[union-attr]
    evaluation = run(items, tmp_path)
    assert {item for item, _ in evaluation.skipped} == {items[1], items[6]}
    assert len(evaluation.results[0].classes[0].scores) == 6
    assert len(to_dict(evaluation)["skipped"]) == 2


def test_an_interrupted_run_keeps_the_finished_classes(tmp_path: Path) -> None:
    class Stops(Brightness):
        def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            if sum(self.batches) >= 8:
                raise KeyboardInterrupt
            return super().run(images)

    items = make_class(tmp_path, "bolt", 4, 4) + make_class(tmp_path, "nut", 4, 4)
    data = Dataset("parts", "mvtec", tmp_path, tuple(items))
    stopped = evaluate(replace(subject(), backend=Stops()), [to_evaluate(data, None)], 4, Console(quiet=True))
    assert [c.name for c in stopped.results[0].classes] == ["bolt"]
    assert stopped.results[0].classes[0].values == run(items, tmp_path).results[0].classes[0].values
    assert not stamp(stopped)["complete"]
    with pytest.raises(KeyboardInterrupt):  # nothing to keep
        evaluate(stopped.subject, [to_evaluate(data, None)], 4, Console(quiet=True))


def test_classes_that_are_not_there(tmp_path: Path) -> None:
    data = Dataset("mini", "mvtec", tmp_path, tuple(make_class(tmp_path, "bolt", 1, 1)))
    assert to_evaluate(data, ("bolt",)).items == data.items
    with pytest.raises(UsageError, match="bolt; got nut"):
        to_evaluate(data, ("nut",))
    with pytest.raises(UsageError, match="needs test images"):
        to_evaluate(Dataset("mini", "mvtec", tmp_path, ()), None)


class Links(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def test_the_report_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    items = make_class(tmp_path, "a<script>&$x^2$", 4, 4) + make_class(tmp_path, "_b", 4, 4)
    evaluation = run(items, tmp_path)
    stamped = stamp(evaluation)
    write_report(evaluation, stamped, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Links()
    page.feed(text)
    assert "script" not in page.tags
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    assert text.count("<svg") == 6
    assert "a&lt;script&gt;&amp;$x^2$" in text
    write_results(evaluation, stamped, tmp_path)
    assert r"a<script>\&\$x\textasciicircum{}2\$" in (tmp_path / "results.tex").read_text()
    assert sorted(p.name for p in tmp_path.glob("r*.*")) == [
        *("report.html", "results.csv", "results.json", "results.md", "results.tex")
    ]


def test_names_of_any_kind_are_written_and_shown(tmp_path: Path) -> None:
    name = "[x]\n| forged\x1b[31m Ri\udcdf"  # the last is a byte that is no UTF-8
    stamped = stamp(run(make_class(tmp_path, "plain", 2, 2), tmp_path))
    evaluation = run(make_class(tmp_path, name, 2, 2), tmp_path)
    write_results(evaluation, stamped, tmp_path)
    write_report(evaluation, stamped, tmp_path / "report.html")
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {name}
    assert all(Path(row["image"]).is_file() for row in rows)
    assert r"| mini | [x]\n\| forged\x1b[31m Ri\xdf | 4 |" in (tmp_path / "results.md").read_text()
    assert r"Ri\textbackslash{}xdf" in (tmp_path / "results.tex").read_text()
    assert r"Ri\udcdf" in (tmp_path / "report.html").read_text()
    console = Console(file=io.StringIO(), width=200)
    show(evaluation, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert r"[x]\n| forged\x1b[31m Ri\xdf" in shown
    assert "\x1b" not in shown


def test_the_embedded_bundle_as_installed(fbclip: Run, tmp_path: Path) -> None:
    make_class(tmp_path / "mini", "bolt", 3, 3)
    make_class(tmp_path / "mini", "nut", 3, 3)
    broken = tmp_path / "mini/nut/test/good/000.png"
    broken.write_bytes(b"")
    done = fbclip("eval", "mini", "--batch-size", 4, code=2)
    assert "000.png is empty" in done.stdout
    out = tmp_path / "runs/eval/exp"
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["sha256"] == sha256(EMBEDDED / "manifest.json")
    assert results["threshold"] == Bundle.load().manifest.threshold
    assert results["threshold_from"] in done.stdout
    assert "is the model's own; no calibration" in results["threshold_from"]
    assert re.fullmatch("[0-9a-f]{64}", results["data"][0]["fingerprint"])
    assert [entry["image"] for entry in results["skipped"]] == [str(broken)]
    with (out / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["class"] for row in table] == ["bolt", "nut", "mean"]
    for value in VALUES:
        assert float(table[2][value]) == pytest.approx((float(table[0][value]) + float(table[1][value])) / 2)
    with (out / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 11
    assert (out / "report.html").stat().st_size > 50_000
    fbclip("eval", "mini", "--workers", 2, "--no-report", code=2)
    with (out.with_name("exp2") / "scores.csv").open() as two, (out / "scores.csv").open() as one:
        for by_two, by_one in zip(csv.DictReader(two), csv.DictReader(one), strict=True):
            assert by_two["image"] == by_one["image"]
            assert float(by_two["score"]) == pytest.approx(float(by_one["score"]), abs=1e-6)


def test_the_threshold_is_the_one_that_infer_would_take(fbclip: Run, tmp_path: Path) -> None:
    make_class(tmp_path / "mini", "bolt", 2, 2)
    shutil.copytree(EMBEDDED, tmp_path / "part.fbclip")
    fbclip("calibrate", "part.fbclip", "mini/bolt/test", "--false-alarm-rate", 0.3)
    calibrated = json.loads((tmp_path / "part.fbclip/calibration.json").read_text())["threshold"]
    told = fbclip("infer", "mini/bolt/test/good", "--bundle", "part.fbclip", "--no-save").stdout.splitlines()[0]
    for name, option in (("auto", []), ("given", ["--threshold", 0.05])):
        fbclip("eval", "mini", "--bundle", "part.fbclip", "--name", name, *option)
        out = tmp_path / "runs/eval" / name
        results = json.loads((out / "results.json").read_text())
        expected = calibrated if name == "auto" else 0.05
        assert results["threshold"] == expected
        assert results["threshold_from"] == (told if name == "auto" else "threshold 0.05 was given")
        assert escape(results["threshold_from"]) in (out / "report.html").read_text()
        with (out / "scores.csv").open() as file:
            reached = [row["label"] for row in csv.DictReader(file) if float(row["score"]) >= expected]
        bolt = results["results"][0]["classes"]["bolt"]
        assert (bolt["found"], bolt["false_alarms"]) == (reached.count("1"), reached.count("0"))


def seen_of(items: list[Item], trained: int, chosen_by: int) -> Seen:
    digests = [file_digest(item.image) for item in items]
    return Seen.of(digests[:trained], digests[trained : trained + chosen_by])


@pytest.mark.parametrize(
    ("trained", "chosen_by", "expected"),
    [
        (6, 0, ["mini: 6 of these 8 images were trained on: the figures say nothing of new parts"]),
        (8, 0, ["mini: all 8 images were trained on: the figures say nothing of new parts"]),
        (0, 2, ["mini: 2 of these 8 images chose among the checkpoints"]),
        (5, 3, ["mini: 5 of these 8 images were trained on", "mini: 3 of these 8 images chose among the checkpoints"]),
        (0, 0, []),
    ],
)
def test_images_that_were_trained_on_are_told_everywhere(
    tmp_path: Path, trained: int, chosen_by: int, expected: list[str]
) -> None:
    items = make_class(tmp_path, "bolt", 4, 4)
    renamed = [replace(item, image=item.image.rename(item.image.with_name(f"x{item.image.name}"))) for item in items]
    known = replace(subject(), seen=seen_of(renamed, trained, chosen_by))
    data = Dataset("mini", "mvtec", tmp_path, tuple(renamed))
    evaluation = evaluate(known, [to_evaluate(data, None)], 4, Console(quiet=True))
    stamped = stamp(evaluation)
    warnings = stamped["warnings"]
    assert all(line.startswith(start) for line, start in zip(warnings, expected, strict=True))
    assert (stamped["data"][0]["trained_on"], stamped["data"][0]["validated_on"]) == (trained, chosen_by)
    screen = io.StringIO()
    show(evaluation, Console(width=60, file=screen), warnings)
    write_results(evaluation, stamped, tmp_path)
    write_report(evaluation, stamped, tmp_path / "report.html")
    assert json.loads((tmp_path / "results.json").read_text())["warnings"] == warnings
    told = (screen.getvalue(), *((tmp_path / f"{name}").read_text() for name in ("results.md", "report.html")))
    assert all(line in text for line in warnings for text in told)


def test_a_model_that_does_not_say_what_it_was_trained_on(tmp_path: Path) -> None:
    stamped = stamp(run(make_class(tmp_path, "bolt", 4, 4), tmp_path))
    assert (stamped["data"][0]["trained_on"], stamped["data"][0]["validated_on"]) == (None, None)
    assert stamped["warnings"] == []


def test_a_bundle_knows_what_it_was_trained_on(fbclip: Run, tmp_path: Path) -> None:
    items = make_class(tmp_path / "mini", "bolt", 3, 3)
    manifest = shutil.copytree(EMBEDDED, tmp_path / "part.fbclip") / "manifest.json"
    values = json.loads(manifest.read_text())
    values["provenance"]["seen"] = seen_of(items, 4, 0).to_dict()
    manifest.write_text(json.dumps(values))
    told = "4 of these 6 images were trained on"
    assert told in fbclip("eval", "mini", "--bundle", "part.fbclip", "--no-report").stdout
    values["provenance"]["seen"]["trained"] = "?"
    manifest.write_text(json.dumps(values))
    (line,) = fbclip("eval", "mini", "--bundle", "part.fbclip", "--no-report", code=2).stderr.splitlines()
    assert "part.fbclip doesn't say in an intelligible way what the model was trained on" in line


def test_a_checkpoint_scores_like_the_bundle_exported_from_it(fbclip: Run, tmp_path: Path) -> None:
    make_class(tmp_path / "mini", "bolt", 2, 2)
    checkpoint = NANO
    fbclip("eval", "mini", "--no-report", "--name", "bundle")
    fbclip("eval", "mini", "--no-report", "--name", "torch", "--checkpoint", "nano")  # at the side it is deployed at
    fbclip("eval", "mini", "--no-report", "--name", "given", "--checkpoint", checkpoint, "--threshold", 0.3)
    stamps = [json.loads((tmp_path / f"runs/eval/{name}/results.json").read_text()) for name in ("torch", "given")]
    assert [stamp["threshold"] for stamp in stamps] == [Bundle.load().manifest.threshold, 0.3]
    assert [stamp["threshold_from"] for stamp in stamps] == [
        f"threshold {Bundle.load().manifest.threshold} is the checkpoint's",
        "threshold 0.3 was given",
    ]
    scores = []
    for name in ("bundle", "torch"):
        with (tmp_path / "runs/eval" / name / "scores.csv").open() as file:
            scores.append([float(row["score"]) for row in csv.DictReader(file)])
    assert len(scores[0]) == 4
    assert np.abs(np.subtract(*scores)).max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["mini", "--checkpoint", "nano", "--workers", 2], "--workers share the cores of a bundle"),
        ([".", "--image-size", 64], "go with --checkpoint"),
        ([".", "--bundle", "b", "--checkpoint", "c"], "a --checkpoint or a --bundle"),
        ([".", "--checkpoint", "c", "--precision", "fp16"], "a checkpoint runs in fp32"),
        (["mini", "--threshold", "high"], "--threshold: a threshold is auto, or a probability"),
        (["mini", "--threshold", 1.5], "--threshold: a threshold is a probability between 0 and 1; got 1.5"),
        (
            ["mini", "--checkpoint", "nano", "--threshold", -1],
            "--threshold: a threshold is a probability between 0 and 1; got -1",
        ),
    ],
)
def test_wrong_usage_is_one_line(fbclip: Run, tmp_path: Path, arguments: list[object], message: str) -> None:
    make_class(tmp_path / "mini", "bolt", 1, 1)
    error = fbclip("eval", *arguments, code=2).stderr
    assert message in error
    assert error.count("\n") == 1
