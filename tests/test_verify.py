"""No file passes that is not the one that was proven, and what is wrong with it is said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from octoc.apply import Encoder, encode_biases, encode_weights, quantize_activations
from octoc.compressed import Compressed
from octoc.errors import ArtifactError, VerificationError
from octoc.export import onnx as exporter
from octoc.load.module import from_module
from octoc.proof import NAME, Proof, artifact_sha256, prove, write_proof
from octoc.qtensor import Affine
from octoc.quantize.activations import calibrate
from octoc.recipe import Encode
from octoc.report import Check
from octoc.verify import format_of, require, unchanged, verify, verify_file


class Net(nn.Module):
    """Operations whose results all differ, so that each can be told apart."""

    def __init__(self, outputs: int = 5, size: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.linear = nn.Linear(8 * (size - 4) ** 2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(F.relu(self.first(x))))
        return self.linear(x.flatten(1))


def make(folder: Path, integer: bool = False) -> tuple[Path, Proof]:
    """An ONNX file and its proof."""
    torch.manual_seed(0)
    model = from_module(Net(), [torch.zeros(1, 3, 8, 8)])
    samples = torch.randn(16, 3, 8, 8)
    if integer:
        model = quantize_activations(model, calibrate(model, [(samples,)], steps=10))
    steps = [Encode(layer.name, "int8-channel", "float32", layer.axis) for layer in model.layers()]
    coded = encode_weights(model, steps, Encoder(model))
    small = Compressed(model, {**coded, **encode_biases(model, coded)})
    path = folder / exporter.FILE
    exporter.write(exporter.convert(model), small, path)
    tolerance = 0.15 if integer else 1e-3
    proof = prove(small, [samples.numpy()], "onnx", tolerance, 3 if integer else 0, artifact_sha256(path), "network")
    write_proof(proof, folder / NAME)
    return path, proof


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Proof]:
    path, proof = make(tmp_path_factory.mktemp("made"))
    return path.read_bytes(), proof


@pytest.fixture
def case(made: tuple[bytes, Proof], tmp_path: Path) -> tuple[Path, Proof]:
    """The file and its proof in a folder of the test's own."""
    (tmp_path / exporter.FILE).write_bytes(made[0])
    write_proof(made[1], tmp_path / NAME)
    return tmp_path / exporter.FILE, made[1]


def checked(path: Path, proof: Proof) -> list[Check]:
    return [*verify(path, proof), unchanged(path, proof)]


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.held}


