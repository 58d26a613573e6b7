"""Quantization-aware training with the original network as teacher.

Esser et al., "Learned Step Size Quantization", arXiv 1902.08153 (LSQ); Hinton et al., "Distilling the Knowledge in a
Neural Network", 2015. Labels are not used.

1. Each weight of an affine tensor has a latent float v; its code is round(clip(v / s)). The gradient of v is that of
   the weight where v / s lies within the range and 0 outside; that of the scale s is the sum of
   (round(v / s) - v / s) inside, low or high outside, times 1 / sqrt(weights * high).
2. Each weight of a palette has a latent float too; it takes the entry nearest to it. The gradient of an entry is the
   sum over its weights, that of the latent float is that of the weight.
3. The latent floats begin at the float weights, moved as little as keeps the codes that came.
4. Biases and other vectors that are stored in floats are trained too.
5. Loss: divergence of the outputs from the original's (KL of logits, else relative squared error). Adam, learning rates
   relative to the distance between codes, falling along a cosine. How large they begin is tried: of a few multiples,
   each for a twentieth of the steps, the one of least divergence on held-out samples. A network that lost much needs
   ten times the rate that one which lost little can bear.
6. The parameters of least divergence on held-out samples are kept; half of the steps without a new best end it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octoc.compressed import Compressed
from octoc.model import Model
from octoc.qtensor import Affine, Palette, QTensor, Sparse
from octoc.recover import EncodeBiases, Tuned
from octoc.recover.codes import AffineRows, Coded, FloatTraining, Masked, PaletteRows, Part, groups, trainable
from octoc.recover.network import Network, free_floats, training_network
from octoc.recover.state import State, identity
from octoc.recover.task import Task, divergence, planned, task

KIND = "tune"

BATCH = 32
STEPS = 1000
RATES = {"weight": 1e-3, "scale": 1e-3, "table": 5e-4, "float": 3e-4}
MULTIPLES = (1.0, 4.0, 16.0)
_TRIAL = 20  # one step in so many for each multiple
_CHECKS = 20  # times that the held-out samples are asked
_PATIENCE = 0.5  # of the steps
_MARGIN = 0.05  # of a step or a cell: how far from its edge a latent float begins


class Lsq(torch.autograd.Function):
    """Step 1: values [tiles, elements], step [tiles, 1], low and high [tiles, 1] -> quantized values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ratio = values / step
        codes = torch.minimum(torch.maximum(ratio, low), high).round()
        ctx.save_for_backward(ratio, codes, low, high)
        return codes * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, codes, low, high = ctx.saved_tensors
        inside = (ratio > low) & (ratio < high)
        share = torch.where(inside, codes - ratio, codes)
        factor = torch.rsqrt(high.clamp_min(1) * ratio.shape[1])
        return gradient * inside, (gradient * share).sum(1, keepdim=True) * factor, None, None


class Nearest(torch.autograd.Function):
    """Step 2: values [tiles, elements], table [tiles, entries] ascending -> the nearest entries."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, table: Tensor) -> Tensor:
        codes = nearest(values, table)
        ctx.save_for_backward(codes)
        ctx.entries = table.shape[1]
        return table.gather(1, codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (codes,) = ctx.saved_tensors
        sums = gradient.new_zeros(len(gradient), ctx.entries)
        return gradient, sums.scatter_add_(1, codes, gradient)


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of the same row, of two as near the lower: int64 [tiles, elements]."""
    return torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, values.contiguous())


class AffineTraining:
    """An affine weight in training; the latent floats are in steps."""

    def __init__(self, tensor: Affine, weight: Tensor) -> None:
        self.rows = rows = AffineRows(tensor, weight)
        kept = (rows.values - rows.codes).clamp(-0.5 + _MARGIN, 0.5 - _MARGIN)
        outside = ((rows.codes == rows.low) & (rows.values < rows.low)) | (
            (rows.codes == rows.high) & (rows.values > rows.high)
        )
        self.latent = torch.where(outside, rows.values, rows.codes + kept).requires_grad_()
        self.change = torch.zeros_like(rows.scale).requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.latent, "scale": self.change}

    def weight(self) -> Tensor:
        rows = self.rows
        quantized = Lsq.apply(self.latent, rows.factor(self.change), rows.low, rows.high)  # type: ignore[no-untyped-call]
        return rows.shaped(quantized * rows.scale)

    def hard(self) -> Affine:
        with torch.no_grad():
            factor = self.rows.factor(self.change)
            codes = torch.minimum(torch.maximum(self.latent / factor, self.rows.low), self.rows.high).round()
            return self.rows.stored(codes, factor)


class PaletteTraining:
    """A palette in training."""

    def __init__(self, tensor: Palette, weight: Tensor) -> None:
        self.rows = rows = PaletteRows(tensor, weight)
        middle = (rows.table[:, 1:] + rows.table[:, :-1]) / 2
        far = torch.full_like(rows.table[:, :1], float("inf"))
        low = torch.cat([-far, middle], 1).gather(1, rows.codes)
        high = torch.cat([middle, far], 1).gather(1, rows.codes)
        room = torch.where((high - low).isfinite(), (high - low) * _MARGIN, 1e-6)
        self.latent = torch.minimum(torch.maximum(rows.values, low + room), high - room).requires_grad_()
        self.table = rows.table.clone().requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.latent, "table": self.table}

    def weight(self) -> Tensor:
        entries = Nearest.apply(self.latent, self.table.sort(1).values)  # type: ignore[no-untyped-call]
        return self.rows.shaped(entries * self.rows.unit)

    def hard(self) -> Palette:
        with torch.no_grad():
            table = self.table.sort(1).values
            return self.rows.stored(nearest(self.latent, table), table)


