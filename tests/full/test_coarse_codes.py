"""Codes of 4, 3 and 2 bits by GPTQ on trained networks: what is right afterwards, and what a language model loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import octoc
from octoc.apply import Encoder
from octoc.load import load_model
from octoc.qtensor import Array
from octoc.recipe import Encode
from octoc.sequential import encode_sequentially
from tests.networks import cifar10_test, cifar10_train, trained_resnet20
from tests.stories import stories, story_loss, trained_stories
from tests.zoo import answers

pytestmark = pytest.mark.full

LENGTH = 192  # tokens of a text for calibration
BATCH = 16


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained_resnet20()


@pytest.fixture(scope="module")
def read() -> Array:
    """For calibration: stories that none of `told` is among."""
    tokens = stories(300, 512, LENGTH)
    return tokens[(tokens >= 0).all(axis=1)][:48]


@pytest.fixture(scope="module")
def told() -> Array:
    """For the loss."""
    return stories(0, 100)


@pytest.mark.parametrize(("bits", "least"), [(4, 912), (3, 895), (2, 800)])
def test_resnet20_stays_right_with_one_table_a_layer(bits: int, least: int, resnet: nn.Module, tmp_path: Path) -> None:
    x, y = cifar10_test()
    given = {"data": (x, y), "calibration": cifar10_train(512), "weights": f"palette{bits}-tensor"}
    report = octoc.compress_model(resnet, devices=["iphone-15-pro"], formats=["coreml"], out=tmp_path, **given)
    (artifact,) = report.artifacts
    assert artifact.held, artifact.failed
    assert int((answers(artifact, tmp_path, [x])[0].argmax(1) == y).sum()) >= least


@pytest.mark.parametrize(("bits", "most"), [(4, 1.27), (3, 1.45), (2, 2.6)])
def test_a_language_model_loses_little_with_codes_in_groups(bits: int, most: float, read: Array, told: Array) -> None:
    model = load_model(trained_stories(), examples=(torch.zeros(2, LENGTH, dtype=torch.int64),))
    steps = [
        Encode(layer.name, f"int{bits}-group{32 if layer.shape[1] == 64 else 43}", "float16", layer.axis, "gptq")
        for layer in model.layers()
        if layer.name.startswith("blocks")
    ]
    calls = [(torch.from_numpy(read[i : i + BATCH]),) for i in range(0, len(read), BATCH)]
    small, notes = encode_sequentially(model, steps, Encoder(model), calls)
    assert len(steps) == len(small.qtensors) == 35
    assert not notes
    network = trained_stories()
    weights = {name: torch.from_numpy(tensor.dequantize().copy()) for name, tensor in small.qtensors.items()}
    network.load_state_dict({**network.state_dict(), **weights})
    with torch.no_grad():
        logits = torch.cat([network(torch.from_numpy(part.clip(0))) for part in (told[:50], told[50:])])
    assert story_loss(logits, told) <= most