def weights(raw: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, offset in the file, bytes) of every stored tensor with more than one element."""
    for tensor in onnx.load_from_string(raw).graph.initializer:
        if len(tensor.raw_data) > 8:
            at = raw.find(tensor.raw_data)
            assert raw.count(tensor.raw_data) == 1
            yield tensor.name, at, len(tensor.raw_data)


def edited(path: Path, change: Any) -> None:
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("integer", [False, True])
def test_what_was_written_is_verified(tmp_path: Path, integer: bool) -> None:
    path, _ = make(tmp_path, integer)
    checks = verify_file(path)
    assert failed(checks) == {}
    names = ["codes", "outputs", *(["integer operations"] if integer else []), "unchanged"]
    assert [check.name for check in checks] == names
    require(checks, path)


def test_a_file_that_was_just_written_is_not_compared_with_its_own_digest(case: tuple[Path, Proof]) -> None:
    path, proof = case
    assert [check.name for check in verify(path, proof)] == ["codes", "outputs"]
    assert [check.name for check in verify_file(path)] == ["codes", "outputs", "unchanged"]


def test_codes_that_only_the_file_or_only_the_proof_has_fail(case: tuple[Path, Proof]) -> None:
    path, proof = case
    for name in proof.qtensors:
        rest = {key: tensor for key, tensor in proof.qtensors.items() if key != name}
        wrong = failed(verify(path, replace(proof, qtensors=rest)))
        assert wrong == {"codes": f"{name} is compressed in the file, not in the network"}
        more = {**proof.qtensors, "other.weight": proof.qtensors[name]}
        assert failed(verify(path, replace(proof, qtensors=more))) == {"codes": "other.weight is not in the file"}


def test_a_missing_integer_bias_is_excused_in_coreml_alone(
    case: tuple[Path, Proof], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, proof = case
    bias = Affine(np.zeros(6, np.int32), np.ones(6, np.float32), None, 32)
    more = replace(proof, qtensors={**proof.qtensors, "first.bias": bias})
    assert failed(verify(path, more)) == {"codes": "first.bias is not in the file"}
    reader = SimpleNamespace(read_codes=lambda path: dict(proof.qtensors))
    monkeypatch.setattr("octoc.verify.exporter", lambda name: reader)
    assert "codes" not in failed(verify(path, replace(more, format="coreml")))
    assert "codes" in failed(verify(path, replace(more, format="tflite")))


def test_a_file_without_codes_says_so_and_claims_no_comparison(tmp_path: Path) -> None:
    model = from_module(nn.Linear(3, 2), [torch.zeros(1, 3)])
    path, small = tmp_path / exporter.FILE, Compressed(model, {})
    exporter.write(exporter.convert(model), small, path)
    proof = prove(small, [np.ones((4, 3), np.float32)], "onnx", 1e-3, 0, artifact_sha256(path), "network")
    assert verify(path, proof)[0] == Check("codes", True, "no weight is compressed")


def test_fewer_operations_in_integers_than_the_network_has_fail_and_are_counted(tmp_path: Path) -> None:
    path, proof = make(tmp_path, integer=True)
    assert Check("integer operations", True, "3 of 3 layers run in integers") in verify(path, proof)
    assert failed(verify(path, replace(proof, integer=4))) == {"integer operations": "3 of 4 layers run in integers"}
    floats = tmp_path / "floats"
    floats.mkdir()
    path, proof = make(floats)
    assert failed(verify(path, replace(proof, integer=3))) == {"integer operations": "0 of 3 layers run in integers"}


def test_a_file_may_be_called_and_lie_anywhere(case: tuple[Path, Proof], tmp_path: Path) -> None:
    path, _ = case
    elsewhere = tmp_path / "elsewhere" / "renamed.onnx"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    assert failed(verify_file(elsewhere, tmp_path / NAME)) == {}
    with pytest.raises(ArtifactError, match="missing"):
        verify_file(elsewhere)
    with pytest.raises(ArtifactError, match=r"no artefact .*model\.onnx"):
        verify_file(path)


@pytest.mark.parametrize("where", [0.0, 0.37, 0.999])
def test_one_flipped_byte_of_any_weight_fails_and_a_check_says_which_tensor(
    case: tuple[Path, Proof], where: float
) -> None:
    path, proof = case
    raw = path.read_bytes()
    coded = 0
    for name, at, size in weights(raw):
        damaged = bytearray(raw)
        damaged[at + int(where * size)] ^= 0x10
        path.write_bytes(damaged)
        wrong = failed(checked(path, proof))
        assert "unchanged" in wrong
        owner = next((q for q in proof.qtensors if name.startswith(q)), None)
        if owner is not None:
            assert owner in wrong["codes"]
            coded += 1
        with pytest.raises(VerificationError, match="is not what was proven"):
            require(checked(path, proof), path)
    assert coded == 6  # codes and scales of three weights


def test_every_place_of_the_codes_is_compared(case: tuple[Path, Proof]) -> None:
    path, proof = case
    raw = path.read_bytes()
    generator = np.random.default_rng(0)
    places = [(n, a, s) for n, a, s in weights(raw) if any(n.startswith(q) for q in proof.qtensors)]
    for _ in range(25):
        name, at, size = places[generator.integers(len(places))]
        damaged = bytearray(raw)
        damaged[at + int(generator.integers(size))] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        assert any(q in failed(checked(path, proof))["codes"] for q in proof.qtensors if name.startswith(q))


def test_a_changed_byte_anywhere_else_is_no_longer_the_proven_file(case: tuple[Path, Proof]) -> None:
    path, proof = case
    raw = path.read_bytes()
    spans = [(at, at + size) for _, at, size in weights(raw)]
    others = [i for i in range(len(raw)) if not any(a <= i < b for a, b in spans)]
    for at in np.random.default_rng(1).choice(others, 25, replace=False):
        damaged = bytearray(raw)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        assert "unchanged" in failed(checked(path, proof))


def test_a_file_that_only_says_something_else_about_itself_fails_unchanged_alone(case: tuple[Path, Proof]) -> None:
    path, proof = case
    edited(path, lambda proto: setattr(proto, "doc_string", "changed"))
    wrong = failed(checked(path, proof))
    assert set(wrong) == {"unchanged"}
    assert proof.sha256[:16] in wrong["unchanged"]


@pytest.mark.parametrize("content", [b"", b"not a network", b"\0" * 1000])
def test_a_file_that_cannot_be_opened_fails_every_check(case: tuple[Path, Proof], content: bytes) -> None:
    path, proof = case
    path.write_bytes(content)
    assert set(failed(checked(path, proof))) == {"codes", "outputs", "unchanged"}


@pytest.mark.parametrize("layer", ["first", "second", "linear"])
def test_the_first_diverging_operation_is_the_one_whose_weight_was_changed(
    case: tuple[Path, Proof], layer: str
) -> None:
    """Codes and scales stay; a bias, which no code holds, is moved far away."""
    path, proof = case

    def change(proto: onnx.ModelProto) -> None:
        (bias,) = [t for t in proto.graph.initializer if t.name == f"{layer}.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(3), bias.name))

    edited(path, change)
    wrong = failed(checked(path, proof))
    assert set(wrong) == {"outputs", "unchanged"}
    proto = onnx.load(path)
    (node,) = [n for n in proto.graph.node if f"{layer}.bias" in n.input]
    # a product and the addition of its bias are one operation of the network
    product = [n for n in proto.graph.node if n.op_type == "MatMul" and set(n.output) & set(node.input)]
    assert wrong["outputs"].split("first at ")[1] in {f"{n.op_type} {n.name or n.output[0]}" for n in (node, *product)}


def test_an_operation_that_computes_something_else_is_named(case: tuple[Path, Proof]) -> None:
    path, proof = case

    def change(proto: onnx.ModelProto) -> None:
        (node,) = [n for n in proto.graph.node if n.op_type == "Tanh"]
        node.op_type = "Sigmoid"

    edited(path, change)
    assert re.search(r"first at Sigmoid \S+$", failed(checked(path, proof))["outputs"])


def test_the_first_diverging_operation_is_found_behind_a_mask_of_minus_infinity(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            scores = (x @ x.transpose(1, 2)).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
            return torch.tanh(self.inner(torch.softmax(scores, -1) @ x))

    torch.manual_seed(0)
    model = from_module(Attention(), [torch.zeros(1, 4, 6)])
    path, small = tmp_path / exporter.FILE, Compressed(model, {})
    exporter.write(exporter.convert(model), small, path)
    samples = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
    proof = prove(small, [samples], "onnx", 1e-3, 0, artifact_sha256(path), "network")
    assert failed(checked(path, proof)) == {}

    def change(proto: onnx.ModelProto) -> None:
        (node,) = [n for n in proto.graph.node if n.op_type == "Tanh"]
        node.op_type = "Sin"

    edited(path, change)
    assert "first at Sin " in failed(checked(path, proof))["outputs"]


def test_a_difference_within_the_tolerance_passes_and_one_beyond_it_does_not(case: tuple[Path, Proof]) -> None:
    path, proof = case
    scale = max(float(np.abs(array).max()) for array in proof.outputs.values())
    for factor, passes in ((0.9, True), (1.1, False)):
        moved = {name: array + np.float32(factor * proof.tolerance * scale) for name, array in proof.outputs.items()}
        largest = max(float(np.abs(array).max()) for array in moved.values())
        assert largest == pytest.approx(scale, rel=0.01)
        assert ("outputs" in failed(verify(path, replace(proof, outputs=moved)))) != passes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_agrees_only_with_itself(case: tuple[Path, Proof], value: float) -> None:
    path, proof = case
    (name,) = proof.outputs
    strange = proof.outputs[name].copy()
    strange.flat[3] = value
    assert "NaN or infinite" in failed(verify(path, replace(proof, outputs={name: strange})))["outputs"]


def test_infinities_of_another_sign_and_nan_are_told_apart(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x * float("inf"), x)

    model = from_module(Masked(), [torch.zeros(1, 4)])
    path = tmp_path / exporter.FILE
    small = Compressed(model, {})
    exporter.write(exporter.convert(model), small, path)
    proof = prove(small, [np.array([[1, -1, 2, -2]], np.float32)], "onnx", 1e-3, 0, artifact_sha256(path), "network")
    (name,) = proof.outputs
    assert np.isposinf(proof.outputs[name]).sum() == 2
    assert failed(checked(path, proof)) == {}
    for other in (-np.inf, np.nan):
        swapped = np.where(np.isinf(proof.outputs[name]), np.float32(other), proof.outputs[name])
        assert "outputs" in failed(verify(path, replace(proof, outputs={name: swapped})))


def test_another_network_in_the_file_s_place_fails_with_its_names_or_shapes(case: tuple[Path, Proof]) -> None:
    path, proof = case
    for module, shape in ((Net(7), (3, 8, 8)), (Net(5, 9), (3, 9, 9)), (nn.Sequential(nn.Linear(8, 8)), (3, 8, 8))):
        model = from_module(module, [torch.zeros(1, *shape)])
        path.unlink()
        exporter.write(exporter.convert(model), Compressed(model, {}), path)
        wrong = failed(checked(path, proof))
        assert set(wrong) == {"codes", "outputs", "unchanged"}
        assert re.search(r"shape|takes", wrong["outputs"])


def test_the_first_check_that_failed_is_the_error() -> None:
    require([Check("codes", True, "fine")], Path("a.onnx"))
    with pytest.raises(VerificationError, match=r"a\.onnx is not what was proven: outputs: far off"):
        require([Check("codes", True, "fine"), Check("outputs", False, "far off")], Path("a.onnx"))


def test_the_format_is_told_by_the_ending() -> None:
    assert [format_of(Path(name)) for name in ("a.onnx", "b.tflite", "c.mlpackage")] == ["onnx", "tflite", "coreml"]
    with pytest.raises(ArtifactError, match=r"\.onnx"):
        format_of(Path("a.pt"))
