"""Min-max rounding: the textbook's, whatever the shape and the way the weight lies in memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from octoc.qtensor import Scheme, difference
from octoc.quantize import encode
from octoc.quantize.rtn import code_range

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=9),
    elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-3]),
)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@given(weight=WEIGHTS, bits=st.integers(2, 8))
@settings(max_examples=80, deadline=None)
def test_codes_and_scales_are_those_of_a_loop_over_channels(weight, bits, dtype):
    stored = encode(weight, Scheme("affine", bits, "channel"), 0, dtype=dtype, method="minmax")
    high, info = code_range(bits)[1], np.finfo(dtype)
    for row, codes, scale in zip(weight, stored.codes, stored.scale.reshape(-1), strict=True):
        peak = np.abs(row).max()
        wanted = np.maximum(peak / np.float32(high), info.smallest_normal).astype(dtype) if peak else 1
        np.testing.assert_allclose(scale, wanted, rtol=1e-6)
        np.testing.assert_array_equal(codes, np.rint(row / np.float32(scale)))


def test_blocks_and_ways_to_lie_in_memory_change_nothing(monkeypatch):
    weight = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    scheme = Scheme.parse("int4-group32")
    usual = encode(weight, scheme, 0, method="minmax")
    still = weight.copy()
    still.flags.writeable = False
    for other in (np.asfortranarray(weight), weight[::-1][::-1], still):
        assert difference(usual, encode(other, scheme, 0, method="minmax")) is None
    monkeypatch.setattr("octoc.quantize.minmax._BLOCK", 100)
    assert difference(usual, encode(weight, scheme, 0, method="minmax")) is None
    np.testing.assert_array_equal(weight, still)


def test_the_search_for_a_better_scale_is_never_worse():
    weight = np.random.default_rng(1).standard_t(3, (32, 64)).astype(np.float32)
    for bits in (2, 3, 4, 8):
        scheme = Scheme("affine", bits, "group", 32)
        plain, sought = (encode(weight, scheme, 0, method=method).dequantize() for method in ("minmax", "rtn"))
        assert np.square(sought - weight).sum() <= np.square(plain - weight).sum()
