"""The report in a terminal: a line for each artefact, what failed, what was left out, and where the files are."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octoc.report import ArtifactReport, Report, words
from octoc.units import format_size

_NARROW = 76  # columns; a table of eight columns does not fit below
_REASONS = 4  # shown of each kind; the page lists all
_STYLES = {"held": "green", "failed": "bold red", "planned": "yellow", "unchecked": "yellow"}
_KINDS = {"fallbacks": "Falls back or runs slowly", "skipped": "Asked for and not done"}


def print_report(report: Report, console: Console) -> None:
    """Prints a report at any width, with or without colours.

    Args:
        report: what is printed.
        console: where; names are printed as they are, never as markup.
    """
    _line(console, Text(words.headline(report)))
    if not report.artifacts:
        return
    console.print()
    if console.width < _NARROW:
        _print_list(report, console)
    else:
        console.print(_table(report), soft_wrap=False)
    console.print()
    for artifact in report.artifacts:
        for check in artifact.failed:
            where = f"{words.artifact_name(artifact)}, {check.name}: "
            _line(console, Text.assemble(("FAILED ", "bold red"), (where, "bold"), check.detail))
    for field, title in _KINDS.items():
        _print_reasons(report, console, field, title)
    notes = [(words.artifact_name(a), note) for a in report.artifacts for note in a.notes]
    for name, note in notes:
        _line(console, Text.assemble(("Note ", "bold"), f"{name}: {note}"))
    paths = [artifact.path for artifact in report.artifacts if artifact.path is not None]
    if paths:
        _line(console, Text("Files", style="bold"))
        for path in paths:
            _line(console, Text(f"  {path}"))
        _line(console, Text("Every layer, check and reason: report.html, report.json"))


def _cells(report: Report, artifact: ArtifactReport) -> dict[str, str]:
    return {
        "size": format_size(artifact.nbytes),
        "ratio": words.share(artifact.nbytes, report.nbytes),
        "bits": words.bits(artifact.bits),
        report.metric: words.quality(report, artifact.quality),
        "drop": words.drop(report, artifact.drop),
    }


def _outcome(artifact: ArtifactReport) -> Text:
    return Text(words.state_text(artifact), style=_STYLES[words.state(artifact)])


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("device", overflow="fold", min_width=8)
    table.add_column("format", no_wrap=True)
    for title in _cells(report, report.artifacts[0]):
        table.add_column(Text(title), justify="right", no_wrap=True, max_width=16)
    table.add_column("outcome", no_wrap=True)
    for artifact in report.artifacts:
        cells = [Text(cell.removesuffix(" points")) for cell in _cells(report, artifact).values()]
        table.add_row(Text(artifact.device), Text(artifact.format), *cells, _outcome(artifact))
    return table


def _print_list(report: Report, console: Console) -> None:
    """The table's content where the table does not fit."""
    for artifact in report.artifacts:
        _line(console, Text.assemble((words.artifact_name(artifact), "bold"), " ", _outcome(artifact)))
        for title, cell in _cells(report, artifact).items():
            _line(console, Text(f"  {title}: {cell}"))


def _print_reasons(report: Report, console: Console, field: str, title: str) -> None:
    """A count for each reason over all artefacts, the most frequent first, and the artefacts it concerns."""
    found = [(words.artifact_name(a), note) for a in report.artifacts for note in getattr(a, field)]
    groups = words.by_reason(note for _, note in found)
    if not groups:
        return
    _line(console, Text.assemble((title, "bold"), f": {len(found)}"))
    for reason, names in groups[:_REASONS]:
        where = dict.fromkeys(name for name, note in found if note.reason == reason)
        _line(console, Text(f"  {len(names)} x {reason} ({', '.join(where)})"))
    if len(groups) > _REASONS:
        _line(console, Text(f"  and {len(groups) - _REASONS} more reasons, in report.html"))


def _line(console: Console, text: Text) -> None:
    console.print(text, highlight=False, overflow="fold")
