"""Around the search of one artefact: what a run shares, what may be chosen, and how a plan becomes a file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octoc import __version__
from octoc.apply import Encoder, encode_biases, encode_weights, restructure
from octoc.compressed import Compressed
from octoc.data import Dataset
from octoc.device import Device
from octoc.errors import UsageError
from octoc.evaluate import model_calls, open_session, predict, predict_model
from octoc.export import Exporter, exporter
from octoc.memory import model_limit, peak_activation_bytes
from octoc.metrics import Metric
from octoc.model import Layer, Model, operation
from octoc.options import Asked, Options
from octoc.placement import choices, offers, offers_of, runs_only_int8, sparse_offers
from octoc.profile import Profile, divergence, measure
from octoc.progress import Clock
from octoc.proof import Array, artifact_bytes
from octoc.qtensor import QTensor, Scheme
from octoc.quantize.activations import calibrate, integer_layers
from octoc.quantize.bias import channel_means, corrections
from octoc.quantize.equalize import exponents
from octoc.recipe import CorrectBiases, Decision, Encode, Equalize, QuantizeActivations, Recipe
from octoc.report import Note
from octoc.search import Limits, Plan, Search, Tools

CALIBRATION_BATCH = 32
PROFILE_SAMPLES = 64
FEW_SAMPLES = 16  # where the network fixes its batch, and each call measures all layers anew
SAMPLES = 64  # enough for the mean of a channel, few enough to keep every value of one evaluation


@dataclass(frozen=True)
class Job:
    """One artefact to make."""

    device: Device
    format: str


@dataclass
class Shared:
    """What all artefacts of a run share: measured once, converted and encoded once."""

    original: Model
    fingerprint: str
    shaped: Model
    structure: tuple[Decision, ...]
    data: Dataset
    calibration: Dataset
    metric: Metric
    target: Array | None
    quality: float
    outputs: Sequence[Array]
    options: Options
    clock: Clock
    bases: dict[tuple[str, str], Any] = field(default_factory=dict)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    calibrated: tuple[Equalize | QuantizeActivations, ...] = ()
    measured: Profile | None = None
    answers: list[tuple[torch.Tensor, ...]] | None = None

    def activated(self, integer: bool) -> tuple[Model, tuple[Equalize | QuantizeActivations, ...]]:
        """The network with int8 activations where they are wanted or the recipe has them, and the steps to it."""
        recipe = self.options.recipe
        if recipe is not None:
            steps = tuple(s for s in recipe.steps if isinstance(s, Equalize | QuantizeActivations))
        elif integer:
            steps = self.calibrated = self.calibrated or self._calibrate()
        else:
            steps = ()
        return restructure(self.shaped, steps), steps

    def _calibrate(self) -> tuple[Equalize | QuantizeActivations, ...]:
        with self.clock.stage("calibrate", "Equalising channels", len(self.calibration)):
            powers = exponents(self.shaped, self._batches())
        steps = (Equalize(powers),) if powers else ()
        with self.clock.stage("calibrate", "Calibrating activations", len(self.calibration)):
            ranges = calibrate(restructure(self.shaped, steps), self._batches())
        return (*steps, QuantizeActivations({name: (r.scale, r.zero_point) for name, r in ranges.items()}))

    def profile(self) -> Profile:
        """Every weight's sensitivity, measured when the first artefact needs it."""
        if self.measured is None:
            shaped, classes = self.shaped, self.classes
            samples = model_calls(
                shaped, self.calibration.inputs, PROFILE_SAMPLES if shaped.dynamic_batch else FEW_SAMPLES
            )
            advance = self.clock.progress.advance
            with self.clock.stage(
                "profile", "Measuring every layer's sensitivity", len(shaped.layers()) * len(samples)
            ):
                found = [measure(shaped, call, classes, self.options.seed, advance) for call in samples]
            mean = {name: sum(p.sensitivity[name] for p in found) / len(found) for name in found[0].sensitivity}
            self.measured = replace(found[0], sensitivity=mean, samples=sum(p.samples for p in found))
        return self.measured

    @property
    def classes(self) -> bool:
        """Whether outputs are compared as distributions over classes."""
        return self.metric.name in ("top1", "top5", "loss")

    def references(self) -> list[tuple[torch.Tensor, ...]]:
        """The uncompressed network's outputs for `samples()`."""
        if self.answers is None:
            self.answers = [self.shaped.run(*sample) for sample in self.samples()]
        return self.answers

    def samples(self) -> list[tuple[torch.Tensor, ...]]:
        """Calibration samples for what is measured in a few calls, as the network takes them."""
        return model_calls(self.shaped, self.calibration.inputs, SAMPLES)

    def _batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """All calibration samples, a few at a time, as the network takes them."""
        for arrays, _ in self.calibration.batches(CALIBRATION_BATCH):
            yield from model_calls(self.shaped, arrays, CALIBRATION_BATCH)
            self.clock.progress.advance(len(arrays[0]))


