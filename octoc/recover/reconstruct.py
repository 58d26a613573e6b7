"""Learned rounding, block after block.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568 (AdaRound); Li et al.,
"BRECQ", arXiv 2102.05426 (the block as the unit); Wei et al., "QDrop", arXiv 2203.05740 (inputs mixed with floats).

For each block of `blocks`, in order:

1. Its inputs are what the compressed network, with all blocks before it learned, has there; its targets are what the
   original has where the block ends.
2. A weight lies between two neighbours, codes or entries of its table: low + h (high - low), with
   h = clip(1.2 sigmoid(v) - 0.1, 0, 1). It begins at the float weight, moved as little as rounds to the code that came.
3. Scales, tables, biases and other float vectors are learned with v.
4. Loss: squared error of the block's output relative to what it was with the codes that came, plus the mean over the
   weights of 1 - |2h - 1|^beta, from the first fifth of the steps on, with beta falling from 20 to 2 along a cosine.
   Each input element is the original's with probability 1/2.
5. h is rounded. Where the block's error on held-out samples is not less than before, it keeps what it came with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from octoc.compressed import Compressed
from octoc.errors import ModelError
from octoc.model import Model, aten
from octoc.qtensor import Array, QTensor, describe, rebuild
from octoc.recover import EncodeBiases, Tuned
from octoc.recover.blocks import Block, blocks, sizes
from octoc.recover.codes import FloatTraining, Part, groups, trainable
from octoc.recover.network import Network, between, free_floats, outputs_of, training_network
from octoc.recover.rounding import regulariser, rounding, share
from octoc.recover.state import State, identity
from octoc.recover.task import Task, planned, random, task

KIND = "tune"

BATCH = 32
STEPS = 400  # a block
RATES = {"rounding": 2e-2, "scale": 5e-3, "table": 5e-3, "float": 1e-3}
STIFFNESS = 1.0  # weight of the regulariser
MIX = 0.5  # probability of the original's input
MOST_BYTES = 1 << 30  # values that are kept of all samples
_WARM = 0.2
_BETA = (20.0, 2.0)


@dataclass(frozen=True)
class Values:
    """Values at one cut for all samples, [samples, ...] each: the compressed network's and the original's."""

    small: tuple[Tensor, ...]
    original: tuple[Tensor, ...]


class BlockTraining:
    """One block in training.

    Args:
        job: the network and its samples.
        block: the block.
        model: the compressed network's graph with the float vectors learned so far.
        coded: its compressed tensors so far.
        taken: names of the float vectors that an earlier block learned.
        inputs: values where the block begins.
    """

    def __init__(
        self,
        job: Task,
        block: Block,
        model: Model,
        coded: Mapping[str, QTensor],
        taken: Collection[str],
        inputs: Values,
    ) -> None:
        self.job, self.inputs = job, inputs
        first = block.sources == tuple(node.name for node in model.placeholders)
        decoded = {name: torch.from_numpy(q.dequantize().copy()) for name, q in coded.items()}
        free = set(free_floats(model, tuple(coded))) & _reads(model, block, first) - set(taken)
        self.coded = {name: rounding(coded[name], model.tensors[name]) for name in block.layers}
        self.floats = {name: FloatTraining(model.tensors[name]) for name in sorted(free)}
        self.network = _part(model.with_tensors(decoded), block, (*self.coded, *self.floats), job.batch, first)
        self.start = [coded[name] for name in self.coded], [model.tensors[name] for name in self.floats]
        every = np.arange(len(inputs.small[0]))
        self.target = _all(job, _part(job.original, block, (), job.batch, first), inputs.original, (), every)

    def values(self, coded: Mapping[str, QTensor], floats: Mapping[str, Tensor]) -> Values:
        """Values where the block ends, with these tensors in place of those that it came with."""
        kept = dict(zip(self.floats, self.start[1], strict=True))
        weights = self._decoded([coded[name] for name in self.coded], [{**kept, **floats}[n] for n in self.floats])
        every = np.arange(len(self.inputs.small[0]))
        return Values(tuple(_all(self.job, self.network, self.inputs.small, weights, every)), tuple(self.target))

    def learned(self, total: int, seed: int, told: Callable[[int], Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Trains the block: its codes by name, as `describe` and tensors, and its float vectors."""
        before = self._error(self._decoded(*self.start), self.job.held)
        norm = max(self._error(self._decoded(*self.start), self.job.learn), 1e-30)
        found = groups({**self.coded, **self.floats})
        optimizer = torch.optim.Adam([{"params": list(p.values()), "lr": RATES[key]} for key, p in found.items()])
        for done in range(total):
            for group, key in zip(optimizer.param_groups, found, strict=True):
                if key != "rounding":
                    group["lr"] = RATES[key] * (1 + math.cos(math.pi * done / total)) / 2
            optimizer.zero_grad()
            torch.autograd.backward(self.loss(done, total, norm, seed))
            optimizer.step()
            told(done + 1)
        codes = [part.hard() for part in self.coded.values()]
        floats = [part.weight().detach() for part in self.floats.values()]
        if not self._error(self._decoded(codes, floats), self.job.held) < before:
            codes, floats = self.start
        stored = {
            name: (describe(q), {key: torch.from_numpy(array) for key, array in q.arrays().items()})
            for name, q in zip(self.coded, codes, strict=True)
        }
        return stored, dict(zip(self.floats, floats, strict=True))

    def _decoded(self, codes: Sequence[QTensor], floats: Sequence[Tensor]) -> list[Tensor]:
        return [*(torch.from_numpy(q.dequantize().copy()) for q in codes), *floats]

    def _error(self, weights: Sequence[Tensor], rows: Array) -> float:
        """Mean squared error of the block's outputs with these weights."""
        outputs = _all(self.job, self.network, self.inputs.small, weights, rows)
        gaps = [(out - want[rows]).double().square().mean() for out, want in zip(outputs, self.target, strict=True)]
        return float(torch.stack(gaps).sum())

    def loss(self, done: int, total: int, norm: float, seed: int) -> Tensor:
        """Step 4: what one batch loses, relative to `norm`."""
        rows = self.job.shuffled(done, seed)
        generator = torch.Generator().manual_seed(int(random(seed, done).integers(2**63)))
        mixed = [
            _mixed(small[rows], original[rows], generator)
            for small, original in zip(self.inputs.small, self.inputs.original, strict=True)
        ]
        parts: list[Part] = [*self.coded.values(), *self.floats.values()]
        outputs = self.network(*mixed, *(part.weight() for part in parts))
        gaps = [(out - want[rows]).square().mean() for out, want in zip(outputs, self.target, strict=True)]
        loss = torch.stack(gaps).sum() / norm
        warm = int(_WARM * total)
        if done < warm:
            return loss
        progress = (done - warm) / max(1, total - warm)
        beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
        shares = torch.cat([share(part).flatten() for part in self.coded.values()])
        return loss + STIFFNESS * regulariser(shares, beta).mean()


