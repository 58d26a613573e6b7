"""What every method that trains begins and ends with: samples held out, the score that decides, the whole network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from octoc.compressed import Compressed
from octoc.errors import DataError, UsageError
from octoc.model import Model
from octoc.qtensor import Affine, Array, QTensor
from octoc.recover import EncodeBiases, Tuned

HELD = 8  # one sample in so many is held out
MOST_HELD = 64
_TIMED = 3  # steps that are timed, after a first one

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """One network to train and the samples for it.

    Args:
        small: the compressed network as it came.
        original: the network that it should compute.
        inputs: calibration samples, one array an input.
        learn: rows of the samples to learn from.
        held: rows of the samples that decide.
        batch: samples in one call.
        classes: the outputs are logits over their last axis.
        encode_biases: makes the integer biases.
    """

    small: Compressed
    original: Model
    inputs: tuple[Any, ...]
    learn: Array
    held: Array
    batch: int
    classes: bool
    encode_biases: EncodeBiases

    def coded(self) -> dict[str, QTensor]:
        """The compressed tensors without integer biases, which follow from the weights."""
        return {name: q for name, q in self.small.qtensors.items() if not (isinstance(q, Affine) and q.bits == 32)}

    def take(self, rows: Array) -> Batch:
        """Samples by row, as one call's inputs."""
        return tuple(torch.from_numpy(np.array(array[rows])) for array in self.inputs)

    def batches(self, rows: Array) -> Iterator[Array]:
        """Rows of whole calls; where the network fixes its batch, the last is filled up with its last sample."""
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            if not self.small.model.dynamic_batch and len(part) < self.batch:
                part = np.concatenate([part, np.repeat(part[-1:], self.batch - len(part))])
            yield part

    def shuffled(self, step: int, seed: int) -> Array:
        """Rows of the samples that a step learns from; depends on nothing but its arguments, so that it can resume."""
        each = max(1, len(self.learn) // self.batch)
        order = random(seed, step // each).permutation(len(self.learn))
        start = step % each * self.batch
        return next(self.batches(self.learn[order[start : start + self.batch]]))

    def divergence(self, run: Callable[..., tuple[Tensor, ...]]) -> float:
        """How far outputs are from the original's on the held-out samples; infinite where they are not finite."""
        total = 0.0
        with torch.no_grad():
            for rows in self.batches(self.held):
                batch = self.take(rows)
                total += float(divergence(self.original.run(*batch), run(*batch), self.classes)) * len(rows)
        mean = total / len(self.held)
        return mean if np.isfinite(mean) else float("inf")

    def finish(
        self,
        coded: Mapping[str, QTensor],
        floats: Mapping[str, Tensor],
        steps: int,
        run: int,
        notes: tuple[str, ...] = (),
    ) -> Tuned:
        """The trained network where it is better on the held-out samples, else the one that came."""
        values = {name: tensor.detach().clone() for name, tensor in floats.items()}
        model = self.small.model.with_tensors(values)
        all_coded = {**coded, **self.encode_biases(model, coded)}
        tuned = replace(self.small, model=model, qtensors=all_coded)
        before, after = (self.divergence(network.decoded.run) for network in (self.small, tuned))
        if after < before:
            vectors = {name: tuple(tensor.tolist()) for name, tensor in values.items()}
            return Tuned(tuned, steps, run, before, after, vectors, notes)
        why = f"training did not help: {after:.3g} against {before:.3g} on {len(self.held)} held-out samples"
        return Tuned(self.small, steps, run, before, before, {}, (*notes, why))


def task(
    small: Compressed,
    original: Model,
    inputs: Sequence[Any],
    batch: int,
    classes: bool,
    encode_biases: EncodeBiases,
    seed: int,
) -> Task:
    """Checks the samples and holds some out.

    Raises:
        DataError: fewer than two samples, or not one array for each input.
    """
    if len(inputs) != len(small.model.inputs) or len({len(array) for array in inputs}) != 1:
        raise DataError(f"training wants {len(small.model.inputs)} arrays with the same samples, one an input")
    count = len(inputs[0])
    if count < 2:
        raise DataError(
            f"training wants 2 calibration samples at least, one to learn from and one to hold out; got {count}"
        )
    order = random(seed).permutation(count)
    held = min(max(1, count // HELD), MOST_HELD)
    if not small.model.dynamic_batch:
        batch = next((spec.shape[0] for spec in small.model.inputs if spec.shape), 1)
    else:
        batch = min(batch, count - held)
    return Task(
        small, original, tuple(inputs), np.sort(order[held:]), np.sort(order[:held]), batch, classes, encode_biases
    )


def random(*keys: int) -> np.random.Generator:
    """Random numbers that depend on the keys alone, which may be any whole numbers."""
    return np.random.default_rng([key % 2**64 for key in keys])


def divergence(reference: Sequence[Tensor], outputs: Sequence[Tensor], classes: bool) -> Tensor:
    """How far outputs are from the original's: mean KL in nats, or squared error relative to the outputs' power."""
    total = torch.zeros(())
    for original, changed in zip(reference, outputs, strict=True):
        if not original.is_floating_point():
            continue
        if classes and original.dim() >= 2:
            p, q = original.log_softmax(-1), changed.log_softmax(-1)
            # where both are minus infinity, as masked outputs are, nothing is lost
            gap = torch.where(p == q, 0.0, p - q)
            total = total + (p.exp() * gap).sum(-1).mean()
        else:
            power = original.square().mean().clamp_min(1e-30)
            total = total + (original - changed).square().mean() / power
    return total


def planned(steps: int | None, seconds: float | None, usual: int, one: Callable[[], Any]) -> int:
    """How many steps to run.

    Args:
        steps: as asked for.
        seconds: a time to spend instead.
        usual: where neither is given.
        one: does the work of one step, leaving nothing behind; it is timed.

    Raises:
        UsageError: both are given, or one is not positive.
    """
    if steps is not None and seconds is not None:
        raise UsageError("training takes a number of steps or of seconds, not both")
    if steps is not None:
        if steps < 0:
            raise UsageError(f"training for {steps} steps")
        return steps
    if seconds is None:
        return usual
    if seconds <= 0:
        raise UsageError(f"training for {seconds:g} seconds")
    one()
    start = time.perf_counter()
    for _ in range(_TIMED):
        one()
    return max(1, int(seconds / ((time.perf_counter() - start) / _TIMED)))
