"""The page's pictures as plain functions of the report; `svg.py` knows how they become part of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from octoc.report import ArtifactReport, Check, LayerLine, Point, Report, words
from octoc.report.svg import COLOURS, NAMED, SCHEMES, element, locator, log_axis, plot, rectangles
from octoc.units import format_size

_COLUMN = 340.0  # width of a picture in one column, points
_WIDE = 920.0
_ROW = 34.0  # height of an artefact's row, points


def scheme_colours(report: Report) -> dict[str, int]:
    """Encoding -> index of its colour, the same in all pictures; float32 and the rarest share the last, grey."""
    uses: dict[str, int] = {}
    for artifact in report.artifacts:
        for layer in artifact.layers:
            uses[layer.scheme] = uses.get(layer.scheme, 0) + 1
    ranked = sorted((scheme for scheme in uses if scheme != "float32"), key=lambda scheme: (-uses[scheme], scheme))
    return {scheme: min(ranked.index(scheme), COLOURS - 1) if scheme in ranked else COLOURS - 1 for scheme in uses}


def sizes(report: Report, prefix: str) -> str:
    """A bar for the original and for each artefact, from zero, with the budget as a tick."""
    rows: list[tuple[str, int, float | None]] = [("original", report.nbytes, None)]
    rows += [(words.artifact_name(a), a.nbytes, _limit(a.goals, "size")) for a in report.artifacts]
    largest = max([1, *(nbytes for _, nbytes, _ in rows)])
    figure, axes = _sheet(_ROW * len(rows) + 2)
    for k, (name, nbytes, limit) in enumerate(rows):
        top = _ROW * k
        text = format_size(nbytes) + (f", {words.share(nbytes, report.nbytes)}" if k else "")
        if limit is not None:
            text += f" (goal {format_size(int(limit))})"
        _row_text(axes, top, name, text)
        rectangles(axes, [(0, top + 17, _COLUMN, 9)], NAMED["wash"])
        rectangles(axes, [(0, top + 17, max(1.0, _COLUMN * nbytes / largest), 9)], NAMED["accent" if k else "muted"])
        if limit is not None and limit <= largest:
            over = nbytes > limit
            rectangles(axes, [(_COLUMN * limit / largest - 1, top + 14, 2, 15)], NAMED["failed" if over else "ink"])
    return element(figure, prefix, "Size of each artefact against the original")


def qualities(report: Report, prefix: str) -> str:
    """A dot for each artefact on a common scale around the original's line, with the goal as a tick."""
    sign = 1 if report.higher_is_better else -1
    rows = []
    for artifact in report.artifacts:
        rows.append((words.artifact_name(artifact), artifact.quality, _limit(artifact.goals, "drop")))
    shown = [report.quality, *(v for _, quality, goal in rows for v in (quality, goal))]
    low, high = _span([v for v in shown if v is not None and math.isfinite(v)], 0.12)
    bottom = _ROW * len(rows) + 20

    def at(value: float) -> float:
        return 8 + (_COLUMN - 16) * (value - low) / (high - low)

    figure, axes = _sheet(bottom + 30)
    _row_text(axes, 0, "original", words.quality(report, report.quality), "muted")
    for k, (name, quality, goal) in enumerate(rows):
        top = 20 + _ROW * k
        text = words.quality(report, quality) if quality is not None else "not counted"
        _row_text(axes, top, name, text + (f" (goal {words.quality(report, goal)})" if goal is not None else ""))
        middle = top + 21.5
        rectangles(axes, [(0, middle - 0.5, _COLUMN, 1)], NAMED["line"])
        missed = goal is not None and quality is not None and sign * quality < sign * goal
        if goal is not None and math.isfinite(goal):
            rectangles(axes, [(at(goal) - 1, middle - 7, 2, 14)], NAMED["failed" if missed else "ink"])
        if quality is not None and math.isfinite(quality):
            if math.isfinite(report.quality):
                axes.plot([at(report.quality), at(quality)], [middle] * 2, color=NAMED["accent"], linewidth=3)
                rectangles(axes, [(at(report.quality) - 1, middle - 7, 2, 14)], NAMED["muted"])
            axes.plot([at(quality)], [middle], "o", color=NAMED["accent"], markersize=9)
    for tick in _round_ticks(low, high):
        axes.plot([at(tick)] * 2, [bottom, bottom + 4], color=NAMED["muted"], linewidth=0.8)
        axes.text(at(tick), bottom + 15, f"{tick:g}", ha="center", color=NAMED["muted"], fontsize=9.5)
    better = "higher" if report.higher_is_better else "lower"
    return element(figure, prefix, f"{report.metric} of each artefact against the original; {better} is better")


