"""The state of a training on disk: written beside and renamed, and read again only for the very same work."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octoc.compressed import Compressed
from octoc.errors import ArtifactError, HostError
from octoc.model import Model
from octoc.qtensor import describe

_ROWS = 64  # samples that are hashed together


def identity(small: Compressed, original: Model, inputs: Sequence[Any], *request: Any) -> str:
    """sha256 of both networks, the samples and what is asked for."""
    digest = hashlib.sha256(repr(request).encode())
    for model in (small.model, original):
        for node in model.graph.nodes:
            digest.update(f"{node.name} {node.op} {node.target} {node.args} {node.kwargs}\n".encode())
        _add(digest, {name: tensor.detach().numpy() for name, tensor in model.tensors.items()})
    for name in sorted(small.qtensors):
        digest.update(f"{name} {describe(small.qtensors[name])}\n".encode())
        _add(digest, small.qtensors[name].arrays())
    for array in inputs:
        for start in range(0, len(array), _ROWS):
            _add(digest, {"samples": np.asarray(array[start : start + _ROWS])})
    return digest.hexdigest()


def _add(digest: Any, arrays: Mapping[str, Any]) -> None:
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())


@dataclass(frozen=True)
class State:
    """The file that a training writes its state to.

    Args:
        path: None keeps nothing.
        identity: of the work that the state belongs to.
    """

    path: Path | None
    identity: str

    def load(self) -> dict[str, Any] | None:
        """The state, None where there is none.

        Raises:
            ArtifactError: the file is damaged, or belongs to other work.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, weights_only=True)
            belongs = found.pop("identity")
        except (OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
            raise ArtifactError(f"{self.path} is no state of training: {type(error).__name__}; remove it") from error
        if belongs != self.identity:
            raise ArtifactError(
                f"{self.path} is the state of another network, other samples or another request; remove it first"
            )
        return found

    def save(self, values: Mapping[str, Any]) -> None:
        """Writes the state in one step: whoever is killed here leaves the one before.

        Raises:
            HostError: the file cannot be written.
        """
        if self.path is None:
            return
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            torch.save({**values, "identity": self.identity}, beside)
            beside.replace(self.path)
        except (OSError, RuntimeError) as error:
            raise HostError(f"cannot write the state of the training to {self.path}: {error}") from error
        finally:
            beside.unlink(missing_ok=True)

    def remove(self) -> None:
        """Work that is done needs no state."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
