"""What every method that encodes weights keeps to, whichever files the folder holds."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from octoc.errors import DataError, ModelError, UsageError
from octoc.hessian import Hessian
from octoc.qtensor import Affine, Codebook, Palette, Scheme, Sparse, difference
from octoc.quantize import encode, encoder, encoders, from_rows, to_rows

SCHEMES = {
    "affine": [
        "int2-tensor",
        "int3-channel",
        "int4-group4",
        "int4-channel",
        "int5-tensor",
        "int8-channel",
        "int8-group2",
    ],
    "asymmetric": ["uint2-tensor", "uint3-channel", "uint4-group4", "uint5-tensor", "uint8-channel", "uint8-group2"],
    "palette": ["palette1-tensor", "palette2-group2", "palette3-channel", "palette4-tensor", "palette8-tensor"],
    "codebook": [
        "codebook2-tensor",
        "codebook3-channel",
        "codebook4-group4",
        "codebook4x2-group2",
        "codebook8x2-channel",
    ],
    "cast": ["float16"],
}
UNFIT = {
    "affine": ["int4-group5"],
    "asymmetric": ["uint4-group5"],
    "palette": ["palette4-group5"],
    "codebook": ["codebook4-group5", "codebook4x2-group1"],
    "cast": [],
}
CASES = [(name, text) for name in encoders() for kind in encoder(name).ENCODES for text in SCHEMES[kind]]
DTYPES = ["float32", "float16"]


def weights():
    """Named weights [6, 8, 3], each of which broke somebody's quantizer."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((6, 8, 3)).astype(np.float32)
    dead = normal.copy()
    dead[2] = 0
    return {
        "normal": normal,
        "a zero channel": dead,
        "all zero": np.zeros_like(normal),
        "constant": np.full_like(normal, 0.3),
        "negative": -np.abs(normal),
        "denormal": normal * np.float32(1e-40),
        "mixed": normal * np.float32(10.0) ** rng.integers(-42, 4, normal.shape).astype(np.float32),
        "close to float16's end": np.sign(normal) * np.float32(65504),
        "huge": normal * np.float32(1e38 / 4),
    }


WEIGHTS = weights()


def statistics(name, weight):
    """What a method needs of the layer's inputs, here hardly correlated."""
    if "hessian" not in encoder(name).NEEDS:
        return {}
    hessian = Hessian(1, len(weight), weight[0].size)
    hessian.update(np.random.default_rng(3).standard_normal((1, 4096, weight[0].size)).astype(np.float32))
    return {"hessian": hessian}


def stored_as(name, text, weight, dtype):
    more = statistics(name, weight)
    return encoder(name).encode(weight, Scheme.parse(text), 0, dtype=dtype, importance=None, **more)


def bound(scheme, weight, dtype):
    """Largest error [weight's shape] that rounding at min-max's step may leave, plus what the dtype takes."""
    peak = np.abs(weight).max()
    bits = scheme.bits // scheme.vector
    relative = 0.0 if scheme.kind == "cast" else 0.5 / (2 ** (bits - 1) - 1) if bits > 1 else 1.0
    info = np.finfo("float16" if scheme.kind == "cast" else dtype)
    return peak * (relative + 2 * float(info.eps)) + float(info.smallest_normal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(WEIGHTS))
@pytest.mark.parametrize(("name", "text"), CASES)
def test_any_finite_weight_is_stored_finite_near_and_twice_the_same(name, text, case, dtype):
    weight, scheme = WEIGHTS[case], Scheme.parse(text)
    narrow = dtype == "float16" or scheme.kind == "cast"
    if narrow and (case == "huge" or (case.startswith("close") and scheme.vector > 1)):
        with pytest.raises(ModelError, match="at most"):
            stored_as(name, text, weight, dtype)
        return
    stored = stored_as(name, text, weight, dtype)
    decoded = stored.dequantize().astype(np.float64)
    assert decoded.shape == weight.shape
    assert np.isfinite(decoded).all()
    root_mean = np.sqrt(np.mean(np.square(decoded - weight)))
    assert root_mean <= bound(scheme, weight, dtype)
    assert difference(stored, stored_as(name, text, weight.copy(), dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "text"), CASES)
