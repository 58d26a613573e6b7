"""The straight line as a user meets it: networks that peers get silently wrong, goals, recipes, folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import octoc
from octoc.errors import DataError, ModelError, UsageError
from octoc.evaluate import open_session
from octoc.proof import NAME, artifact_bytes, artifact_files, artifact_sha256, read_proof, write_proof
from octoc.qtensor import Affine, Array, Sparse
from octoc.recipe import Encode, Factorize, Prune, read_recipe
from octoc.report import ArtifactReport, Check, Report, read_report
from tests.zoo import (
    CASES,
    DEVICES,
    FORMATS,
    Convolutional,
    answers,
    built,
    compressed,
    difference,
    expected,
    normal,
    recurrent,
)

pytest.importorskip("litert_torch", reason="the extra tflite is not installed")

BOARD = "raspberry-pi-5"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and lose much where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_every_file_gives_what_the_network_gives(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    network = built(case.make)
    report = compressed(network, case.inputs, tmp_path, **case.options)
    assert [artifact.format for artifact in report.artifacts] == list(FORMATS)
    for artifact in report.artifacts:
        assert artifact.held, (artifact.format, artifact.failed)
        assert {"codes", "outputs"} <= {check.name for check in artifact.checks}
        wanted = expected(network, case.inputs, case.batch)
        assert difference(answers(artifact, tmp_path, case.inputs), wanted) < case.limit, artifact.format


def test_groups_that_do_not_divide_the_channels_are_refused_and_said(tmp_path: Path) -> None:
    case = CASES["ten channels"]
    network = built(case.make)
    with pytest.raises(UsageError, match=r"int4-group8: .* run no such weights") as found:
        compressed(network, case.inputs, tmp_path / "all", weights="int4-group8")
    assert "\n" not in str(found.value)
    (artifact,) = compressed(network, case.inputs, tmp_path, devices=DEVICES[:1], weights="palette4-group8").artifacts
    assert {note.what for note in artifact.skipped} == {"0.weight", "2.weight"}
    assert all("not a multiple of groups of 8" in note.reason for note in artifact.skipped)
    assert all(line.bits >= 8 for line in artifact.layers)
    assert difference(answers(artifact, tmp_path, case.inputs), expected(network, case.inputs)) < case.limit


X = normal(3, 12, 12, count=200)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """With batch norms that have seen data, and logits that differ from sample to sample."""
    made = built(Convolutional).train()
    with torch.no_grad():
        for _ in range(20):
            made(torch.from_numpy(X))
        made.head.weight *= 8
    return made.eval()


@pytest.fixture(scope="module")
def labels(network: nn.Module) -> Array:
    """What the network itself says, so that it is right in 100 of 100."""
    return expected(network, [X])[0].argmax(1)


@dataclass(frozen=True)
class Run:
    """A finished run that several tests look at."""

    out: Path
    report: Report
    network: nn.Module

    def artifact(self, fmt: str) -> ArtifactReport:
        return next(artifact for artifact in self.report.artifacts if artifact.format == fmt)

    def path(self, fmt: str) -> Path:
        return self.out / str(self.artifact(fmt).path)


@pytest.fixture(scope="module")
def floats(network: nn.Module, labels: Array, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weights in 8 bits."""
    out = tmp_path_factory.mktemp("floats")
    return Run(out, octoc.compress_model(network, devices=DEVICES, data=(X, labels), out=out), network)


