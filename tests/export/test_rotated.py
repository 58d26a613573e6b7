"""Rotated layers with zero points: every format holds and runs them."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from octoc.compressed import Compressed
from octoc.export import exporter, formats
from octoc.load import load_model
from octoc.qtensor import Scheme, difference
from octoc.quantize import encode
from octoc.quantize.rotate import rewrite, rotatable


@pytest.mark.parametrize("fmt", formats())
def test_a_rotated_network_with_zero_points_is_written_exactly_and_runs(fmt: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64)
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 172), nn.ReLU(), nn.Linear(172, 8))
    model = load_model(network.eval(), examples=(x,))
    model = rewrite(model, rotatable(model))
    module = exporter(fmt)
    base = module.convert(model)
    scheme, dtype = Scheme.parse("uint4-group4"), getattr(base, "compute", "float32")
    layers = model.layers()
    assert [module.accepts(scheme, layer, False) for layer in layers] == [None] * 3
    codes = {layer.name: encode(model.tensors[layer.name].numpy(), scheme, 0, dtype=dtype) for layer in layers}
    small, path = Compressed(model, codes), tmp_path / module.FILE
    module.write(base, small, path)
    found = module.read_codes(path)
    assert {name: difference(tensor, found[name]) for name, tensor in codes.items()} == dict.fromkeys(codes)
    session = importlib.import_module(f"octoc.runtime.{fmt}").open_session(path)
    (output,) = session.run({session.inputs[0].name: x[:1].numpy()}).values()
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(output, small.decoded.run(x[:1])[0].numpy(), atol=tolerance)


@pytest.mark.parametrize("fmt", formats())
def test_codebooks_are_refused_with_the_reason_and_zero_points_where_activations_are_integers(fmt: str) -> None:
    (layer,) = load_model(nn.Linear(8, 4).eval(), examples=(torch.zeros(2, 8),)).layers()
    accepts = exporter(fmt).accepts
    assert "table" in str(accepts(Scheme.parse("codebook4-group4"), layer, False))
    assert accepts(Scheme.parse("uint8-channel"), layer, True) is not None
    assert accepts(Scheme.parse("uint8-channel"), layer, False) is None