def layer_bits(artifact: ArtifactReport, colours: dict[str, int], prefix: str) -> str:
    """A bar for each weight in network order, coloured by encoding."""
    layers = artifact.layers
    count = len(layers)
    names = _layer_names(layers, 22)
    shown = _thinned(count, 46)
    rotated = max(len(names[i]) for i in shown) * len(shown) * 6 > _WIDE
    under = 14 + (max(len(names[i]) for i in shown) * 3.4 if rotated else 4)
    left = max(38.0, 4.2 * len(names[0])) if rotated else 38.0
    figure, axes = plot(_WIDE, 150 + under, (left, under, 8, 16))
    heights = [layer.bits if math.isfinite(layer.bits) else 0.0 for layer in layers]
    width = 0.8 if count < 150 else 1.0
    for colour in range(COLOURS):
        mine = [k for k, layer in enumerate(layers) if colours[layer.scheme] == colour]
        rectangles(axes, [(k - width / 2, 0, width, heights[k]) for k in mine], SCHEMES[colour])
    if count <= 32:
        for k, height in enumerate(heights):
            axes.text(k, height + max(heights) * 0.03, f"{height:.3g}", ha="center", fontsize=9, color=NAMED["muted"])
    average = artifact.bits
    if math.isfinite(average):
        axes.axhline(average, color=NAMED["muted"], linewidth=1, linestyle=(0, (3, 2)), zorder=0.6)
    padding = max(0.6, (12 - count) / 2)
    axes.set_xlim(-padding, count - 1 + padding)
    _bits_axis(axes, max(heights))
    slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if rotated else {}
    axes.set_xticks(shown, [names[i] for i in shown], fontsize=8.5, **slant)
    what = f"Bits per weight of the {count} weights of {words.artifact_name(artifact)} in network order"
    return element(figure, prefix, f"{what}; {words.bits(average)} on average")


def sensitivities(artifact: ArtifactReport, colours: dict[str, int], prefix: str) -> str | None:
    """Bits against sensitivity, a dot for each weight; None where no sensitivity was measured."""
    layers = [
        (layer, name)
        for layer, name in zip(artifact.layers, _layer_names(artifact.layers, 30), strict=True)
        if layer.sensitivity is not None and 0 < layer.sensitivity < math.inf and math.isfinite(layer.bits)
    ]
    if not layers:
        return None
    figure, axes = plot(_COLUMN, 250, (36, 40, 10, 12))
    size = 6.5 if len(layers) <= 100 else 4.5
    for colour in range(COLOURS):
        mine = [layer for layer, _ in layers if colours[layer.scheme] == colour]
        if mine:
            x, y = [layer.sensitivity for layer in mine], [layer.bits for layer in mine]
            axes.plot(
                x, y, "o", color=SCHEMES[colour], markersize=size, markeredgecolor=NAMED["card"], markeredgewidth=0.6
            )
    most, name = max(layers, key=lambda pair: (pair[0].sensitivity or 0.0, pair[1]))
    place = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right", "fontsize": 9}
    axes.annotate(name, (most.sensitivity, most.bits), color=NAMED["muted"], **place)
    values = [layer.sensitivity or 0.0 for layer, _ in layers]
    log_axis(axes, "x", min(values), max(values))
    _bits_axis(axes, max(layer.bits for layer, _ in layers))
    axes.set_xlabel("sensitivity (loss per squared relative error)")
    return element(figure, prefix, f"Bits against sensitivity of the weights of {words.artifact_name(artifact)}")


def search_front(report: Report, artifact: ArtifactReport, prefix: str) -> str | None:
    """Predicted loss and measured quality against bytes; None where the search saw nothing."""
    points = [p for p in artifact.front if math.isfinite(p.predicted)]
    if not points:
        return None
    measured = [p for p in points if p.quality is not None and math.isfinite(p.quality)]
    figure, axes = plot(_COLUMN, 390 if measured else 240, (56, 40, 12, 12), rows=2 if measured else 1)
    upper, lower = axes[0], axes[-1]
    line = sorted((p.nbytes, p.predicted) for p in points if p.kind == "front")
    losses = [p.predicted for p in points]
    if line:
        upper.plot([b for b, _ in line], [v for _, v in line], color=NAMED["accent"], linewidth=1.8)
    _marks(upper, points, [p.predicted for p in points])
    if min(losses) > 0 and max(losses) > 30 * min(losses):
        log_axis(upper, "y", min(losses), max(losses))
    upper.set_ylabel("predicted loss")
    if measured:
        _marks(lower, measured, [p.quality or 0.0 for p in measured])
        _quality_axis(lower, report, artifact, measured)
    low, high = _span([p.nbytes for p in points], 0.04)
    budget = _limit(artifact.goals, "size")
    if budget is not None and budget <= high + 0.25 * (high - low):
        low, high = min(low, budget), max(high, budget + 0.02 * (high - low))
        for panel in axes:
            panel.axvline(budget, color=NAMED["ink"], linewidth=1.2, linestyle=(0, (3, 2)))
        left = budget < (low + high) / 2
        place = {"xycoords": upper.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "fontsize": 9.5}
        place |= {"xytext": (5 if left else -5, 0), "ha": "left" if left else "right"}
        upper.annotate(f"budget {format_size(int(budget))}", (budget, 1.0), **place)
    for panel in axes:
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(locator(4))
        panel.grid(axis="y")
    upper.tick_params(labelbottom=upper is lower)
    lower.xaxis.set_major_formatter(lambda value, _: format_size(round(value)))
    lower.set_xlabel("size of the file")
    return element(figure, prefix, f"What the search saw for {words.artifact_name(artifact)}: loss and quality by size")


