from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fbclip.data.dataset import Sample
from fbclip.data.procedural import ProceduralDefects
from fbclip.errors import ImageError, UsageError
from fbclip.model.clip import ClipConfig
from fbclip.model.config import default_config
from fbclip.training.distill import Distillation, relative_error
from helpers.training import TINY, Spoilt, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = default_config(ClipConfig("tiny", TINY))
DATA = ProceduralDefects(32, 20)


def images(count: int) -> torch.Tensor:
    """uint8 (count, 32, 32, 3)"""
    return torch.stack([torch.from_numpy(DATA[i].image) for i in range(count)])


def test_the_error_is_nothing_for_the_target_and_whole_for_its_mean() -> None:
    torch.manual_seed(0)
    target = 3 * torch.randn(4, 8, 6, 6) + torch.randn(4, 8, 1, 1)
    assert relative_error(target, target) == 0
    means = target.mean((2, 3), keepdim=True).expand_as(target)
    assert relative_error(means, target).item() == pytest.approx(1, abs=0.02)  # less by the floor


def test_images_count_alike_however_strong_their_texture() -> None:
    torch.manual_seed(0)
    target, wrong = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    strength = torch.tensor([1.0, 4.0]).view(2, 1, 1, 1)
    # both images are missed by as much as they hold; a plain mean square would see the strong one only
    each = [relative_error(s * w[None], s * t[None]) for s, w, t in zip((1, 4), wrong, target, strict=True)]
    together = relative_error(strength * wrong, strength * target)
    assert abs(each[0] - each[1]) < 0.5 * each[0]
    assert min(each) - 0.2 < together < max(each) + 0.2


def test_targets_are_standardised_and_no_finer_than_the_patches() -> None:
    distillation = Distillation("efficientnet-lite0", CONFIG, DATA, 1.0)
    targets = distillation.targets(images(20).permute(0, 3, 1, 2))
    assert [t.shape[1:] for t in targets] == [(96, 4, 4), (40, 4, 4), (112, 2, 2)]
    for target in targets:
        assert target.abs().max() <= 6
        assert target.mean().abs() < 0.1 and 0.6 < target.std() < 1.4


def test_what_cannot_be_read_is_not_measured() -> None:
    def spoil(index: int, sample: Sample) -> Sample:
        if index < unreadable:
            raise ImageError("gone")
        return sample

    unreadable = 10
    distillation = Distillation("efficientnet-lite0", CONFIG, Spoilt(20, spoil), 1.0)
    expected = distillation.teacher(images(20)[10:].permute(0, 3, 1, 2))[0].mean((0, 2, 3))
    torch.testing.assert_close(distillation.get_buffer("mean_2").flatten(), expected)
    unreadable = 20
    with pytest.raises(UsageError, match="none of them can be read"):
        Distillation("efficientnet-lite0", CONFIG, Spoilt(20, spoil), 1.0)


def test_the_tower_learns_the_teacher() -> None:
    model = tiny_model()
    distillation = Distillation("efficientnet-lite0", CONFIG, DATA, 1.0)
    pixels = images(8)
    inputs = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    adam = torch.optim.Adam([*model.visual.tower.parameters(), *distillation.heads.parameters()], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = distillation.loss(pixels, model.visual.tower(inputs))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in distillation.teacher.parameters())


def test_a_teacher_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match="efficientnet-lite0"):
        Distillation("resnet", CONFIG, DATA, 1.0)
    vision = {**TINY["vision_cfg"], "patch_size": 4}  # type: ignore[dict-item]
    fine = replace(CONFIG, clip=ClipConfig("tiny", {**TINY, "vision_cfg": vision}))
    with pytest.raises(UsageError, match="8 or 16"):
        Distillation("efficientnet-lite0", fine, DATA, 1.0)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['efficientnet_lite_pytorch'] = None\n"
        "from fbclip.training.distill import EfficientNetLite0\n"
        "from fbclip.errors import UsageError\n"
        "try: EfficientNetLite0()\n"
        "except UsageError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout
    assert "pip install 'fbclip[distill]'" in said
