from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch.overrides import TorchFunctionMode

from fbclip.bundle import Bundle
from fbclip.data import surfaces
from fbclip.data.dataset import Sample, Samples
from fbclip.data.holdout import split
from fbclip.data.layouts import open_dataset
from fbclip.data.procedural import ProceduralDefects
from fbclip.errors import CheckpointError, FBClipError, ImageError, UsageError
from fbclip.model import checkpoint
from fbclip.model.clip import load_clip
from fbclip.runtime.evaluation.evaluate import evaluate
from fbclip.training import loop as training
from fbclip.training.batches import ReadableSamples, collate
from fbclip.training.evaluation import checkpoint_subject
from fbclip.training.report import samples_to_show
from fbclip.training.step import Recipe, Trainer, batch_order
from fbclip.training.validation import best_threshold
from helpers.own_data import make_own
from helpers.training import Spoilt, arguments, metrics, tiny_model
from helpers.waiting import PATIENCE_S, eventually

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "recipe", "measured"),
    [
        ("", Recipe(epochs=1, batch_size=2, lr=1e-3), 0),
        (
            "--muon-lr 0.02 --teacher efficientnet-lite0 --teacher-weight 0.5",
            Recipe(1, 2, 1e-3, muon_lr=0.02, teacher="efficientnet-lite0", teacher_weight=0.5),
            12,
        ),
    ],
)
def test_resume_goes_on_as_if_never_stopped(
    fbclip: Run, tmp_path: Path, options: str, recipe: Recipe, measured: int
) -> None:
    """`measured` samples are read before the first step, for the teacher."""
    fbclip(*arguments(tmp_path, "whole", 12), *options.split())
    whole = checkpoint.load(tmp_path / "whole/checkpoint.safetensors").state_dict()
    served, shown = 0, 0

    def count(index: int, sample: Sample) -> Sample:
        nonlocal shown
        shown += 1
        return sample

    samples_to_show(Spoilt(12, count), seed=0)  # read before the first step

    def die(index: int, sample: Sample) -> Sample:
        nonlocal served
        served += 1
        if served > shown + measured + 11:  # in the sixth of six steps
            raise RuntimeError("as if the power went")
        return sample

    with pytest.raises(RuntimeError, match="power"):
        training.train(tiny_model(), Spoilt(12, die), recipe, tmp_path / "cut", training.Execution(save_every=2))
    assert len(metrics(tmp_path / "cut")) > 4  # a step that no checkpoint holds is taken and noted again
    fbclip(*arguments(tmp_path, "cut", 12), "--resume", *options.split())
    cut = checkpoint.load(tmp_path / "cut/checkpoint.safetensors").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    assert [row["total"] for row in metrics(tmp_path / "cut")] == [row["total"] for row in metrics(tmp_path / "whole")]
    assert Image.open(tmp_path / "cut/epoch-001.png").size[0] > 800
    assert "12" in fbclip(*arguments(tmp_path, "cut", 14), "--resume", *options.split(), code=2).stderr


def test_the_published_batch_is_kept_where_a_recipe_is_published() -> None:
    """A larger default would take a sixteenth of the steps at the same rate: on few images it learns nothing."""
    assert [training.default_batch(device, True) for device in ("cpu", "cuda")] == [4, 64]
    assert [training.default_batch(device, False) for device in ("cpu", "cuda", "mps")] == [4, 4, 4]


def test_workers_by_default() -> None:
    assert training.default_workers("cpu", 1, False) == 1
    assert training.default_workers("cuda", 1, True) == 2
    assert 1 <= training.default_workers("cuda", 1000, False) <= training.default_workers("cuda", 1, False) <= 8


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    """Each wait leaves a GPU without work; what a step brings to the host comes in one piece, whatever the parts."""
    trainer = Trainer(tiny_model(), ProceduralDefects(32, 4), Recipe(), tmp_path, training.accelerator_for("no"))
    readable = ReadableSamples(trainer.data)
    parts = [collate([readable[i], readable[i + 1]]) for i in (0, 2)]
    trainer.optimisers = []  # Adam on a CPU looks at its count of steps, which its fused form on a GPU does not
    with ToHost() as watch:
        trainer.step(1, parts, False)
    assert watch.tensors == 1


