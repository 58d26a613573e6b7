"""The straight line: load, measure, plan, apply, export, verify, report."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octoc import __version__
from octoc.apply import fingerprint, restructure
from octoc.artifact import build, plan_only
from octoc.data import Dataset, load_data, split_calibration
from octoc.device import Device, find_device, load_devices
from octoc.errors import HostError, ModelError, UsageError
from octoc.evaluate import predict_model
from octoc.export import formats as known_formats
from octoc.load import load_model
from octoc.metrics import class_numbers, default_metric, get_metric
from octoc.model import Model
from octoc.options import Asked, Options, parse_options
from octoc.placement import offers, runs_only_int8, sparse_offers
from octoc.progress import Clock, Progress, Silent
from octoc.qtensor import Scheme
from octoc.quantize import encoder
from octoc.recipe import Decision, Factorize, FoldBatchNorm, Prune
from octoc.report import ArtifactReport, Report
from octoc.shared import Job, Shared

if TYPE_CHECKING:
    from torch import nn

ALL = "all"  # the format that stands for every format of a device


def compress_model(
    model: nn.Module | Model | str | Path,
    *,
    devices: Sequence[str],
    data: Any,
    out: str | Path = "build/octoc",
    calibration: Any = None,
    weights_file: str | Path | None = None,
    formats: Sequence[str] = (),
    max_size: str | float | None = None,
    max_drop: str | float | None = None,
    avg_bits: float | None = None,
    weights: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    method: str | None = None,
    sensitivity: str | Path | None = None,
    activations: str | None = None,
    recover: str | float | None = None,
    sparsity: float | None = None,
    rank: float | None = None,
    metric: str | None = None,
    seed: int = 0,
    recipe: str | Path | None = None,
    recompute: bool = False,
    devices_file: str | Path | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compresses a network for devices, writes the artefacts, verifies them and reports.

    Args:
        model: a module, a `.pt2` file, or `package.module:function`.
        devices: profile ids.
        data: what quality is counted on: a file, a folder, `module:function`, arrays or tensors x, (x, y) or
            ((x0, x1), y), or a `Dataset`.
        out: folder for `DEVICE/FORMAT/` and the report.
        calibration: samples for calibration, in the same forms; split from `data` where None. Samples that are in both
            are left out of calibration; where both hold the same samples, `data` is split.
        weights_file: weights for a factory.
        formats: formats to write, "all" for every one that the device runs; each device's first where empty.
        max_size: budget of each artefact, bytes or text such as "150kB".
        max_drop: allowed loss of quality, points or text such as "1%".
        avg_bits: most bits a weight, over all weights that are encoded, with scales, zero points and tables.
        weights: encoding of every weight, such as "int8" or "int4-group32"; None lets the planner choose where there
            is a goal, and means "int8" where there is none.
        bits: width of every code, 1 to 8, in place of a whole encoding.
        group_size: weights that share a scale, or channels that share a table.
        method: how weights are encoded, a file of octoc/quantize/ such as "gptq" or "rtn"; where None, GPTQ up to 4
            bits and the usual method above.
        sensitivity: `sensitivity.json` of an earlier run on this network, in place of measuring.
        activations: "float", "int8" (what can runs in integers; a start of the network stays in floats where int8 would
            cost most and gain least) or "int8-all"; None means floats, and int8 where the device runs nothing else.
        recover: time to train the compressed network towards the original's outputs, seconds or text such as "15min";
            "none" or None trains nothing. Calibration samples are learned from, without labels.
        sparsity: fraction of weights that magnitude pruning sets to zero.
        rank: share of the full rank that truncated SVD keeps, where that saves.
        metric: name of a metric or `module:function`; top-1 with class numbers, else cosine.
        seed: of everything random.
        recipe: a recipe to replay instead of planning, with its seed and without the options that would steer a plan;
            goals are checked. The codes come from the proof beside it, where one lies: the same bytes on any machine.
        recompute: compute the codes of the recipe anew: the same bytes on the same kind of processor.
        devices_file: further device profiles.
        dry_run: plan, and say what is reachable, without writing anything.
        progress: who watches.

    Returns:
        The report; `report.held` tells whether every goal and check held.

    Raises:
        OctocError: one of its classes; see `octoc.errors`. Where some artefact cannot be made of this network, the
            others are published and reported first.
    """
    start = time.perf_counter()
    clock = Clock(progress or Silent())
    options = parse_options(
        formats=tuple(formats),
        max_size=max_size,
        max_drop=max_drop,
        avg_bits=avg_bits,
        weights=weights,
        bits=bits,
        group_size=group_size,
        method=method,
        sensitivity=sensitivity,
        activations=activations,
        recover=recover,
        sparsity=sparsity,
        rank=rank,
        seed=seed,
        recipe=recipe,
        recompute=recompute,
        dry_run=dry_run,
    )
    jobs = _jobs(devices, Path(devices_file) if devices_file else None, options)
    with _workspace(Path(out), dry_run) as work:
        with clock.stage("load", "Loading the network and the data"):
            counted, calibrated, network, notes = _load(model, weights_file, data, calibration, options.seed)
        with clock.stage("original", "Counting the original", len(counted)):
            outputs = predict_model(network, counted.inputs, clock.progress.advance)
            if counted.labels is not None:
                counted = replace(counted, labels=class_numbers(counted.labels, outputs[0]))
            chosen = get_metric(metric) if metric else default_metric(counted.labels)
            target = counted.labels if chosen.needs_labels else outputs[0]
            quality = chosen(outputs[0], target)
        steps = options.recipe.steps if options.recipe else _structure(network, options)
        shaped = restructure(network, [s for s in steps if isinstance(s, Prune | Factorize | FoldBatchNorm)])
        shared = Shared(
            original=network,
            fingerprint=fingerprint(network),
            shaped=shaped,
            structure=tuple(s for s in steps if isinstance(s, Prune | Factorize | FoldBatchNorm)),
            data=counted,
            calibration=calibrated,
            metric=chosen,
            target=target,
            quality=quality,
            outputs=outputs,
            options=options,
            clock=clock,
            floats=options.activations != "int8-all"
            and not any(runs_only_int8(job.device, job.format) for job in jobs),
        )
        make = plan_only if dry_run else build
        artifacts, failures = _each(jobs, lambda job: make(job, shared, work, Path(out)))
        notes += failures
        layers = network.layers()
        clock.seconds["total"] = time.perf_counter() - start
        report = Report(
            version=__version__,
            model=model if isinstance(model, str) else str(model) if isinstance(model, Path) else type(model).__name__,
            parameters=sum(t.numel() for t in network.tensors.values() if t.is_floating_point()),
            macs=sum(layer.macs for layer in layers),
            nbytes=sum(t.numel() * t.element_size() for t in network.tensors.values()),
            quality=quality,
            metric=chosen.name,
            unit=chosen.unit,
            higher_is_better=chosen.higher_is_better,
            calibration=len(calibrated),
            evaluation=len(counted),
            seed=options.seed,
            artifacts=tuple(replace(a, notes=(*a.notes, *notes)) for a in artifacts),
            seconds={key: round(value, 3) for key, value in clock.seconds.items()},
        )
        if not dry_run:
            _write_report(report, shared.measured_json(), work, Path(out))
    if failures:
        where = "" if dry_run else f"; the rest is in {Path(out) / 'report.html'}"
        raise ModelError(f"{'; '.join(failures)}{where}")
    return report


