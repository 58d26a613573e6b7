"""What the report says of one artefact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octoc.compressed import Compressed
from octoc.placement import fallbacks, slowdowns, uncoded
from octoc.plan import front
from octoc.report import ArtifactReport, Check, LayerLine, Point
from octoc.search import Plan
from octoc.units import format_size
from octoc.workbench import Workbench


def summarize(
    bench: Workbench,
    plan: Plan,
    nbytes: int,
    reachable: tuple[int, int],
    small: Compressed | None = None,
    path: str | None = None,
    quality: float | None = None,
    points: Sequence[Point] = (),
) -> ArtifactReport:
    shared, search = bench.shared, bench.search
    sign = 1 if shared.metric.higher_is_better else -1
    drop = None if quality is None else sign * (shared.quality - quality)
    hull = [Point(b + search.overhead, p, None, "front") for b, p in front(search.choices)]
    dtype = "int8" if bench.integer else bench.dtype
    return ArtifactReport(
        device=bench.job.device.id,
        format=bench.job.format,
        path=path,
        nbytes=nbytes,
        quality=quality,
        drop=drop,
        agreement=None,
        goals=tuple(_goals(bench, nbytes, search.bits(plan), quality, reachable)),
        checks=(),
        layers=tuple(_lines(bench, plan, small)),
        front=(*_thin(hull), *points),
        reachable=reachable,
        skipped=(
            *bench.offering.skipped,
            *(shared.spared if bench.integer else ()),
            *bench.rounded,
            *bench.other_methods(plan),
            *uncoded(bench.model),
        ),
        fallbacks=(
            *bench.offering.remarks(plan),
            *slowdowns(
                bench.model,
                bench.job.device,
                bench.job.format,
                dict(choice.key for choice in plan),
                bench.offering.integers,
            ),
            *fallbacks(bench.shared.shaped, bench.job.device, bench.job.format, dtype),
        ),
        notes=(*shared.original.notes, *getattr(bench.base, "notes", ())),
        activations="int8" if bench.integer else "float",
    )


def _thin(hull: list[Point], most: int = 200) -> list[Point]:
    step = -(-len(hull) // most) or 1
    return hull[::step] if hull[-1:] == hull[::step][-1:] else [*hull[::step], hull[-1]]


def _goals(
    bench: Workbench, nbytes: int, bits: float, quality: float | None, reachable: tuple[int, int]
) -> list[Check]:
    goals = []
    options, shared = bench.options, bench.shared
    if options.max_size is not None:
        detail = f"{format_size(nbytes)} ({nbytes} B) of {format_size(options.max_size)} allowed"
        if nbytes > options.max_size:
            detail += f"; the smallest reachable here is {reachable[0]} B"
        goals.append(Check("size", nbytes <= options.max_size, detail, float(options.max_size)))
    if options.avg_bits is not None:
        detail = f"{bits:.3f} bits a weight of {options.avg_bits:g} allowed, scales and tables counted"
        goals.append(Check("bits", bits <= options.avg_bits, detail, options.avg_bits))
    if bench.limit is not None:
        fits = nbytes <= bench.limit.nbytes
        detail = f"{format_size(nbytes)} of {format_size(bench.limit.nbytes)}: {bench.limit.why}"
        goals.append(Check("memory", fits, detail if fits else f"{detail}; the smallest reachable is {reachable[0]} B"))
    if options.max_drop is not None and quality is not None:
        limit = options.max_drop.limit(shared.quality, shared.metric)
        held = options.max_drop.holds(quality, shared.quality, shared.metric)
        unit = shared.metric.unit
        detail = (
            f"{shared.metric.name} {quality:.4g}{unit}, at {'least' if shared.metric.higher_is_better else 'most'} "
        )
        goals.append(
            Check("drop", held, detail + f"{limit:.4g}{unit} asked for, original {shared.quality:.4g}{unit}", limit)
        )
    return goals


def _lines(bench: Workbench, plan: Plan, small: Compressed | None) -> list[LayerLine]:
    coded = {} if small is None else small.qtensors
    chosen = {choice.key[0]: choice for choice in plan}
    lines = []
    for layer in bench.layers:
        choice = chosen.get(layer.name)
        scheme, nbytes, error = "float32", 4 * layer.size, 0.0
        if choice is not None:
            tensor = coded.get(layer.name) or bench.encoder(layer, choice.key[1], bench.dtype)
            scheme, nbytes = str(choice.key[1]), tensor.nbytes
            weight = bench.model.tensors[layer.name].detach().numpy().astype(np.float64)
            off = weight - tensor.dequantize()
            error = float(np.linalg.norm(off) / max(float(np.linalg.norm(weight)), 1e-30))
        measured = bench.sensitivity.get(layer.name)
        bits = 8 * nbytes / layer.size
        lines.append(LayerLine(layer.name, layer.kind, layer.shape, layer.macs, scheme, bits, nbytes, measured, error))
    return lines