def _mixed(small: Tensor, original: Tensor, generator: torch.Generator) -> Tensor:
    if MIX == 0 or not small.is_floating_point():
        return small
    return torch.where(torch.rand(small.shape, generator=generator) < MIX, original, small)


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
    """Learns the rounding of a compressed network, block after block.

    Args:
        small: the compressed network; its model still holds the float weights.
        original: the network with the same values as `small.model` but for quantization: restructured and equalised
            alike, without int8 activations. Blocks are compared where both have a value of one name.
        inputs: calibration samples, [samples, ...] for each input, arrays or what an index turns into one.
        classes: outputs are logits over their last axis.
        encode_biases: integer biases of a model and its compressed weights.
        seed: of the order of the samples, of the mixed inputs and of which samples are held out.
        steps: batches for each block, STEPS where neither this nor seconds are given.
        seconds: time to spend instead, which becomes a number of steps by timing some.
        step: called with the steps done, over all blocks, and their total.
        state: file to write the learned blocks to, and to resume from where it is there. It is refused where it
            belongs to another network, samples or request, and removed at the end.

    Raises:
        DataError: the samples do not fit.
        ModelError: the original has batch norms that the compressed network has folded.
        UsageError: the request contradicts itself.
        ArtifactError: the state is damaged or belongs to something else.
    """
    job = task(small, original, inputs, BATCH, classes, encode_biases, seed)
    _check(small.model, original)
    coded, model = job.coded(), small.model
    plan = blocks(model, original, {name for name, q in coded.items() if trainable(q)}, job.batch)
    job, notes = _within_memory(job, plan)
    saved = State(state, identity(small, original, inputs, "reconstruct", classes, seed, steps, seconds))
    found = saved.load() or {"blocks": []}
    total = found.get("total") or planned(steps, seconds, STEPS, _rehearsal(job, plan, seed))
    values = Values(job.take(np.arange(len(job.inputs[0]))), job.take(np.arange(len(job.inputs[0]))))
    changed: dict[str, Tensor] = {}
    for i, block in enumerate(plan):
        training = BlockTraining(job, block, model, coded, changed, values)
        if i == len(found["blocks"]):
            told = lambda done, before=i * total: step(before + done, total * len(plan))  # noqa: E731
            found["blocks"].append(training.learned(total, seed, told))
            saved.save({**found, "total": total})
        codes, floats = found["blocks"][i]
        coded |= {name: rebuild(facts, _arrays(parts)) for name, (facts, parts) in codes.items()}
        changed |= floats
        model = model.with_tensors(floats)
        values = training.values(coded, floats)
    tuned = job.finish(coded, changed, total, total * len(plan), notes)
    saved.remove()
    return tuned


