from __future__ import annotations

import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octoc.data import Dataset, load_data, split_calibration
from octoc.errors import DataError, UsageError
from octoc.model import InputSpec
from octoc.samples import Rows

IMAGE = InputSpec("image", (1, 3, 8, 6), torch.float32)
TOKENS = InputSpec("ids", (1, 5), torch.int32)
X = np.random.default_rng(0).normal(size=(10, 3, 8, 6)).astype(np.float32)
Y = np.arange(10) % 3


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_an_npz_gives_samples_and_labels(tmp_path: Path) -> None:
    data = load_data(_npz(tmp_path / "d.npz", x=X, y=Y), [IMAGE])
    assert len(data) == 10
    np.testing.assert_array_equal(data.inputs[0][:], X)
    np.testing.assert_array_equal(data.labels, Y)


def test_several_inputs_follow_their_numbers(tmp_path: Path) -> None:
    ids = np.ones((10, 5), np.int32)
    data = load_data(_npz(tmp_path / "d.npz", x1=ids, x0=X), [IMAGE, TOKENS])
    assert [x.dtype for x in data.inputs] == [np.float32, np.int32]
    assert data.labels is None


def test_ten_or_more_inputs_stay_in_order(tmp_path: Path) -> None:
    data = load_data(_npz(tmp_path / "d.npz", **{f"x{i}": np.full((2, 1), i, np.float32) for i in range(12)}))
    assert [float(x[0][0]) for x in data.inputs] == list(range(12))


def test_an_npy_is_read_lazily(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    data = load_data(tmp_path / "d.npy", [IMAGE])
    assert isinstance(data.inputs[0], np.memmap)
    assert isinstance(data.take([3, 1]).inputs[0], Rows)
    np.testing.assert_array_equal(data.take([3, 1]).take([1]).inputs[0][:], X[[1]])


def test_float64_and_float16_become_float32(tmp_path: Path) -> None:
    for dtype in (np.float64, np.float16):
        np.save(tmp_path / "d.npy", X.astype(dtype))
        for data in (
            load_data(tmp_path / "d.npy", [IMAGE]),
            load_data(_npz(tmp_path / "d.npz", x=X.astype(dtype)), [IMAGE]),
        ):
            assert data.inputs[0].dtype == np.float32
            (batch,), _ = next(data.batches(4))
            assert batch.dtype == np.float32
            np.testing.assert_array_equal(batch, X[:4].astype(dtype).astype(np.float32))


def test_batches_cover_all_samples_in_order() -> None:
    parts = list(Dataset((X,), Y, "d").batches(4))
    assert [len(xs[0]) for xs, _ in parts] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([xs[0] for xs, _ in parts]), X)
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts if y is not None]), Y)


@settings(deadline=None)
@given(st.lists(st.integers(-2, 5), min_size=2, max_size=60), st.floats(0, 1), st.integers(0, 2**32))
def test_a_split_is_disjoint_complete_stratified_and_repeatable(classes: list[int], share: float, seed: int) -> None:
    data = Dataset((np.arange(len(classes)),), np.array(classes), "d")
    first, second = data.split(share, seed)
    a, b = list(first.inputs[0][:]), list(second.inputs[0][:])
    assert sorted(a + b) == list(range(len(classes)))
    assert a == sorted(a)
    assert b == sorted(b)
    assert len(a) == min(max(round(share * len(classes)), 1), len(classes) - 1)
    assert first.labels is not None
    assert [classes[i] for i in a] == list(first.labels)
    for value in set(classes):
        exact = len(a) / len(classes) * classes.count(value)
        assert abs(list(first.labels).count(value) - exact) <= 1
    assert list(data.split(share, seed)[0].inputs[0][:]) == a


def test_another_seed_gives_another_split() -> None:
    data = Dataset((np.arange(100),), None, "d")
    assert list(data.split(0.5, 0)[0].inputs[0][:]) != list(data.split(0.5, 1)[0].inputs[0][:])


def test_calibration_takes_a_fifth_and_at_most_512_samples() -> None:
    for count, expected in ((2, 1), (10, 2), (1000, 200), (5000, 512)):
        calibration, evaluation = split_calibration(Dataset((np.arange(count),), None, "d"), None, 0)
        assert (len(calibration), len(evaluation)) == (expected, count - expected)
        assert not set(calibration.inputs[0][:]) & set(evaluation.inputs[0][:])


def test_calibration_of_another_source_is_used_whole_and_the_same_file_is_split(tmp_path: Path) -> None:
    data, other = Dataset((X,), Y, "a"), Dataset((X[:3] + 1,), None, "a")
    assert split_calibration(data, other, 0) == (other, data)
    path = _npz(tmp_path / "d.npz", x=X)
    again = tmp_path / "sub" / ".." / "d.npz"
    (tmp_path / "sub").mkdir()
    calibration, evaluation = split_calibration(load_data(path), load_data(again), 0)
    assert (len(calibration), len(evaluation)) == (2, 8)