def test_codes_keep_to_their_bits_and_scales_are_normal_numbers(name, text, dtype):
    scheme = Scheme.parse(text)
    for case, weight in WEIGHTS.items():
        narrow = dtype == "float16" or scheme.kind == "cast"
        if narrow and (case == "huge" or (case.startswith("close") and scheme.vector > 1)):
            continue
        stored = stored_as(name, text, weight, dtype)
        assert stored.bits == scheme.bits
        if isinstance(stored, Affine):
            least = -(2 ** (scheme.bits - 1)) if scheme.kind == "affine" else 0
            assert stored.codes.dtype == (np.int8 if stored.signed else np.uint8)
            assert stored.signed == (scheme.kind == "affine")
            assert stored.codes.min() >= least
            assert stored.codes.max() < 2**scheme.bits + least
            if not stored.signed:
                assert stored.zero_point.dtype == np.uint8
                assert stored.zero_point.shape == stored.scale.shape
                assert stored.zero_point.max() < 2**scheme.bits
            assert stored.scale.dtype == dtype
            assert stored.scale.shape == scheme.grid(weight.shape, 0)
            assert (np.abs(stored.scale) >= np.finfo(dtype).smallest_normal).all()
        if isinstance(stored, Codebook):
            assert stored.codes.dtype == np.uint8
            assert stored.codes.max() < 2**scheme.bits
            assert stored.table.dtype == stored.scale.dtype == dtype
            assert stored.table.shape == (2**scheme.bits, scheme.vector)
            assert stored.scale.shape == scheme.grid(weight.shape, 0)
            assert (stored.scale >= np.finfo(dtype).smallest_normal).all()
        if isinstance(stored, Palette):
            assert stored.codes.dtype == np.uint8
            assert stored.codes.max() < 2**scheme.bits
            assert stored.table.dtype == dtype
            assert np.isfinite(stored.table).all()


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in encoders() for kind in encoder(name).ENCODES])
def test_more_bits_never_lose_more(name, kind):
    weight = np.random.default_rng(1).standard_normal((16, 24)).astype(np.float32)
    choices = {
        "affine": [f"int{bits}-channel" for bits in range(2, 9)],
        "asymmetric": [f"uint{bits}-channel" for bits in range(2, 9)],
        "codebook": [f"codebook{bits}-channel" for bits in range(2, 8)],
        "palette": [f"palette{bits}-group4" for bits in (1, 2, 3, 4, 6, 8)],
        "cast": ["float16"],
    }[kind]
    errors = [np.square(stored_as(name, text, weight, "float32").dequantize() - weight).sum() for text in choices]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", encoders())
def test_unfit_schemes_and_other_kinds_are_refused(name):
    weight, kinds = WEIGHTS["normal"], encoder(name).ENCODES
    others = [texts[0] for other, texts in SCHEMES.items() if other not in kinds]
    for text in [text for kind in kinds for text in UNFIT[kind]] + others:
        with pytest.raises(UsageError):
            stored_as(name, text, weight, "float32")
    kind = kinds[0]
    if kind != "cast":  # it has no scales
        with pytest.raises(UsageError, match="bfloat16"):
            stored_as(name, SCHEMES[kind][0], weight, "bfloat16")


@pytest.mark.parametrize("text", [text for kind, texts in SCHEMES.items() if kind != "codebook" for text in texts])
def test_sparse_is_dense_with_zeros_kept_and_no_codes_for_them(text):
    weight = np.where(np.random.default_rng(2).uniform(size=(6, 8, 3)) < 0.5, np.float32(0), WEIGHTS["normal"])
    weight[1] = 0
    weight[2, 0, 0] = -0.0
    stored = encode(weight, Scheme.parse(text + "-sparse"), 0, importance=np.abs(weight[:1]))
    assert isinstance(stored, Sparse)
    np.testing.assert_array_equal(stored.mask, weight != 0)
    codes = stored.dense.arrays().get("codes", stored.dense.arrays().get("values"))
    assert not codes[~stored.mask].any()
    assert not np.signbit(codes[~stored.mask]).any()
    decoded = stored.dequantize()
    assert not decoded[weight == 0].any()
    assert np.isfinite(decoded).all()


def test_importance_that_is_zero_throughout_a_tile_counts_alike():
    weight = WEIGHTS["normal"]
    importance = np.ones_like(weight)
    importance[3] = 0
    for text in ("int4-channel", "palette2-channel"):
        plain, given = (encode(weight, Scheme.parse(text), 0, importance=i) for i in (None, importance))
        assert difference(plain, given) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_counted_and_refused(bad):
    weight = WEIGHTS["normal"].copy()
    weight[0, 0, :2] = bad
    with pytest.raises(ModelError, match="2 of 144"):
        encode(weight, Scheme.parse("int8-channel"), 0)


@pytest.mark.parametrize("importance", [np.ones(5), np.full((6, 8, 3), -1.0), np.full((6, 8, 3), np.nan)])
def test_importance_that_does_not_fit_is_refused(importance):
    with pytest.raises(DataError, match="importance"):
        encode(WEIGHTS["normal"], Scheme.parse("int8-channel"), 0, importance=importance)


def test_rows_hold_whole_tiles_and_go_back():
    weight = np.arange(2 * 6 * 4).reshape(2, 6, 4)
    rows = to_rows(weight, (2, 3, 1))
    np.testing.assert_array_equal(rows[1], weight[0, 2:4].ravel())
    np.testing.assert_array_equal(from_rows(rows, weight.shape, (2, 3, 1)), weight)


def test_only_files_that_encode_are_listed_and_listing_imports_none():
    code = "import sys, octoc.quantize as q; print(*q.encoders()); print([m for m in sys.modules if 'quantize.' in m])"
    names, loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {"rtn", "palette", "cast"} <= set(names.split())
    assert "activations" not in names.split()
    assert loaded == "[]"
    with pytest.raises(UsageError, match="rtn"):
        encoder("activations")