@pytest.fixture(scope="module")
def integers(network: nn.Module, labels: Array, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weights and activations in 8 bits."""
    out = tmp_path_factory.mktemp("integers")
    report = octoc.compress_model(network, devices=DEVICES, data=(X, labels), out=out, activations="int8")
    return Run(out, report, network)


def test_weights_of_a_recurrent_layer_are_named_with_the_reason_why_they_stay_floats(tmp_path: Path) -> None:
    x = normal(10, 8)
    report = compressed(built(lambda: recurrent(nn.LSTM)), (x,), tmp_path, devices=["raspberry-pi-5"], dry_run=True)
    (artifact,) = report.artifacts
    assert {note.what for note in artifact.skipped} == {"body.weight_ih_l0", "body.weight_hh_l0"}
    assert all("lstm" in note.reason for note in artifact.skipped)


def test_a_batch_that_must_be_fixed_is_said(tmp_path: Path) -> None:
    case = CASES["a batch of two"]
    report = compressed(built(case.make), case.inputs, tmp_path, devices=["raspberry-pi-5"], dry_run=True)
    assert "the number of samples is fixed, 2 to a call: " in report.artifacts[0].notes[0]


def test_quality_in_the_report_is_that_of_the_files(floats: Run, labels: Array) -> None:
    assert floats.report.quality == 100
    assert floats.report.calibration + floats.report.evaluation == len(X)
    for artifact in floats.report.artifacts:
        # the whole run counts on four fifths; files that are right everywhere are right there too
        right = answers(artifact, floats.out, [X])[0].argmax(1) == labels
        assert abs(100 * right.mean() - artifact.quality) < 1
        assert artifact.quality >= 98
        assert artifact.nbytes == artifact_bytes(floats.path(artifact.format))


def test_the_report_on_disk_is_the_one_returned(floats: Run) -> None:
    assert read_report(floats.out / "report.json").artifacts[0].path == floats.report.artifacts[0].path
    assert json.loads((floats.out / "report.json").read_text())["quality"] == 100


def test_onnx_keeps_its_batch_free(floats: Run, integers: Run) -> None:
    for run in (floats, integers):
        session = open_session("onnx", run.path("onnx"))
        assert session.inputs[0].shape[0] is None
        whole = session.run({session.inputs[0].name: X[:7]})
        single = [session.run({session.inputs[0].name: X[i : i + 1]}) for i in range(7)]
        for name, value in whole.items():
            np.testing.assert_allclose(value, np.concatenate([one[name] for one in single]), rtol=1e-4, atol=1e-4)


def test_names_of_inputs_are_the_networks(floats: Run) -> None:
    assert {open_session(fmt, floats.path(fmt)).inputs[0].name for fmt in FORMATS} == {"x"}


@pytest.mark.parametrize("fmt", FORMATS)
def test_int8_activations_cost_little(integers: Run, fmt: str) -> None:
    artifact = integers.artifact(fmt)
    assert artifact.held, artifact.failed
    assert "integer operations" in {check.name for check in artifact.checks}
    assert difference(answers(artifact, integers.out, [X]), expected(integers.network, [X])) < 0.1


def test_the_three_formats_agree_on_int8_activations(integers: Run) -> None:
    outputs = [answers(integers.artifact(fmt), integers.out, [X])[0] for fmt in FORMATS]
    for other in outputs[1:]:
        assert difference([other], [outputs[0]]) < 0.05


def test_litert_computes_in_int8(integers: Run) -> None:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(integers.path("tflite")))
    interpreter.allocate_tensors()
    dtypes = {detail["index"]: detail["dtype"] for detail in interpreter.get_tensor_details()}
    seen = set()
    for operation in interpreter._get_ops_details():
        if operation["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MEAN"):
            seen.add(operation["op_name"])
            sources, results = operation["inputs"][:2], operation["outputs"]
            assert {dtypes[i] for i in (*sources, *results)} <= {np.int8, np.int32}
            assert dtypes[results[0]] is np.int8
    assert seen == {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MEAN"}


def test_onnxruntime_computes_in_int8(integers: Run, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(integers.path("onnx"), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 3
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Add"} & set(kinds)


def test_core_ml_feeds_every_layer_by_dequantize_with_int8_weights(integers: Run) -> None:
    import coremltools

    program = coremltools.utils.load_spec(str(integers.path("coreml"))).mlProgram
    block = next(iter(next(iter(program.functions.values())).block_specializations.values()))
    made_by = {output.name: operation for operation in block.operations for output in operation.outputs}
    layers = [operation for operation in block.operations if operation.type in ("conv", "linear", "matmul")]
    assert len(layers) == 4
    for layer in layers:
        x, weight = (made_by[layer.inputs[key].arguments[0].name] for key in ("x", "weight"))
        assert x.type == "dequantize"
        assert made_by[x.inputs["input"].arguments[0].name].type == "quantize"
        assert weight.type in ("constexpr_blockwise_shift_scale", "constexpr_affine_dequantize")
        data = made_by[weight.inputs["data"].arguments[0].name] if weight.inputs["data"].arguments[0].name else None
        kind = (data.outputs[0] if data is not None else weight.inputs["data"].arguments[0].value).type
        assert kind.tensorType.dataType == coremltools.proto.MIL_pb2.DataType.INT8


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_flipped_byte_of_weights_is_noticed_even_where_its_digest_is_forged(
    integers: Run, fmt: str, tmp_path: Path
) -> None:
    source = integers.path(fmt)
    proof = read_proof(source.parent / NAME)
    codes = proof.qtensors["head.weight"]
    assert isinstance(codes, Affine)
    copy = tmp_path / source.name
    for entry in artifact_files(source):
        place = copy / entry.relative_to(source) if source.is_dir() else copy
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(entry.read_bytes().replace(codes.codes.tobytes(), _flipped(codes.codes).tobytes()))
    write_proof(proof, tmp_path / NAME)
    assert {c.name for c in octoc.verify_file(copy) if not c.held} >= {"codes", "unchanged"}
    write_proof(replace(proof, sha256=artifact_sha256(copy)), tmp_path / NAME)
    assert next(c.name for c in octoc.verify_file(copy) if not c.held) == "codes"
    assert all(check.held for check in octoc.verify_file(source))


def _flipped(codes: Array) -> Array:
    changed = codes.copy()
    changed.flat[codes.size // 2] ^= 1
    return changed


# In a process of its own, with other samples than the recipes were made with.
REPLAY = """
import json, sys
jobs, weights, root, threads = json.loads(sys.argv[1])
sys.path.insert(0, root)
import octoc, torch
from tests.zoo import Convolutional, normal
torch.set_num_threads(threads)
network = Convolutional()
network.load_state_dict(torch.load(weights))
for recipe, device, out in jobs:
    octoc.compress_model(network.eval(), devices=[device], data=normal(3, 12, 12, seed=9), out=out, recipe=recipe)
"""


def same_bytes(one: Path, other: Path) -> bool:
    files = [[entry.read_bytes() for entry in artifact_files(path)] for path in (one, other)]
    return files[0] == files[1] and len(files[0]) > 0


def test_recipes_rebuild_the_same_bytes_in_another_process_from_other_data(integers: Run, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(integers.network.state_dict(), weights)
    jobs = [
        (str(integers.path(fmt).parent / "recipe.json"), device, str(tmp_path / fmt))
        for fmt, device in zip(FORMATS, DEVICES, strict=True)
    ]
    given = [jobs, str(weights), str(Path(__file__).parents[1]), torch.get_num_threads()]
    found = subprocess.run([sys.executable, "-c", REPLAY, json.dumps(given)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for fmt, device in zip(FORMATS, DEVICES, strict=True):
        path = integers.path(fmt)
        assert same_bytes(tmp_path / fmt / device / fmt / path.name, path), fmt


def test_the_same_seed_gives_the_same_bytes_and_recipes(network: nn.Module, labels: Array, tmp_path: Path) -> None:
    for name in ("one", "other"):
        given = {"devices": [BOARD], "formats": ["onnx", "tflite"], "max_size": 9000, "activations": "int8", "seed": 3}
        octoc.compress_model(network, data=(X, labels), out=tmp_path / name, **given)
    for relative in ("onnx/model.onnx", "tflite/model.tflite", "onnx/recipe.json", "onnx/proof.safetensors"):
        one, other = (tmp_path / name / BOARD / relative for name in ("one", "other"))
        assert same_bytes(one, other), relative


def test_a_recipe_of_another_network_or_with_what_the_device_lacks_is_refused(floats: Run, tmp_path: Path) -> None:
    path = floats.path("onnx").parent / "recipe.json"
    with pytest.raises(UsageError, match="made for another network"):
        octoc.compress_model(built(Convolutional), devices=[BOARD], data=X, out=tmp_path / "out", recipe=path)
    recipe = read_recipe(path)
    steps = [replace(s, scheme="int4-group8") if isinstance(s, Encode) else s for s in recipe.steps]
    (tmp_path / "recipe.json").write_text(replace(recipe, steps=tuple(steps)).to_json())
    with pytest.raises(UsageError, match=r"as int4-group8, and onnx cannot: 3 input channels are not a multiple of"):
        octoc.compress_model(
            floats.network, devices=[BOARD], data=X, out=tmp_path / "out", recipe=tmp_path / "recipe.json"
        )
    assert not (tmp_path / "out").exists()


def test_pruning_removes_what_is_near_zero_and_stands_in_the_recipe(tmp_path: Path) -> None:
    network = built(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 10)))
    with torch.no_grad():
        for layer in (network[0], network[3]):
            layer.weight.view(-1)[::2] *= 1e-6  # half of them, which pruning should find
    report = compressed(network, [X], tmp_path, sparsity=0.5)
    for artifact in report.artifacts:
        assert artifact.held
        folder = (tmp_path / str(artifact.path)).parent
        steps = read_recipe(folder / "recipe.json").of(Prune)
        assert {step.tensor for step in steps} == {"0.weight", "3.weight"}
        assert all(step.sparsity == pytest.approx(0.5, abs=0.01) for step in steps)
        for tensor in read_proof(folder / NAME).qtensors.values():
            assert np.count_nonzero(tensor.dequantize()) <= 0.51 * tensor.dequantize().size
        assert difference(answers(artifact, tmp_path, [X]), expected(network, [X])) < 0.02
    tensors = read_proof(tmp_path / DEVICES[0] / "coreml" / NAME).qtensors.values()
    assert any(isinstance(tensor, Sparse) for tensor in tensors)


def test_low_rank_loses_nothing_of_what_has_low_rank_and_stands_in_the_recipe(tmp_path: Path) -> None:
    network = built(lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    with torch.no_grad():
        network[0].weight.copy_(torch.randn(64, 16) @ torch.randn(16, 64) / 16)
        network[2].weight.copy_(torch.randn(10, 3) @ torch.randn(3, 64) / 8)
    x = normal(64)
    report = compressed(network, [x], tmp_path, rank=0.4)
    for artifact in report.artifacts:
        assert artifact.held
        recipe = read_recipe((tmp_path / str(artifact.path)).parent / "recipe.json")
        assert {step.tensor: step.rank for step in recipe.of(Factorize)} == {"0.weight": 26, "2.weight": 4}
        factors = read_proof((tmp_path / str(artifact.path)).parent / NAME).qtensors.values()
        assert sum(factor.nbytes for factor in factors) < 64 * 64
        assert difference(answers(artifact, tmp_path, [x]), expected(network, [x])) < 0.02


def test_a_budget_is_kept(network: nn.Module, floats: Run, labels: Array, tmp_path: Path) -> None:
    for fmt, device in zip(FORMATS, DEVICES, strict=True):
        budget = floats.artifact(fmt).nbytes - 250
        report = octoc.compress_model(network, devices=[device], data=(X, labels), out=tmp_path / fmt, max_size=budget)
        (artifact,) = report.artifacts
        size = artifact_bytes(tmp_path / fmt / str(artifact.path))
        if report.held:
            assert artifact.reachable[0] <= size <= budget
            assert artifact.nbytes == size
        else:  # TFLite's smallest is what int8 alone gave
            assert fmt == "tflite"
            assert "smallest reachable" in artifact.failed[0].detail


def test_an_impossible_budget_keeps_the_smallest_and_says_so(network: nn.Module, tmp_path: Path) -> None:
    report = octoc.compress_model(network, devices=DEVICES, data=X, out=tmp_path, max_size="1kB")
    assert not report.held
    for artifact in report.artifacts:
        (failed,) = artifact.failed
        assert failed.name == "size"
        assert f"the smallest reachable here is {artifact.reachable[0]} B" in failed.detail
        assert artifact_bytes(tmp_path / str(artifact.path)) == artifact.nbytes == artifact.reachable[0]


def test_the_smallest_file_within_a_drop_is_found(
    network: nn.Module, floats: Run, labels: Array, tmp_path: Path
) -> None:
    given = {"devices": DEVICES[:1], "data": (X, labels), "calibration": normal(3, 12, 12, seed=1)}
    report = octoc.compress_model(network, out=tmp_path, max_drop=5, **given)
    (artifact,) = report.artifacts
    assert artifact.held
    assert artifact.nbytes < floats.artifact("coreml").nbytes
    assert 100 * (answers(artifact, tmp_path, [X])[0].argmax(1) == labels).mean() >= 95


def test_a_second_run_replaces_the_first_whole(network: nn.Module, tmp_path: Path) -> None:
    out = tmp_path / "a folder, größer 日本"
    octoc.compress_model(network, devices=[BOARD], data=X, out=out)
    folder = out / BOARD / "onnx"
    (folder / "stale").write_text("of the first run")
    first = (folder / "model.onnx").read_bytes()
    octoc.compress_model(network, devices=[BOARD], data=X, out=out, weights="float16")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "proof.safetensors", "recipe.json"]
    assert (folder / "model.onnx").read_bytes() != first
    assert sorted(path.name for path in out.iterdir()) == [BOARD, "report.html", "report.json"]
    assert all(check.held for check in octoc.verify_file(folder / "model.onnx"))


def test_a_file_that_is_not_proven_never_takes_the_place_of_one_that_is(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"devices": [BOARD], "data": X, "out": tmp_path}
    octoc.compress_model(network, **given)
    proven = (tmp_path / BOARD / "onnx" / "model.onnx").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("octoc.artifact.verify", lambda path, proof: [Check("outputs", False, "they differ")])
        report = octoc.compress_model(network, weights="float16", **given)
    assert not report.held
    assert report.artifacts[0].path == f"{BOARD}/onnx.unverified/model.onnx"
    assert {path.name for path in (tmp_path / BOARD).iterdir()} == {"onnx", "onnx.unverified"}
    assert (tmp_path / BOARD / "onnx" / "model.onnx").read_bytes() == proven
    octoc.compress_model(network, **given)
    assert {path.name for path in (tmp_path / BOARD).iterdir()} == {"onnx"}


@pytest.mark.parametrize("stage", ["octoc.artifact.verify", "octoc.workbench.predict", "octoc.artifact.publish"])
def test_nothing_is_left_of_a_run_that_fails(
    network: nn.Module, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise ModelError("a stage failed")

    monkeypatch.setattr(stage, fail)
    with pytest.raises(ModelError, match="a stage failed"):
        octoc.compress_model(network, devices=[BOARD], data=X, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_older_artefact_stays_where_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from octoc.artifact import publish

    finished, target = tmp_path / "work" / "onnx", tmp_path / "board" / "onnx"
    for folder, text in ((finished, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_text(text)
    rename = Path.rename

    def stubborn(self: Path, place: Path) -> Path:
        if self == finished:
            raise OSError("no")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(OSError, match="no"):
        publish(finished, target)
    assert (target / "model.onnx").read_text() == "old"


def test_folders_may_be_relative_and_data_may_be_arrays_tensors_or_files(
    network: nn.Module, labels: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("samples, größer.npz", x=X, y=labels)
    reports = [
        octoc.compress_model(network, devices=[BOARD], data=data, out="a/b c", max_drop=2)
        for data in ("samples, größer.npz", (torch.from_numpy(X), torch.from_numpy(labels)))
    ]
    assert reports[0].artifacts[0].front == reports[1].artifacts[0].front
    assert (tmp_path / "a/b c" / str(reports[0].artifacts[0].path)).is_file()


@pytest.mark.parametrize("data", [3, None, {"x": 1}, [], "", X[:0], X.astype(complex), X * np.nan])
def test_data_that_is_none_is_refused_in_one_line(network: nn.Module, data: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as found:
        octoc.compress_model(network, devices=[BOARD], data=data, out=tmp_path / "out")
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()
