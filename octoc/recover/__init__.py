"""Methods that train what compression took away, one a file. The file's name is the method's name.

A file says in `KIND` which kind of method it is; one of kind "tune" has

    tune(small, original, inputs, *, classes, encode_biases, seed, steps, seconds, step, state) -> Tuned

It returns a network with the same graph whose codes keep their form (bits, grids, dtypes), no worse on calibration
samples that it did not train on, and never looks at a label.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from octoc.compressed import Compressed
from octoc.errors import UsageError
from octoc.model import Model
from octoc.qtensor import QTensor

# Biases of the layers that run in integers, and the weights that had to make room for them: `apply.encode_biases`.
EncodeBiases = Callable[[Model, Mapping[str, QTensor]], Mapping[str, QTensor]]


@dataclass(frozen=True)
class Tuned:
    """What training made.

    Args:
        compressed: the network; the one that went in where training did not help.
        steps: that were planned; a replay with as many gives the same network.
        run: of them, that were done before the held-out samples said to stop.
        before: divergence of the outputs from the original's on held-out calibration samples (nats a sample where
            outputs are logits, else relative squared error).
        after: the same of `compressed`; never more than `before`.
        vectors: float tensors of `compressed.model` that were trained and that its QTensors do not hold, by name.
        notes: what was done differently than asked, and why.
    """

    compressed: Compressed
    steps: int
    run: int
    before: float
    after: float
    vectors: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


class Tuner(Protocol):
    """What every file of kind "tune" provides; see above."""

    KIND: str

    def tune(
        self,
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
    ) -> Tuned: ...


def tuners() -> tuple[str, ...]:
    """Names of all methods that train, without importing them."""
    names = (info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg)
    return tuple(sorted(name for name in names if _kind(name) == "tune"))


def tuner(name: str) -> Tuner:
    """The method `name`. Raises UsageError where there is none that trains."""
    if name not in tuners():
        raise UsageError(f"no method {name!r} trains a compressed network; there are {', '.join(tuners())}")
    method: Tuner = importlib.import_module(f"{__name__}.{name}")
    return method


def _kind(name: str) -> str | None:
    """What the file says of itself: importing it would import what it needs."""
    source = pkgutil.get_data(__name__, f"{name}.py") or b""
    match = re.search(rb'^KIND = "(\w+)"', source, re.MULTILINE)
    return match[1].decode() if match else None