def test_calibration_samples_are_compared_with_the_data_by_their_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "copy.npy", X[::-1])
    same = load_data(tmp_path / "copy.npy", [IMAGE])  # lazy, in another order, under another name
    calibration, evaluation = split_calibration(load_data((X, Y)), same, 0)
    assert (len(calibration), len(evaluation)) == (2, 8)
    assert not {row.tobytes() for row in calibration.inputs[0][:]} & {row.tobytes() for row in evaluation.inputs[0][:]}


@pytest.mark.parametrize("evaluated", [X[:4], X[2:8]])
def test_calibration_samples_that_are_evaluated_are_left_out(evaluated: np.ndarray) -> None:
    # the first is wholly part of the other samples, of which enough are left; the second overlaps with them
    given = np.concatenate([X[:6], X[:4] + 1])
    calibration, evaluation = split_calibration(Dataset((evaluated,), None, "a"), Dataset((given,), None, "b"), 0)
    kept = [row for row in given if not (row == evaluated).all(axis=(1, 2, 3)).any()]
    np.testing.assert_array_equal(calibration.inputs[0][:], kept)
    np.testing.assert_array_equal(evaluation.inputs[0][:], evaluated)


def test_calibration_on_a_part_of_the_data_is_refused() -> None:
    with pytest.raises(DataError, match="all 3 samples of b are in a too"):
        split_calibration(Dataset((X,), Y, "a"), Dataset((X[:3],), None, "b"), 0)


def test_a_sample_of_several_inputs_is_the_same_only_where_all_inputs_are() -> None:
    data = Dataset((X, np.zeros((10, 5), np.int32)), None, "a")
    other = Dataset((X, np.ones((10, 5), np.int32)), None, "a")
    assert split_calibration(data, other, 0) == (other, data)


def test_arrays_and_tensors_are_one_batch() -> None:
    import torch

    for batch in (X, (X, Y), ((X,), Y), [torch.from_numpy(X), torch.from_numpy(Y)], Dataset((X,), Y, "d")):
        data = load_data(batch, [IMAGE])
        assert np.array_equal(data.inputs[0][:], X)
        assert data.labels is None if batch is X else np.array_equal(data.labels, Y)
    for wrong in (3, None, {"x": X}, [], (X, Y, Y), X[:0], X[:, :2]):
        with pytest.raises(DataError, match=r"the data|a batch is"):
            load_data(wrong, [IMAGE])


def test_one_sample_is_read_and_cannot_be_split(tmp_path: Path) -> None:
    data = load_data(_npz(tmp_path / "d.npz", x=X[:1]), [IMAGE])
    with pytest.raises(DataError, match=r"has 1 sample\(s\); two disjoint parts need at least 2"):
        split_calibration(data, None, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X[:, :, :7]}, r"x is float32 \[10, 3, 7, 6\]; the network's image takes float32 \[\*, 3, 8, 6\]$"),
        ({"x": X.transpose(0, 2, 3, 1)}, r"its channels are last: x\.transpose\(0, 3, 1, 2\) moves them"),
        ({"x": X[:, 0]}, r"x is float32 \[10, 8, 6\].*it lacks an axis of 3"),
        ({"x": np.zeros((10, 3, 8, 6), np.uint8)}, "x is uint8 .* octoc does not scale: apply the network's own"),
        ({"x": np.where(X > 2, np.nan, X)}, r"has \d+ NaN and 0 infinite values of 1440"),
        ({"x": np.where(X > 2, -np.inf, X)}, r"has 0 NaN and \d+ infinite"),
        ({"x": X.astype(np.float64) * 1e300}, "infinite values"),
        ({"x": X[:0]}, "has no samples"),
        ({"x": np.float32(1)}, "one number, not samples"),
        ({"x": X.astype(str)}, "not numbers"),
        ({"x": X.astype(complex)}, "not numbers"),
        ({"x": X, "y": Y[:9]}, "y has 9 labels for 10 samples"),
        ({"x": X, "y": np.int64(3)}, "y has one number for 10 samples"),
        ({"x": X, "y": Y.astype(str)}, "give class numbers from 0"),
        ({"x0": X, "x1": X}, r"has 2 input\(s\); the network takes 1 \(image\)"),
        ({"X": X, "y": Y}, "has X, y; octoc reads x"),
        ({"x": X, "z": Y}, "has x, z; octoc reads x"),
        ({"x0": X, "x2": X}, "has x0, x2; octoc reads x"),
        ({"y": Y}, "has y; octoc reads x"),
    ],
)
def test_data_that_does_not_fit_is_refused_with_the_numbers(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(_npz(tmp_path / "d.npz", **arrays), [IMAGE])
    assert "\n" not in str(caught.value)


def test_channels_that_are_first_and_missing_channels_are_recognised() -> None:
    last = InputSpec("image", (1, 8, 6, 3), torch.float32)
    with pytest.raises(DataError, match=r"x\.transpose\(0, 2, 3, 1\) moves them"):
        Dataset((X,), None, "d").check([last])
    gray = InputSpec("image", (1, 1, 8, 6), torch.float32)
    with pytest.raises(DataError, match=r"x\[:, None\] adds it"):
        Dataset((X[:, 0],), None, "d").check([gray])


def test_integers_become_the_networks_integers_where_they_fit() -> None:
    data = Dataset((np.ones((4, 5), np.int64),), None, "d").check([TOKENS])
    assert data.inputs[0].dtype == np.int32
    with pytest.raises(DataError, match=r"values from 1 to 4294967296; .* from -2147483648 to 2147483647"):
        Dataset((np.array([[1, 1, 1, 1, 2**32]]),), None, "d").check([TOKENS])
    with pytest.raises(DataError, match=r"convert with x\.astype\('int32'\)"):
        Dataset((np.ones((4, 5), np.float32),), None, "d").check([TOKENS])


def test_an_input_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="takes one number without samples"):
        Dataset((np.ones(3, np.float32),), None, "d").check([InputSpec("scale", (), torch.float32)])


