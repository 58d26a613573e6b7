"""Compressed weights in training: they begin as they came, learn by the papers' gradients and end storable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from octoc import quantize
from octoc.qtensor import Affine, Array, Palette, QTensor, Scheme, Sparse, difference
from octoc.recover.codes import Coded, from_rows, to_rows
from octoc.recover.distill import Lsq, Nearest, in_training
from octoc.recover.rounding import rectified, regulariser, rounding, share, unrectified

WAYS = {"distill": in_training, "reconstruct": rounding}
Way = Callable[[QTensor, Tensor], Coded]


@st.composite
def weights(draw: st.DrawFn) -> tuple[Array, QTensor]:
    """A weight [4, 6, 2] and a compressed tensor, not always of the nearest codes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = rng.standard_normal((4, 6, 2)).astype(np.float32) * np.float32(10.0 ** draw(st.integers(-3, 3)))
    if draw(st.booleans()):
        weight[1] = 0
    dtype = draw(st.sampled_from(["float32", "float16"]))
    granularity = draw(st.sampled_from(["tensor", "channel", "group2"]))
    if draw(st.booleans()):
        text = f"int{draw(st.integers(2, 8))}-{granularity}"
    else:
        text = f"palette{draw(st.sampled_from([1, 2, 4]))}-{granularity}"
    if draw(st.booleans()):
        text += "-sparse"
        weight[rng.random(weight.shape) < 0.4] = 0
    return weight, moved(quantize.encode(weight, Scheme.parse(text), 0, dtype=dtype), rng, draw(st.booleans()))


def moved(tensor: QTensor, rng: np.random.Generator, move: bool) -> QTensor:
    """Some codes moved, and a zero point for an affine tensor, where this is asked for."""
    if isinstance(tensor, Sparse):
        dense = moved(tensor.dense, rng, move)
        assert isinstance(dense, Affine | Palette)
        codes = np.where(tensor.mask, dense.codes, dense.codes.dtype.type(0))
        return Sparse(tensor.mask, type(dense)(**{**vars(dense), "codes": codes}))
    if not move:
        return tensor
    if isinstance(tensor, Affine):
        high = 2 ** (tensor.bits - 1) - 1
        codes = np.clip(tensor.codes + rng.integers(-1, 2, tensor.shape), -high, high).astype(np.int8)
        zero = rng.integers(-1, 2, tensor.scale.shape).astype(np.int8)
        return Affine(codes, tensor.scale, zero, tensor.bits)
    assert isinstance(tensor, Palette)
    if (np.diff(tensor.table, axis=-1) == 0).any():
        return tensor
    codes = np.clip(tensor.codes + rng.integers(-1, 2, tensor.shape), 0, 2**tensor.bits - 1).astype(np.uint8)
    return Palette(codes, tensor.table, tensor.bits)