def in_training(tensor: QTensor, weight: Tensor) -> Coded:
    """A compressed weight in training.

    Args:
        tensor: its codes.
        weight: the floats they stand for.
    """
    if isinstance(tensor, Sparse):
        return Masked(in_training(tensor.dense, weight), tensor.mask)
    if isinstance(tensor, Affine):
        return AffineTraining(tensor, weight)
    assert isinstance(tensor, Palette)
    return PaletteTraining(tensor, weight)


class Student:
    """The compressed network in training.

    Args:
        job: what is trained.
    """

    def __init__(self, job: Task) -> None:
        tensors = job.small.model.tensors
        self.fixed = {name: q for name, q in job.coded().items() if not trainable(q)}
        self.coded = {name: in_training(q, tensors[name]) for name, q in job.coded().items() if trainable(q)}
        self.floats = {name: FloatTraining(tensors[name]) for name in free_floats(job.small.model, tuple(job.coded()))}
        decoded = {name: torch.from_numpy(q.dequantize()) for name, q in self.fixed.items()}
        self.network: Network = training_network(job.small.model.with_tensors(decoded), (*self.coded, *self.floats))

    @property
    def parts(self) -> dict[str, Part]:
        """What is trained, by name of the tensor."""
        return {**self.coded, **self.floats}

    def weights(self) -> list[Tensor]:
        return [part.weight() for part in self.parts.values()]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.network(*inputs, *self.weights())


class Descent:
    """A student and the optimizer of its parameters.

    Args:
        job: what is trained.
        seed: of the order of the samples.
    """

    def __init__(self, job: Task, seed: int) -> None:
        self.job, self.seed, self.student = job, seed, Student(job)
        self._rated = groups(self.student.parts)
        self.parameters = [parameter for part in self._rated.values() for parameter in part.values()]
        self.optimizer = torch.optim.Adam([{"params": list(part.values())} for part in self._rated.values()])

    def gradients(self, done: int) -> None:
        """Gradients of one batch."""
        batch = self.job.take(self.job.shuffled(done, self.seed))
        outputs = self.student.run(*batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(divergence(self.job.original.run(*batch), outputs, self.job.classes))

    def descend(self, done: int, multiple: float) -> None:
        """One step at a multiple of the learning rates."""
        for group, key in zip(self.optimizer.param_groups, self._rated, strict=True):
            group["lr"] = RATES[key] * multiple
        self.gradients(done)
        self.optimizer.step()

    def score(self) -> float:
        """Divergence on the held-out samples."""
        return self.job.divergence(self.student.run)

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def restore(self, values: Iterable[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def best_multiple(job: Task, total: int, seed: int) -> float:
    """Step 5: the multiple of the learning rates that a short trial prefers."""
    scores = {}
    for multiple in MULTIPLES:
        trial = Descent(job, seed)
        for done in range(max(1, total // _TRIAL)):
            trial.descend(done, multiple)
        scores[multiple] = trial.score()
    return min(MULTIPLES, key=scores.__getitem__)


def tune(
    small: Compressed,
    original: Model,
    inputs: Sequence[Any],
    *,
    classes: bool,
    encode_biases: EncodeBiases,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    step: Callable[[int, int], Any] = lambda done, total: None,
    state: Path | None = None,
) -> Tuned:
    """Trains codes, scales, tables and float vectors of a compressed network towards the original's outputs.

    Args:
        small: the compressed network; its model still holds the float weights.
        original: a network of the same inputs and outputs.
        inputs: calibration samples, [samples, ...] for each input, arrays or what an index turns into one.
        classes: outputs are logits over their last axis.
        encode_biases: integer biases of a model and its compressed weights.
        seed: of the order of the samples and of which are held out.
        steps: batches to learn from, STEPS where neither this nor seconds are given.
        seconds: time to spend instead, which becomes a number of steps by timing some.
        step: called with the steps done and their total.
        state: file to write the training's state to now and then, and to resume from where it is there. It is refused
            where it belongs to another network, samples or request, and removed at the end.

    Raises:
        DataError: the samples do not fit.
        UsageError: the request contradicts itself.
        ArtifactError: the state is damaged or belongs to something else.
    """
    job = task(small, original, inputs, BATCH, classes, encode_biases, seed)
    descent = Descent(job, seed)
    saved = State(state, identity(small, original, inputs, "distill", classes, seed, steps, seconds))
    at = saved.load()
    if at is None:
        training = None if seconds is None else seconds / (1 + len(MULTIPLES) / _TRIAL)
        total = planned(steps, training, STEPS, lambda: descent.gradients(0))
        at = {"done": 0, "total": total, "least": math.inf, "least_at": 0, "best": descent.values()}
        at["multiple"] = best_multiple(job, total, seed) if total else 0.0
    else:
        descent.restore(at.pop("values"))
        descent.optimizer.load_state_dict(at.pop("optimizer"))
    done, total = at["done"], at["total"]
    step(done, total)
    while done < total:
        if done % max(1, total // _CHECKS) == 0:
            score = descent.score()
            if score < at["least"]:
                at |= {"least": score, "least_at": done, "best": descent.values()}
            if done - at["least_at"] > _PATIENCE * total:
                break
            saved.save({**at, "done": done, "values": descent.values(), "optimizer": descent.optimizer.state_dict()})
        descent.descend(done, at["multiple"] * (1 + math.cos(math.pi * done / total)) / 2)
        done += 1
        step(done, total)
    if descent.score() >= at["least"]:
        descent.restore(at["best"])
    coded = {name: part.hard() for name, part in descent.student.coded.items()}
    floats = {name: part.weight() for name, part in descent.student.floats.items()}
    tuned = job.finish({**descent.student.fixed, **coded}, floats, total, done)
    saved.remove()
    return tuned
