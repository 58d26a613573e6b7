"""The words and numbers that the terminal and the page share, so that both say the same."""

from __future__ import annotations

import math
from collections.abc import Iterable

from octoc.report import ArtifactReport, Note, Report
from octoc.units import format_size

MISSING = "-"
_STATES = {
    "held": "held",
    "failed": "failed",
    "planned": "planned only",
    "unchecked": "not checked",
}


def artifact_name(artifact: ArtifactReport) -> str:
    """Device and format, which together name an artefact within a report."""
    return f"{artifact.device} {artifact.format}"


def state(artifact: ArtifactReport) -> str:
    """A key of the states: "failed" before "planned" (no file) before "unchecked" (nothing to hold) before "held"."""
    if artifact.failed:
        return "failed"
    if artifact.path is None:
        return "planned"
    return "held" if artifact.checks or artifact.goals else "unchecked"


def state_text(artifact: ArtifactReport) -> str:
    """The state with the number of failures, as in "2 failed"."""
    words = _STATES[state(artifact)]
    return f"{len(artifact.failed)} {words}" if artifact.failed else words


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, a dash where nothing was measured, words where the value is not finite."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    return f"{value:.{digits}g}"


def bits(value: float) -> str:
    """Bits with two decimals."""
    return f"{value:.2f}" if math.isfinite(value) else MISSING


def count(value: int) -> str:
    """A count with three significant digits and an SI prefix: 40.8 M."""
    scaled, prefix = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if abs(scaled) < 999.5:
            break
        scaled, prefix = scaled / 1000, larger
    if not prefix:
        return str(value)
    decimals = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{decimals}f} {prefix}"


def share(part: float, whole: float) -> str:
    """A percentage; a dash where the whole is nothing."""
    if not whole or not math.isfinite(part / whole):
        return MISSING
    return f"{100 * part / whole:.1f} %"


def percent(value: float) -> str:
    """A percentage with one decimal."""
    return f"{value:.1f} %" if math.isfinite(value) else number(value)


def quality(report: Report, value: float | None) -> str:
    """In the metric's unit."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.2f} {report.unit}" if report.unit else f"{value:.4g}"


def drop(report: Report, value: float | None) -> str:
    """How much worse than the original; a share in percent is lost in points."""
    if value is None or not math.isfinite(value):
        return number(value)
    if report.unit != "%":
        return f"{value:.3g} {report.unit}".rstrip()
    return f"{value + 0.0:.2f} points"


def change(report: Report, value: float | None) -> str:
    """`drop` as a phrase: "0.20 points worse"."""
    if value is None or not math.isfinite(value):
        return number(value)
    if value == 0:
        return "same as the original"
    return f"{drop(report, abs(value))} {'worse' if value > 0 else 'better'}"


def headline(report: Report) -> str:
    """What went in, what came out, and whether it held: two sentences."""
    source = f"{report.model} ({format_size(report.nbytes)}, {report.metric} {quality(report, report.quality)})"
    artifacts = report.artifacts
    if not artifacts:
        return f"{source} went in. No file came out."
    low, high = (format_size(pick(a.nbytes for a in artifacts)) for pick in (min, max))
    sizes = low if low == high else f"{low} to {high}"
    written = sum(artifact.path is not None for artifact in artifacts)
    if not written:
        became = f"could become {plural(len(artifacts), 'file')} of {sizes}; this is a plan and nothing was written."
    else:
        rest = f", {len(artifacts) - written} planned only" if written < len(artifacts) else ""
        became = f"became {plural(written, 'file')} of {sizes}{rest}."
    return f"{source} {became} {_outcome(report)}"


def _outcome(report: Report) -> str:
    failed = [artifact for artifact in report.artifacts if artifact.failed]
    if failed:
        goals = sum(not goal.held for artifact in failed for goal in artifact.goals)
        checks = sum(not check.held for artifact in failed for check in artifact.checks)
        missed = [f"{plural(goals, 'goal')} missed"] * bool(goals) + [f"{plural(checks, 'check')} failed"] * bool(
            checks
        )
        where = f", in {len(failed)} of {len(report.artifacts)} artefacts" if len(report.artifacts) > 1 else ""
        return f"{' and '.join(missed)}{where}."
    total = sum(len(artifact.goals) + len(artifact.checks) for artifact in report.artifacts)
    if not total:
        return "Nothing was checked."
    return "The one goal or check held." if total == 1 else f"All {total} goals and checks held."


def by_reason(notes: Iterable[Note]) -> list[tuple[str, list[str]]]:
    """Notes of one reason together, the most frequent first, in the given order among equals."""
    groups: dict[str, list[str]] = {}
    for note in notes:
        groups.setdefault(note.reason, []).append(note.what)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def shorten(name: str, limit: int) -> str:
    """A name on one line of at most `limit` characters, the middle left out: its end tells layers apart."""
    line = " ".join(name.split())
    if len(line) <= limit:
        return line
    head = (limit - 1) // 3
    return f"{line[:head]}…{line[len(line) - (limit - 1 - head) :]}"


def plural(n: int, one: str) -> str:
    """A number in full and its noun: "1,000 samples"."""
    return f"{n:,} {one}{'' if n == 1 else 's'}"
