"""Run an artefact: one module per format, each with

open_session(path, threads) -> Session
integer_operations(path) -> int         how many layers with a weight run in integers
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an artefact.

    Attributes:
        name: the name to feed or to read.
        shape: one entry per dimension; None is a flexible one.
        dtype: a numpy dtype name, such as "float32".
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class OpRecord:
    """One executed operation.

    Attributes:
        name: the operation's own name in the file, or its first output's.
        kind: the format's name of the operation.
        inputs: names of the values read.
        outputs: value by name.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: dict[str, np.ndarray]
