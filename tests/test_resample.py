"""Constant matrices against the programs whose work they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fbclip.export.graph import FrameResize
from fbclip.resample import bilinear_matrix, resize, upsampling_matrix

sides = st.integers(1, 90)


@pytest.mark.slow
@settings(deadline=None, max_examples=80)
@given(sides, sides, sides, st.sampled_from([2, 256]), st.integers(0, 99))
def test_the_resize_in_the_graph_is_pillows(height: int, width: int, size: int, levels: int, seed: int) -> None:
    steps = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    frame = (steps * (255 // (levels - 1))).astype(np.uint8)
    resized = FrameResize(size, (height, width))(torch.from_numpy(frame).float().permute(2, 0, 1)[None])
    assert (resized[0].permute(1, 2, 0).numpy() == resize(frame, size)).all()


@pytest.mark.parametrize("frame_hw", [(480, 640), (1080, 1920), (1920, 1080), (224, 700), (1233, 224), (3000, 200)])
def test_frames_of_cameras(frame_hw: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (*frame_hw, 3), np.uint8)
    resized = FrameResize(224, frame_hw)(torch.from_numpy(frame).float().permute(2, 0, 1)[None])
    assert (resized[0].permute(1, 2, 0).numpy() == resize(frame, 224)).all()


@given(sides, st.integers(1, 12))
def test_maps_of_a_frames_size(side: int, grid: int) -> None:
    at_once = upsampling_matrix(56, grid, side)
    assert np.allclose(at_once, bilinear_matrix(side, 56) @ upsampling_matrix(56, grid), atol=1e-6)
    assert at_once.sum(axis=1) == pytest.approx(1, abs=1e-5)