def _arrays(parts: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in parts.items()}


def _check(model: Model, original: Model) -> None:
    def norms(graph: fx.Graph) -> int:
        return sum(node.target is aten.batch_norm.default for node in graph.nodes)

    if norms(original.graph) > norms(model.graph):
        raise ModelError("the original has batch norms that the compressed network has folded; fold them in both")


def _within_memory(job: Task, plan: Sequence[Block]) -> tuple[Task, tuple[str, ...]]:
    """The task with so few samples to learn from that what is kept of them fits in MOST_BYTES."""
    elements = {node.name: size for node, size in sizes(job.small.model, job.batch)[0].items()}
    ends = [sum(elements[name] for name in (*block.sources, *block.results)) for block in plan]
    most = max(1, int(MOST_BYTES / (8 * max(ends, default=1) / job.batch)))
    count = len(job.inputs[0])
    if count <= most:
        return job, ()
    learn, held = job.learn[: max(1, most - len(job.held))], job.held
    kept = np.concatenate([learn, held])
    fewer = replace(
        job,
        inputs=tuple(np.asarray(array[kept]) for array in job.inputs),
        learn=np.arange(len(learn)),
        held=np.arange(len(learn), len(kept)),
    )
    return fewer, (f"learned from {len(learn)} of {len(job.learn)} samples, whose values fill {MOST_BYTES} bytes",)


def _rehearsal(job: Task, plan: Sequence[Block], seed: int) -> Callable[[], None]:
    """One step of every block, with nothing learned."""
    rows = np.resize(job.learn, job.batch)
    few = replace(job, inputs=job.take(rows), learn=np.arange(job.batch), held=np.arange(job.batch))
    made: list[BlockTraining] = []

    def one() -> None:
        if not made:
            values = Values(few.inputs, few.inputs)
            for block in plan:
                made.append(BlockTraining(few, block, job.small.model, job.coded(), (), values))
                values = made[-1].values(job.coded(), {})
        for training in made:
            torch.autograd.backward(training.loss(0, 1, 1.0, seed))

    return one


def _part(model: Model, block: Block, trained: Sequence[str], batch: int, first: bool) -> Network:
    """A block of a network that has it, as a function for calls of `batch` samples."""
    nodes, (_, numbers) = model.nodes(), sizes(model, batch)
    sources = model.placeholders if first else [nodes[name] for name in block.sources]
    results = [nodes[name] for name in block.results] or None
    return training_network(model, trained, sources, results, numbers)


def _reads(model: Model, block: Block, first: bool) -> set[str]:
    """Names of the tensors that the block reads."""
    nodes = model.nodes()
    sources = model.placeholders if first else [nodes[name] for name in block.sources]
    results = [nodes[name] for name in block.results] or outputs_of(model)
    return {str(node.target) for node in between(model.graph, sources, results) if node.op == "get_attr"}


def _all(job: Task, network: Network, inputs: Sequence[Tensor], weights: Sequence[Tensor], rows: Array) -> list[Tensor]:
    """Outputs of a block for some samples, in calls of the task's batch."""
    parts: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for start in range(0, len(rows), job.batch):
            part = rows[start : start + job.batch]
            whole = np.concatenate([part, np.repeat(part[-1:], job.batch - len(part))])
            outputs = network(*(values[whole] for values in inputs), *weights)
            parts.append(tuple(value[: len(part)] for value in outputs))
    return [torch.cat(column) for column in zip(*parts, strict=True)]