def _each(jobs: Sequence[Job], make: Callable[[Job], ArtifactReport]) -> tuple[list[ArtifactReport], tuple[str, ...]]:
    """Every artefact that can be made, and a line for each that cannot, so that one format does not end a fleet.

    Raises:
        ModelError: none can be made; the first reason.
    """
    made: list[ArtifactReport] = []
    failures: list[tuple[Job, ModelError]] = []
    for job in jobs:
        try:
            made.append(make(job))
        except ModelError as error:
            failures.append((job, error))
    if not made:
        raise failures[0][1]
    return made, tuple(f"{job.device.id} {job.format} was not made: {error}" for job, error in failures)


def _jobs(names: Sequence[str], extra: Path | None, options: Options) -> list[Job]:
    """(device, format) pairs, in the order in which they were asked for."""
    if not names:
        raise UsageError("no device given; `octoc devices` lists them")
    devices = load_devices(extra)
    for fmt in options.formats:
        if fmt not in (*known_formats(), ALL):
            raise UsageError(f"no format {fmt!r}; there are {', '.join(known_formats())} and {ALL}")
    jobs: list[Job] = []
    for name in dict.fromkeys(names):
        device = find_device(name, devices)
        jobs += [Job(device, fmt) for fmt in _formats(device, options)]
    if options.asked.text not in (None, "auto") or options.asked.names_codes:
        _check_offered(options.asked, jobs, options.sparsity is not None)
    if options.method is not None:
        _check_method(options.method, jobs)
    return jobs