def _quality_axis(axes: Any, report: Report, artifact: ArtifactReport, measured: Sequence[Point]) -> None:
    values = [p.quality for p in measured if p.quality is not None]
    goal = _limit(artifact.goals, "drop")
    if goal is not None:
        axes.axhline(goal, color=NAMED["ink"], linewidth=1.2, linestyle=(0, (3, 2)))
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 9.5}
        axes.annotate(f"goal {words.quality(report, goal)}", (1.0, goal), xytext=(0, 4), ha="right", **place)
        values.append(goal)
    axes.set_ylim(*_span(values, 0.12))
    axes.set_ylabel(words.shorten(report.metric + (f" ({report.unit})" if report.unit else ""), 24))
    axes.yaxis.set_major_locator(locator(4))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _marks(axes: Any, points: Sequence[Point], heights: Sequence[float]) -> None:
    styles: dict[str, dict[str, Any]] = {
        "tried": {"marker": "o", "markersize": 7, "markerfacecolor": NAMED["card"], "color": NAMED["accent"]},
        "rejected": {"marker": "x", "markersize": 7, "color": NAMED["failed"]},
        "chosen": {"marker": "D", "markersize": 8.5, "color": NAMED["ink"]},
    }
    for kind, style in styles.items():
        mine = [(p.nbytes, height) for p, height in zip(points, heights, strict=True) if p.kind == kind]
        if mine:
            x, y = zip(*mine, strict=True)
            axes.plot(x, y, linestyle="none", markeredgewidth=1.8, zorder=3, **style)


def _limit(goals: Sequence[Check], name: str) -> float | None:
    found = [goal.limit for goal in goals if goal.name == name and goal.limit is not None]
    return found[0] if found and math.isfinite(found[0]) else None


def _layer_names(layers: Sequence[LayerLine], limit: int) -> list[str]:
    """Short names: the dotted parts that all of them begin or end with say nothing."""
    names = [layer.name.removesuffix(".weight").split(".") for layer in layers]
    room = min(len(name) for name in names) - 1 if len(names) > 1 else 0
    head = next((k for k in range(room) if len({name[k] for name in names}) > 1), room)
    tail = next((k for k in range(room - head) if len({name[-1 - k] for name in names}) > 1), room - head)
    return [words.shorten(".".join(name[head : len(name) - tail]), limit) for name in names]


def _bits_axis(axes: Any, top: float) -> None:
    """From zero, with ticks at the usual widths of codes."""
    top = top if top > 0 else 1.0
    axes.set(ylim=(0, top * 1.15), ylabel="bits per weight")
    axes.set_yticks([b for b in (0, 2, 4, 8, 16, 32) if b <= top * 1.15 and (not b or b >= top / 6)])
    axes.grid(axis="y")


def _thinned(count: int, most: int) -> list[int]:
    """At most about `most` of `count` positions, evenly."""
    return list(range(0, count, math.ceil(count / most)))


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Limits of an axis around the values; never empty."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _round_ticks(low: float, high: float) -> list[float]:
    return [float(tick) for tick in locator(5).tick_values(low, high) if low <= tick <= high]


def _sheet(height: float) -> tuple[Any, Any]:
    """A column's width to draw on in points from the top left corner."""
    figure, axes = plot(_COLUMN, height, (0, 0, 0, 0))
    axes.set(xlim=(0, _COLUMN), ylim=(height, 0))
    axes.set_axis_off()
    return figure, axes


def _row_text(axes: Any, top: float, name: str, value: str, colour: str = "ink") -> None:
    room = max(12, 52 - len(value))  # characters that fit beside the value
    axes.text(0, top + 11, words.shorten(name, room), fontsize=10.5, color=NAMED[colour])
    axes.text(_COLUMN, top + 11, value, fontsize=10.5, ha="right", color=NAMED["muted"])
