"""`proof.safetensors`: what an artefact is compared with, now and later, without the network it came from.

One safetensors file that holds

    code/NAME/PART    every part of every compressed tensor (codes, scale, table ...), exactly as the artefact stores it
    input/NAME        probe inputs, [calls, *the artefact's shape]
    output/NAME       what the compressed network gives for them in torch
    values            [operations, 4]: size, sum, sum of squares and largest magnitude of every operation's result for
                      the last probe call; they do not change when a format lays its tensors out differently

and in its metadata, under "octoc", the facts that arrays lack: kinds and widths of the compressed tensors, names of the
operations, tolerance, the sha256 of the artefact, and the fingerprint of the network that was compressed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from octoc.compressed import Compressed
from octoc.errors import ArtifactError
from octoc.evaluate import calls
from octoc.qtensor import QTensor, describe, rebuild

Array = NDArray[Any]
NAME = "proof.safetensors"
PROBES = 4


@dataclass(frozen=True)
class Proof:
    """See the module.

    Args:
        qtensors: by tensor name.
        inputs: by input name.
        outputs: by output name, in the network's order.
        operations: names, in the network's order.
        values: [operations, 4].
        tolerance: largest difference from `outputs`, as a share of their largest magnitude.
        format: of the artefact.
        integer: how many of the network's operations must run in integers.
        sha256: of the artefact.
        model: fingerprint of the network before compression.
    """

    qtensors: Mapping[str, QTensor]
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    operations: tuple[str, ...]
    values: Array
    tolerance: float
    format: str
    integer: int
    sha256: str
    model: str


def prove(
    small: Compressed, samples: Sequence[Array], fmt: str, tolerance: float, integer: int, sha256: str, model: str
) -> Proof:
    """Evaluates the compressed network on the probes.

    Args:
        small: the compressed network.
        samples: calibration samples, one array an input; the first call of the probes is all zeros.
        fmt: format of the artefact.
        tolerance: see `Proof`.
        integer: see `Proof`.
        sha256: of the artefact.
        model: see `Proof`.
    """
    decoded = small.decoded
    batch = next((spec.shape[0] for spec in decoded.inputs if spec.shape), 1)
    probes = []
    for array in samples:
        real = calls([array[: (PROBES - 1) * batch]], batch)[0]
        probes.append(np.concatenate([np.zeros_like(real[:1]), real]))
    found: list[list[Array]] = []
    operations: list[str] = []
    rows: list[list[float]] = []

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            operations.append(node.name)
            rows.append(summary(value.numpy()))

    for i in range(len(probes[0])):
        call = [torch.from_numpy(p[i]).reshape(s.shape) for p, s in zip(probes, decoded.inputs, strict=True)]
        last = i == len(probes[0]) - 1
        found.append([value.numpy() for value in decoded.run(*call, observe=note if last else None)])
    return Proof(
        small.qtensors,
        {spec.name: p.reshape(len(p), *spec.shape) for spec, p in zip(decoded.inputs, probes, strict=True)},
        {name: np.stack(column) for name, column in zip(decoded.outputs, zip(*found, strict=True), strict=True)},
        tuple(operations),
        np.array(rows, dtype=np.float64).reshape(-1, 4),
        tolerance,
        fmt,
        integer,
        sha256,
        model,
    )


def summary(value: Array) -> list[float]:
    """Size, sum, sum of squares and largest magnitude: what stays when a tensor is laid out in another order.

    The last three are of the finite values: an attention mask's minus infinity would hide all others.
    """
    flat = value.astype(np.float64).ravel()
    finite = flat[np.isfinite(flat)]
    return [float(flat.size), float(finite.sum()), float(finite @ finite), float(np.abs(finite).max(initial=0))]


def write_proof(proof: Proof, path: Path) -> None:
    """Writes the file; the same proof gives the same bytes."""
    from safetensors.numpy import save

    arrays = {f"code/{name}/{part}": a for name, q in proof.qtensors.items() for part, a in q.arrays().items()}
    arrays |= {f"input/{name}": a for name, a in proof.inputs.items()}
    arrays |= {f"output/{name}": a for name, a in proof.outputs.items()}
    arrays["values"] = proof.values
    facts = {
        "tensors": {name: describe(q) for name, q in proof.qtensors.items()},
        "inputs": list(proof.inputs),
        "outputs": list(proof.outputs),
        "operations": list(proof.operations),
        "tolerance": proof.tolerance,
        "format": proof.format,
        "integer": proof.integer,
        "sha256": proof.sha256,
        "model": proof.model,
    }
    # safetensors' own writer hides a full disk in an error of its own, and the file from other users
    whole = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    path.write_bytes(save(whole, {"octoc": json.dumps(facts)}))


def read_proof(path: Path) -> Proof:
    """The inverse of `write_proof`. Raises ArtifactError where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {})["octoc"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        qtensors = {
            name: rebuild(
                entry, {k.rsplit("/", 1)[1]: a for k, a in arrays.items() if k.rsplit("/", 1)[0] == f"code/{name}"}
            )
            for name, entry in facts["tensors"].items()
        }
        tolerance = float(facts["tolerance"])
        if not 0 < tolerance < math.inf:
            raise ValueError(f"a tolerance of {tolerance} tells nothing")
        if not all(isinstance(facts[key], str) for key in ("format", "sha256", "model")):
            raise TypeError("its format, sha256 and model are not all texts")
        if type(facts["integer"]) is not int or facts["integer"] < 0:  # True is an int too
            raise TypeError(f"{facts['integer']!r} is no number of integer operations")
        return Proof(
            qtensors,
            {name: arrays[f"input/{name}"] for name in facts["inputs"]},
            {name: arrays[f"output/{name}"] for name in facts["outputs"]},
            tuple(facts["operations"]),
            arrays["values"],
            tolerance,
            facts["format"],
            facts["integer"],
            facts["sha256"],
            facts["model"],
        )
    except FileNotFoundError as error:
        raise ArtifactError(f"no {path.name} beside the artefact: {path} is missing; verification needs it") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged or no proof of octoc: {error}") from error


def artifact_files(path: Path) -> list[Path]:
    """The file itself, or every file of a package, in a fixed order."""
    if path.is_dir():
        return sorted(entry for entry in path.rglob("*") if entry.is_file())
    return [path]


def artifact_bytes(path: Path) -> int:
    """Size of the file, or of the whole package."""
    return sum(entry.stat().st_size for entry in artifact_files(path))


def artifact_sha256(path: Path) -> str:
    """sha256 of the bytes, and for a package of the names inside it; the artefact's own name does not count."""
    digest = hashlib.sha256()
    for entry in artifact_files(path):
        if path.is_dir():
            digest.update(entry.relative_to(path).as_posix().encode() + b"\0")
        digest.update(entry.read_bytes())
    return digest.hexdigest()
