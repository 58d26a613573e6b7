"""LiteRT sessions: names, values, traces, and files that are not what they claim to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("litert_torch", reason="the extra tflite is not installed")

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, DataError
from octoc.export import tflite
from octoc.load.module import from_module
from octoc.model import Model
from octoc.qtensor import Affine
from octoc.runtime.tflite import open_session


class Two(nn.Module):
    """Two inputs, one of them token ids, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(self.embedding(ids)) + image, ids + 1


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    torch.manual_seed(0)
    model = from_module(Two(), [torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)])
    weight = model.tensors["linear.weight"].numpy()
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    codes = Affine(np.round(weight / scale).astype(np.int8), scale)
    path = tmp_path_factory.mktemp("two") / "model.tflite"
    small = Compressed(model, {"linear.weight": codes})
    tflite.write(tflite.convert(model), small, path)
    return small.decoded, path


def feeds(calls: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(calls, 1, 5, 3)).astype(np.float32),
        "ids": rng.integers(0, 7, (calls, 1, 5)),
    }


def test_a_session_has_the_networks_names_in_the_networks_order(two: tuple[Model, Path]) -> None:
    model, path = two
    session = open_session(path, threads=1)
    assert [(spec.name, spec.shape, spec.dtype) for spec in session.inputs] == [
        ("image", (1, 5, 3), "float32"),
        ("ids", (1, 5), "int32"),
    ]
    assert tuple(spec.name for spec in session.outputs) == model.outputs


def test_many_calls_equal_the_network_call_by_call(two: tuple[Model, Path]) -> None:
    model, path = two
    session = open_session(path)
    given = feeds(4)
    found = session.run_many(given)
    for i in range(4):
        expected = model.run(torch.from_numpy(given["image"][i]), torch.from_numpy(given["ids"][i]))
        for name, value in zip(model.outputs, expected, strict=True):
            np.testing.assert_allclose(found[name][i], value.numpy(), atol=1e-6)
    none = session.run_many({name: array[:0] for name, array in given.items()})
    assert none[model.outputs[0]].shape == (0, 1, 5, 3)


def test_a_trace_has_every_operation_and_ends_in_the_outputs(two: tuple[Model, Path]) -> None:
    session = open_session(two[1])
    one = {name: array[0] for name, array in feeds(1).items()}
    records = session.trace(one)
    values = {name: value for record in records for name, value in record.outputs.items()}
    assert {"DEQUANTIZE", "FULLY_CONNECTED", "ADD"} <= {record.kind for record in records}
    assert any("linear.weight" in record.inputs for record in records)
    for name, value in session.run(one).items():
        np.testing.assert_allclose(values[name], value, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": np.zeros((1, 5, 3), np.float32)}, "takes"),
        ({"image": np.zeros((1, 5, 4), np.float32), "ids": np.zeros((1, 5), np.int64)}, r"\[1, 5, 3\]"),
        ({"image": np.zeros((1, 5, 3), np.float32), "ids": np.full((1, 5), 2**40)}, "do not fit int32"),
    ],
)
def test_feeds_that_do_not_fit_are_named(two: tuple[Model, Path], wrong: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_session(two[1]).run(wrong)


def test_a_session_prints_nothing(two: tuple[Model, Path], capfd: pytest.CaptureFixture[str]) -> None:
    open_session(two[1]).run({name: array[0] for name, array in feeds(1).items()})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"TFL3", bytes(range(256)) * 4, b"\x1c\0\0\0TFL3" + bytes(100)])
def test_what_is_no_tflite_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_session(tmp_path / "absent.tflite")


def test_a_truncated_file_is_refused(two: tuple[Model, Path], tmp_path: Path) -> None:
    content = two[1].read_bytes()
    for size in range(20, len(content) - 8, max(1, len(content) // 40)):
        path = tmp_path / "short.tflite"
        path.write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            open_session(path)


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_is_an_error_or_harmless_and_never_a_crash(
    two: tuple[Model, Path], tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(two[1].read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.tflite"
    path.write_bytes(content)
    error = _outcome(path)
    assert error is None or "\n" not in str(error)


def _outcome(path: Path) -> Exception | None:
    try:
        session = open_session(path)
        session.run({spec.name: np.zeros([size or 0 for size in spec.shape], spec.dtype) for spec in session.inputs})
    except (ArtifactError, DataError) as error:
        return error
    return None
