"""The cheap exact forms against the literal transcription, where grids and masks are odd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fbclip.model import reference
from fbclip.model.network import SpatialView, distance_to_class, foreground_mask, layers_before, semantic_view
from fbclip.resample import bilinear_matrix, gaussian_matrix

WIDTH = 24
TOLERANCE = 2e-5
shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
masks = st.sampled_from(["mixed", "front", "behind"])


def make(shape: tuple[int, int, int], mask: str, seed: int, constant: bool) -> tuple[Tensor, Tensor]:
    batch, rows, cols = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, 1 + rows * cols, WIDTH, generator=generator)
    if constant:
        tokens[:, 1:] = tokens[:, 1:2]
    values = {
        "mixed": torch.rand(batch, rows * cols, generator=generator) > 0.5,
        "front": torch.ones(batch, rows * cols),
        "behind": torch.zeros(batch, rows * cols),
    }
    return tokens, torch.where(values[mask] > 0, 1.0, 0.5)


@given(shapes, masks, st.integers(0, 99), st.booleans())
def test_semantic_view(shape: tuple[int, int, int], mask: str, seed: int, constant: bool) -> None:
    tokens, f = make(shape, mask, seed, constant)
    view = semantic_view(tokens, f, distance_to_class(tokens))
    assert (view - reference.semantic_view(tokens, f)).abs().max() < TOLERANCE


@given(shapes, masks, st.integers(0, 99), st.booleans())
def test_spatial_view(shape: tuple[int, int, int], mask: str, seed: int, constant: bool) -> None:
    tokens, f = make(shape, mask, seed, constant)
    grid = shape[1:]
    view = SpatialView(grid)(tokens, f, distance_to_class(tokens))
    difference = (view - reference.spatial_view(tokens, f, grid)).abs().max()
    # patches that equal their window's mean leave nothing but rounding of the expanded square
    assert difference < (2e-3 if constant else TOLERANCE)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(3, 30), st.integers(0, 99))
def test_foreground_mask(batch: int, layers: int, length: int, seed: int) -> None:
    tokens = torch.randn(batch, layers, 1 + length, WIDTH, generator=torch.Generator().manual_seed(seed))
    got = foreground_mask(tokens, tokens.index_select(1, layers_before(layers)), distance_to_class(tokens))
    for k in range(layers):
        expected = reference.foreground_mask(tokens[:, k], tokens[:, k - 1] if k else None)
        assert (got[:, k] == expected).all()


def test_a_patch_alone_in_front_gets_only_itself() -> None:
    tokens, _ = make((1, 1, 3), "mixed", 0, False)
    view = semantic_view(tokens, torch.full((1, 3), 0.5), distance_to_class(tokens))
    assert torch.isfinite(view).all()


@given(st.integers(1, 40), st.integers(1, 40))
def test_bilinear_is_torchs(out_size: int, in_size: int) -> None:
    values = torch.randn(1, 1, in_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.nn.functional.interpolate(values, out_size, mode="linear", align_corners=False)[0, 0]
    assert torch.allclose(torch.from_numpy(bilinear_matrix(out_size, in_size)) @ values[0, 0], expected)


@pytest.mark.parametrize("size", [3, 14, 64])
def test_gaussian_keeps_a_constant_and_is_symmetric(size: int) -> None:
    matrix = gaussian_matrix(size)
    assert matrix.sum(axis=1) == pytest.approx(1)
    assert matrix == pytest.approx(matrix[::-1, ::-1])
    if size > 40:
        assert matrix[32, 36] / matrix[32, 32] == pytest.approx(0.60653, abs=1e-4)  # exp(-1/2) at one sigma
