"""Compressed weights: text forms, shapes, bytes, and a comparison that sees every bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc.errors import ArtifactError, UsageError
from octoc.packing import pack_codes, packed_bytes, unpack_codes
from octoc.qtensor import (
    PALETTE_BITS,
    Affine,
    Cast,
    Codebook,
    Palette,
    Scheme,
    Sparse,
    describe,
    difference,
    expand,
    rebuild,
)

SHAPE = (4, 6, 3)


@st.composite
def schemes(draw):
    sparse = draw(st.booleans())
    kind = draw(st.sampled_from(["affine", "asymmetric", "palette", "codebook", "cast"]))
    if kind == "cast":
        return Scheme("cast", 16, sparse=sparse)
    bits = draw(st.sampled_from(PALETTE_BITS) if kind == "palette" else st.integers(2, 8))
    granularity = draw(st.sampled_from(["tensor", "channel", "group"]))
    size = draw(st.integers(1, 512)) if granularity == "group" else 0
    if kind == "codebook":
        return Scheme(kind, bits, granularity, size, vector=draw(st.sampled_from([1, 2])))
    return Scheme(kind, bits, granularity, size, sparse)


@st.composite
def tensors(draw):
    """Any QTensor of SHAPE."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    dtype = draw(st.sampled_from(["float32", "float16"]))
    grid = draw(st.sampled_from([(1, 1, 1), (4, 1, 1), (4, 3, 1), (2, 2, 3)]))
    kind = draw(st.sampled_from(["affine", "unsigned", "palette", "codebook", "cast"]))
    if kind == "affine":
        bits = draw(st.integers(2, 8))
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), SHAPE).astype(np.int8)
        dense = Affine(codes, rng.uniform(0.1, 1, grid).astype(dtype), bits=bits)
    elif kind == "unsigned":
        bits = draw(st.sampled_from([4, 8]))
        codes, points = (rng.integers(0, 2**bits, shape).astype(np.uint8) for shape in (SHAPE, grid))
        dense = Affine(codes, rng.uniform(0.1, 1, grid).astype(dtype), points, bits, signed=False)
    elif kind == "palette":
        bits = draw(st.sampled_from(PALETTE_BITS))
        codes = rng.integers(0, 2**bits, SHAPE).astype(np.uint8)
        dense = Palette(codes, rng.standard_normal((*grid, 2**bits)).astype(dtype), bits)
    elif kind == "codebook":
        bits, length = draw(st.integers(2, 8)), draw(st.sampled_from([1, 2]))
        codes = rng.integers(0, 2**bits, (4, 6 // length, 3)).astype(np.uint8)
        table = rng.standard_normal((2**bits, length)).astype(dtype)
        return Codebook(codes, table, rng.uniform(0.1, 1, grid).astype(dtype), bits, 1)
    else:
        dense = Cast(rng.standard_normal(SHAPE).astype(np.float16))
    return Sparse(rng.uniform(size=SHAPE) < 0.5, dense) if draw(st.booleans()) else dense


@given(schemes())
def test_a_scheme_is_what_its_text_says(scheme):
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text",
    ["int1-tensor", "int9-tensor", "palette5-tensor", "int4", "int4-group", "int4-channel8", "float32", "", "int4-"],
)
def test_what_is_no_scheme_is_refused_with_its_text(text):
    with pytest.raises(UsageError, match=repr(text)):
        Scheme.parse(text)


@pytest.mark.parametrize(
    "text", ["codebook4-tensor-sparse", "codebook4x3-tensor", "int4x2-channel", "uint9-tensor", "uint1-channel"]
)
def test_codebooks_are_dense_of_short_vectors_and_other_codes_stand_for_one_weight(text):
    with pytest.raises(UsageError, match=repr(text)):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "axis", "grid"),
    [
        ("int8-tensor", 0, (1, 1, 1)),
        ("int8-channel", 0, (4, 1, 1)),
        ("int8-channel", 1, (1, 6, 1)),
        ("int8-group3", 0, (4, 2, 1)),
        ("int8-group2", 1, (2, 6, 1)),
        ("palette4-channel", 0, (4, 1, 1)),
        ("palette4-group2", 0, (2, 1, 1)),
        ("palette4-group2", 1, (1, 3, 1)),
        ("float16", 0, (1, 1, 1)),
    ],
)
def test_the_grid_says_what_shares_a_scale_or_a_table(text, axis, grid):
    assert Scheme.parse(text).grid(SHAPE, axis) == grid


@pytest.mark.parametrize(("text", "axis"), [("int8-group4", 0), ("palette4-group3", 0), ("palette4-group4", 1)])
def test_groups_that_do_not_divide_the_channels_are_refused(text, axis):
    assert "multiple of groups" in Scheme.parse(text).unfit(SHAPE, axis)
    with pytest.raises(UsageError, match="multiple of groups"):
        Scheme.parse(text).grid(SHAPE, axis)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
