"""HQQ and HIGGS on a trained language model: better than rounding, without data and at no more bits in all."""

from __future__ import annotations

import pytest
import torch

from benchmarks.data_free import bits_in_all, compress, loss
from octoc.load import load_model
from tests.stories import stories, trained_stories

pytestmark = pytest.mark.full


@pytest.mark.parametrize(("bits", "hqq", "higgs"), [(4, 1.31, 1.30), (3, 1.76, 1.75), (2, 4.5, 4.2)])
def test_hqq_and_higgs_lose_less_than_rounding_at_no_more_bits(bits: int, hqq: float, higgs: float) -> None:
    tokens = stories(0, 100)
    model = load_model(trained_stories(), examples=(torch.zeros(2, tokens.shape[1], dtype=torch.int64),))
    found = {method: compress(model, method, bits) for method in ("rtn", "hqq", "higgs")}
    sizes = {method: bits_in_all(small, model) for method, small in found.items()}
    losses = {method: loss(small.decoded, tokens) for method, small in found.items()}
    assert max(sizes.values()) == sizes["rtn"] <= bits + 0.5
    assert losses["hqq"] < min(hqq, losses["rtn"])
    assert losses["higgs"] < min(higgs, losses["rtn"])
