"""A proof comes back as it was written, in the same bytes each time; a damaged one is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save
from torch import Tensor, nn

from octoc.compressed import Compressed
from octoc.errors import ArtifactError
from octoc.load.module import from_module
from octoc.proof import (
    PROBES,
    Proof,
    artifact_bytes,
    artifact_files,
    artifact_sha256,
    prove,
    read_proof,
    summary,
    write_proof,
)
from octoc.qtensor import Affine, Cast, Palette, QTensor, Sparse, difference

rng = np.random.default_rng(0)
TENSORS: dict[str, QTensor] = {
    "a": Affine(rng.integers(-128, 128, (4, 6)).astype(np.int8), rng.random((4, 1)).astype(np.float32)),
    "a/b": Affine(
        rng.integers(0, 16, (4, 6)).astype(np.uint8),
        rng.random((4, 2)).astype(np.float16),
        rng.integers(0, 16, (4, 2)).astype(np.uint8),
        4,
        False,
    ),
    "a.bias": Affine(rng.integers(-(2**31), 2**31, 4).astype(np.int32), rng.random(4).astype(np.float32), None, 32),
    "p": Palette(rng.integers(0, 8, (4, 6)).astype(np.uint8), rng.random((1, 1, 8)).astype(np.float16), 3),
    "c": Cast(rng.random((2, 3, 1, 1)).astype(np.float16)),
    "s": Sparse(rng.random((4, 6)) > 0.5, Affine(np.zeros((4, 6), np.int8), np.ones((1, 1), np.float32))),
    "code/x/values": Cast(np.zeros((1, 1), np.float16)),
}


def a_proof(**changes: Any) -> Proof:
    proof = Proof(
        TENSORS,
        {"x": rng.random((4, 1, 3)).astype(np.float32), "tokens": rng.integers(0, 9, (4, 1, 2))},
        {"y": np.array([[1.0, np.nan, -np.inf, -0.0]], np.float32), "flag": np.array([True, False])},
        ("conv", "ünï"),
        rng.random((2, 4)),
        0.001,
        "onnx",
        2,
        "00ff",
        "network",
    )
    return replace(proof, **changes)


def assert_same(one: Proof, other: Proof) -> None:
    for field in fields(Proof):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "qtensors":
            assert a.keys() == b.keys()
            assert all(difference(a[name], b[name]) is None for name in a)
        elif field.name in ("inputs", "outputs"):
            assert list(a) == list(b)
            for name in a:
                assert a[name].dtype == b[name].dtype
                np.testing.assert_array_equal(a[name], b[name])
        elif field.name == "values":
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize(
    "changes", [{}, {"qtensors": {}, "operations": (), "values": np.zeros((0, 4))}, {"integer": 0}]
)
def test_a_proof_comes_back_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    proof = a_proof(**changes)
    write_proof(proof, tmp_path / "proof.safetensors")
    assert_same(read_proof(tmp_path / "proof.safetensors"), proof)


def test_the_same_proof_gives_the_same_bytes_wherever_its_arrays_lie(tmp_path: Path) -> None:
    proof = a_proof()
    turned = replace(proof, inputs={name: np.asfortranarray(array) for name, array in proof.inputs.items()})
    for name, one in (("a", proof), ("b", proof), ("c", turned)):
        write_proof(one, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    write_proof(read_proof(tmp_path / "a"), tmp_path / "d")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "d").read_bytes()


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("proof") / "proof.safetensors"
    write_proof(a_proof(), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "proof.safetensors"


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_proof_that_was_cut_is_refused(raw: bytes, place: Path, share: float) -> None:
    place.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ArtifactError, match=r"proof\.safetensors"):
        read_proof(place)


@given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_proof_with_a_flipped_bit_is_refused_or_read_never_a_crash(
    raw: bytes, place: Path, at: int, bit: int
) -> None:
    damaged = bytearray(raw)
    damaged[at % len(raw)] ^= 1 << bit
    place.write_bytes(damaged)
    try:
        found = read_proof(place)
    except ArtifactError:
        return
    assert isinstance(found, Proof)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("tensors", "inputs", "outputs", "operations", "tolerance", "format", "integer", "sha256", "model")


@given(key=st.sampled_from(KEYS), value=json_values)
def test_facts_of_any_other_form_are_refused_or_read_never_a_crash(
    raw: bytes, place: Path, key: str, value: Any
) -> None:
    place.write_bytes(save(load(raw), {"octoc": json.dumps({**facts_of(raw), key: value})}))
    try:
        found = read_proof(place)
    except ArtifactError:
        return
    assert isinstance(found.format, str)
    assert 0 < found.tolerance < float("inf")


@pytest.mark.parametrize("key", KEYS)
def test_a_proof_without_one_of_its_facts_is_refused(raw: bytes, place: Path, key: str) -> None:
    facts = {name: fact for name, fact in facts_of(raw).items() if name != key}
    place.write_bytes(save(load(raw), {"octoc": json.dumps(facts)}))
    with pytest.raises(ArtifactError):
        read_proof(place)


@pytest.mark.parametrize("tolerance", ["NaN", "Infinity", "-1.0", "0.0"])
def test_a_tolerance_that_anything_would_pass_is_refused(raw: bytes, place: Path, tolerance: str) -> None:
    text = json.dumps({**facts_of(raw), "tolerance": "@"}).replace('"@"', tolerance)
    place.write_bytes(save(load(raw), {"octoc": text}))
    with pytest.raises(ArtifactError):
        read_proof(place)


@pytest.mark.parametrize("count", [True, False, -1, 1.0, "2", None])
def test_integer_operations_are_counted_not_asserted(raw: bytes, place: Path, count: Any) -> None:
    place.write_bytes(save(load(raw), {"octoc": json.dumps({**facts_of(raw), "integer": count})}))
    with pytest.raises(ArtifactError, match="integer operations"):
        read_proof(place)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a proof", save({"a": np.zeros(3)})])
def test_another_file_is_no_proof(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged or no proof"):
        read_proof(place)


def test_a_missing_proof_is_told_apart_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="missing"):
        read_proof(tmp_path / "proof.safetensors")
    with pytest.raises(ArtifactError):
        read_proof(tmp_path)


def facts_of(raw: bytes) -> dict[str, Any]:
    size = int.from_bytes(raw[:8], "little")
    facts: dict[str, Any] = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["octoc"])
    return facts


class Net(nn.Module):
    """A network with two outputs, one of them a number."""

    def __init__(self, batch: int | None) -> None:
        super().__init__()
        self.batch = batch
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x if self.batch is None else x.reshape(self.batch, 3))
        return torch.relu(y) + z, y.sum() if self.batch else y.sum(1)


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_the_first_probe_is_zeros_the_others_are_samples_and_the_outputs_are_the_compressed_network_s(
    batch: int | None,
) -> None:
    torch.manual_seed(0)
    count = batch or 1
    model = from_module(Net(batch), [torch.zeros(count, 3), torch.zeros(count, 4)])
    weight = Cast(model.tensors["linear.weight"].numpy().astype(np.float16))
    small = Compressed(model, {"linear.weight": weight})
    samples = [rng.normal(size=(16, n)).astype(np.float32) for n in (3, 4)]
    proof = prove(small, samples, "onnx", 0.01, 0, "ff", "network")
    assert [array.shape for array in proof.inputs.values()] == [(PROBES, count, 3), (PROBES, count, 4)]
    for array, sample in zip(proof.inputs.values(), samples, strict=True):
        assert not array[0].any()
        np.testing.assert_array_equal(array[1:].reshape(-1, sample.shape[1]), sample[: (PROBES - 1) * count])
    for i in range(PROBES):
        call = [torch.from_numpy(array[i]) for array in proof.inputs.values()]
        for output, value in zip(proof.outputs.values(), small.decoded.run(*call), strict=True):
            np.testing.assert_array_equal(output[i], value.numpy())
    floats = [node.name for node in model.graph.nodes if node.op == "call_function" and "sym" not in str(node.target)]
    assert set(proof.operations) <= set(floats)
    assert {"linear", "relu", "add"} <= set(proof.operations)
    assert proof.values.shape == (len(proof.operations), 4)
    last = small.decoded.run(*[torch.from_numpy(array[-1]) for array in proof.inputs.values()])[0]
    np.testing.assert_array_equal(proof.values[proof.operations.index("add")], summary(last.numpy()))


def test_few_samples_make_few_probes() -> None:
    model = from_module(nn.Linear(3, 2), [torch.zeros(1, 3)])
    proof = prove(Compressed(model, {}), [np.ones((1, 3), np.float32)], "onnx", 0.01, 0, "ff", "network")
    (array,) = proof.inputs.values()
    np.testing.assert_array_equal(array, [[[0, 0, 0]], [[1, 1, 1]]])


@given(st.permutations(range(24)))
def test_a_summary_does_not_depend_on_the_layout(order: list[int]) -> None:
    array = np.linspace(-3, 5, 24, dtype=np.float32)
    a, b = summary(array.reshape(2, 3, 4)), summary(array[order].reshape(4, 6))
    np.testing.assert_allclose(a, b, rtol=1e-12)
    assert a[0] == 24
    assert a[3] == 5
    assert summary(np.zeros((0, 3), np.float32)) == [0, 0, 0, 0]
    assert summary(np.array([1, np.inf, -2, -np.inf, np.nan], np.float32)) == [5, -1, 5, 2]


def test_the_bytes_and_the_digest_of_an_artefact_cover_every_file_and_its_name_inside(tmp_path: Path) -> None:
    package = tmp_path / "m.mlpackage"
    (package / "inner").mkdir(parents=True)
    (package / "a").write_bytes(b"12")
    (package / "inner" / "b").write_bytes(b"345")
    assert artifact_files(package) == [package / "a", package / "inner" / "b"]
    assert artifact_bytes(package) == 5
    digests = [artifact_sha256(package)]
    digests.append(artifact_sha256(package.rename(tmp_path / "n.mlpackage")))
    package = tmp_path / "n.mlpackage"
    (package / "inner" / "b").write_bytes(b"346")
    digests.append(artifact_sha256(package))
    (package / "inner" / "b").rename(package / "inner" / "c")
    digests.append(artifact_sha256(package))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    (tmp_path / "file").write_bytes(b"12")
    assert artifact_files(tmp_path / "file") == [tmp_path / "file"]
    assert artifact_bytes(tmp_path / "file") == 2
