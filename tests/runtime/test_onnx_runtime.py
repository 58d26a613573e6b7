"""onnxruntime behind the project's session."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, DataError, HostError
from octoc.export import onnx as exporter
from octoc.load.module import from_module
from octoc.runtime import TensorSpec
from octoc.runtime import onnx as runtime


class Fixed(nn.Module):
    """Its batch is one, because it reshapes to one."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 4).cumsum(1)


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = from_module(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.zeros(2, 4)])
    path = tmp_path_factory.mktemp("free") / "m.onnx"
    exporter.write(exporter.convert(model), Compressed(model, {}), path)
    return path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = from_module(Fixed(), [torch.zeros(1, 4)])
    path = tmp_path_factory.mktemp("fixed") / "m.onnx"
    exporter.write(exporter.convert(model), Compressed(model, {}), path)
    return path


def test_a_session_states_its_inputs_and_outputs(free: Path, fixed: Path) -> None:
    session = runtime.open_session(free)
    assert session.inputs == (TensorSpec("input", (None, 4), "float32"),)
    assert [(spec.shape, spec.dtype) for spec in session.outputs] == [((None, 3), "float32")]
    assert runtime.open_session(fixed).inputs[0].shape == (1, 4)


@pytest.mark.parametrize("calls", [1, 7, runtime.CHUNK + 1])
def test_many_calls_equal_single_calls(free: Path, fixed: Path, calls: int) -> None:
    x = np.random.default_rng(0).standard_normal((calls, 1, 4)).astype(np.float32)
    for path in (free, fixed):
        session = runtime.open_session(path, threads=1)
        (name,), (result,) = (spec.name for spec in session.inputs), (spec.name for spec in session.outputs)
        many = session.run_many({name: x})[result]
        single = np.stack([session.run({name: one})[result] for one in x])
        assert many.shape == single.shape
        np.testing.assert_allclose(many, single, rtol=1e-6, atol=1e-6)


def test_a_trace_shows_every_operation_and_ends_with_the_output(free: Path) -> None:
    session = runtime.open_session(free)
    x = np.ones((2, 4), np.float32)
    records = session.trace({"input": x})
    assert [(record.name, record.kind) for record in records] == [
        ("linear", "Gemm"),
        ("relu", "Relu"),
        ("linear_1", "Gemm"),
    ]
    assert records[0].inputs[0] == "input"
    (hidden,), (after,) = records[0].outputs.values(), records[1].outputs.values()
    np.testing.assert_array_equal(np.maximum(hidden, 0), after)
    np.testing.assert_allclose(
        next(iter(records[-1].outputs.values())), next(iter(session.run({"input": x}).values())), rtol=1e-6
    )


def test_wrong_inputs_are_named(free: Path) -> None:
    session = runtime.open_session(free)
    with pytest.raises(DataError, match="takes input; given: y"):
        session.run({"y": np.zeros((1, 4), np.float32)})
    with pytest.raises(DataError, match=r"takes \[any, 4\]; given: \[1, 5\]"):
        session.run({"input": np.zeros((1, 5), np.float32)})


@pytest.mark.parametrize("damage", ["random", "truncated", "empty", "missing", "folder"])
def test_a_damaged_file_is_an_error_of_one_line(
    free: Path, tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.onnx"
    contents = {
        "random": np.random.default_rng(0).bytes(300),
        "truncated": free.read_bytes()[:-40],
        "empty": b"",
    }
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "folder":
        path.mkdir()
    for read in (runtime.open_session, exporter.read_codes):
        with pytest.raises((ArtifactError, HostError)) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_flipped_bytes_never_escape_the_tree_of_errors(free: Path, tmp_path: Path) -> None:
    raw, random = free.read_bytes(), np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    messages = []
    for _ in range(60):
        damaged = bytearray(raw)
        for at in random.integers(0, len(raw), 8):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        for read in (runtime.open_session, exporter.read_codes):
            try:
                read(path)
            except (ArtifactError, HostError) as error:
                messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_a_missing_package_is_named(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None if name == "onnxruntime" else util.find_spec(name))
    with pytest.raises(HostError, match="pip install onnxruntime"):
        runtime.open_session(free)


def test_the_optimised_graph_is_counted(free: Path) -> None:
    assert runtime.optimized_operations(free)["Gemm"] + runtime.optimized_operations(free)["FusedGemm"] == 2