class Workbench:
    """Everything around the search of one artefact."""

    def __init__(self, job: Job, shared: Shared, work: Path) -> None:
        self.job, self.shared, self.options, self.clock = job, shared, shared.options, shared.clock
        self.writer: Exporter = exporter(job.format)
        self.wants_int8 = shared.options.activations == "int8" or (
            shared.options.activations is None and runs_only_int8(job.device, job.format)
        )
        self.model, self.activation_steps = shared.activated(self.wants_int8)
        self._means: dict[str, torch.Tensor] | None = None
        self.integer = any(isinstance(step, QuantizeActivations) for step in self.activation_steps)
        self.folder = work / job.device.id / job.format
        self.base = self._converted()
        self.dtype: str = getattr(self.base, "compute", "float32")
        self.layers = self.model.layers()
        self.limit = model_limit(
            job.device, peak_activation_bytes(shared.shaped, 1 if self.integer else np.dtype(self.dtype).itemsize)
        )
        self.plans, self.limits = self._goal()
        free = self.plans or self.options.asked.names_codes or self.options.weights is not None
        self.asked = self.options.asked if free else Asked("int8", None, None)
        self.sensitivity = shared.profile().sensitivity if self.plans else {}
        self.integers = set(integer_layers(self.model))
        self.encoder = shared.encoders.setdefault("int8" if self.integer else "float", self._encoder())
        self.skipped: list[Note] = []
        self.schemes = self._schemes()
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

    def _schemes(self) -> dict[str, list[Scheme]]:
        """What may be chosen for each weight; weights without any choice are skipped with the reason."""
        codable = getattr(self.base, "names", None)
        found: dict[str, list[Scheme]] = {}
        for layer in self.layers:
            if codable is not None and layer.name not in codable:
                self.skipped.append(Note(layer.name, f"the converter to {self.job.format} transformed this weight"))
                continue
            schemes = (
                self._offered(layer) if self.options.recipe is None else self._replayed(layer, self.options.recipe)
            )
            if schemes:
                found[layer.name] = schemes
        return found

    def _offered(self, layer: Layer) -> list[Scheme]:
        """Encodings that the device runs, the exporter accepts and the user asked for."""
        nodes = self.model.nodes()
        kinds = [operation(nodes[name], self.model.tensors) for name in layer.nodes]
        offered = offers(self.job.device, self.job.format)
        if self.options.sparsity is not None:
            offered += sparse_offers(self.job.device, self.job.format)
        good, refused = choices(layer, kinds, offered, self.writer, layer.name in self.integers)
        if not good and layer.name in self.integers:
            why = next(iter(refused.values()), "")
            self.skipped.append(Note(layer.name, f"computes in floats: {why}"))
            good, refused = choices(layer, kinds, offered, self.writer, False)
        wanted = [scheme for scheme in good if self.asked.means(scheme)]
        if wanted:
            return _worth_pricing(wanted) or wanted
        if not good:
            why = next(iter(refused.values()), f"{self.job.device.id} runs no weight encoding in {self.job.format}")
            self.skipped.append(Note(layer.name, f"left in floats: {why}"))
            return []
        why = next(
            (r for text, r in refused.items() if self.asked.means(Scheme.parse(text))), "not offered by the device"
        )
        bits = self.asked.bits or 8
        instead = min(good, key=lambda scheme: (scheme.bits != bits, scheme.granularity != "channel", -scheme.bits))
        self.skipped.append(Note(layer.name, f"{self.asked}: {why}; stored as {instead}"))
        return [instead]

    def _replayed(self, layer: Layer, recipe: Recipe) -> list[Scheme]:
        """The recipe's encoding, which the exporter must accept; what the device prefers is not asked again."""
        for step in recipe.of(Encode):
            if step.tensor == layer.name:
                scheme = Scheme.parse(step.scheme)
                reason = scheme.unfit(layer.shape, layer.axis)
                reason = reason or self.writer.accepts(scheme, layer, layer.name in self.integers)
                if reason is not None:
                    raise UsageError(
                        f"the recipe stores {layer.name} as {scheme}, and {self.job.format} cannot: {reason}"
                    )
                return [scheme]
        self.skipped.append(Note(layer.name, "the recipe leaves it in floats"))
        return []

    def remarks(self, plan: Plan) -> list[Note]:
        """What a plan's encodings cost beside bytes: an accelerator that does not run them, zeros that save nothing."""
        runners = self.job.device.runners(self.job.format)
        native = {
            offer.scheme
            for offer in (*offers_of(self.job.device, runners[:1]), *sparse_offers(self.job.device, self.job.format))
        }
        notes = []
        for name, scheme in (choice.key for choice in plan):
            if runners and scheme not in native:
                notes.append(
                    Note(name, f"{runners[0].name} does not run {scheme}; another processor of the device does")
                )
        if self.options.sparsity is not None and not any(choice.key[1].sparse for choice in plan):
            notes.append(
                Note("pruning", f"no weight is stored sparse, so that zeros save no bytes in {self.job.format} here")
            )
        return notes

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
        coded = encode_weights(self.model, self.encodes(plan), self._encode)
        shifts = self._shifts(coded) if correct else {}
        model = restructure(self.model, [CorrectBiases(shifts)])
        return Compressed(model, {**coded, **encode_biases(model, coded)}, shifts)

    def _shifts(self, coded: dict[str, QTensor]) -> dict[str, tuple[float, ...]]:
        """What to add to each bias: the recipe's numbers, or measured on calibration samples."""
        recipe = self.options.recipe
        if recipe is not None:
            return {name: shift for step in recipe.of(CorrectBiases) for name, shift in step.shifts.items()}
        if not self.integer and all(tensor.bits >= 8 for tensor in coded.values()):
            return {}  # 8-bit weights alone move no mean that float rounding would not
        samples = self.shared.samples()
        if self._means is None:
            equalized = [step for step in self.activation_steps if isinstance(step, Equalize)]
            self._means = channel_means(restructure(self.shared.shaped, equalized), samples)
        shifts = corrections(self._means, Compressed(self.model, coded).decoded, samples)
        return {name: tuple(map(float, shift)) for name, shift in shifts.items()}

    def _encode(self, layer: Layer, scheme: Scheme, dtype: str) -> QTensor:
        return self.encoder(layer, scheme, dtype)

    def encodes(self, plan: Plan) -> list[Encode]:
        axes = {layer.name: layer.axis for layer in self.layers}
        return [Encode(name, str(scheme), self.dtype, axes[name]) for name, scheme in (c.key for c in plan)]

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
        steps = (*self.shared.structure, *self.activation_steps, *corrected, *self.encodes(plan))
        return Recipe(
            self.shared.fingerprint, self.job.format, self.job.device.id, self.options.seed, steps, __version__
        )


def _worth_pricing(schemes: list[Scheme]) -> list[Scheme]:
    """What the planner looks at: without the palettes that take seconds a layer to compute and win nothing.

    Where int8 is on offer an 8-bit palette takes as many bytes for hardly less error, and a 6-bit palette a group of
    channels gains less than its tables cost.
    """
    if not any(scheme.kind == "affine" and scheme.bits == 8 for scheme in schemes):
        return schemes
    return [s for s in schemes if s.kind != "palette" or s.bits < 6 or (s.bits == 6 and s.granularity == "tensor")]
