"""One artefact of one device: calibrate, convert, search, verify, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from octoc import __version__
from octoc.apply import Encoder, encode_biases, encode_weights, restructure
from octoc.compressed import Compressed
from octoc.data import Dataset
from octoc.device import Device
from octoc.errors import UsageError
from octoc.evaluate import open_session, predict, predict_model
from octoc.export import Exporter, exporter
from octoc.metrics import Metric
from octoc.model import Layer, Model, operation
from octoc.placement import choices, fallbacks, offers, sparse_offers
from octoc.profile import Profile
from octoc.progress import Clock
from octoc.proof import NAME as PROOF
from octoc.proof import Array, artifact_bytes, artifact_sha256, prove, write_proof
from octoc.qtensor import QTensor, Scheme
from octoc.quantize.activations import calibrate, integer_layers
from octoc.quantize.bias import channel_means, corrections
from octoc.quantize.equalize import exponents
from octoc.recipe import CorrectBiases, Decision, Encode, Equalize, QuantizeActivations, Recipe
from octoc.report import ArtifactReport, Check, LayerLine, Note, Point
from octoc.search import Outcome, Plan, Search, Tools
from octoc.units import format_size
from octoc.verify import verify

if TYPE_CHECKING:
    from octoc.pipeline import Options

SAMPLES = 64  # enough for the mean of a channel, few enough to keep every value of one evaluation

# Largest difference between an artefact and the compressed network in torch, as a share of the largest output.
# Floats: rounding in another order. float16: 11 bits a value through the whole network. int8 activations: a value on
# the edge between two codes may fall either way, and one step moves what follows.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "int8": 0.15}


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
    profile: Profile | None
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
    activation_steps: tuple[Equalize | QuantizeActivations, ...] = ()

    def activated(self) -> tuple[Model, tuple[Equalize | QuantizeActivations, ...]]:
        """The network with int8 activations where they are asked for, and the steps that made it so."""
        recipe = self.options.recipe
        if recipe is not None:
            self.activation_steps = tuple(s for s in recipe.steps if isinstance(s, Equalize | QuantizeActivations))
        elif self.options.activations == "int8" and not self.activation_steps:
            self.activation_steps = self._calibrate()
        return restructure(self.shaped, self.activation_steps), self.activation_steps

    def _calibrate(self) -> tuple[Equalize | QuantizeActivations, ...]:
        size = 32 if self.shaped.dynamic_batch else self.shaped.inputs[0].shape[0]
        with self.clock.stage("calibrate", "Equalising channels", len(self.calibration)):
            powers = exponents(self.shaped, self._batches(size))
        steps = (Equalize(powers),) if powers else ()
        with self.clock.stage("calibrate", "Calibrating activations", len(self.calibration)):
            ranges = calibrate(restructure(self.shaped, steps), self._batches(size))
        return (*steps, QuantizeActivations({name: (r.scale, r.zero_point) for name, r in ranges.items()}))

    def samples(self) -> list[torch.Tensor]:
        """Calibration samples for what is measured in one call, one tensor an input."""
        count = SAMPLES if self.shaped.dynamic_batch else self.shaped.inputs[0].shape[0]
        return [torch.from_numpy(np.array(array[:count])) for array in self.calibration.inputs]

    def _batches(self, size: int) -> Any:
        for arrays, _ in self.calibration.batches(size):
            if self.shaped.dynamic_batch or len(arrays[0]) == size:
                yield tuple(torch.from_numpy(np.array(array)) for array in arrays)
            self.clock.progress.advance(len(arrays[0]))


class _Workbench:
    """Everything around the search of one artefact."""

    def __init__(self, job: Job, shared: Shared, work: Path) -> None:
        self.job, self.shared, self.options, self.clock = job, shared, shared.options, shared.clock
        self.writer: Exporter = exporter(job.format)
        self.model, self.activation_steps = shared.activated()
        self._means: dict[str, torch.Tensor] | None = None
        self.bias_steps: tuple[CorrectBiases, ...] = ()
        self.integer = any(isinstance(step, QuantizeActivations) for step in self.activation_steps)
        self.folder = work / job.device.id / job.format
        self.base = self._converted()
        self.dtype: str = getattr(self.base, "compute", "float32")
        self.layers = self.model.layers()
        self.encoder = shared.encoders.setdefault("int8" if self.integer else "float", Encoder(self.model))
        self.skipped: list[Note] = []
        self.schemes = self._schemes()
        self.search = self._search()

    def _converted(self) -> Any:
        key = (self.job.format, "int8" if self.integer else "float")
        if key not in self.shared.bases:
            with self.clock.stage("converters", f"Converting to {self.job.format}"):
                self.shared.bases[key] = self.writer.convert(self.model)
        return self.shared.bases[key]

    def _schemes(self) -> dict[str, list[Scheme]]:
        """What may be chosen for each weight; weights without any choice are skipped with the reason."""
        nodes = self.model.nodes()
        integers = set(integer_layers(self.model))
        sparse = self.options.sparsity is not None
        offered = offers(self.job.device, self.job.format)
        if sparse:
            offered += sparse_offers(self.job.device, self.job.format)
        codable = getattr(self.base, "names", None)
        found: dict[str, list[Scheme]] = {}
        for layer in self.layers:
            if codable is not None and layer.name not in codable:
                self.skipped.append(Note(layer.name, f"the converter to {self.job.format} transformed this weight"))
                continue
            kinds = [operation(nodes[name], self.model.tensors) for name in layer.nodes]
            good, refused = choices(layer, kinds, offered, self.writer, layer.name in integers)
            wanted = [scheme for scheme in _worth_pricing(good) if self._asked(scheme)]
            wanted = wanted or [scheme for scheme in good if self._asked(scheme)]
            if not wanted and good:
                wanted = [max(good, key=lambda s: s.bits)]
                why = next((r for s, r in refused.items() if self._asked(Scheme.parse(s))), "not offered by the device")
                self.skipped.append(Note(layer.name, f"{self._asked_text()}: {why}; stored as {wanted[0]}"))
            if wanted:
                found[layer.name] = wanted
            else:
                why = next(iter(refused.values()), f"{self.job.device.id} runs no weight encoding in {self.job.format}")
                self.skipped.append(Note(layer.name, f"left in floats: {why}"))
        return found

    def _asked_text(self) -> str:
        if self.options.weights is not None:
            return self.options.weights
        chosen = (self.options.max_size, self.options.max_drop, self.options.recipe)  # these say what is to be stored
        return "int8" if chosen == (None, None, None) else ""

    def _asked(self, scheme: Scheme) -> bool:
        """`int8` stands for every encoding that begins so; nothing asked for leaves the choice to the planner."""
        wanted = self._asked_text()
        text = str(scheme)
        return text == wanted or wanted in ("", "auto") or text.startswith(f"{wanted}-")

    def _search(self) -> Search:
        sensitivity = self.shared.profile.sensitivity if self.shared.profile else {}
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
        )
        chosen = [layer for layer in self.layers if layer.name in self.schemes]
        weights = {layer.name: self.model.tensors[layer.name].detach().numpy() for layer in chosen}
        with self.clock.stage("encode", "Pricing encodings", len(chosen)):
            return Search(chosen, self.schemes, sensitivity, weights, tools)

    def assemble(self, plan: Plan) -> Compressed:
        """The compressed network of a plan, its biases corrected where its codes are coarse."""
        coded = encode_weights(self.model, self.encodes(plan), self._encode)
        self.bias_steps = self._corrections(coded)
        model = restructure(self.model, self.bias_steps)
        return Compressed(model, {**coded, **encode_biases(model, coded)})

    def _corrections(self, coded: dict[str, QTensor]) -> tuple[CorrectBiases, ...]:
        recipe = self.options.recipe
        if recipe is not None:
            return recipe.of(CorrectBiases)
        if not self.integer and all(tensor.bits >= 8 for tensor in coded.values()):
            return ()  # 8-bit weights alone move no mean that float rounding would not
        samples = self.shared.samples()
        if self._means is None:
            equalized = [step for step in self.activation_steps if isinstance(step, Equalize)]
            self._means = channel_means(restructure(self.shared.shaped, equalized), samples)
        shifts = corrections(self._means, Compressed(self.model, coded).decoded, samples)
        return (CorrectBiases({name: tuple(map(float, shift)) for name, shift in shifts.items()}),)

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

    def recipe(self, plan: Plan) -> Recipe:
        steps = (*self.shared.structure, *self.activation_steps, *self.bias_steps, *self.encodes(plan))
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


def build(job: Job, shared: Shared, work: Path, out: Path) -> ArtifactReport:
    """Makes, verifies and publishes one artefact."""
    started = time.perf_counter()
    bench = _Workbench(job, shared, work)
    search, options = bench.search, shared.options
    if options.recipe is not None:
        outcome = _replay(bench)
    else:
        search.measure_overhead()
        outcome = search.run(options.max_size)
    with shared.clock.stage("verify", f"Verifying {job.device.id} {job.format}"):
        checks = _verify(bench, outcome)
    (bench.folder / "recipe.json").write_text(bench.recipe(outcome.plan).to_json())
    held = all(check.held for check in checks)
    target = out / job.device.id / (job.format if held else f"{job.format}.unverified")
    publish(bench.folder, target)
    path = (target / bench.writer.FILE).relative_to(out)
    report = _report(bench, outcome.plan, str(path), outcome.nbytes, outcome.quality, outcome.points, outcome.reachable)
    return _with(
        report, checks=tuple(checks), agreement=_agreement(bench), seconds={"total": time.perf_counter() - started}
    )


def plan_only(job: Job, shared: Shared, work: Path, out: Path) -> ArtifactReport:
    """What `build` would start from: the plan, its predicted size, and what is reachable."""
    bench = _Workbench(job, shared, work)
    search, options = bench.search, shared.options
    search.measure_overhead()
    budget = options.max_size if options.max_size is not None else search.reachable()[1]
    found = _planned(bench) if options.recipe else search.within(budget) or search.smallest()
    nbytes = sum(choice.nbytes for choice in found) + search.overhead
    return _report(bench, found, None, nbytes, None, [], search.reachable())


def _planned(bench: _Workbench) -> Plan:
    """The plan of the recipe that is to be replayed."""
    recipe = bench.options.recipe
    assert recipe is not None
    if recipe.model != bench.shared.fingerprint:
        raise UsageError("the recipe was made for another network: its fingerprint differs from this one's")
    known = {layer.name: i for i, layer in enumerate(bench.search.layers)}
    plan = bench.search.smallest()
    for step in recipe.of(Encode):
        if step.tensor not in known:
            raise UsageError(f"the recipe names the weight {step.tensor}, which the network lacks")
        at = known[step.tensor]
        options = [c for c in bench.search.choices[at] if str(c.key[1]) == step.scheme]
        if not options:
            raise UsageError(f"{bench.job.device.id} does not run {step.tensor} as {step.scheme} in {bench.job.format}")
        plan[at] = options[0]
    return plan


def _replay(bench: _Workbench) -> Outcome:
    """The plan of a recipe, without a search."""
    plan = _planned(bench)
    small = bench.assemble(plan)
    path, nbytes = bench.write(small)
    quality = bench.file_quality(path)
    chosen = Point(nbytes, sum(c.loss for c in plan), quality, "chosen")
    return Outcome(plan, small, path, nbytes, quality, [chosen], (nbytes, nbytes))


def _verify(bench: _Workbench, outcome: Outcome) -> list[Check]:
    """Writes the proof beside the artefact and checks the one against the other."""
    kind = "int8" if bench.integer else bench.dtype
    samples = [np.asarray(array[:16]) for array in bench.shared.calibration.inputs]
    digest = artifact_sha256(outcome.path)
    proof = prove(outcome.small, samples, bench.job.format, TOLERANCE[kind], bench.integer, digest)
    write_proof(proof, bench.folder / PROOF)
    return verify(outcome.path, proof)


def publish(finished: Path, target: Path) -> None:
    """Moves a finished folder to its place in one rename; an older one there is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = finished.parent / f"{finished.name}.old"
        target.rename(old)
        finished.rename(target)
        shutil.rmtree(old)
    else:
        finished.rename(target)