def test_a_run_of_a_gpu_goes_on_on_a_cpu(tmp_path: Path) -> None:
    """The optimiser's form is the device's: a GPU's would take other steps here."""

    def trainer() -> Trainer:
        accelerator = training.accelerator_for("no")
        return Trainer(tiny_model(), ProceduralDefects(32, 12), Recipe(), tmp_path, accelerator)

    whole = trainer()
    readable = ReadableSamples(whole.data)
    batches = [collate([readable[i] for i in indices]) for indices in whole.batches[:3]]
    for number in (1, 2):
        whole.step(number, [batches[number - 1]], False)
    whole.save(2)
    path = tmp_path / "optimiser-000002.pt"
    state = torch.load(path, weights_only=True)
    for group in state["optimisers"][0]["param_groups"]:
        group["fused"] = True
    torch.save(state, path)
    resumed = trainer()
    assert resumed.resume() == 2
    assert resumed.step(3, [batches[2]], False) == whole.step(3, [batches[2]], False)
    for one, other in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other)


class ToHost(TorchFunctionMode):
    """Counts the calls that hand a tensor's values to Python, for which a GPU has to be waited."""

    WAITS: ClassVar[set[object]] = {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.cpu,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
        torch.Tensor.__float__,
        torch.Tensor.__int__,
    }

    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors += func in self.WAITS
        return func(*args, **(kwargs or {}))


def test_a_second_run_does_not_overwrite_the_first(fbclip: Run, tmp_path: Path) -> None:
    assert "2 images a step" in fbclip(*arguments(tmp_path, "run", 2)).stdout
    assert "--resume" in fbclip(*arguments(tmp_path, "run", 2), code=2).stderr


def test_a_data_set_with_masks(fbclip: Run, tmp_path: Path) -> None:
    for kind in ("good", "hole"):
        folder = tmp_path / "data/part/test" / kind
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / "000.png"), np.full((40, 50, 3), 90, np.uint8))
    masks = tmp_path / "data/part/ground_truth/hole"
    masks.mkdir(parents=True)
    command = arguments(tmp_path, "run", 1)
    command[1] = "data"
    assert "has none" in fbclip(*command, code=2).stderr
    cv2.imwrite(str(masks / "000_mask.png"), np.pad(np.full((10, 10), 255, np.uint8), ((0, 30), (0, 40))))
    assert "too few to judge by" in fbclip(*command).stdout
    assert checkpoint.read_header(tmp_path / "run/checkpoint.safetensors")["provenance"]["step"] == 1
    assert not (tmp_path / "run/last.safetensors").exists()


def judged(out: Path, data: Path, epochs: int = 3, **execution: Any) -> list[dict[str, float]]:
    """Train the tiny model on a data set with a held-out part; returns the lines of its epochs."""
    parts = split(open_dataset(data, "mvtec"), 0.3)
    trained, held_out = (Samples(items, 32) for items in (parts.trained, parts.held_out))
    recipe = Recipe(epochs, batch_size=4, lr=3e-3)
    origin = {"name": out.name, "data": parts.to_dict(), "seen": parts.seen.to_dict()}
    options = training.Execution(progress=False, **execution)
    training.train(tiny_model(), trained, recipe, out, options, held_out=held_out, origin=origin)
    return [row for row in metrics(out) if "best" in row]


