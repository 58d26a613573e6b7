"""What all artefacts of a run share: measured once, calibrated once, converted and encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from octoc.apply import Encoder, fingerprint, restructure
from octoc.compressed import Compressed
from octoc.data import Dataset
from octoc.device import Device
from octoc.evaluate import model_calls
from octoc.metrics import Metric
from octoc.model import Model
from octoc.options import Options
from octoc.profile import Profile, divergence, measure, read_profile
from octoc.progress import Clock
from octoc.proof import Array
from octoc.quantize.activations import calibrate
from octoc.quantize.equalize import exponents
from octoc.quantize.ranges import Range
from octoc.quantize.start import float_start, layers_of
from octoc.recipe import Decision, Equalize, QuantizeActivations
from octoc.report import Note

CALIBRATION_BATCH = 32
PROFILE_SAMPLES = 64
FEW_SAMPLES = 16  # where the network fixes its batch, and each call measures all layers anew
GATHERED = 512  # samples for the statistics that methods take of a layer's inputs
START_SAMPLES = 32  # what int8 costs is compared among few cuts, far apart
SAMPLES = 64  # enough for the mean of a channel, few enough to keep every value of one evaluation


@dataclass(frozen=True)
class Job:
    """One artefact to make."""

    device: Device
    format: str


@dataclass
class Shared:
    """See the module; `Options` and the network come in, the rest fills up on demand."""

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
    floats: bool  # a part of the network may compute in floats: every device can, and the user did not say int8-all
    bases: dict[tuple[str, str], Any] = field(default_factory=dict)
    encoders: dict[str, Encoder] = field(default_factory=dict)
    sequential: dict[Any, tuple[Compressed, tuple[Note, ...]]] = field(default_factory=dict)
    calibrated: tuple[Equalize | QuantizeActivations, ...] = ()
    spared: tuple[Note, ...] = ()
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
            model = restructure(self.shaped, steps)
            ranges = calibrate(model, self._batches())
        spared = self._spare(model, ranges)
        ranges = {name: found for name, found in ranges.items() if name not in spared}
        return (*steps, QuantizeActivations({name: (r.scale, r.zero_point) for name, r in ranges.items()}))

    def _spare(self, model: Model, ranges: Mapping[str, Range]) -> tuple[str, ...]:
        """Values of the network's start that stay in floats, of which the report says the layers."""
        if not self.floats:
            return ()
        with self.clock.stage("calibrate", "Looking for values that int8 costs most"):
            few = model_calls(self.shaped, self.calibration.inputs, START_SAMPLES)
            found = float_start(model, ranges, few, partial(divergence, classes=self.classes))
        why = "computes in floats: of all layers int8 would cost most there, and gain least"
        self.spared = tuple(Note(layer, why) for layer in layers_of(model, found))
        return found

    def profile(self) -> Profile:
        """Every weight's sensitivity, read from the user's file or measured when the first artefact needs it."""
        if self.measured is None and self.options.sensitivity is not None:
            kind = "kl" if self.classes else "relative"
            shaped = self.shaped
            self.measured = read_profile(self.options.sensitivity, fingerprint(shaped), shaped.layers(), kind)
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

    def measured_json(self) -> str | None:
        """The sensitivities for another run, None where this one needed none."""
        return None if self.measured is None else self.measured.to_json(fingerprint(self.shaped))

    @property
    def classes(self) -> bool:
        """Whether outputs are compared as distributions over classes."""
        return self.metric.name in ("top1", "top5", "loss")

    def references(self) -> list[tuple[torch.Tensor, ...]]:
        """The uncompressed network's outputs for `samples()`."""
        if self.answers is None:
            self.answers = [self.shaped.run(*sample) for sample in self.samples()]
        return self.answers

    def calls(self) -> list[tuple[torch.Tensor, ...]]:
        """Calibration samples for what is gathered call by call, as the network takes them."""
        found: list[tuple[torch.Tensor, ...]] = []
        for arrays, _ in self.calibration.batches(CALIBRATION_BATCH):
            found += model_calls(self.shaped, arrays, CALIBRATION_BATCH)
            if len(found) * CALIBRATION_BATCH >= GATHERED:
                break
        return found

    def samples(self) -> list[tuple[torch.Tensor, ...]]:
        """Calibration samples for what is measured in a few calls, as the network takes them."""
        return model_calls(self.shaped, self.calibration.inputs, SAMPLES)

    def _batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """All calibration samples, a few at a time, as the network takes them."""
        for arrays, _ in self.calibration.batches(CALIBRATION_BATCH):
            yield from model_calls(self.shaped, arrays, CALIBRATION_BATCH)
            self.clock.progress.advance(len(arrays[0]))
