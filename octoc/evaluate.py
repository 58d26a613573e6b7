"""Runs networks and artefacts over many samples: samples first in, samples first out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from octoc.errors import DataError
from octoc.model import Model
from octoc.runtime import OpRecord, TensorSpec

Array = NDArray[Any]
BATCH = 64  # samples in one call of the torch network, and calls in one `run_many`


class Session(Protocol):
    """An artefact opened by its runtime: `open_session(path, threads)` of a module in octoc/runtime/."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def run_many(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def trace(self, feeds: Mapping[str, Array]) -> list[OpRecord]: ...


def open_session(fmt: str, path: Path, threads: int | None = None) -> Session:
    """Opens an artefact of a known format."""
    return cast(Session, importlib.import_module(f"octoc.runtime.{fmt}").open_session(path, threads))


def declared_batch(inputs: Sequence[TensorSpec]) -> int:
    """Samples in one call: the first size of the inputs, 1 where it is free or there is none."""
    return next((int(spec.shape[0]) for spec in inputs if spec.shape and spec.shape[0]), 1)


def calls(arrays: Sequence[Array], batch: int) -> list[Array]:
    """[samples, ...] -> [calls, batch, ...]; the last call is filled up with its last sample."""
    result = []
    for array in arrays:
        count = -(-len(array) // batch)
        short = count * batch - len(array)
        whole = np.concatenate([array, np.repeat(array[-1:], short, axis=0)]) if short else np.asarray(array)
        result.append(whole.reshape(count, batch, *array.shape[1:]))
    return result


def samples_first(output: Array, batch: int, count: int) -> Array:
    """[calls, batch, ...] -> [samples, ...]. An output without a batch stands for its call as a whole."""
    if output.ndim >= 2 and output.shape[1] == batch:
        return output.reshape(-1, *output.shape[2:])[:count]
    if batch != 1:
        raise DataError(f"an output of shape {output.shape[1:]} for {batch} samples a call has no samples to count")
    return output[:count]


def predict(session: Session, inputs: Sequence[Any], step: Callable[[int], Any] = lambda n: None) -> list[Array]:
    """Outputs of an artefact, in its order.

    Args:
        session: the artefact.
        inputs: [samples, ...] each, arrays or what a slice turns into one, in the order of `session.inputs`.
        step: called with the number of samples done since the last call.
    """
    batch = declared_batch(session.inputs)
    parts: list[list[Array]] = []
    for piece in _pieces(inputs, BATCH * batch):
        stacked = calls(piece, batch)
        feeds = {
            spec.name: array if spec.shape else array.reshape(len(array))
            for spec, array in zip(session.inputs, stacked, strict=True)
        }
        found = session.run_many(feeds)
        parts.append([samples_first(found[spec.name], batch, len(piece[0])) for spec in session.outputs])
        step(len(piece[0]))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def model_calls(model: Model, inputs: Sequence[Any], samples: int) -> list[tuple[torch.Tensor, ...]]:
    """Arguments for the network: one call with all samples where its batch is free, several of its own batch elsewhere.

    Args:
        model: the network.
        inputs: [n, ...] each, arrays or what a slice turns into one.
        samples: how many to use at most.
    """
    chosen = [np.asarray(array[:samples]) for array in inputs]
    if model.dynamic_batch:
        return [tuple(torch.from_numpy(np.array(array)) for array in chosen)]
    batch = next((spec.shape[0] for spec in model.inputs if spec.shape), 1)
    stacked = calls(chosen, batch)
    return [
        tuple(
            torch.from_numpy(np.array(s[i])).reshape(spec.shape) for s, spec in zip(stacked, model.inputs, strict=True)
        )
        for i in range(len(stacked[0]))
    ]


def predict_model(model: Model, inputs: Sequence[Any], step: Callable[[int], Any] = lambda n: None) -> list[Array]:
    """Outputs of a network in torch; arguments as in `predict`."""
    batch = 1
    if not model.dynamic_batch:
        batch = next((spec.shape[0] for spec in model.inputs if spec.shape), 1)
    parts: list[list[Array]] = []
    for piece in _pieces(inputs, BATCH if model.dynamic_batch else batch):
        if model.dynamic_batch:
            outputs = [value.numpy() for value in model.run(*(torch.from_numpy(np.array(part)) for part in piece))]
        else:
            stacked = calls(piece, batch)
            tensors = [
                torch.from_numpy(np.array(part[0])).reshape(spec.shape)
                for part, spec in zip(stacked, model.inputs, strict=True)
            ]
            outputs = [samples_first(value.numpy()[None], batch, len(piece[0])) for value in model.run(*tensors)]
        parts.append(outputs)
        step(len(piece[0]))
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _pieces(inputs: Sequence[Any], size: int) -> Iterator[list[Array]]:
    for start in range(0, len(inputs[0]), size):
        yield [np.asarray(array[start : start + size]) for array in inputs]
