"""Samples go in and come out in their order, whatever number of them a call takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from octoc.compressed import Compressed
from octoc.errors import DataError
from octoc.evaluate import (
    BATCH,
    Array,
    calls,
    declared_batch,
    model_calls,
    open_session,
    predict,
    predict_model,
    samples_first,
)
from octoc.export import onnx as exporter
from octoc.load.module import from_module
from octoc.model import Model
from octoc.runtime import OpRecord, TensorSpec


@dataclass
class Fake:
    """A runtime that runs a function on each call and remembers how it was called."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    function: Any
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        values = self.function(*(feeds[spec.name] for spec in self.inputs))
        return {spec.name: np.asarray(v) for spec, v in zip(self.outputs, values, strict=True)}

    def run_many(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.seen.append(next(iter(feeds.values())).shape)
        rows = [self.run({name: a[i] for name, a in feeds.items()}) for i in range(self.seen[-1][0])]
        return {spec.name: np.stack([row[spec.name] for row in rows]) for spec in self.outputs}

    def trace(self, feeds: Mapping[str, Array]) -> list[OpRecord]:
        return []


def fake(function: Any, inputs: list[tuple[int | None, ...]], outputs: int = 1) -> Fake:
    return Fake(
        tuple(TensorSpec(f"x{i}", shape, "float32") for i, shape in enumerate(inputs)),
        tuple(TensorSpec(f"y{i}", (), "float32") for i in range(outputs)),
        function,
    )


@given(st.integers(1, 20), st.integers(1, 7), st.integers(0, 3))
def test_calls_hold_the_samples_in_order_and_repeat_the_last_one_to_fill_up(count: int, batch: int, rank: int) -> None:
    array = np.arange(count * 2**rank, dtype=np.float32).reshape(count, *[2] * rank)
    (stacked,) = calls([array], batch)
    assert stacked.shape == (-(-count // batch), batch, *[2] * rank)
    flat = stacked.reshape(-1, *[2] * rank)
    np.testing.assert_array_equal(flat[:count], array)
    assert all(np.array_equal(row, array[-1]) for row in flat[count:])
    np.testing.assert_array_equal(samples_first(stacked, batch, count), array)


@given(st.integers(1, 9))
def test_an_output_without_a_batch_stands_for_its_call_where_a_call_is_a_sample(count: int) -> None:
    scalars = np.arange(count, dtype=np.float32)
    np.testing.assert_array_equal(samples_first(scalars, 1, count), scalars)
    rows = np.arange(count * 5.0).reshape(count, 5)
    np.testing.assert_array_equal(samples_first(rows, 1, count), rows)
    for output in (scalars, rows):
        with pytest.raises(DataError, match="4 samples a call"):
            samples_first(output, 4, count)


def test_the_declared_batch_is_the_first_fixed_size_and_one_where_it_is_free() -> None:
    specs = {shape: TensorSpec("x", shape, "float32") for shape in ((4, 3), (None, 3), (1, 3), ())}
    assert [declared_batch([spec]) for spec in specs.values()] == [4, 1, 1, 1]
    assert declared_batch([specs[()], specs[4, 3]]) == 4


@given(st.integers(1, 11), st.sampled_from([1, 2, 4]))
def test_predictions_come_in_the_order_of_the_samples_for_any_batch(count: int, batch: int) -> None:
    session = fake(lambda a, b: (a * 2 + b, a.sum(1)), [(batch, 3), (batch, 3)], 2)
    a, b = np.random.default_rng(0).normal(size=(2, count, 3)).astype(np.float32)
    told: list[int] = []
    first, second = predict(session, [a, b], told.append)
    np.testing.assert_array_equal(first, a * 2 + b)
    np.testing.assert_array_equal(second, a.sum(1))
    assert sum(told) == count


def test_more_samples_than_one_piece_holds_are_run_in_pieces() -> None:
    session = fake(lambda a: (a,), [(2, 1)])
    x = np.arange(2 * BATCH * 2 + 3, dtype=np.float32)[:, None]
    told: list[int] = []
    np.testing.assert_array_equal(predict(session, [x], told.append)[0], x)
    assert [shape[0] for shape in session.seen] == [BATCH, BATCH, 2]
    assert told == [2 * BATCH, 2 * BATCH, 3]


def test_inputs_and_outputs_without_any_size_are_one_number_a_call() -> None:
    session = fake(lambda a, b: (a.sum() * b,), [(1, 3), ()])
    a, b = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.arange(5, dtype=np.float32)
    np.testing.assert_allclose(predict(session, [a, b])[0], a.sum(1) * b)


def test_an_output_of_a_whole_batch_has_no_samples_to_count() -> None:
    with pytest.raises(DataError, match="2 samples a call"):
        predict(fake(lambda a: (a.sum(),), [(2, 3)]), [np.zeros((4, 3), np.float32)])


class Two(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + z, x.sum(1)


class Fixed(nn.Module):
    """Written for one number of samples."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(self.batch, 3))


class Scalar(nn.Module):
    """One number a call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mean()


def written(model: Model, folder: Path) -> Any:
    path = folder / exporter.FILE
    exporter.write(exporter.convert(model), Compressed(model, {}), path)
    return open_session("onnx", path, 1)


@pytest.mark.parametrize("count", [1, 5, BATCH + 3])
def test_a_network_of_free_batch_predicts_as_it_runs_all_at_once(count: int, tmp_path: Path) -> None:
    model = from_module(Two(), [torch.zeros(1, 3), torch.zeros(1, 4)])
    assert model.dynamic_batch
    x, z = torch.randn(count, 3), torch.randn(count, 4)
    told: list[int] = []
    found = predict_model(model, [x.numpy(), z.numpy()], told.append)
    assert sum(told) == count
    for ours, whole in zip(found, model.run(x, z), strict=True):
        np.testing.assert_allclose(ours, whole.numpy(), rtol=1e-5, atol=1e-6)
    if count == 5:
        for ours, theirs in zip(predict(written(model, tmp_path), [x.numpy(), z.numpy()]), found, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 10])
def test_a_network_of_four_samples_a_call_predicts_a_remainder_too(count: int, tmp_path: Path) -> None:
    module = Fixed(4)
    model = from_module(module, [torch.zeros(4, 3)])
    assert not model.dynamic_batch
    x = torch.randn(count, 3)
    expected = module.linear(x).detach().numpy()
    told: list[int] = []
    np.testing.assert_allclose(predict_model(model, [x.numpy()], told.append)[0], expected, rtol=1e-5, atol=1e-6)
    assert sum(told) == count
    if count == 10:
        np.testing.assert_allclose(predict(written(model, tmp_path), [x.numpy()])[0], expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_free_batch_takes_its_samples_in_one_call_and_another_in_calls_of_its_own() -> None:
    x = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    free = from_module(nn.Linear(3, 4), [torch.zeros(1, 3)])
    ((whole,),) = model_calls(free, [x], 6)
    np.testing.assert_array_equal(whole.numpy(), x[:6])
    fixed = from_module(Fixed(4), [torch.zeros(4, 3)])
    parts = model_calls(fixed, [x], 6)
    assert [part.shape for (part,) in parts] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(torch.cat([part for (part,) in parts])[:6].numpy(), x[:6])


def test_a_network_that_gives_one_number_gives_one_for_each_sample(tmp_path: Path) -> None:
    module = Scalar()
    model = from_module(module, [torch.zeros(1, 3)])
    x = torch.randn(7, 3)
    expected = module.linear(x).mean(1).detach().numpy()
    np.testing.assert_allclose(predict_model(model, [x.numpy()])[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(predict(written(model, tmp_path), [x.numpy()])[0], expected, rtol=1e-4, atol=1e-5)
