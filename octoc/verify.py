"""Proof that an artefact computes what the compressed network computes.

1. codes: what the file stores is read back and compared bit for bit; it stores no other codes.
2. outputs: the file, run by its own runtime, agrees with the compressed network within the stated tolerance; where it
   does not, the first diverging operation is named.
3. integer operations: as many operations run in integers as the compressed network has between int8 values.
4. unchanged: every byte is the one that was proven.

The last is for a file that has lain somewhere: one that was just written is the one that its digest was taken of.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from octoc.errors import ArtifactError, DataError, VerificationError
from octoc.evaluate import Session, open_session
from octoc.export import exporter, formats
from octoc.proof import NAME, Array, Proof, artifact_sha256, read_proof, summary
from octoc.qtensor import difference
from octoc.report import Check
from octoc.runtime import OpRecord


def format_of(path: Path) -> str:
    """Format of an artefact by its ending. Raises ArtifactError where none has it."""
    for name in formats():
        if Path(exporter(name).FILE).suffix == path.suffix:
            return name
    endings = ", ".join(Path(exporter(name).FILE).suffix for name in formats())
    raise ArtifactError(f"{path} is no artefact: its name ends in none of {endings}")


def verify_file(path: Path, proof_path: Path | None = None) -> list[Check]:
    """All checks of an artefact against the proof beside it."""
    if not path.exists():
        raise ArtifactError(f"no artefact {path}")
    proof = read_proof(proof_path or path.parent / NAME)
    return [*verify(path, proof), unchanged(path, proof)]


def verify(path: Path, proof: Proof) -> list[Check]:
    """All checks of what an artefact holds. A file that its runtime cannot open fails the checks that need it."""
    checks = [_codes(path, proof)]
    try:
        session = open_session(proof.format, path)
        checks.append(_outputs(session, proof))
        if proof.integer:
            checks.append(_integers(path, proof))
    except (ArtifactError, DataError) as error:  # a DataError: the file takes other shapes
        checks.append(Check("outputs", False, str(error)))
    return checks


def unchanged(path: Path, proof: Proof) -> Check:
    """Whether every byte of an artefact is the one that was proven."""
    same = artifact_sha256(path) == proof.sha256
    return Check("unchanged", same, f"sha256 {proof.sha256[:16]}" + ("" if same else " was proven, not this file"))


def require(checks: Iterable[Check], path: Path) -> None:
    """Raises VerificationError with the first check that failed."""
    for check in checks:
        if not check.held:
            raise VerificationError(f"{path} is not what was proven: {check.name}: {check.detail}")


def _codes(path: Path, proof: Proof) -> Check:
    try:
        found = exporter(proof.format).read_codes(path)
    except ArtifactError as error:
        return Check("codes", False, str(error))
    for name in found:
        if name not in proof.qtensors:
            return Check("codes", False, f"{name} is compressed in the file, not in the network")
    count = 0
    for name, expected in proof.qtensors.items():
        if expected.bits == 32 and name not in found and proof.format == "coreml":
            continue  # CoreML has no integer bias
        if name not in found:
            return Check("codes", False, f"{name} is not in the file")
        wrong = difference(expected, found[name])
        if wrong:
            return Check("codes", False, f"{name}: {wrong}")
        count += 1
    if not count:
        return Check("codes", True, "no weight is compressed")
    return Check("codes", True, f"{count} tensors read back bit for bit")


def _outputs(session: Session, proof: Proof) -> Check:
    if {spec.name for spec in session.inputs} != set(proof.inputs):
        names = sorted(spec.name for spec in session.inputs)
        return Check("outputs", False, f"the file takes {names}, the network {sorted(proof.inputs)}")
    found = session.run_many(proof.inputs)
    worst = 0.0
    for name, expected in proof.outputs.items():
        if name not in found:
            return Check("outputs", False, f"the file has no output {name}; it has {sorted(found)}")
        actual = found[name]
        if actual.shape != expected.shape:
            return Check("outputs", False, f"{name} has shape {actual.shape[1:]}, the network's {expected.shape[1:]}")
        finite = np.isfinite(expected)
        alike = np.array_equal(np.isfinite(actual), finite)
        if not alike or not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
            return Check("outputs", False, f"{name}: NaN or infinite where the network is not, or the other way round")
        scale = max(float(np.abs(expected[finite]).max(initial=0)), 1e-6)
        error = float(np.abs(actual[finite].astype(np.float64) - expected[finite]).max(initial=0)) / scale
        worst = max(worst, error)
        if error > proof.tolerance:
            where = first_divergence(session, proof)
            return Check(
                "outputs",
                False,
                f"{name} differs by {error:.2e} of its largest magnitude, allowed {proof.tolerance:g}; {where}",
            )
    return Check(
        "outputs", True, f"largest difference {worst:.1e} of {proof.tolerance:g} allowed, {_calls(proof)} probes"
    )


def _calls(proof: Proof) -> int:
    return len(next(iter(proof.inputs.values())))


def first_divergence(session: Session, proof: Proof) -> str:
    """Names the first operation of the artefact whose inputs agree with the network and whose result does not.

    A result agrees where some operation of the network has the same size, sum, sum of squares and largest magnitude.
    Operations that the network does not have (layout changes, padding) agree with what they read.
    """
    last = {name: array[-1] for name, array in proof.inputs.items()}
    records = session.trace(last)
    wrong = {name for record in records for name, value in record.outputs.items() if not _known(value, proof)}
    produced = {name for record in records for name in record.outputs}
    for record in records:
        bad = [name for name in record.outputs if name in wrong]
        if not bad or any(name in wrong for name in record.inputs if name in produced):
            continue
        # Padding, slices and the inside of a fused operation have no counterpart; what follows them tells.
        if _readers_agree(bad, records, wrong, produced):
            continue
        return f"first at {record.kind} {record.name}"
    return "no single operation stands out"


def _readers_agree(names: list[str], records: list[OpRecord], wrong: set[str], produced: set[str]) -> bool:
    """Whether some operation that reads only these, or correct values besides, comes out right."""
    reached = set(names)
    for record in records:
        if reached & set(record.inputs):
            if any(name not in wrong for name in record.outputs):
                return True
            if not any(name in wrong and name in produced and name not in reached for name in record.inputs):
                reached |= set(record.outputs)
    return False


def _known(value: Array, proof: Proof) -> bool:
    if value.dtype.kind != "f" or proof.values.size == 0:
        return True
    mine = np.array(summary(value))
    same = proof.values[:, 0] == mine[0]
    if not same.any():
        return True
    rows = proof.values[same]
    size, _, squares, peak = rows.T
    norm = np.sqrt(squares)
    slack = 4 * proof.tolerance
    close = (
        (np.abs(rows[:, 1] - mine[1]) <= slack * np.sqrt(size) * norm + 1e-9)
        & (np.abs(norm - np.sqrt(mine[2])) <= slack * norm + 1e-9)
        & (np.abs(peak - mine[3]) <= slack * peak + 1e-9)
    )
    return bool(close.any())


def _integers(path: Path, proof: Proof) -> Check:
    """Every format's runtime counts itself what it runs in integers."""
    count = importlib.import_module(f"octoc.runtime.{proof.format}").integer_operations(path)
    return Check(
        "integer operations",
        count >= proof.integer,
        f"{min(count, proof.integer)} of {proof.integer} layers run in integers",
    )
