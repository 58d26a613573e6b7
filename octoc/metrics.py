"""What quality is counted in: a table of metrics, and how much of one may be lost.

Shares are counted in points: 915 right of 1000 is 91.5, and a drop from 91.5 to 90.5 is one point.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octoc.errors import DataError, UsageError, reason
from octoc.reference import is_reference, resolve

Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """One number for the quality of a network's outputs.

    Args:
        name: as `--metric` takes it.
        needs_labels: the function takes labels; otherwise it takes the original network's outputs.
        higher_is_better: False for a loss.
        unit: "%" where 100 is perfect, empty where the metric has no scale of its own.
        function: (outputs [n, ...], labels [n, ...] or the original's outputs [n, ...]) -> the metric.
    """

    name: str
    needs_labels: bool
    higher_is_better: bool
    unit: str
    function: Callable[[Array, Array], float]

    def __call__(self, outputs: Array, target: Array | None) -> float:
        """The metric of some outputs.

        Args:
            outputs: [n, ...], one row a sample.
            target: labels [n, ...] where the metric needs them, else the original's outputs [n, ...].

        Raises:
            DataError: there are no samples, no labels, or they are not of the kind that the metric counts.
        """
        if target is None:
            missing = "labels (y)" if self.needs_labels else "the original network's outputs"
            raise DataError(f"metric {self.name} needs {missing}, and the data has none; cosine needs no labels")
        if outputs.ndim == 0 or len(outputs) == 0:
            raise DataError(f"metric {self.name} needs at least one sample; the outputs are {list(outputs.shape)}")
        if len(outputs) != len(target):
            raise DataError(f"metric {self.name}: {len(outputs)} outputs for {len(target)} targets")
        return self.function(outputs, target)


@dataclass(frozen=True)
class Drop:
    """How much of a metric may be lost.

    Args:
        value: points of the metric, or a share of the original's value (0.01 for `1%`).
        relative: `value` is a share.
    """

    value: float
    relative: bool

    def limit(self, baseline: float, metric: Metric) -> float:
        """The worst value that still holds, where the original network reaches `baseline`."""
        loss = self.value * abs(baseline) if self.relative else self.value
        return baseline - loss if metric.higher_is_better else baseline + loss

    def holds(self, value: float, baseline: float, metric: Metric) -> bool:
        """Whether a value is within the drop; NaN never is."""
        limit = self.limit(baseline, metric)
        # 91.5 - 0.3 is not 91.2 in binary: a difference of rounding is not a loss of quality
        slack = 1e-9 * max(1.0, abs(baseline))
        return value >= limit - slack if metric.higher_is_better else value <= limit + slack


_DROP = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15}|inf)\s*(%?)\s*", re.ASCII)


def parse_drop(text: str | float) -> Drop:
    """`1` is one point of the metric, `1%` one hundredth of the original's value, `inf` no limit; a number is points.

    Raises:
        UsageError: not a drop.
    """
    if not isinstance(text, str):
        if not text >= 0:
            raise UsageError(f"a drop of {text} is no loss that can be allowed; write points of the metric, such as 1")
        return Drop(float(text), False)
    match = _DROP.fullmatch(text)
    if match is None or (match[2] and float(match[1]) > 100):
        raise UsageError(f"{text!r} is not a drop; write points of the metric, such as 1, or a share up to 100%, as 1%")
    return Drop(float(match[1]) / 100, True) if match[2] else Drop(float(match[1]), False)


def _logits(outputs: Array, labels: Array, name: str) -> tuple[Array, Array]:
    """Outputs [n, classes] and labels [n], or the reason why they are not."""
    flat = (
        outputs.reshape(len(outputs), -1)
        if outputs.ndim > 2 and outputs.size == math.prod(outputs.shape[:2])
        else outputs
    )
    if flat.ndim != 2 or flat.shape[1] < 2:
        raise DataError(
            f"metric {name} counts classes, and the outputs are {list(outputs.shape)}, not [samples, 2 or more]; "
            "use --metric cosine or package.module:function"
        )
    if labels.dtype.kind not in "iub" or labels.ndim != 1:
        raise DataError(
            f"metric {name} needs integer labels [samples]; y is {labels.dtype} {list(labels.shape)}; "
            "give class numbers, or use --metric package.module:function"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= flat.shape[1]:
        raise DataError(f"labels run from {low} to {high}; the network has {flat.shape[1]} classes, from 0")
    return flat, labels.astype(np.int64)


def _among_best(outputs: Array, labels: Array, k: int, name: str) -> float:
    """Share of samples whose label is among the k largest outputs, in points; equal outputs rank by class number."""
    logits, classes = _logits(outputs, labels, name)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]  # [n, k]
    right = (best == classes[:, None]).any(axis=1) & ~np.isnan(logits).any(axis=1)
    return 100.0 * float(right.mean())


def top1(outputs: Array, labels: Array) -> float:
    """Share of samples whose largest output is their label, in points. Rows with NaN are wrong."""
    return _among_best(outputs, labels, 1, "top1")


def top5(outputs: Array, labels: Array) -> float:
    """Share of samples whose label is among the five largest outputs, in points. Rows with NaN are wrong."""
    return _among_best(outputs, labels, 5, "top5")


def loss(outputs: Array, labels: Array) -> float:
    """Mean cross entropy of logits in nats; infinite where an output is NaN."""
    logits, classes = _logits(outputs, labels, "loss")
    rows = logits.astype(np.float64)
    if np.isnan(rows).any() or np.isposinf(rows).any():
        return math.inf
    shifted = rows - rows.max(axis=1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=1))
    mean = float((total - shifted[np.arange(len(rows)), classes]).mean())
    return math.inf if math.isnan(mean) else mean


def cosine(outputs: Array, reference: Array) -> float:
    """Mean over samples of the cosine between outputs and the original's outputs, in points.

    Two zero vectors agree (100); a zero vector and another do not (0), nor do rows with NaN or infinite values.
    """
    if outputs.shape != reference.shape:
        raise DataError(f"outputs are {list(outputs.shape)}; the original's are {list(reference.shape)}")
    a = outputs.reshape(len(outputs), -1).astype(np.float64)
    b = reference.reshape(len(reference), -1).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        ratio = (a * b).sum(axis=1) / norms
    alike = np.where(norms == 0, (a == b).all(axis=1).astype(np.float64), ratio)
    return 100.0 * float(np.where(np.isfinite(alike), np.clip(alike, -1.0, 1.0), 0.0).mean())


METRICS: dict[str, Metric] = {
    "top1": Metric("top1", True, True, "%", top1),
    "top5": Metric("top5", True, True, "%", top5),
    "loss": Metric("loss", True, False, "nats", loss),
    "cosine": Metric("cosine", False, True, "%", cosine),
}


def get_metric(name: str) -> Metric:
    """A metric of the table, or one of the user's: `package.module:function`, higher is better.

    Raises:
        UsageError: no such metric.
    """
    if name in METRICS:
        return METRICS[name]
    if not is_reference(name):
        raise UsageError(f"no metric {name!r}; there are {', '.join(METRICS)}, or package.module:function")
    function = resolve(name, UsageError)
    if not callable(function):
        raise UsageError(f"metric {name} is {type(function).__name__}, not a function of (outputs, labels)")

    def counted(outputs: Array, labels: Array) -> float:
        try:
            value = float(function(outputs, labels))
        except Exception as error:
            raise DataError(f"metric {name} failed: {reason(error)}") from error
        if math.isnan(value):
            raise DataError(f"metric {name} returned NaN for {len(outputs)} samples")
        return value

    return Metric(name, True, True, "", counted)


def class_numbers(labels: Array, outputs: Array) -> Array:
    """Labels as int64 where they are class numbers stored as floats, as a .npz often has them; else as they are.

    Args:
        labels: [n], whole numbers from 0 to classes - 1; anything else is returned untouched.
        outputs: [n, classes, ...] of the network; one output alone makes no classes.
    """
    if labels.ndim != 1 or labels.dtype.kind != "f" or outputs.ndim < 2 or outputs.shape[1] < 2:
        return labels
    classes = (labels % 1 == 0) & (labels >= 0) & (labels < outputs.shape[1])
    return labels.astype(np.int64) if classes.all() else labels


def default_metric(labels: Array | None) -> Metric:
    """Top-1 where there are integer labels, one a sample; else the cosine to the original's outputs."""
    integers = labels is not None and labels.ndim == 1 and labels.dtype.kind in "iu"
    return METRICS["top1" if integers else "cosine"]
