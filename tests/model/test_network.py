"""The recorded numbers of the reference program, stage by stage (tolerances as recorded with them)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fbclip.model import reference
from fbclip.model.network import FBCLIP, background, distance_to_class, foreground_mask, layers_before
from fbclip.resample import CLIP_MEAN, CLIP_STD, resize, upsampling_matrix
from fbclip.training.losses import fbclip_losses
from helpers import golden

TOKENS, PROBABILITY, RELATIVE = 1e-5, 1e-6, 1e-4
EXPECTED = golden.arrays()
UPSAMPLING = upsampling_matrix(golden.IMAGE_SIZE, 11)


@pytest.fixture(scope="module")
def model(golden_files: Path) -> FBCLIP:
    return golden.model(golden_files)


def all_separated(model: FBCLIP, tokens: Tensor) -> Tensor:
    """Z as one tensor (B, K, 3, N, C)."""
    return torch.cat(list(model.visual.separated(tokens)), dim=1).flatten(1, 2).unflatten(1, (-1, 3))


@pytest.fixture(scope="module")
def stages(model: FBCLIP) -> dict[str, Tensor]:
    visual, image = model.visual, torch.from_numpy(EXPECTED["image"])
    with torch.no_grad():
        embeddings = model.prompts.embeddings(model.text)
        hidden = model.text(embeddings)
        eot, mean, attention = model.prompts.strategies(hidden, model.text.projection)
        tokens = visual.tower(image)
        f = foreground_mask(tokens, tokens.index_select(1, layers_before(5)), distance_to_class(tokens))
        views, z = visual.views(tokens), all_separated(model, tokens)
    per_layer = {
        f"{name}_{k}": value
        for k in range(5)
        for name, value in (
            ("tokens", tokens[:, k]),
            ("foreground", f[:, k]),
            ("semantic", views[:, k, 1]),
            ("spatial", views[:, k, 2]),
        )
    }
    return {
        "prompt_embeddings": embeddings,
        "text_hidden": hidden,
        "text_eot": eot,
        "text_mean": mean,
        "text_attention": attention,
        "text_features": model.encode_text(),
        **per_layer,
        "separated_0_identity": z[:, 0, 0],
        "separated_1_semantic": z[:, 1, 1],
        "separated_last_spatial": z[:, -1, 2],
        "background": background(z),
        "suppressed_projected_last": visual.suppressed(z, background(z))[:, -1, 2],
    }


STAGES = [
    "prompt_embeddings",
    "text_hidden",
    "text_eot",
    "text_mean",
    "text_attention",
    "text_features",
    *(f"{name}_{k}" for k in range(5) for name in ("tokens", "foreground", "semantic", "spatial")),
    "separated_0_identity",
    "separated_1_semantic",
    "separated_last_spatial",
    "background",
    "suppressed_projected_last",
]


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stages: dict[str, Tensor], stage: str) -> None:
    assert np.abs(stages[stage].detach().numpy() - EXPECTED[stage]).max() <= TOKENS


def test_tokens_of_the_prompts(model: FBCLIP) -> None:
    assert (model.prompts.tokens.numpy() == EXPECTED["tokenized_prompts"]).all()


@torch.no_grad()
def test_scores_and_maps(model: FBCLIP) -> None:
    score, patch_map = model(torch.from_numpy(EXPECTED["image"]))
    assert np.abs(score.numpy() - EXPECTED["image_score"]).max() <= PROBABILITY
    assert np.abs(patch_map.numpy() - EXPECTED["patch_map"][:, 0]).max() <= PROBABILITY
    assert np.abs(UPSAMPLING @ patch_map.numpy() @ UPSAMPLING.T - EXPECTED["anomaly_map"]).max() <= PROBABILITY


@pytest.mark.slow
@torch.no_grad()
def test_the_literal_reference(model: FBCLIP) -> None:
    score, patch_map = reference.forward(model.visual, torch.from_numpy(EXPECTED["image"]), model.encode_text())
    assert np.abs(score.numpy() - EXPECTED["image_score"]).max() <= PROBABILITY
    assert np.abs(patch_map.numpy() - EXPECTED["patch_map"][:, 0]).max() <= PROBABILITY


def test_preprocessing() -> None:
    pixels = resize(EXPECTED["raw_image"], golden.IMAGE_SIZE) / np.float32(255)
    normalised = ((pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)
    assert np.abs(normalised - EXPECTED["preprocessed"]).max() <= PROBABILITY


@pytest.mark.slow
def test_three_training_steps(golden_files: Path) -> None:
    model = golden.model(golden_files)
    image, label, mask = (torch.from_numpy(EXPECTED[name]) for name in ("image", "gt_label", "gt_mask"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=5e-5, betas=(0.5, 0.999))
    for step, expected in enumerate(EXPECTED["train_losses"]):
        text = model.encode_text()
        z = all_separated(model, model.visual.tower(image))
        projected = model.visual.suppressed(z, background(z))
        score, patch_map = model.visual.probabilities(model.visual.fused(model.visual.logits(projected, text)))
        losses = fbclip_losses(score, patch_map, projected[:, -1, 2], text, label, mask[:, 0])
        got = [losses.total.item(), *(loss.item() for loss in losses)]
        np.testing.assert_allclose(got, expected, rtol=RELATIVE)
        optimiser.zero_grad()
        losses.total.backward()
        if step == 0:
            assert losses.scr.item() == pytest.approx(float(EXPECTED["scr_loss"]), rel=RELATIVE)
            check_gradients(model)
        optimiser.step()
    assert np.abs(model.prompts.ctx_neg.detach().numpy() - EXPECTED["ctx_neg_after_3_steps"]).max() <= PROBABILITY


def check_gradients(model: FBCLIP) -> None:
    separation, prompts = model.visual.separation, model.prompts
    parameters = {
        "ctx_pos": prompts.ctx_pos,
        "scale_weights": model.visual.scale_weights,
        "token_selector_2_weight": prompts.token_selector[2].weight,
        "fg_to_q": separation.foreground.to_q.weight,
    }
    for name, parameter in parameters.items():
        expected = EXPECTED[f"grad_{name}"]
        assert parameter.grad is not None
        assert np.abs(parameter.grad.numpy() - expected).max() <= RELATIVE * np.abs(expected).max(), name
    # The gate scales tokens before a LayerNorm, which undoes scaling: its gradient is a difference of nearly equal
    # numbers, and float32 leaves three digits of it.
    expected, gate = EXPECTED["grad_gate_0_weight"], separation.gate[0].weight.grad
    assert np.abs(gate.numpy() - expected).max() <= 1e-3 * np.abs(expected).max()
