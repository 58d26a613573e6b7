"""Around the search of one artefact: the network made ready, and how a plan becomes a file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octoc import __version__
from octoc.apply import Encoder, encode_biases, encode_weights, recover, restructure
from octoc.compressed import Compressed
from octoc.evaluate import open_session, predict, predict_model
from octoc.export import Exporter, exporter
from octoc.memory import model_limit, peak_activation_bytes
from octoc.model import Model
from octoc.offering import Offering
from octoc.options import Asked
from octoc.placement import runs_only_int8
from octoc.profile import divergence
from octoc.proof import Array, artifact_bytes
from octoc.qtensor import QTensor, Scheme
from octoc.quantize import encoder as method_named
from octoc.quantize.activations import integer_layers
from octoc.quantize.bias import channel_means, corrections
from octoc.recipe import CorrectBiases, Encode, Equalize, QuantizeActivations, Recipe, Recover
from octoc.recover import Tuned
from octoc.recover.state import identity
from octoc.report import Note
from octoc.search import Limits, Plan, Search, Tools
from octoc.sequential import encode_sequentially, needs_hessian
from octoc.shared import Job, Shared

Shifts = dict[str, tuple[float, ...]]

_COARSE = 4  # bits of a code; above, what GPTQ wins is less than float16 rounding costs


class Workbench:
    """Everything around the search of one artefact."""

    def __init__(self, job: Job, shared: Shared, work: Path) -> None:
        self.job, self.shared, self.options, self.clock = job, shared, shared.options, shared.clock
        self.writer: Exporter = exporter(job.format)
        self.wants_int8 = shared.options.activations in ("int8", "int8-all") or (
            shared.options.activations is None and runs_only_int8(job.device, job.format)
        )
        self.model, self.activation_steps = shared.activated(self.wants_int8)
        self._means: dict[str, torch.Tensor] | None = None
        self.rounded: tuple[Note, ...] = ()
        self.training: Recover | None = None
        self.integer = any(isinstance(step, QuantizeActivations) for step in self.activation_steps)
        self.folder = work / job.device.id / job.format
        self.base = self._converted()
        self.dtype: str = getattr(self.base, "compute", "float32")
        self.layers = self.model.layers()
        self.limit = model_limit(
            job.device, peak_activation_bytes(shared.shaped, 1 if self.integer else np.dtype(self.dtype).itemsize)
        )
        self.plans, self.limits = self._goal()
        self.sensitivity = shared.profile().sensitivity if self.plans else {}
        self.encoder = shared.encoders.setdefault("int8" if self.integer else "float", self._encoder())
        self.offering = self._offering()
        self.schemes = self.offering.schemes(self.options.recipe)
        self.search = self._search()

    def _encoder(self) -> Encoder:
        """Computes codes, or takes them from the proof beside the recipe that is replayed."""
        proof = self.options.proof
        return Encoder(self.model, None if proof is None else proof.qtensors)

    def _converted(self) -> Any:
        key = (self.job.format, "int8" if self.integer else "float")
        if key not in self.shared.bases:
            with self.clock.stage("converters", f"Converting to {self.job.format}"):
                self.shared.bases[key] = self.writer.convert(self.model)
        return self.shared.bases[key]

    def _goal(self) -> tuple[bool, Limits]:
        """Whether the planner weighs encodings, and within what: the user's limits or the device's."""
        options, limit = self.options, self.limit
        crowded = limit is not None and sum(layer.size for layer in self.layers) > limit.nbytes
        goals = (options.max_size, options.max_drop, options.avg_bits)
        asked = any(goal is not None for goal in goals) or options.weights == "auto"
        plans = options.recipe is None and (asked or (crowded and options.weights is None))
        held = [size for size in (options.max_size, limit.nbytes if limit and plans else None) if size is not None]
        return plans, Limits(min(held, default=None), options.avg_bits)

    def _offering(self) -> Offering:
        free = self.plans or self.options.asked.names_codes or self.options.weights is not None
        return Offering(
            self.job.device,
            self.job.format,
            self.writer,
            self.model,
            getattr(self.base, "names", None),
            set(integer_layers(self.model)),
            self.options.asked if free else Asked("int8", None, None),
            self.options.sparsity is not None,
        )

    def _search(self) -> Search:
        goal = self.options.max_drop
        worse = None
        if goal is not None:
            worse = lambda quality: not goal.holds(quality, self.shared.quality, self.shared.metric)  # noqa: E731
        tools = Tools(
            encode=lambda layer, scheme: self.encoder(layer, scheme, self.dtype),
            assemble=self.assemble,
            write=self.write,
            quality=self.model_quality,
            count=self.file_quality,
            worse=worse,
            divergence=self.divergence if self.plans else None,
        )
        chosen = [layer for layer in self.layers if layer.name in self.schemes]
        weights = {layer.name: self.model.tensors[layer.name].detach().numpy() for layer in chosen}
        with self.clock.stage("encode", "Pricing encodings", len(chosen)):
            return Search(chosen, self.schemes, self.sensitivity, weights, tools)

    def assemble(self, plan: Plan, correct: bool = True) -> Compressed:
        """The compressed network of a plan, its biases corrected where its codes are coarse.

        Args:
            plan: one choice a layer.
            correct: False where only the size of the file is wanted.
        """
        steps = self.encodes(plan, correct)
        if correct and self.options.proof is None and any(map(needs_hessian, steps)):
            coded, found = self._sequential(steps)
        else:
            coded, found = encode_weights(self.model, steps, self.encoder), None
        shifts = self._shifts(coded, found) if correct else {}
        model = restructure(self.model, [CorrectBiases(shifts), *self._trained()])
        return Compressed(model, {**coded, **encode_biases(model, coded)}, shifts)

    def _trained(self) -> tuple[Recover, ...]:
        """Training that is not done again, because the proof beside the recipe holds its codes."""
        recipe = self.options.recipe
        return recipe.of(Recover) if recipe is not None and self.options.proof is not None else ()

    def recovered(self, small: Compressed, out: Path) -> Tuned | None:
        """The network after training towards the original's outputs, None where none is asked for.

        Args:
            small: the compressed network.
            out: where the state of the training is kept, for a run that is broken off to be resumed by the next.
        """
        recipe = self.options.recipe
        asked = None if recipe is None else next(iter(recipe.of(Recover)), None)
        if asked is not None and self.options.proof is not None:
            self.training = asked
            return None
        if asked is None and self.options.recover is None:
            return None
        seconds, steps = (self.options.recover, None) if asked is None else (None, asked.steps)
        done = 0

        def step(current: int, total: int) -> None:
            nonlocal done
            percent = 100 * current // max(total, 1)
            self.clock.progress.advance(percent - done)
            done = percent

        inputs, original = self.shared.calibration.inputs, self._floats()
        # Block by block where convolutions make blocks; few samples teach more there than through the whole network.
        convolutions = any(layer.kind in ("conv", "depthwise") for layer in self.layers)
        method = asked.method if asked is not None else "reconstruct" if convolutions else "distill"
        request = (method, self.shared.classes, self.options.seed, seconds, steps)
        stem = f".{self.job.device.id}-{self.job.format}"
        state = out / f"{stem}-{identity(small, original, inputs, *request)[:16]}.recovery"
        with self.clock.stage("recover", "Training towards the original", 100):
            tuned, self.training = recover(
                small,
                original,
                inputs,
                method,
                classes=self.shared.classes,
                seed=self.options.seed,
                steps=steps,
                seconds=seconds,
                step=step,
                state=state,
            )
        for stale in out.glob(f"{stem}-*.recovery"):  # of runs that were broken off and never resumed
            stale.unlink()
        return tuned

    def _shifts(self, coded: dict[str, QTensor], found: Shifts | None) -> Shifts:
        """What to add to each bias: the recipe's numbers, or measured on calibration samples.

        Args:
            coded: the compressed weights.
            found: shifts that came with them, where activations are floats.
        """
        recipe = self.options.recipe
        if recipe is not None:
            return {name: shift for step in recipe.of(CorrectBiases) for name, shift in step.shifts.items()}
        if found is not None and not self.integer:
            return found
        if not self.integer and all(tensor.bits >= 8 for tensor in coded.values()):
            return {}  # 8-bit weights alone move no mean that float rounding would not
        samples = self.shared.samples()
        if self._means is None:
            self._means = channel_means(self._floats(), samples)
        shifts = corrections(self._means, Compressed(self.model, coded).decoded, samples)
        return {name: tuple(map(float, shift)) for name, shift in shifts.items()}

    def _sequential(self, steps: list[Encode]) -> tuple[dict[str, QTensor], Shifts]:
        """Codes by methods that look at what the layers before have left of their inputs, and shifts of biases."""
        done, key = self.shared.sequential, (self.integer, tuple(steps))
        if key not in done:
            with self.clock.stage("encode", "Encoding layer after layer", len(steps)):
                done[key] = encode_sequentially(self._floats(), steps, self.encoder, self.shared.calls())
        small, self.rounded = done[key]
        return dict(small.qtensors), dict(small.shifts)

    def _floats(self) -> Model:
        """The network whose weights are encoded, with float activations."""
        return restructure(self.shared.shaped, [step for step in self.activation_steps if isinstance(step, Equalize)])

    def encodes(self, plan: Plan, chosen: bool = True) -> list[Encode]:
        """The decisions of a plan.

        Args:
            plan: one choice a layer.
            chosen: by the methods of the options; otherwise by the usual, which are quick and take as many bytes.
        """
        axes = {layer.name: layer.axis for layer in self.layers}
        return [
            Encode(name, str(scheme), self.dtype, axes[name], self._method(name, scheme) if chosen else None)
            for name, scheme in (choice.key for choice in plan)
        ]

    def other_methods(self, plan: Plan) -> list[Note]:
        """Weights that the user's method does not encode, because it makes no such codes."""
        method = self.options.method
        if method is None:
            return []
        kinds = method_named(method).ENCODES
        return [
            Note(name, f"encoded by the usual method: {method} makes no {scheme}")
            for name, scheme in (choice.key for choice in plan)
            if scheme.kind not in kinds
        ]

    def _method(self, name: str, scheme: Scheme) -> str | None:
        """The recipe's method, the user's where it makes such codes, GPTQ where codes are coarse, or the usual."""
        if self.options.recipe is not None:
            return next((step.method for step in self.options.recipe.of(Encode) if step.tensor == name), None)
        if self.options.method is not None:
            return self.options.method if scheme.kind in method_named(self.options.method).ENCODES else None
        coarse = scheme.bits <= _COARSE and scheme.kind in method_named("gptq").ENCODES and not scheme.sparse
        return "gptq" if coarse else None

    def write(self, small: Compressed) -> tuple[Path, int]:
        path = self.folder / self.writer.FILE
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        with self.clock.stage("write", f"Writing {self.job.format}"):
            self.writer.write(self.base, small, path)
        return path, artifact_bytes(path)

    def divergence(self, small: Compressed) -> float:
        """How far a compressed network's outputs are from the original's on calibration samples."""
        classes = self.shared.classes
        samples = self.shared.samples()
        references = self.shared.references()
        found = [small.decoded.run(*sample) for sample in samples]
        each = [divergence(r, f, classes) for r, f in zip(references, found, strict=True)]
        return sum(each) / len(each)

    def model_quality(self, small: Compressed) -> float:
        data = self.shared.data
        with self.clock.stage("evaluate", "Counting a plan", len(data)):
            outputs = predict_model(small.decoded, data.inputs, self.clock.progress.advance)
        return self.shared.metric(outputs[0], self.shared.target)

    def file_quality(self, path: Path) -> float:
        self.outputs = self.run_file(path)
        return self.shared.metric(self.outputs[0], self.shared.target)

    def run_file(self, path: Path) -> list[Array]:
        data = self.shared.data
        what = f"Counting {self.job.device.id} {self.job.format}"
        with self.clock.stage("run", what, len(data)):
            return predict(open_session(self.job.format, path), data.inputs, self.clock.progress.advance)

    def recipe(self, plan: Plan, small: Compressed) -> Recipe:
        """The decisions that made a network of this plan."""
        corrected = (CorrectBiases(small.shifts),) if small.shifts else ()
        trained = () if self.training is None else (self.training,)
        steps = (*self.shared.structure, *self.activation_steps, *corrected, *self.encodes(plan), *trained)
        return Recipe(
            self.shared.fingerprint, self.job.format, self.job.device.id, self.options.seed, steps, __version__
        )