def _agreement(bench: _Workbench) -> float | None:
    ours, theirs = bench.outputs[0], bench.shared.outputs[0]
    if ours.ndim != 2 or ours.shape[1] < 2 or bench.shared.metric.name == "cosine":
        return None
    return 100.0 * float((ours.argmax(1) == theirs.argmax(1)).mean())


def _report(
    bench: _Workbench,
    plan: Plan,
    path: str | None,
    nbytes: int,
    quality: float | None,
    points: list[Point],
    reachable: tuple[int, int],
) -> ArtifactReport:
    from octoc.plan import front

    shared, search = bench.shared, bench.search
    sign = 1 if shared.metric.higher_is_better else -1
    drop = None if quality is None else sign * (shared.quality - quality)
    hull = [Point(b + search.overhead, p, None, "front") for b, p in front(search.choices)]
    dtype = "int8" if bench.integer else bench.dtype
    return ArtifactReport(
        device=bench.job.device.id,
        format=bench.job.format,
        path=path,
        nbytes=nbytes,
        quality=quality,
        drop=drop,
        agreement=None,
        goals=tuple(_goals(bench, nbytes, quality, reachable)),
        checks=(),
        layers=tuple(_lines(bench, plan)),
        front=tuple(_thin(hull) + points),
        reachable=reachable,
        skipped=tuple(bench.skipped),
        fallbacks=fallbacks(bench.shared.shaped, bench.job.device, bench.job.format, dtype),
        notes=tuple(getattr(bench.base, "notes", ())),
        activations="int8" if bench.integer else "float",
    )


