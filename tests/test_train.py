from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st

from fbclip import checkpoint
from fbclip.data.procedural import ProceduralDefects

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def arguments(tmp_path: Path, out: str, samples: int) -> list[object]:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return [
        "train",
        "procedural",
        "--clip",
        "tiny.json",
        "--train-tower",
        "--epochs",
        1,
        "--samples",
        samples,
        "--batch-size",
        2,
        "--lr",
        1e-3,
        "--save-every",
        2,
        "--workers",
        0,
        "--out",
        out,
    ]


def test_resume_goes_on_as_if_never_stopped(fbclip: Run, tmp_path: Path) -> None:
    fbclip(*arguments(tmp_path, "whole", 12))
    whole = checkpoint.load(tmp_path / "whole/checkpoint.safetensors").state_dict()
    # the run that stops: the same recipe, its loader dying in the middle
    from fbclip import train as training
    from fbclip.clip import load_clip
    from fbclip.model import FBCLIP, default_config

    class Dies(ProceduralDefects):
        served = 0

        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            self.served += 1
            if self.served > 9:  # in the fifth of six steps
                raise KeyboardInterrupt
            return super().__getitem__(index)

    recipe = training.Recipe(epochs=1, batch_size=2, lr=1e-3, seed=0, save_every=2)
    torch.manual_seed(0)
    clip, config = load_clip(str(tmp_path / "tiny.json"), None)
    model = FBCLIP(default_config(config), clip, train_tower=True)
    training.init_from_scratch(model)
    data = Dies(32, 12)
    with pytest.raises(KeyboardInterrupt):
        training.train(model, data, recipe, tmp_path / "cut", progress=False)
    fbclip(*arguments(tmp_path, "cut", 12), "--resume")
    cut = checkpoint.load(tmp_path / "cut/checkpoint.safetensors").state_dict()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_second_run_does_not_overwrite_the_first(fbclip: Run, tmp_path: Path) -> None:
    fbclip(*arguments(tmp_path, "run", 2))
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
    fbclip(*command)
    assert checkpoint.read_header(tmp_path / "run/checkpoint.safetensors")["provenance"]["step"] == 1


def test_a_frozen_clip_needs_weights(fbclip: Run, tmp_path: Path) -> None:
    command = [a for a in arguments(tmp_path, "run", 1) if a != "--train-tower"]
    assert "--clip-weights" in fbclip(*command, code=2).stderr


@given(st.integers(0, 10_000), st.sampled_from([32, 48, 96]))
def test_procedural_samples(index: int, size: int) -> None:
    data = ProceduralDefects(size, 20_000, seed=3, ramp=5000)
    sample, again = data[index], data[index]
    assert (sample.image == again.image).all()
    assert sample.image.shape == (size, size, 3)
    assert sample.image.dtype == np.uint8
    assert set(np.unique(sample.mask)) <= {0, 1}
    clean, defective, mask, _ = data.render(index)
    changed = np.abs(clean - defective).max(axis=2)
    if sample.label:
        assert changed[mask == 1].mean() > 0.02
    else:
        assert (changed == 0).all()


def test_half_the_samples_are_defective() -> None:
    data = ProceduralDefects(32, 400)
    assert 0.4 < np.mean([data[i].label for i in range(400)]) < 0.6
