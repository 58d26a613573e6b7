"""One artefact of one device: search or replay, verify, publish."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from octoc.apply import runs_in_integers
from octoc.errors import UsageError
from octoc.proof import NAME as PROOF
from octoc.proof import artifact_sha256, prove, write_proof
from octoc.quantize.activations import integer_layers
from octoc.recipe import Encode
from octoc.report import ArtifactReport, Check, Point
from octoc.search import Outcome, Plan
from octoc.shared import Job, Shared
from octoc.summary import summarize
from octoc.verify import verify
from octoc.workbench import Workbench

# Largest difference between an artefact and the compressed network in torch, as a share of the largest output.
# Floats: rounding in another order. float16: 11 bits a value through the whole network. int8 activations: a value on
# the edge between two codes may fall either way, and one step moves what follows.
TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "int8": 0.15}


def build(job: Job, shared: Shared, work: Path, out: Path) -> ArtifactReport:
    """Makes, verifies and publishes one artefact."""
    started = time.perf_counter()
    _require_same_network(shared)
    bench = Workbench(job, shared, work)
    search, options = bench.search, shared.options
    if options.recipe is not None:
        outcome = _replay(bench)
    else:
        if bench.plans:
            search.measure_overhead()
        outcome = search.run(bench.limits)
    outcome, learned = _recovered(bench, outcome, out)
    with shared.clock.stage("verify", f"Verifying {job.device.id} {job.format}"):
        checks = _verify(bench, outcome)
    (bench.folder / "recipe.json").write_text(bench.recipe(outcome.plan, outcome.small).to_json())
    held = all(check.held for check in checks)
    target = out / job.device.id / (job.format if held else f"{job.format}.unverified")
    publish(bench.folder, target)
    if held:  # what an earlier run left here is answered
        shutil.rmtree(target.with_name(f"{job.format}.unverified"), ignore_errors=True)
    path = (target / bench.writer.FILE).relative_to(out)
    report = summarize(
        bench,
        outcome.plan,
        outcome.nbytes,
        outcome.reachable,
        outcome.small,
        str(path),
        outcome.quality,
        outcome.points,
    )
    seconds = {"total": time.perf_counter() - started}
    return replace(
        report,
        checks=tuple(checks),
        agreement=_agreement(bench),
        notes=(*report.notes, *learned),
        seconds=seconds,
    )


def plan_only(job: Job, shared: Shared, work: Path, out: Path) -> ArtifactReport:
    """What `build` would start from: the plan, its predicted size, and what is reachable."""
    _require_same_network(shared)
    bench = Workbench(job, shared, work)
    search, options = bench.search, shared.options
    search.measure_overhead()
    found = _planned(bench) if options.recipe else search.within(bench.limits) or search.smallest()
    nbytes = sum(choice.nbytes for choice in found) + search.overhead
    report = summarize(bench, found, nbytes, search.reachable())
    if options.max_drop is None:
        return report
    searched = "the plan of best quality in that size; a run looks for the smallest within --max-drop by counting"
    return replace(report, notes=(*report.notes, searched))


def _require_same_network(shared: Shared) -> None:
    """Refuses to replay a recipe or the codes of another network."""
    recipe, proof = shared.options.recipe, shared.options.proof
    if recipe is not None and recipe.model != shared.fingerprint:
        raise UsageError("the recipe was made for another network: its fingerprint differs from this one's")
    if proof is not None and proof.model != shared.fingerprint:
        raise UsageError(
            "the proof beside the recipe was made for another network; compute the codes anew with --recompute"
        )


def _planned(bench: Workbench) -> Plan:
    """The plan of the recipe that is to be replayed."""
    recipe = bench.options.recipe
    assert recipe is not None
    known = {layer.name for layer in bench.layers}
    for step in recipe.of(Encode):
        if step.tensor not in known:
            raise UsageError(f"the recipe names the weight {step.tensor}, which the network lacks")
    return bench.search.smallest()  # each weight has one choice


def _replay(bench: Workbench) -> Outcome:
    """The plan of a recipe, without a search."""
    plan = _planned(bench)
    small = bench.assemble(plan)
    path, nbytes = bench.write(small)
    quality = bench.file_quality(path)
    chosen = Point(nbytes, sum(c.loss for c in plan), quality, "chosen")
    return Outcome(plan, small, path, nbytes, quality, [chosen], (nbytes, nbytes))


def _recovered(bench: Workbench, outcome: Outcome, out: Path) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome after training, where that is asked for and within the limits, and what the report says of it."""
    tuned = bench.recovered(outcome.small, out)
    if tuned is None:
        return outcome, ()
    path, nbytes = bench.write(tuned.compressed)
    limit = bench.limits.nbytes
    if limit is not None and nbytes > limit >= outcome.nbytes:
        bench.training = None
        path, _ = bench.write(outcome.small)
        note = f"training is left out: its file takes {nbytes} B of {limit:.0f} B allowed"
        return replace(outcome, path=path, quality=bench.file_quality(path)), (note,)
    quality = bench.file_quality(path)
    method = bench.training.method if bench.training else ""
    spent = f"trained by {method}, {tuned.run} of {tuned.steps} steps: divergence on held-out samples "
    note = f"{spent}{tuned.before:.4g} before, {tuned.after:.4g} after"
    points = [Point(p.nbytes, p.predicted, p.quality, "tried") if p.kind == "chosen" else p for p in outcome.points]
    points.append(Point(nbytes, sum(c.loss for c in outcome.plan), quality, "chosen"))
    trained = Outcome(outcome.plan, tuned.compressed, path, nbytes, quality, points, outcome.reachable)
    return trained, (note, *tuned.notes)


def _verify(bench: Workbench, outcome: Outcome) -> list[Check]:
    """Writes the proof beside the artefact and checks the one against the other."""
    kind = "int8" if bench.integer else bench.dtype
    samples = [np.asarray(array[:16]) for array in bench.shared.calibration.inputs]
    digest, model = artifact_sha256(outcome.path), bench.shared.fingerprint
    integer = _integer_operations(bench, outcome)
    proof = prove(outcome.small, samples, bench.job.format, TOLERANCE[kind], integer, digest, model)
    write_proof(proof, bench.folder / PROOF)
    checks = verify(outcome.path, proof)
    if not integer and bench.wants_int8:
        checks.append(Check("integer operations", False, "no operation of this network runs in integers"))
    return checks


def _integer_operations(bench: Workbench, outcome: Outcome) -> int:
    """How many operations of the compressed network must run in integers: int8 in, and a weight for integer kernels."""
    layers = {layer.name: layer for layer in bench.layers}
    schemes = dict(choice.key for choice in outcome.plan)
    return sum(
        len(uses)
        for name, uses in integer_layers(outcome.small.model).items()
        if name in schemes
        and runs_in_integers(outcome.small.qtensors.get(name))
        and bench.writer.accepts(schemes[name], layers[name], True) is None
    )


def publish(finished: Path, target: Path) -> None:
    """Moves a finished folder to its place in one rename; an older one there is replaced, or stays if that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        old = finished.parent / f"{finished.name}.old"
        target.rename(old)
        try:
            finished.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old)
    else:
        finished.rename(target)


def _agreement(bench: Workbench) -> float | None:
    ours, theirs = bench.outputs[0], bench.shared.outputs[0]
    if ours.ndim != 2 or ours.shape[1] < 2 or bench.shared.metric.name == "cosine":
        return None
    return 100.0 * float((ours.argmax(1) == theirs.argmax(1)).mean())
