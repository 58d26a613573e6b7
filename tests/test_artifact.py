"""What is built is checked against what was asked for; a replay takes codes from a proof of the same network only."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import octoc
from octoc.errors import UsageError
from octoc.packing import pack_codes
from octoc.proof import NAME, artifact_files, artifact_sha256, read_proof, write_proof
from octoc.qtensor import Affine
from octoc.recipe import Encode, read_recipe
from octoc.verify import verify
from tests.zoo import DEVICES, FORMATS, built, normal

BOARD = "raspberry-pi-5"
X = normal(3, 8, 8, count=24)


class Upsampling(nn.Module):
    """Two convolutions, a transposed one and a linear layer, all between int8 values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 16 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        y: torch.Tensor = self.head(torch.relu(self.up(x)).flatten(1))
        return y


@pytest.mark.parametrize(
    ("fmt", "device", "count"), [(f, d, 3 if f == "onnx" else 4) for f, d in zip(FORMATS, DEVICES, strict=True)]
)
def test_every_layer_that_the_format_has_integer_kernels_for_runs_in_integers(
    fmt: str, device: str, count: int, tmp_path: Path
) -> None:
    """onnxruntime has none for a transposed convolution."""
    network = built(Upsampling)
    report = octoc.compress_model(network, devices=[device], formats=[fmt], data=X, out=tmp_path, activations="int8")
    (artifact,) = report.artifacts
    assert artifact.held, artifact.failed
    assert read_proof((tmp_path / str(artifact.path)).parent / NAME).integer == count
    details = {check.name: check.detail for check in artifact.checks}
    assert details["integer operations"] == f"{count} of {count} layers run in integers"
    assert "unchanged" not in details


@pytest.mark.parametrize(("fmt", "device"), list(zip(FORMATS, DEVICES, strict=True)))
def test_four_bit_weights_run_in_integers_wherever_eight_bit_ones_do(fmt: str, device: str, tmp_path: Path) -> None:
    """LiteRT's transposed convolution takes 8 bits only, and onnxruntime has none."""
    given = {"devices": [device], "formats": [fmt], "data": X, "weights": "int4", "activations": "int8"}
    report = octoc.compress_model(built(Upsampling), out=tmp_path, **given)
    (artifact,) = report.artifacts
    assert artifact.held, artifact.failed
    path = tmp_path / str(artifact.path)
    proof = read_proof(path.parent / NAME)
    widths = {name: tensor.bits for name, tensor in proof.qtensors.items() if name.endswith("weight")}
    assert widths == {"first.weight": 4, "second.weight": 4, "head.weight": 4, "up.weight": 8 if fmt == "tflite" else 4}
    assert proof.integer == (3 if fmt == "onnx" else 4)
    codes = proof.qtensors["head.weight"]
    assert isinstance(codes, Affine)
    packed = pack_codes(codes.codes, 4).tobytes()
    broken = tmp_path / path.name
    for entry in artifact_files(path):
        place = broken / entry.relative_to(path) if path.is_dir() else broken
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(entry.read_bytes().replace(packed, bytes([packed[0] ^ 1]) + packed[1:]))
    forged = replace(proof, sha256=artifact_sha256(broken))
    assert next(check.name for check in verify(broken, forged) if not check.held) == "codes"


@pytest.mark.parametrize(("fmt", "device"), list(zip(FORMATS, DEVICES, strict=True)))
def test_int8_weights_between_float_values_are_no_integer_operations(fmt: str, device: str, tmp_path: Path) -> None:
    report = octoc.compress_model(built(Upsampling), devices=[device], formats=[fmt], data=X, out=tmp_path)
    (artifact,) = report.artifacts
    path = tmp_path / str(artifact.path)
    assert "integer operations" not in {check.name for check in artifact.checks}
    assert importlib.import_module(f"octoc.runtime.{fmt}").integer_operations(path) == 0
    more = replace(read_proof(path.parent / NAME), integer=1)
    assert [check.name for check in verify(path, more) if not check.held] == ["integer operations"]


def test_a_device_that_runs_only_int8_gets_int8_activations_without_asking(tmp_path: Path) -> None:
    report = octoc.compress_model(built(Upsampling), devices=["mcu-stm32l4r5"], data=X, out=tmp_path)
    (artifact,) = report.artifacts
    assert artifact.held, artifact.failed
    assert artifact.activations == "int8"
    assert read_proof((tmp_path / str(artifact.path)).parent / NAME).integer == 4


