"""Small models, and samples that spoil a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from fbclip.data.dataset import Sample
from fbclip.data.procedural import ProceduralDefects
from fbclip.model.clip import ClipConfig, build_clip
from fbclip.model.config import default_config
from fbclip.model.network import FBCLIP
from fbclip.training import loop as training

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def arguments(tmp_path: Path, out: str, samples: int, *more: object) -> list[object]:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    options = "--clip tiny.json --train-tower --epochs 1 --batch-size 2 --lr 1e-3 --save-every 2 --workers 0"
    return ["train", "procedural", *options.split(), "--samples", samples, "--out", out, *more]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tiny_model(train_tower: bool = True) -> FBCLIP:
    torch.manual_seed(0)
    config = ClipConfig("tiny", TINY)
    model = FBCLIP(default_config(config), build_clip(config, None), train_tower)
    training.init_from_scratch(model)
    return model


class Spoilt(ProceduralDefects):
    """Procedural samples of which some do what `spoil` says."""

    def __init__(self, length: int, spoil: Callable[[int, Sample], Sample]) -> None:
        super().__init__(32, length)
        self.spoil = spoil

    def __getitem__(self, index: int) -> Sample:
        return self.spoil(index, super().__getitem__(index))