def _with(report: ArtifactReport, **changes: Any) -> ArtifactReport:
    from dataclasses import replace

    return replace(report, **changes)


def _thin(hull: list[Point], most: int = 200) -> list[Point]:
    step = -(-len(hull) // most) or 1
    return hull[::step] if hull[-1:] == hull[::step][-1:] else [*hull[::step], hull[-1]]


def _goals(bench: _Workbench, nbytes: int, quality: float | None, reachable: tuple[int, int]) -> list[Check]:
    goals = []
    options, shared = bench.options, bench.shared
    if options.max_size is not None:
        detail = f"{format_size(nbytes)} ({nbytes} B) of {format_size(options.max_size)} allowed"
        if nbytes > options.max_size:
            detail += f"; the smallest reachable here is {reachable[0]} B"
        goals.append(Check("size", nbytes <= options.max_size, detail, float(options.max_size)))
    if options.max_drop is not None and quality is not None:
        limit = options.max_drop.limit(shared.quality, shared.metric)
        held = options.max_drop.holds(quality, shared.quality, shared.metric)
        unit = shared.metric.unit
        detail = (
            f"{shared.metric.name} {quality:.4g}{unit}, at {'least' if shared.metric.higher_is_better else 'most'} "
        )
        goals.append(
            Check("drop", held, detail + f"{limit:.4g}{unit} asked for, original {shared.quality:.4g}{unit}", limit)
        )
    return goals


def _lines(bench: _Workbench, plan: Plan) -> list[LayerLine]:
    chosen = {choice.key[0]: choice for choice in plan}
    sensitivity = bench.shared.profile.sensitivity if bench.shared.profile else {}
    lines = []
    for layer in bench.layers:
        choice = chosen.get(layer.name)
        scheme, nbytes, error = "float32", 4 * layer.size, 0.0
        if choice is not None:
            scheme, nbytes = str(choice.key[1]), choice.nbytes
            weight = bench.model.tensors[layer.name].detach().numpy().astype(np.float64)
            off = weight - bench.encoder(layer, choice.key[1], bench.dtype).dequantize()
            error = float(np.linalg.norm(off) / max(float(np.linalg.norm(weight)), 1e-30))
        measured = sensitivity.get(layer.name)
        bits = 8 * nbytes / layer.size
        lines.append(LayerLine(layer.name, layer.kind, layer.shape, layer.macs, scheme, bits, nbytes, measured, error))
    return lines
