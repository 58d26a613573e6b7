"""One self-contained page: inline style, inline SVG, no script, nothing fetched."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from octoc.errors import HostError
from octoc.report import ArtifactReport, Report, pictures, words
from octoc.report.svg import drawing
from octoc.units import format_size


@dataclass(frozen=True)
class _Section:
    """An artefact with its pictures, None where there is nothing to draw."""

    artifact: ArtifactReport
    name: str
    bits: str | None
    sensitivity: str | None
    front: str | None
    budget: str | None


def write_html(report: Report, path: Path) -> None:
    """Writes the page of a report; the same report gives the same bytes.

    Args:
        report: what the page is about.
        path: of the page; it appears complete or not at all.

    Raises:
        HostError: the file cannot be written.
    """
    beside = path.with_name(path.name + ".part")
    text = _render(report)
    try:
        beside.write_text(text, encoding="utf-8", newline="\n", errors="replace")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise HostError(f"{path} cannot be written: {error.strerror or error}") from error


def _render(report: Report) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    with drawing():
        colours = pictures.scheme_colours(report)
        size_picture = pictures.sizes(report, "size")
        counted = any(artifact.quality is not None for artifact in report.artifacts)
        quality_picture = pictures.qualities(report, "quality") if counted else None
        sections = [_section(report, artifact, colours, f"a{k}") for k, artifact in enumerate(report.artifacts)]
    stages = {stage: s for stage, s in report.seconds.items() if stage != "total"}
    return environment.get_template("page.html.jinja").render(
        report=report,
        w=words,
        size=format_size,
        sections=sections,
        colours=colours,
        legend=sorted(colours, key=lambda scheme: (_width(report, scheme), scheme)),
        size_picture=size_picture,
        quality_picture=quality_picture,
        stages=stages,
        total=report.seconds.get("total", math.fsum(stages.values())),
        columns=list(dict.fromkeys(stage for a in report.artifacts for stage in a.seconds)),
    )


def _section(report: Report, artifact: ArtifactReport, colours: dict[str, int], prefix: str) -> _Section:
    budget = next((goal.limit for goal in artifact.goals if goal.name == "size" and goal.limit is not None), None)
    return _Section(
        artifact=artifact,
        name=words.artifact_name(artifact),
        bits=pictures.layer_bits(artifact, colours, f"{prefix}b") if artifact.layers else None,
        sensitivity=pictures.sensitivities(artifact, colours, f"{prefix}s"),
        front=pictures.search_front(report, artifact, f"{prefix}f"),
        budget=None if budget is None or not math.isfinite(budget) else format_size(int(budget)),
    )


def _width(report: Report, scheme: str) -> float:
    """Bits of an encoding, on average over the weights that have it, for its place in the legend."""
    found = [layer.bits for artifact in report.artifacts for layer in artifact.layers if layer.scheme == scheme]
    return sum(found) / len(found)
