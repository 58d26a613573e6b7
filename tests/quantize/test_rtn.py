"""Rounding to nearest: never worse than min-max, near the best scale there is, and equivariant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from octoc.qtensor import Affine, Scheme, expand
from octoc.quantize import encode
from octoc.quantize.rtn import code_range

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-3]),
)


def squared(weight, stored):
    return float(np.square(stored.astype(np.float64) - weight).sum())


def min_max(weight, scheme, dtype):
    """The textbook's rounding, with a scale that is stored and guarded alike."""
    high = 2 ** (scheme.bits - 1) - 1
    grid = scheme.grid(weight.shape, 0)
    peak = np.zeros(grid, np.float32)
    for index in np.ndindex(*weight.shape):
        tile = tuple(i * g // size for i, g, size in zip(index, grid, weight.shape, strict=True))
        peak[tile] = max(peak[tile], abs(weight[index]))
    info = np.finfo(dtype)
    scale = np.where(peak > 0, np.maximum(peak.astype(np.float64) / high, info.smallest_normal), 1).astype(dtype)
    ratio = weight.astype(np.float64) / expand(scale, weight.shape)
    return Affine(np.clip(np.rint(ratio), -high, high).astype(np.int8), scale, bits=scheme.bits)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group1"])
@given(weight=WEIGHTS, bits=st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_the_error_never_exceeds_that_of_min_max_rounding(weight, bits, granularity, dtype):
    scheme = Scheme.parse(f"int{bits}-{granularity}")
    ours = squared(weight, encode(weight, scheme, 0, dtype=dtype).dequantize())
    theirs = squared(weight, min_max(weight, scheme, dtype).dequantize())
    assert ours <= theirs * (1 + 1e-6) + 1e-9 * np.square(weight.astype(np.float64)).max(initial=0)


@pytest.mark.parametrize(("bits", "worst"), [(2, 1.01), (3, 1.01), (4, 1.01), (6, 1.04)])
def test_the_scale_is_near_the_best_of_all_scales(bits, worst):
    low, high = code_range(bits)
    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    stored = encode(weight, Scheme("affine", bits, "channel"), 0).dequantize()
    best = 0.0
    for row in weight.astype(np.float64):
        scales = np.geomspace(np.abs(row).max() / high / 20, np.abs(row).max() / high * 1.5, 20000)[:, None]
        codes = np.clip(np.rint(row / scales), low, high)
        best += np.square(codes * scales - row).sum(axis=1).min()
    assert squared(weight, stored) <= best * worst


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [-20, 7, 40])
def test_scaling_a_weight_by_a_power_of_two_scales_only_the_scale(bits, power):
    weight = np.random.default_rng(1).standard_normal((6, 8, 3)).astype(np.float32)
    scheme = Scheme("affine", bits, "group", 4)
    plain, scaled = encode(weight, scheme, 0), encode(np.ldexp(weight, power), scheme, 0)
    np.testing.assert_array_equal(plain.codes, scaled.codes)
    np.testing.assert_array_equal(np.ldexp(plain.scale, power), scaled.scale)


def test_no_other_code_stands_nearer_to_the_weight():
    weight = np.random.default_rng(2).standard_normal((5, 40)).astype(np.float32)
    for dtype, slack in (("float32", 1e-6), ("float16", 2e-3)):
        stored = encode(weight, Scheme.parse("int4-channel"), 0, dtype=dtype)
        low, high = code_range(4)
        choices = np.arange(low, high + 1) * stored.scale.astype(np.float64)[:, :, None]
        nearest = np.abs(choices - weight[:, :, None]).min(axis=2)
        assert (np.abs(stored.dequantize() - weight) <= nearest + slack * np.abs(weight)).all()


def test_eight_bit_codes_are_symmetric_and_four_bit_codes_use_the_whole_range():
    weight = np.linspace(-1, 0.87, 4000, dtype=np.float32).reshape(4, 1000)
    assert encode(weight, Scheme.parse("int8-tensor"), 0).codes.min() == -127
    assert encode(weight, Scheme.parse("int4-tensor"), 0).codes.min() == -8


def test_importance_moves_the_error_to_where_it_counts_less():
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((8, 32)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal((8, 32)))
    scheme = Scheme.parse("int3-channel")
    plain, weighted = encode(weight, scheme, 0), encode(weight, scheme, 0, importance=importance)

    def counted(stored):
        return float((importance * np.square(stored.dequantize() - weight)).sum())

    assert counted(weighted) < 0.95 * counted(plain)
    assert squared(weight, weighted.dequantize()) > squared(weight, plain.dequantize())


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_run_along_the_input_channels(axis):
    weight = np.random.default_rng(4).standard_normal((8, 12, 3)).astype(np.float32)
    stored = encode(weight, Scheme("affine", 4, "group", 4), axis)
    turned = encode(np.swapaxes(weight, 0, 1), Scheme("affine", 4, "group", 4), 1 - axis)
    assert stored.scale.shape == ((8, 3, 1) if axis == 0 else (2, 12, 1))
    np.testing.assert_array_equal(stored.dequantize(), np.swapaxes(turned.dequantize(), 0, 1))