def _check_method(name: str, jobs: Sequence[Job]) -> None:
    """A method that makes no encoding of any artefact would do nothing."""
    kinds = encoder(name).ENCODES
    offered = {offer.scheme.kind for job in jobs for offer in offers(job.device, job.format)}
    if offered.isdisjoint(kinds):
        raise UsageError(
            f"--method {name} makes {' and '.join(kinds)} encodings, and these devices run none; "
            f"they run {', '.join(sorted(offered))}"
        )


def _check_offered(asked: Asked, jobs: Sequence[Job], pruned: bool) -> None:
    """An encoding that no weight of any artefact could have is a mistake; where some could, the others are noted."""
    found: dict[str, None] = {}
    for job in jobs:
        offered = offers(job.device, job.format)
        if pruned:
            offered += sparse_offers(job.device, job.format)
        found |= dict.fromkeys(str(offer.scheme) for offer in offered)
    if not any(asked.means(Scheme.parse(text)) for text in found):
        places = ", ".join(f"{job.device.id} {job.format}" for job in jobs)
        kind = (asked.text or "").split("-")[0]
        near = [text for text in found if text.split("-")[0] == kind] or dict.fromkeys(t.split("-")[0] for t in found)
        raise UsageError(f"{asked}: {places} run no such weights; they run {', '.join(near) or 'none'}")


def _formats(device: Device, options: Options) -> tuple[str, ...]:
    if ALL in options.formats:
        return device.formats
    asked = options.formats or (() if options.recipe is None else (options.recipe.format,))
    for fmt in asked:
        if fmt not in device.formats:
            raise UsageError(f"{device.id} does not run {fmt}; it runs {', '.join(device.formats)}")
    return tuple(dict.fromkeys(asked)) or device.formats[:1]


def _load(
    model: Any, weights_file: str | Path | None, data: Any, calibration: Any, seed: int
) -> tuple[Dataset, Dataset, Model, tuple[str, ...]]:
    """Evaluation data, calibration data and the network, checked against one another, and what was left out."""
    counted = load_data(data)
    if isinstance(model, Model):
        network = model
    else:
        import torch

        examples = [torch.from_numpy(np.array(array[:2])) for array in counted.inputs]
        network = load_model(model, weights=weights_file, examples=examples)
    counted = counted.check(network.inputs)
    given = None
    if calibration is not None and calibration is not data:
        given = load_data(calibration, network.inputs, "the calibration data")
    calibrated, counted = split_calibration(counted, given, seed)
    return counted, calibrated, network, _left_out(given, calibrated, counted)


def _left_out(given: Dataset | None, calibrated: Dataset, counted: Dataset) -> tuple[str, ...]:
    if given is None or len(given) == len(calibrated):
        return ()
    return (
        f"calibrated on {len(calibrated)} samples instead of the {len(given)} of {given.source}: "
        f"what {counted.source} holds too was left out",
    )


def _structure(network: Model, options: Options) -> tuple[Decision, ...]:
    """What is asked for of pruning and factorization, then batch-norm folding."""
    steps: list[Decision] = []
    if options.sparsity is not None:
        from octoc.prune.magnitude import global_threshold

        weights = {layer.name: network.tensors[layer.name].numpy() for layer in network.layers()}
        shares = global_threshold(weights, options.sparsity)
        steps += [Prune(name, share) for name, share in shares.items() if share > 0]
    if options.rank is not None:
        from octoc.lowrank.svd import planned_ranks

        steps += [Factorize(name, rank) for name, rank in planned_ranks(network, options.rank).items()]
    return (*steps, FoldBatchNorm())


@contextmanager
def _workspace(out: Path, dry_run: bool) -> Iterator[Path]:
    """A folder beside the results, gone afterwards whatever happens; what is finished is renamed out of it."""
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="octoc-") as folder:
            yield Path(folder)
        return
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".octoc-", dir=out))
    except OSError as error:
        raise HostError(f"cannot write to {out}: {error.strerror or error}; give another folder with --out") from error
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not existed and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _write_report(report: Report, sensitivities: str | None, work: Path, out: Path) -> None:
    from octoc.report.html import write_html

    (work / "report.json").write_text(report.to_json())
    write_html(report, work / "report.html")
    names = ["report.json", "report.html"]
    if sensitivities is not None:
        (work / "sensitivity.json").write_text(sensitivities)
        names.append("sensitivity.json")
    for name in names:
        (work / name).replace(out / name)