def small_device(folder: Path, budget: int) -> Path:
    path = folder / "devices.yaml"
    path.write_text(
        f"devices:\n  badge:\n    base: raspberry-pi-5\n    name: a badge\n"
        f"    model_budget: {{value: {budget}, unit: B, source: measured, estimate: false}}\n"
    )
    return path


@pytest.mark.parametrize("budget", [4900, 100])
def test_a_model_is_planned_for_what_the_device_holds_and_the_report_says_whether_it_fits(
    budget: int, tmp_path: Path
) -> None:
    given = {"data": X, "devices": ["badge"], "formats": ["onnx"]}
    network = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)))
    report = octoc.compress_model(network, out=tmp_path, devices_file=small_device(tmp_path, budget), **given)
    (artifact,) = report.artifacts
    (goal,) = artifact.goals
    assert goal.name == "memory"
    assert "the budget of a model of badge" in goal.detail
    assert goal.held == (artifact.nbytes <= budget) == (budget == 4900)
    assert artifact.layers[0].bits < 8
    if not goal.held:
        assert f"the smallest reachable is {artifact.nbytes} B" in goal.detail


def test_sensitivities_are_measured_only_where_something_is_to_be_planned(tmp_path: Path) -> None:
    given = {"data": X, "devices": [BOARD], "formats": ["onnx"]}
    plain = octoc.compress_model(built(Upsampling), out=tmp_path / "plain", **given)
    planned = octoc.compress_model(built(Upsampling), out=tmp_path / "planned", weights="auto", **given)
    assert "profile" not in plain.seconds
    assert all(line.sensitivity is None for line in plain.artifacts[0].layers)
    assert all(line.sensitivity is not None for line in planned.artifacts[0].layers)
    low, high = plain.artifacts[0].reachable
    assert low <= high == plain.artifacts[0].nbytes


def test_a_network_without_integer_operations_does_not_pass_for_one_in_integers(tmp_path: Path) -> None:
    network = built(lambda: nn.Sequential(nn.Flatten(), nn.Softmax(1)))
    report = octoc.compress_model(network, devices=[BOARD], formats=["onnx"], data=X, out=tmp_path, activations="int8")
    (artifact,) = report.artifacts
    assert [(check.name, check.detail) for check in artifact.failed] == [
        ("integer operations", "no operation of this network runs in integers")
    ]


@pytest.fixture
def source(tmp_path: Path) -> tuple[nn.Module, Path]:
    """A network and the folder of its artefact."""
    network = built(Upsampling)
    octoc.compress_model(network, devices=[BOARD], formats=["onnx"], data=X, out=tmp_path / "source")
    return network, tmp_path / "source" / BOARD / "onnx"


def replayed(network: nn.Module, folder: Path, recompute: bool = False) -> Path:
    out = folder / "replayed"
    octoc.compress_model(network, devices=[BOARD], data=X, out=out, recipe=folder / "recipe.json", recompute=recompute)
    return out / BOARD / "onnx"


def test_an_edited_encoding_is_not_answered_with_the_proof_s(source: tuple[nn.Module, Path]) -> None:
    network, folder = source
    recipe = read_recipe(folder / "recipe.json")
    steps = [replace(s, scheme="int8-tensor") if isinstance(s, Encode) else s for s in recipe.steps]
    assert steps != list(recipe.steps)
    (folder / "recipe.json").write_text(replace(recipe, steps=tuple(steps)).to_json())
    with pytest.raises(UsageError, match=r"weight as int8-tensor, and the proof .*--recompute"):
        replayed(network, folder)
    tensors = read_proof(replayed(network, folder, recompute=True) / NAME).qtensors.values()
    assert {tensor.arrays()["scale"].size for tensor in tensors} == {1}


def test_a_proof_of_another_network_is_refused(source: tuple[nn.Module, Path]) -> None:
    network, folder = source
    proof = read_proof(folder / NAME)
    assert proof.model == read_recipe(folder / "recipe.json").model
    write_proof(replace(proof, model="0" * 64), folder / NAME)
    with pytest.raises(UsageError, match=r"proof beside the recipe was made for another network.*--recompute"):
        replayed(network, folder)
    first, again = folder / "model.onnx", replayed(network, folder, recompute=True) / "model.onnx"
    assert [p.read_bytes() for p in artifact_files(first)] == [p.read_bytes() for p in artifact_files(again)]
