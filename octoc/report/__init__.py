"""`Report`: what was done, measured, verified and skipped, as plain data. Every view reads this and nothing else.

`report.json` is this structure as it stands, one JSON object; the dataclasses below are its schema. Sizes are bytes
(1 kB = 1000 bytes), times seconds, quality in the metric's unit.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from octoc.errors import ArtifactError


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Args:
        name: "codes", "outputs", "integer operations", "size", "drop" ...
        held: the outcome.
        detail: one line with the numbers.
        limit: for the pictures: bytes that the goal "size" allows, quality that the goal "drop" asks for; else None.
    """

    name: str
    held: bool
    detail: str
    limit: float | None = None


@dataclass(frozen=True)
class LayerLine:
    """One weight and what became of it.

    Args:
        name: of the weight.
        kind: of its operation.
        shape: of the weight.
        macs: multiply-accumulates a sample.
        scheme: text of the encoding, "float32" where it was left.
        bits: a weight, everything counted (codes, scales, tables).
        nbytes: in the file.
        sensitivity: loss per squared relative error; None where it was not measured.
        error: relative error of the encoded weight, in the Frobenius norm.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    scheme: str
    bits: float
    nbytes: int
    sensitivity: float | None
    error: float


@dataclass(frozen=True)
class Point:
    """One plan that the search saw.

    Args:
        nbytes: of the whole file; predicted, or measured where `kind` is "chosen".
        predicted: loss by the linear model.
        quality: measured, None where it was not.
        kind: "front" (predicted only), "tried" (evaluated), "rejected" (evaluated, goal missed) or "chosen".
    """

    nbytes: int
    predicted: float
    quality: float | None
    kind: str


@dataclass(frozen=True)
class Note:
    """Something skipped, changed or falling back.

    Args:
        what: layer, operation or step.
        reason: one line.
    """

    what: str
    reason: str


@dataclass(frozen=True)
class ArtifactReport:
    """One file.

    Args:
        device: profile id.
        format: "onnx", "tflite" or "coreml".
        path: of the artefact, relative to the report's folder; None in a dry run.
        nbytes: of the file, or of the whole folder.
        quality: counted by running the artefact, None in a dry run.
        drop: original quality minus this one, positive where the artefact is worse.
        agreement: share of evaluation samples where its prediction is the original's, in percent; None without classes.
        goals: budget and quality goals.
        checks: verification.
        layers: every weight.
        front: what the search saw.
        reachable: bytes of the smallest and of the largest plan.
        skipped: what was asked for and not done.
        fallbacks: operations that the device's first accelerator refuses, and weights in an encoding that runs slowly.
        notes: anything else a reader should know, one line each.
        activations: "float" or "int8".
        seconds: by stage.
    """

    device: str
    format: str
    path: str | None
    nbytes: int
    quality: float | None
    drop: float | None
    agreement: float | None
    goals: tuple[Check, ...]
    checks: tuple[Check, ...]
    layers: tuple[LayerLine, ...]
    front: tuple[Point, ...]
    reachable: tuple[int, int]
    skipped: tuple[Note, ...]
    fallbacks: tuple[Note, ...]
    notes: tuple[str, ...]
    activations: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Every goal and every check."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """Goals missed, then checks failed."""
        return tuple(check for check in (*self.goals, *self.checks) if not check.held)

    @property
    def bits(self) -> float:
        """Per weight on average, everything counted; NaN without weights."""
        count = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * sum(layer.nbytes for layer in self.layers) / count if count else math.nan


@dataclass(frozen=True)
class Report:
    """One run of `octoc compress`.

    Args:
        version: of octoc.
        model: what the user typed.
        parameters: number of weights.
        macs: multiply-accumulates a sample.
        nbytes: of the original's tensors.
        quality: of the original on the evaluation samples.
        metric: its name.
        unit: "%" or "".
        higher_is_better: direction of the metric.
        calibration: number of calibration samples.
        evaluation: number of evaluation samples.
        seed: of everything random.
        artifacts: one for each device and format.
        seconds: by stage; "converters" is the time spent inside converter libraries, "total" all of it.
    """

    version: str
    model: str
    parameters: int
    macs: int
    nbytes: int
    quality: float
    metric: str
    unit: str
    higher_is_better: bool
    calibration: int
    evaluation: int
    seed: int
    artifacts: tuple[ArtifactReport, ...]
    seconds: dict[str, float]

    @property
    def held(self) -> bool:
        """Every goal and every check of every artefact."""
        return all(artifact.held for artifact in self.artifacts)

    def to_json(self) -> str:
        """One JSON object; NaN and infinities become null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """The inverse of `Report.to_json`. Raises ArtifactError where the file is no report."""
    try:
        report = _build(Report, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a report of octoc: {error}") from error
    assert isinstance(report, Report)
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _build(kind: Any, value: Any) -> Any:
    """Plain JSON data -> the dataclass `kind`, recursively; unknown or missing keys are errors."""
    if is_dataclass(kind):
        _require(value, dict)
        hints = typing.get_type_hints(kind)
        names = {entry.name for entry in fields(kind)}
        if set(value) != names:
            raise KeyError(f"keys differ in {sorted(set(value) ^ names)}")
        return kind(**{name: _build(hints[name], value[name]) for name in names})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        _require(value, list)
        inner = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        return tuple(_build(k, v) for k, v in zip(inner, value, strict=True))
    if origin is dict:
        _require(value, dict)
        return {key: _build(arguments[1], entry) for key, entry in value.items()}
    if origin is types.UnionType:
        return None if value is None else _build(arguments[0], value)
    if kind is float and value is None:
        return float("nan")
    _require(value, int | float if kind is float else kind)
    if isinstance(value, bool) and kind is not bool:
        raise TypeError(f"{value} is not {kind.__name__}")
    return float(value) if kind is float else value


def _require(value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} is not {getattr(kind, '__name__', kind)}")
