"""Learned rounding against rounding to nearest, where inputs are correlated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from octoc.apply import encode_biases
from octoc.compressed import Compressed
from octoc.errors import ModelError
from octoc.load import load_model
from octoc.model import Model
from octoc.qtensor import Array, Scheme
from octoc.quantize import encode
from octoc.recover import reconstruct


def correlated(count: int, width: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((4, width))
    return (rng.standard_normal((count, 4)) @ mixing + 0.1 * rng.standard_normal((count, width))).astype(np.float32)


def layer(width: int = 16) -> Model:
    torch.manual_seed(0)
    return load_model(nn.Sequential(nn.Linear(width, 8, bias=False)).eval(), examples=[torch.zeros(2, width)])


def error(small: Compressed, model: Model, x: Array) -> float:
    x_ = torch.from_numpy(x)
    return float((small.decoded.run(x_)[0] - model.run(x_)[0]).square().sum())


@pytest.mark.parametrize("text", ["int2-channel", "int4-channel", "int3-group4", "palette2-tensor", "palette3-group2"])
def test_a_layer_with_correlated_inputs_errs_less_on_new_samples(text: str) -> None:
    model = layer()
    (name,) = (found.name for found in model.layers())
    rounded = Compressed(model, {name: encode(model.tensors[name].numpy(), Scheme.parse(text), 0)})
    tuned = reconstruct.tune(
        rounded, model, [correlated(200, 16, 1)], classes=False, encode_biases=encode_biases, steps=300
    )
    fresh = correlated(200, 16, 2)
    assert error(tuned.compressed, model, fresh) < 0.6 * error(rounded, model, fresh)


def test_a_block_that_would_err_more_keeps_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer()
    (name,) = (found.name for found in model.layers())
    rounded = Compressed(model, {name: encode(model.tensors[name].numpy(), Scheme.parse("int4-channel"), 0)})
    monkeypatch.setitem(reconstruct.RATES, "rounding", 50.0)
    tuned = reconstruct.tune(
        rounded, model, [correlated(40, 16, 1)], classes=False, encode_biases=encode_biases, steps=3
    )
    assert tuned.compressed is rounded
    assert "did not help" in tuned.notes[-1]


def test_samples_beyond_what_memory_is_given_are_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layer()
    (name,) = (found.name for found in model.layers())
    rounded = Compressed(model, {name: encode(model.tensors[name].numpy(), Scheme.parse("int2-channel"), 0)})
    monkeypatch.setattr(reconstruct, "MOST_BYTES", 8 * (16 + 8) * 60)
    tuned = reconstruct.tune(
        rounded, model, [correlated(200, 16, 1)], classes=False, encode_biases=encode_biases, steps=50
    )
    assert "35 of 175 samples" in tuned.notes[0]
    assert tuned.after < tuned.before


def test_an_original_whose_batch_norms_are_not_folded_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    original = load_model(module, examples=[torch.zeros(2, 2, 5, 5)])
    folded = load_model(nn.Sequential(nn.Conv2d(2, 3, 3)).eval(), examples=[torch.zeros(2, 2, 5, 5)])
    x = np.zeros((4, 2, 5, 5), np.float32)
    with pytest.raises(ModelError, match="fold them in both"):
        reconstruct.tune(Compressed(folded, {}), original, [x], classes=False, encode_biases=encode_biases)