def test_expand_repeats_each_element_over_its_tile(sizes):
    grid = np.arange(np.prod([g for g, _ in sizes])).reshape([g for g, _ in sizes])
    spread = expand(grid, tuple(g * tile for g, tile in sizes))
    for index in np.ndindex(*spread.shape):
        assert spread[index] == grid[tuple(i // tile for i, (_, tile) in zip(index, sizes, strict=True))]


@pytest.mark.parametrize("grid", [(3, 1, 1), (4, 6), (4, 4, 1)])
def test_a_grid_that_does_not_tile_is_an_error(grid):
    with pytest.raises(ArtifactError, match="tile"):
        expand(np.ones(grid), SHAPE)


@given(tensors())
@settings(deadline=None)
def test_facts_and_arrays_rebuild_the_tensor(tensor):
    again = rebuild(describe(tensor), {name: array.copy() for name, array in tensor.arrays().items()})
    assert difference(tensor, again) is None
    np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())
    assert again.nbytes == tensor.nbytes
    assert again.shape == SHAPE


def test_parts_that_do_not_belong_together_are_an_error():
    tensor = Cast(np.zeros(3, np.float16))
    for facts, arrays in [
        ({"kind": "affine", "bits": 8}, tensor.arrays()),
        ({"kind": "vector", "bits": 8}, tensor.arrays()),
        ({"bits": 8}, tensor.arrays()),
        ({**describe(tensor), "sparse": True}, tensor.arrays()),
    ]:
        with pytest.raises(ArtifactError):
            rebuild(facts, arrays)


@given(tensors())
@settings(deadline=None)
def test_bytes_are_those_of_packed_codes_and_of_what_goes_with_them(tensor):
    arrays = dict(tensor.arrays())
    mask = arrays.pop("mask", np.ones(SHAPE, np.bool_))
    count = tensor.codes.size if isinstance(tensor, Codebook) else int(mask.sum())
    stored = "".join(format(0, f"0{tensor.bits}b") for _ in range(count))
    expected = -(-len(stored) // 8) + (9 if isinstance(tensor, Sparse) else 0)  # 72 elements: 9 bytes of mask
    for name, array in arrays.items():
        if name in ("scale", "table"):
            expected += array.size * array.itemsize
        if name == "zero_point":
            expected += packed_bytes(array.size, tensor.bits)
    assert tensor.nbytes == expected


@given(tensors(), st.data())
@settings(max_examples=150, deadline=None)
def test_one_flipped_bit_is_found_where_it_is(tensor, data):
    arrays = {name: array.copy() for name, array in tensor.arrays().items()}
    name = data.draw(st.sampled_from(sorted(arrays)))
    flat = arrays[name].reshape(-1)
    place = data.draw(st.integers(0, flat.size - 1))
    raw = flat[place : place + 1].view(np.uint8)
    bit = 0 if name == "mask" else data.draw(st.integers(0, 8 * raw.size - 1))
    raw[bit // 8] ^= 1 << (bit % 8)
    found = difference(tensor, rebuild(describe(tensor), arrays))
    assert found is not None
    assert found.startswith(f"{name}: 1 of {flat.size} differ")
    assert str(tuple(int(i) for i in np.unravel_index(place, arrays[name].shape))) in found


def test_signs_of_zero_differ_and_nan_equals_itself():
    zero = Cast(np.zeros(2, np.float16))
    assert difference(zero, Cast(-zero.values)) is not None
    nan = Cast(np.full(2, np.nan, np.float16))
    assert difference(nan, Cast(nan.values.copy())) is None


def test_another_kind_dtype_or_width_differs():
    codes, scale = np.zeros(SHAPE, np.int8), np.ones((1, 1, 1), np.float32)
    tensor = Affine(codes, scale)
    for other in (
        replace(tensor, bits=4),
        replace(tensor, signed=False),
        replace(tensor, scale=scale.astype(np.float16)),
        replace(tensor, scale=np.ones((4, 1, 1), np.float32)),
        replace(tensor, zero_point=np.zeros((1, 1, 1), np.int8)),
        Sparse(np.ones(SHAPE, np.bool_), tensor),
        Cast(np.zeros(SHAPE, np.float16)),
    ):
        assert difference(tensor, other) is not None


def test_codes_mean_what_the_definition_says():
    affine = Affine(
        np.array([[1, 2], [3, 255]], np.uint8), np.float32([[0.5], [2]]), np.uint8([[1], [128]]), signed=False
    )
    np.testing.assert_array_equal(affine.dequantize(), [[0, 0.5], [-250, 254]])
    palette = Palette(np.array([[0, 1], [1, 0]], np.uint8), np.float16([[[-1, 1]], [[5, 7]]]), 1)
    np.testing.assert_array_equal(palette.dequantize(), [[-1, 1], [7, 5]])
    sparse = Sparse(np.array([[True, False], [False, True]]), palette)
    np.testing.assert_array_equal(sparse.dequantize(), [[-1, 0], [0, 5]])


@given(st.integers(1, 8), st.booleans(), st.data())
def test_packed_codes_stand_bit_after_bit_and_unpack_again(bits: int, signed: bool, data: st.DataObject) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    numbers = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=40))
    codes = np.array(numbers, np.int8 if signed else np.uint8)
    packed = pack_codes(codes, bits)
    whole = sum((number & (2**bits - 1)) << (bits * i) for i, number in enumerate(numbers))
    assert packed.tobytes() == whole.to_bytes(packed_bytes(codes.size, bits), "little")
    found = unpack_codes(packed, codes.size, bits, signed)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_pieces_of_a_large_array_meet_without_a_gap(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 21)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    monkeypatch.setattr("octoc.packing._PIECE", 8)
    np.testing.assert_array_equal(pack_codes(codes.T.copy().T, bits), packed)
    np.testing.assert_array_equal(unpack_codes(packed, 105, bits, False), codes.reshape(-1))


def test_bytes_of_another_number_of_codes_are_refused() -> None:
    with pytest.raises(ArtifactError, match="3 bytes cannot hold 9 codes"):
        unpack_codes(np.zeros(3, np.uint8), 9, 4, True)