def test_the_best_checkpoint_by_held_out_images_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_own(tmp_path / "own", {"bolt": (10, 10), "nut": (7, 7)})
    rows = judged(tmp_path / "run", tmp_path / "own", epochs=4)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    merits = [(row["validation_image_auroc"] + row["validation_pixel_ap"]) / 2 for row in rows]
    assert [row["validation_merit"] for row in rows] == pytest.approx(merits)
    assert [row["best"] for row in rows] == [m > max([-1, *merits[:i]]) for i, m in enumerate(merits)]
    best = rows[merits.index(max(merits))]
    header = checkpoint.read_header(tmp_path / "run/checkpoint.safetensors")["provenance"]
    assert header["step"] == best["step"]
    assert checkpoint.read_header(tmp_path / "run/last.safetensors")["provenance"]["step"] == rows[-1]["step"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    for row, line in zip(rows, lines, strict=True):
        assert f"image AUROC {100 * row['validation_image_auroc']:.1f} %" in line
        assert f"pixel AUROC {100 * row['validation_pixel_auroc']:.1f} %" in line
        assert ("best so far" in line) == row["best"]
        assert (" left" in line) == (row is not rows[-1])
    # what fbclip eval says of the same images
    held_out = split(data, 0.3).held_out
    subject = checkpoint_subject(tmp_path / "run/checkpoint.safetensors", None, None, None, None, "cpu")
    assert (subject.threshold, subject.description["name"]) == (header["threshold"], "run")
    mean = evaluate(subject, [replace(data, items=held_out)], 4, Console(quiet=True)).results[0].mean
    assert mean["image_auroc"] == pytest.approx(best["validation_image_auroc"])
    assert mean["pixel_auroc"] == pytest.approx(best["validation_pixel_auroc"])
    assert mean["pixel_ap"] == pytest.approx(best["validation_pixel_ap"])


@pytest.mark.parametrize(("killed_after", "save_every"), [(7, 3), (9, 5)])
def test_a_judged_run_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_after: int, save_every: int
) -> None:
    """An epoch has 4 steps, so that the last step saved is before or after the one that was judged last."""
    make_own(tmp_path / "own", {"bolt": (10, 10)})
    whole = judged(tmp_path / "whole", tmp_path / "own")

    step = Trainer.step

    def counted(self: Trainer, number: int, *rest: Any) -> Any:
        if number > killed_after:
            raise RuntimeError("as if the power went")
        return step(self, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power"):
        patch.setattr(Trainer, "step", counted)
        judged(tmp_path / "cut", tmp_path / "own", save_every=save_every)
    parts = split(open_dataset(tmp_path / "own", "mvtec"), 0.3)
    trained, held_out = (Samples(items, 32) for items in (parts.trained, parts.held_out))
    origin = {"name": "whole", "data": parts.to_dict(), "seen": parts.seen.to_dict()}
    recipe = Recipe(3, batch_size=4, lr=3e-3)
    cut = tmp_path / "cut"
    with pytest.raises(FBClipError, match="same recipe and data"):  # other images, as many of them
        other = {**origin, "data": {**parts.to_dict(), "fingerprint": "0" * 64}}
        training.train(tiny_model(), trained, recipe, cut, None, True, held_out=held_out, origin=other)
    training.train(tiny_model(), trained, recipe, cut, None, True, held_out=held_out, origin=origin)
    for file in ("checkpoint", "last"):
        one, two = ((tmp_path / run / f"{file}.safetensors").read_bytes() for run in ("whole", "cut"))
        assert one == two
    assert [row for row in metrics(cut) if "best" in row] == [
        {**row, "images_per_s": other["images_per_s"]} for row, other in zip(whole, metrics(cut)[3::4], strict=True)
    ]


def test_cached_tokens_judge_the_same(tmp_path: Path) -> None:
    make_own(tmp_path / "own", {"bolt": (10, 10)})
    parts = split(open_dataset(tmp_path / "own", "mvtec"), 0.3)
    trained, held_out = (Samples(items, 32) for items in (parts.trained, parts.held_out))
    figures = []
    for cache in (None, tmp_path / "tokens", tmp_path / "tokens"):
        out = tmp_path / str(len(figures))
        execution = training.Execution(cache_tokens=cache)
        training.train(tiny_model(train_tower=False), trained, Recipe(2), out, execution, held_out=held_out)
        figures.append([row["validation_pixel_auroc"] for row in metrics(out) if "best" in row])
    np.testing.assert_allclose(figures[1], figures[0], atol=2e-3)
    assert figures[2] == figures[1]


def test_without_a_held_out_part_every_image_is_trained_on(fbclip: Run, tmp_path: Path) -> None:
    """The published recipe: what the command writes is what plain training on the test split gives."""
    data = make_own(tmp_path / "own", {"bolt": (6, 6)})
    command = arguments(tmp_path, "run", 1, "--validation", 0)
    command[1] = "own"
    assert "trained on all 12 images" in fbclip(*command).stdout
    plain = tmp_path / "plain"
    training.train(tiny_model(), Samples(data.for_training(), 32), Recipe(1, 2, 1e-3), plain)
    ran = checkpoint.load(tmp_path / "run/checkpoint.safetensors").state_dict()
    assert all(
        torch.equal(value, ran[name])
        for name, value in checkpoint.load(plain / "checkpoint.safetensors").state_dict().items()
    )
    assert [row["total"] for row in metrics(tmp_path / "run")] == [row["total"] for row in metrics(plain)]
    assert "procedural ones are drawn anew" in fbclip(*arguments(tmp_path, "p", 2, "--validation", 0.2), code=2).stderr


def test_the_embedded_model_is_trained_at_the_side_it_is_deployed_at(fbclip: Run, tmp_path: Path) -> None:
    make_own(tmp_path / "own", {"bolt": (2, 2)})
    deployed = Bundle.load().manifest
    assert checkpoint.read_header(checkpoint.NANO)["config"]["image_size"] < deployed.image_size
    done = fbclip("train", "own", "--epochs", 1, "--workers", 0)  # neither --from nor --clip: nothing is fetched
    assert f"starting from fbclip-nano at {deployed.image_size} px" in done.stdout
    run = tmp_path / "runs/train/exp/checkpoint.safetensors"
    assert checkpoint.about(run).name == "own"
    assert checkpoint.read_header(run)["config"]["image_size"] == deployed.image_size
    shutil.copy(run, tmp_path / "line3.safetensors")
    assert checkpoint.about(tmp_path / "line3.safetensors").name == "line3"
    done = fbclip(
        "train", "own", "--from", run.parent, "--epochs", 1, "--workers", 0, "--image-size", 64, "--out", "64"
    )
    assert "starting from own at 64 px" in done.stdout
    assert checkpoint.read_header(tmp_path / "64/checkpoint.safetensors")["config"]["image_size"] == 64


def test_a_copy_of_the_embedded_checkpoint_is_known(tmp_path: Path) -> None:
    copy = shutil.copy(checkpoint.NANO, tmp_path / "mine.safetensors")
    deployed = Bundle.load().manifest
    said = checkpoint.about(copy)
    assert (said.name, said.image_size, said.threshold) == ("mine", deployed.image_size, deployed.threshold)
    assert checkpoint.load(copy).config.image_size == deployed.image_size


@pytest.mark.parametrize(
    ("name", "threshold"),
    [("../x", 0.5), ("..", 0.5), ("", 0.5), (5, 0.5), ("a", "0.5"), ("a", 2.0), ("a", True)],
)
def test_a_checkpoint_that_says_nonsense_of_itself(tmp_path: Path, name: object, threshold: object) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(tiny_model(), path, {"name": name, "threshold": threshold})
    with pytest.raises(CheckpointError):
        checkpoint.about(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["own", "--from", "nanno"], "--from: no checkpoint at nanno: pass its file"),
        (["good"], "no defective ones in its test split"),
        (["own", "--out", "/dev/null/run"], "can't write /dev/null/run"),
        (["own", "--clip-weights", "openai"], "--clip-weights are those of a --clip"),
        (["nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_told_before_torch_is_imported(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/torch.py").write_text("raise RuntimeError('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    make_own(tmp_path / "own", {"bolt": (2, 2)})
    make_own(tmp_path / "good", {"bolt": (4, 0)})
    error = fbclip("train", *options, code=2).stderr
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_was_learnt_is_what_is_deployed(fbclip: Run, tmp_path: Path) -> None:
    """From training to a bundle's verdict: name, side, threshold, and what was trained on."""
    make_own(tmp_path / "own", {"bolt": (10, 10)})
    command = arguments(tmp_path, "line[3]", 1)
    command[1] = "own"
    done = fbclip(*command)
    assert "2 good and 2 defective of 20 images are held out" in done.stdout
    assert "wrote line[3]/checkpoint.safetensors, the best by the held-out images" in done.stdout
    fbclip("export", "--checkpoint", "line[3]")
    manifest = Bundle.load(tmp_path / "line[3].fbclip").manifest
    header = checkpoint.read_header(tmp_path / "line[3]/checkpoint.safetensors")["provenance"]
    assert (manifest.name, manifest.image_size, manifest.threshold) == ("line[3]", 32, header["threshold"])
    told = fbclip("eval", "own", "--bundle", "line[3].fbclip", "--no-report").stdout
    assert "own: 16 of these 20 images were trained on" in told
    assert "own: 4 of these 20 images chose among the checkpoints" in told


class Mute(BaseHTTPRequestHandler):
    """A hub that hangs up."""

    asked: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.asked.append(self.client_address[0])


def test_a_hub_out_of_reach_is_told_after_one_try(fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Mute) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        command = ["train", "procedural", "--clip", "ViT-B-32", "--clip-weights", "openai"]
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        done = subprocess.run(
            [Path(sys.executable).with_name("fbclip"), *command],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        hub.shutdown()
    assert done.returncode == 2
    assert "could not fetch ViT-B-32 'openai'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert 1 <= len(Mute.asked) <= 3  # a lost connection is made once more; retries for a minute are many


def test_nothing_is_fetched_unasked(golden_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError, match=r"not on this machine.*name both, ViT-L-14-336 and openai"):
        checkpoint.load(golden_files / "official.pth")
    with pytest.raises(UsageError, match="nothing is fetched unasked"):
        load_clip("ViT-B-32", "openai", fetch=False)


def test_a_frozen_clip_needs_weights(fbclip: Run, tmp_path: Path) -> None:
    command = [a for a in arguments(tmp_path, "run", 1) if a != "--train-tower"]
    assert "--clip-weights" in fbclip(*command, code=2).stderr


@pytest.mark.parametrize("tower", [True, False])
def test_training_starts_from_a_checkpoint(fbclip: Run, tmp_path: Path, tower: bool) -> None:
    fbclip(*arguments(tmp_path, "first", 4))
    start = checkpoint.load(tmp_path / "first/checkpoint.safetensors").state_dict()
    command = arguments(tmp_path, "second", 2, "--from", "first/checkpoint.safetensors")
    assert "--clip" in fbclip(*command, code=2).stderr  # the checkpoint carries its own
    command = [a for a in command if a not in ("--clip", "tiny.json") and (tower or a != "--train-tower")]
    fbclip(*command, "--lr", 0)
    still = checkpoint.load(tmp_path / "second/checkpoint.safetensors").state_dict()
    assert all(torch.equal(start[name], still[name]) for name in start)
    fbclip(*command, "--out", "third")
    moved = checkpoint.load(tmp_path / "third/checkpoint.safetensors").state_dict()
    changed = {name for name in start if not torch.equal(start[name], moved[name])}
    assert any(name.startswith("visual.separation.") for name in changed)
    assert any(name.startswith("visual.tower.") for name in changed) == tower


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    command = [Path(sys.executable).with_name("fbclip"), *map(str, arguments(tmp_path, "run", 10_000))]
    command[command.index("--save-every") + 1] = "1000000"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    while "training" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=5 * PATIENCE_S)  # saves a checkpoint
    assert process.returncode == 128 + number, errors
    assert "can be resumed" in errors and "Traceback" not in errors
    taken = metrics(tmp_path / "run")[-1]["step"]
    assert checkpoint.read_header(tmp_path / "run/checkpoint.safetensors")["provenance"]["step"] == taken
    assert f"step {taken} of 5000" in errors


def test_two_processes_take_the_steps_of_one_with_the_doubled_batch(tmp_path: Path) -> None:
    make_own(tmp_path / "own", {"bolt": (7, 7)})
    parts = split(open_dataset(tmp_path / "own", "mvtec"), 0.3)
    # 10 samples in batches of 4: the last batch is a single image on each process; 4 more judge
    trained, held_out = (Samples(items, 32) for items in (parts.trained, parts.held_out))
    training.train(tiny_model(), trained, Recipe(1, batch_size=4, lr=1e-3), tmp_path / "one", held_out=held_out)
    command = arguments(tmp_path, "two", 10, "--validation", 0.3)
    command[1] = "own"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launcher, "-m", "fbclip.cli", *map(str, command)],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3]
    for name in ("total", "score_focal", "map_focal", "map_dice", "scr", "gradient_norm"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-4, err_msg=name)
    for name in ("validation_image_auroc", "validation_pixel_auroc", "validation_pixel_ap"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=1e-3), name
    assert checkpoint.read_header(tmp_path / "two/checkpoint.safetensors")["provenance"]["step"] == 3


@pytest.mark.parametrize(("accumulate", "samples"), [(2, 8), (2, 5), (4, 3)])
def test_accumulation_takes_the_same_steps(tmp_path: Path, accumulate: int, samples: int) -> None:
    data, recipe = ProceduralDefects(32, samples), Recipe(epochs=1, batch_size=4, lr=1e-3)
    rows = []
    for passes in (1, accumulate):
        out = tmp_path / str(passes)
        training.train(tiny_model(), data, recipe, out, training.Execution(accumulate=passes))
        rows.append([row["total"] for row in metrics(out)])
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_the_parts_of_all_processes_are_the_batch(samples: int, batch: int, processes: int, accumulate: int) -> None:
    recipe = Recipe(epochs=2, batch_size=batch * processes * accumulate)
    parts = []
    for index in range(processes):
        trainer = object.__new__(Trainer)  # the order needs no model
        trainer.accelerator = SimpleNamespace(process_index=index, num_processes=processes)
        trainer.batches = list(batch_order(samples, recipe))
        parts.append(trainer.parts_of_batches(1, accumulate))
    for step, whole in enumerate(trainer.batches[1:]):
        taken = [i for mine in parts for part in mine[step * accumulate : (step + 1) * accumulate] for i in part]
        assert taken == whole


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    data, recipe = ProceduralDefects(32, 8), Recipe(epochs=1, lr=1e-4)
    totals = []
    for amp in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process is accelerate's rule
        training.train(tiny_model(), data, recipe, tmp_path / amp, accelerator=training.accelerator_for(amp))
        totals.append([row["total"] for row in metrics(tmp_path / amp)])
    AcceleratorState._reset_state(reset_partial_state=True)
    assert totals[0] != totals[1]
    np.testing.assert_allclose(totals[0], totals[1], rtol=0.02)


def test_a_loss_that_is_no_number_stops_before_the_step(fbclip: Run, tmp_path: Path) -> None:
    command = arguments(tmp_path, "run", 12)
    command[command.index("--lr") + 1] = "1e30"
    done = fbclip(*command, code=1)
    assert "step 2 gave loss" in done.stderr and "learning rate" in done.stderr and "no checkpoint" in done.stderr
    data, order = ProceduralDefects(32, 12), list(batch_order(12, Recipe(epochs=1, batch_size=2)))[1]
    with np.load(tmp_path / "run/bad_batch.npz") as bad:
        assert bad["indices"].tolist() == order
        assert all((bad["images"][k] == data[i].image).all() for k, i in enumerate(order))
        assert all((bad["masks"][k] == data[i].mask).all() for k, i in enumerate(order))


def test_an_exploding_loss_stops(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = Trainer(model, ProceduralDefects(32, 4), Recipe(), tmp_path, training.accelerator_for("no"))
    for total in (0.3, 0.4, 11.0, 0.3):
        trainer._require_sound(1, {"total": total, "gradient_norm": 1.0})
    with pytest.raises(FBClipError, match="loss 13"):
        trainer._require_sound(1, {"total": 13.0, "gradient_norm": 1.0})
    with pytest.raises(FBClipError, match="gradient norm nan"):
        trainer._require_sound(1, {"total": 0.3, "gradient_norm": float("nan")})


def test_an_unreadable_image_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = list(batch_order(12, Recipe(epochs=1)))

    def spoil(index: int, sample: Sample) -> Sample:
        if index in (order[1][0], *order[2][1:]):
            raise ImageError(f"part-{index}.png can't be read")
        return sample

    recipe = Recipe(epochs=1)
    execution = training.Execution(progress=False, workers=1)
    took = training.train(tiny_model(), Spoilt(12, spoil), recipe, tmp_path / "run", execution)
    assert took.images == 8
    eventually(lambda: not multiprocessing.active_children())
    assert capsys.readouterr().out.count("left out: part-") == 4

    def spoil_all(index: int, sample: Sample) -> Sample:
        raise ImageError("gone")

    with pytest.raises(UsageError, match="none of the images"):
        training.train(tiny_model(), Spoilt(12, spoil_all), recipe, tmp_path / "none")


def test_samples_of_a_data_set_are_shuffled_whatever_the_rate_does() -> None:
    """A data set lists its good images first; only procedural samples come in an order that is meant."""
    recipe = Recipe(epochs=1, batch_size=50, cosine=True)
    assert list(batch_order(50, recipe)) == [list(range(50))]
    assert list(batch_order(50, recipe, drawn=False)) == list(batch_order(50, Recipe(epochs=1, batch_size=50)))


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 20)), min_size=1, max_size=30))
def test_the_threshold_has_the_best_balanced_accuracy(images: list[tuple[int, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*images, strict=True))
    found = best_threshold(labels, scores / 20)
    if len(set(labels)) < 2:
        assert found is None
        return

    def accuracy(threshold: float) -> float:
        anomalous = scores / 20 >= threshold
        return float(anomalous[labels == 1].mean() - anomalous[labels == 0].mean())

    assert found is not None
    if len(set(scores)) > 1:
        assert accuracy(found) == pytest.approx(max(accuracy((a + 0.5) / 20) for a in range(min(scores), max(scores))))


def test_a_full_disk_is_told_before_and_during_the_training(
    fbclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
        with pytest.raises(FBClipError, match=r"the disk is full: .* take \d+\.\d MB, .*run has 1\.0 MB free") as error:
            training.train(tiny_model(), ProceduralDefects(32, 4), Recipe(1, 2), tmp_path / "run")
        assert error.value.exit_code == 1

    def limit() -> None:  # no file may grow past 100 kB: to a writer the same as a disk that fills up
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [Path(sys.executable).with_name("fbclip"), *map(str, arguments(tmp_path, "cut", 4))]
    done = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, text=True, capture_output=True)
    assert "Traceback" not in done.stderr
    assert "can't write cut/optimiser-000002.pt" in done.stderr
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_tensorboard_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training.train(tiny_model(), ProceduralDefects(32, 4), Recipe(1, 2), tmp_path, training.Execution(tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    noted = [event.value for event in events.Scalars("total")]
    np.testing.assert_allclose(noted, [row["total"] for row in metrics(tmp_path)], rtol=1e-6)


@given(st.integers(0, 10_000), st.sampled_from([32, 48, 96]), st.sampled_from([1.0, 2.0]))
def test_procedural_samples(index: int, size: int, variety: float) -> None:
    data = ProceduralDefects(size, 20_000, seed=3, ramp=5000, variety=variety)
    sample, again = data[index], data[index]
    assert (sample.image == again.image).all()
    assert sample.image.shape == (size, size, 3)
    assert sample.image.dtype == np.uint8
    assert set(np.unique(sample.mask)) <= {0, 1}
    clean, defective, mask, _ = data.render(index)
    changed = np.abs(clean - defective).max(axis=2)
    if sample.label:
        assert changed[mask == 1].mean() > (0.02 if variety == 1 else 0.015)  # from afar, rims are half surface
    else:
        assert (changed == 0).all()


def test_variety_above_1_adds_surfaces() -> None:
    """Up to 1 the images stay what the first stage of the embedded model was trained on."""
    plain, varied, irregular = (ProceduralDefects(48, 40, variety=variety) for variety in (0, 1, 2))
    drawn: list[set[str]] = []
    for data in (plain, varied, irregular):
        drawn.append(set())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(surfaces, "TEXTURES", tuple(noting(draw, drawn[-1]) for draw in surfaces.TEXTURES))
            for i in range(len(data)):
                data.render(i)
    names = [draw.__name__ for draw in surfaces.TEXTURES]
    assert drawn[0] <= set(names[:4])
    assert drawn[0] < drawn[1] <= set(names[:14])
    assert drawn[2] > {"leaves", "flecked", "crazed", "bond", "filtered"}


def noting(draw: Callable[..., NDArray[np.float32]], names: set[str]) -> Callable[..., NDArray[np.float32]]:
    def noted(*arguments: Any) -> NDArray[np.float32]:
        names.add(draw.__name__)
        return draw(*arguments)

    return noted


def test_half_the_samples_are_defective() -> None:
    data = ProceduralDefects(32, 400)
    assert 0.4 < np.mean([data[i].label for i in range(400)]) < 0.6