@pytest.mark.parametrize("way", WAYS)
@given(case=weights())
@settings(deadline=None)
def test_without_a_step_every_code_scale_and_entry_is_what_it_was(way: str, case: tuple[Array, QTensor]) -> None:
    weight, tensor = case
    part = WAYS[way](tensor, torch.from_numpy(weight))
    assert difference(tensor, part.hard()) is None
    if way == "distill":
        np.testing.assert_allclose(part.weight().detach(), tensor.dequantize(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@given(case=weights(), size=st.sampled_from([0.1, 1.0, 1e3, 1e38]), seed=st.integers(0, 99))
@settings(deadline=None)
def test_whatever_was_learned_is_storable(way: str, case: tuple[Array, QTensor], size: float, seed: int) -> None:
    weight, tensor = case
    part = WAYS[way](tensor, torch.from_numpy(weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in part.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    stored = part.hard()
    dense = stored.dense if isinstance(stored, Sparse) else stored
    came = tensor.dense if isinstance(tensor, Sparse) else tensor
    assert np.isfinite(stored.dequantize()).all()
    if isinstance(dense, Affine) and isinstance(came, Affine):
        whole = came.bits <= 4 or came.zero_point is not None
        high = 2 ** (came.bits - 1) - 1
        assert -high - whole <= dense.codes.min() <= dense.codes.max() <= high
        assert (dense.codes.dtype, dense.scale.dtype) == (came.codes.dtype, came.scale.dtype)
        assert (dense.scale >= np.finfo(dense.scale.dtype).smallest_normal).all()
    if isinstance(dense, Palette) and isinstance(came, Palette):
        assert dense.codes.max() < 2**came.bits
        assert (dense.table.dtype, dense.table.shape) == (came.table.dtype, came.table.shape)
        assert (np.diff(dense.table.astype(np.float64), axis=-1) >= 0).all()
        rows = to_rows(torch.from_numpy(dense.codes), dense.table.shape[:-1]).numpy()
        for codes, table in zip(rows, dense.table.reshape(len(rows), -1), strict=True):
            np.testing.assert_array_equal(np.searchsorted(table, table)[codes], codes)


def test_the_gradient_of_a_step_is_lsqs_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 7, generator=generator).double().requires_grad_()
    step = torch.tensor([[0.3], [0.8], [0.1]]).double().requires_grad_()
    low, high = torch.full((3, 1), -4.0), torch.full((3, 1), 3.0)
    slopes = torch.randn(3, 7, generator=generator).double()
    quantized = Lsq.apply(values, step, low, high)
    (quantized * slopes).sum().backward()
    assert values.grad is not None
    assert step.grad is not None
    v, s = values.tolist(), step.tolist()
    for i in range(3):
        expected = 0.0
        for j in range(7):
            ratio = v[i][j] / s[i][0]
            inside = -4 < ratio < 3
            share = round(ratio) - ratio if inside else (-4.0 if ratio <= -4 else 3.0)
            expected += float(slopes[i, j]) * share / (7 * 3) ** 0.5
            assert float(values.grad[i, j]) == (float(slopes[i, j]) if inside else 0.0)
            assert quantized.tolist()[i][j] == pytest.approx(min(max(round(ratio), -4), 3) * s[i][0])
        assert float(step.grad[i, 0]) == pytest.approx(expected)


def test_the_gradient_of_an_entry_is_the_sum_over_its_weights() -> None:
    values = torch.tensor([[0.1, 0.4, 0.9, 2.0], [0.0, 0.0, -3.0, 1.0]], requires_grad=True)
    table = torch.tensor([[0.0, 1.0], [-1.0, 2.0]], requires_grad=True)
    slopes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    entries = Nearest.apply(values, table)
    (entries * slopes).sum().backward()
    assert entries.tolist() == [[0.0, 0.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 2.0]]
    assert table.grad is not None
    assert values.grad is not None
    assert table.grad.tolist() == [[3.0, 12.0], [7.0, 8.0]]
    assert torch.equal(values.grad, slopes)


def test_the_soft_rounding_begins_at_the_weight_where_that_is_near_its_code() -> None:
    weight = torch.tensor([[0.2, -0.3, 1.4, 0.8, -1.05]])
    tensor = quantize.encode(weight.numpy(), Scheme.parse("int4-tensor"), 0)
    assert isinstance(tensor, Affine)
    step = float(tensor.scale.max())
    torch.testing.assert_close(rounding(tensor, weight).weight(), weight, rtol=0, atol=0.03 * step)


def test_rectified_sigmoid_and_its_inverse_are_the_papers() -> None:
    v = torch.linspace(-9, 9, 41)
    h = rectified(v)
    torch.testing.assert_close(h, torch.clip(torch.sigmoid(v) * 1.2 - 0.1, 0, 1))
    inside = torch.linspace(0.01, 0.99, 21)
    torch.testing.assert_close(rectified(unrectified(inside)), inside)
    torch.testing.assert_close(
        regulariser(torch.tensor([0.0, 0.25, 0.5, 1.0]), 2.0), torch.tensor([0.0, 0.75, 1.0, 0.0])
    )


def test_what_is_masked_has_no_gradient() -> None:
    weight = torch.tensor([[0.5, 0.0, -0.7, 0.0, 1.0]])
    for way in WAYS.values():
        for text in ("int4-tensor-sparse", "palette1-tensor-sparse"):
            part = way(quantize.encode(weight.numpy(), Scheme.parse(text), 0), weight)
            part.weight().sum().backward()
            parameter = next(p for key, p in part.parameters().items() if key in ("weight", "rounding"))
            assert parameter.grad is not None
            assert parameter.grad[0, [1, 3]].tolist() == [0.0, 0.0]
            assert parameter.grad[0, [0, 2, 4]].any()
    assert share(rounding(quantize.encode(weight.numpy(), Scheme.parse("int4-tensor-sparse"), 0), weight)).shape == (
        1,
        5,
    )


def test_rows_are_those_of_the_encoders() -> None:
    weight = np.arange(48, dtype=np.float32).reshape(2, 6, 4)
    grid = (2, 3, 1)
    rows = to_rows(torch.from_numpy(weight), grid)
    np.testing.assert_array_equal(rows, quantize.to_rows(weight, grid))
    np.testing.assert_array_equal(from_rows(rows, weight.shape, grid), weight)
