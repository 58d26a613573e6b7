"""One line of Python gives a network that runs, evaluates and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import octoc
from octoc.errors import ArtifactError, UsageError
from octoc.evaluate import open_session, predict
from octoc.quantize import encoder, encoders
from octoc.quantized import QuantizedModel

X = np.random.default_rng(0).normal(size=(96, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).eval()


def quantized(network: nn.Module, **options: Any) -> QuantizedModel:
    return octoc.quantize_model(network, calibration_data=X[:64], **options)


@pytest.mark.parametrize("method", [name for name in encoders() if name != "cast"])
def test_every_method_gives_a_network_that_runs_close_to_the_original(method: str, network: nn.Module) -> None:
    small = quantized(network, bits=4, method=method)
    with torch.no_grad():
        wanted = network(torch.from_numpy(X[64:]))
    found = small(torch.from_numpy(X[64:]))
    assert isinstance(found, torch.Tensor)
    assert float((found - wanted).norm() / wanted.norm()) < 0.3
    assert small.evaluate(X[64:]) > 95
    assert 4 <= small.bits < 6


def test_more_bits_are_closer(network: nn.Module) -> None:
    found = [quantized(network, bits=bits).evaluate(X[64:]) for bits in (2, 3, 4, 8)]
    assert found == sorted(found)
    assert found[-1] > 99.9


def test_calibration_makes_gptq_the_method_and_beats_rounding(network: nn.Module) -> None:
    plain = octoc.quantize_model(network, bits=3, examples=[torch.zeros(2, 3, 8, 8)])
    assert quantized(network, bits=3).evaluate(X[64:]) > plain.evaluate(X[64:])
    same = quantized(network, bits=3, method="rtn")
    assert all(
        np.array_equal(q.dequantize(), plain.compressed.qtensors[n].dequantize())
        for n, q in same.compressed.qtensors.items()
    )


@pytest.mark.parametrize(("file", "dtype"), [("model.onnx", "float32"), ("model.mlpackage", "float16")])
def test_what_it_exports_gives_what_it_gives(file: str, dtype: str, network: nn.Module, tmp_path: Path) -> None:
    small = quantized(network, bits=8, dtype=dtype)
    checks = small.export(tmp_path / "new folder" / file)
    assert {check.name for check in checks} == {"codes", "outputs"}
    assert all(check.held for check in checks)
    fmt = {"onnx": "onnx", "mlpackage": "coreml"}[file.split(".")[1]]
    (found,) = predict(open_session(fmt, tmp_path / "new folder" / file), [X[64:]])
    wanted = small(torch.from_numpy(X[64:]))
    assert isinstance(wanted, torch.Tensor)
    assert np.abs(found - wanted.numpy()).max() < 0.02 * np.abs(wanted.numpy()).max()
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == [file]
    with pytest.raises(UsageError, match="exists; give another name"):
        small.export(tmp_path / "new folder" / file)


def test_groups_that_do_not_divide_a_layer_become_the_largest_that_do(network: nn.Module) -> None:
    small = quantized(network, bits=4, group_size=24)
    assert {note.what: note.reason for note in small.notes} == {
        "0.weight": "3 channels in groups of 3, not 24",
        "4.weight": "512 channels in groups of 16, not 24",
        "6.weight": "32 channels in groups of 16, not 24",
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "magic"}, "no method 'magic' encodes weights"),
        ({"method": "gptq", "kind": "codebook"}, "gptq makes affine and palette encodings, not codebook"),
        ({"bits": 9}, "no int encoding of 9 bits"),
        ({"method": "palette", "bits": 5}, "no palette encoding of 5 bits"),
    ],
)
def test_what_no_method_makes_is_refused(asked: dict[str, Any], message: str, network: nn.Module) -> None:
    with pytest.raises(UsageError, match=message):
        quantized(network, **asked)


def test_a_method_that_needs_data_says_so(network: nn.Module) -> None:
    with pytest.raises(UsageError, match="gptq needs calibration_data"):
        octoc.quantize_model(network, method="gptq", examples=[torch.zeros(2, 3, 8, 8)])
    assert encoder("gptq").NEEDS == ("hessian",)


@pytest.mark.parametrize(
    ("file", "asked", "message"),
    [
        ("model.bin", {}, r"is no artefact: its name ends in none of .*\.onnx"),
        ("model.onnx", {"bits": 3}, r"onnx cannot hold 0\.weight so: ONNX has no 3-bit integers"),
        ("model.onnx", {"dtype": "float16"}, r"its scales are float16, and the file computes in float32"),
        ("model.onnx", {"method": "palette"}, r"onnx cannot hold 0\.weight so: ONNX holds no look-up tables"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(
    file: str, asked: dict[str, Any], message: str, network: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises((ArtifactError, UsageError), match=message):
        quantized(network, **asked).export(tmp_path / file)
    assert list(tmp_path.iterdir()) == []