@pytest.mark.parametrize("name", ["d.npz", "d.npy"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"PK\x03\x04rest", os.urandom(500), b"\x93NUMPY\x01\x00", b"text\n" * 9]
)
def test_empty_truncated_and_random_files_are_refused_on_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_data(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_files_that_end_too_early_are_refused(tmp_path: Path, share: float) -> None:
    for path in (_npz(tmp_path / "d.npz", x=X, y=Y), tmp_path / "d.npy"):
        if path.suffix == ".npy":
            np.save(path, X)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(DataError):
            load_data(path)


def test_pickled_objects_are_refused_and_do_not_run(tmp_path: Path) -> None:
    trapped = np.empty(2, object)
    trapped[:] = [Trap(tmp_path / "ran"), 1]
    np.save(tmp_path / "array.npy", trapped, allow_pickle=True)
    np.savez(tmp_path / "x.npz", x=trapped)
    np.savez(tmp_path / "y.npz", x=X, y=trapped[:1].repeat(10))
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as file:
        file.writestr("x.npy", pickle.dumps(Trap(tmp_path / "ran")))
    for name in ("array.npy", "x.npz", "y.npz", "bare.npy", "bare.npz"):
        with pytest.raises(DataError, match="holds Python objects, and reading them would run code"):
            load_data(tmp_path / name)
    with pytest.raises(DataError):
        load_data(tmp_path / "member.npz")
    assert not (tmp_path / "ran").exists()


def test_missing_files_folders_and_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    for name, message in (
        ("none.npz", "no such file"),
        ("none", "no such file or folder"),
        ("d.csv", "not a kind of data"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(tmp_path / name)


FUNCTIONS = """
import numpy as np
import torch

def plain():
    for i in range(3):
        yield np.full((2, 4), i, np.float32)

def labelled():
    return [(torch.full((2, 4), float(i), requires_grad=True), torch.tensor([i, i])) for i in range(3)]

def pairs():
    yield (np.zeros((2, 4)), np.ones((2, 5))), np.array([0, 1])

def ragged():
    yield np.zeros((2, 4))
    yield np.zeros((2, 5))

def sometimes():
    yield np.zeros((2, 4)), np.array([0, 1])
    yield np.zeros((2, 4))

def triple():
    yield 1, 2, 3

def nothing():
    return []

def number():
    return 7

def broken():
    yield np.zeros((2, 4))
    raise OSError("disk\\ngone")
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_batches.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_batches", raising=False)


@pytest.mark.usefixtures("functions")
def test_a_function_yields_samples_labels_or_several_inputs() -> None:
    plain, labelled, pairs = (load_data(f"own_batches:{name}") for name in ("plain", "labelled", "pairs"))
    assert plain.labels is None
    assert list(plain.inputs[0][:][:, 0]) == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(labelled.inputs[0][:], plain.inputs[0][:])
    assert labelled.labels is not None
    assert list(labelled.labels) == [0, 0, 1, 1, 2, 2]
    assert [x.shape for x in pairs.inputs] == [(2, 4), (2, 5)]


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ragged", r"batch 1 is not of the form of the first: \[2, 5\]"),
        ("sometimes", "batch 1 is not of the form"),
        ("triple", "has 3 parts"),
        ("nothing", "yields no batch"),
        ("number", "returned int; it must yield batches"),
        ("broken", "batch 1 failed: OSError: disk gone"),
    ],
)
def test_each_way_a_function_can_fail_has_its_own_line(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(f"own_batches:{name}")


@pytest.mark.usefixtures("functions")
def test_a_function_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="own_batches has no absent"):
        load_data("own_batches:absent")


def test_a_damaged_member_is_named_as_damage(tmp_path: Path) -> None:
    path = _npz(tmp_path / "d.npz", x=X)
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        load_data(path)
