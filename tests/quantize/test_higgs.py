"""HIGGS: tables against published and independent values, and codes against a search over all."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate
from scipy.stats import norm

from octoc.errors import ModelError
from octoc.qtensor import Scheme, expand
from octoc.quantize import encode
from octoc.quantize.higgs import gaussian_table, nearest

# Max, "Quantizing for Minimum Distortion", 1960, table I: positive entries and mean squared error.
PUBLISHED = {
    4: ([0.4528, 1.510], 0.1175),
    8: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    16: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
}


@pytest.mark.parametrize("entries", list(PUBLISHED))
def test_the_scalar_tables_are_those_published_by_max(entries):
    table = gaussian_table(entries, 1)[:, 0]
    positive, distortion = PUBLISHED[entries]
    np.testing.assert_allclose(table[entries // 2 :], positive, rtol=4e-4)
    np.testing.assert_allclose(table, -table[::-1], rtol=1e-12)
    border = [-np.inf, *(table[1:] + table[:-1]) / 2, np.inf]
    error = sum(
        integrate.quad(lambda x, t=t: (x - t) ** 2 * norm.pdf(x), low, high)[0]
        for t, low, high in zip(table, border[:-1], border[1:], strict=True)
    )
    assert error == pytest.approx(distortion, rel=1e-3)


@pytest.mark.parametrize("entries", [8, 32, 64])
def test_every_scalar_entry_is_the_mean_of_its_cell(entries):
    table = gaussian_table(entries, 1)[:, 0]
    border = [-np.inf, *(table[1:] + table[:-1]) / 2, np.inf]
    for entry, low, high in zip(table, border[:-1], border[1:], strict=True):
        mean = integrate.quad(lambda x: x * norm.pdf(x), low, high)[0] / integrate.quad(norm.pdf, low, high)[0]
        assert entry == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("entries", [4, 16, 64])
def test_every_pair_is_the_mean_of_its_cell_and_pairs_lose_less_than_single_weights(entries):
    table = gaussian_table(entries, 2)
    sample = np.random.default_rng(0).standard_normal((400_000, 2))
    cell = np.square(sample[:, None, 0] - table[:, 0]) + np.square(sample[:, None, 1] - table[:, 1])
    chosen, error = cell.argmin(axis=1), cell.min(axis=1).mean() / 2
    for k, entry in enumerate(table):
        inside = sample[chosen == k]
        spread = inside.std(axis=0) / np.sqrt(len(inside))
        assert (np.abs(inside.mean(axis=0) - entry) < 5 * spread + 5e-3).all()
    single = gaussian_table(round(entries**0.5), 1)
    alone = np.square(sample - single[nearest(sample[..., None], None, single), 0]).mean()
    assert error < (1.005 if entries == 4 else 0.95) * alone  # of two bits the best pairs are those of single bits


def test_the_largest_table_of_pairs_is_near_the_limit_of_zador():
    sample = np.random.default_rng(1).standard_normal((200_000, 2))
    table = gaussian_table(256, 2)
    error = np.square(sample - table[nearest(sample, None, table)]).sum(axis=1).mean()
    limit = 5 / (18 * np.sqrt(3)) * 8 * np.pi / 256  # second moment of hexagons times the density's norm, by entries
    assert limit * 0.93 < error < limit * 1.05


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("text", ["codebook4-channel", "codebook4x2-channel"])
def test_no_other_entry_stands_nearer_to_the_weight(text, weighted):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((5, 24)).astype(np.float32)
    importance = rng.uniform(0.1, 1, weight.shape) if weighted else None
    stored = encode(weight, Scheme.parse(text), 0, importance=importance)
    length = stored.table.shape[1]
    vectors = weight.reshape(5, -1, length)
    counts = np.ones_like(vectors) if importance is None else importance.reshape(vectors.shape)
    choices = stored.scale[:, :, None, None] * stored.table
    every = (counts[:, :, None] * np.square(vectors[:, :, None] - choices)).sum(axis=-1)
    ours = (counts * np.square(vectors - stored.dequantize().reshape(vectors.shape))).sum(axis=-1)
    np.testing.assert_allclose(ours, every.min(axis=-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("text", "worst"), [("codebook2-channel", 1.02), ("codebook4-channel", 1.02)])
def test_the_scale_is_near_the_best_of_all_scales(text, worst):
    weight = np.random.default_rng(3).standard_normal((30, 64)).astype(np.float32)
    stored = encode(weight, Scheme.parse(text), 0)
    best = 0.0
    for row in weight.astype(np.float64):
        scales = np.geomspace(0.3, 3, 4000)[:, None, None] * stored.table[:, 0].astype(np.float64)
        best += np.square(scales - row[None, :, None]).min(axis=2).sum(axis=1).min()
    assert float(np.square(stored.dequantize() - weight).sum()) <= worst * best


def test_gaussian_weights_lose_less_than_in_any_rounding_of_as_many_bits():
    weight = np.random.default_rng(4).standard_normal((64, 128)).astype(np.float32)
    for bits in (2, 3, 4):
        texts = [f"int{bits}-group64", f"codebook{bits}-group64", f"codebook{2 * bits}x2-group64"]
        errors = [float(np.square(encode(weight, Scheme.parse(t), 0).dequantize() - weight).sum()) for t in texts]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_and_groups_run_along_the_input_channels(axis):
    weight = np.random.default_rng(5).standard_normal((8, 12, 3)).astype(np.float32)
    scheme = Scheme.parse("codebook4x2-group4")
    stored, turned = encode(weight, scheme, axis), encode(np.swapaxes(weight, 0, 1), scheme, 1 - axis)
    assert stored.codes.shape == ((8, 6, 3) if axis == 0 else (4, 12, 3))
    np.testing.assert_array_equal(stored.dequantize(), np.swapaxes(turned.dequantize(), 0, 1))
    scale = expand(stored.scale, weight.shape)
    pairs = np.moveaxis(stored.dequantize() / scale, stored.axis, -1).reshape(-1, 2)
    assert all(np.isclose(stored.table, pair, rtol=1e-5).all(axis=1).any() for pair in pairs)


def test_pairs_that_the_disc_of_a_table_cannot_reach_are_refused_with_the_limit():
    with pytest.raises(ModelError, match="46318"):
        encode(np.full((2, 4), 5e4, np.float32), Scheme.parse("codebook4x2-channel"), 0, dtype="float16")
