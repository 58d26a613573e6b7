"""The terminal view: complete, plain where there is no terminal, and readable at any width."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from sample import dry_run, sample_report

from octoc.report import Note, Report
from octoc.report.terminal import print_report


def printed(report: Report, width: int = 100, color: str | None = None) -> str:
    file = io.StringIO()
    terminal = color is not None
    print_report(report, Console(file=file, width=width, force_terminal=terminal, color_system=color))  # type: ignore[arg-type]
    return file.getvalue()


def joined(text: str) -> str:
    return " ".join(text.split())


def test_every_artefact_has_a_line_with_its_numbers() -> None:
    report = sample_report()
    text = printed(report)
    for artifact in report.artifacts:
        line = next(line for line in text.splitlines() if line.startswith(artifact.device) and "%" in line)
        assert artifact.format in line
        assert f"{artifact.quality:.2f} %" in line
        assert f"{artifact.bits:.2f}" in line
        assert "held" in line or "2 failed" in line


def test_each_failure_is_named_on_one_line_and_each_file_has_its_path() -> None:
    report = sample_report()
    lines = printed(report).splitlines()
    assert "FAILED raspberry-pi-5 onnx, drop: 1.40 points lost, 1 allowed" in lines
    assert sum(line.startswith("FAILED") for line in lines) == 2
    assert all(f"  {artifact.path}" in lines for artifact in report.artifacts)


def test_reasons_are_counted_over_artefacts_and_the_rest_is_pointed_to() -> None:
    report = sample_report()
    assert "4 x strided slice runs on the CPU (iphone-15-pro coreml, pixel-8 tflite)" in printed(report)
    many = tuple(Note(f"node {i}", f"reason {i}") for i in range(9))
    one = replace(report, artifacts=(replace(report.artifacts[0], fallbacks=many),))
    assert "and 5 more reasons, in report.html" in printed(one)


@pytest.mark.parametrize("width", [20, 40, 60, 75, 76, 80, 100, 200])
def test_no_line_is_wider_than_the_console_and_nothing_is_cut_off(width: int) -> None:
    text = printed(sample_report(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "202 kB" in text
    assert "90.10 %" in text


def test_there_are_no_colours_without_a_terminal_and_some_with_one() -> None:
    assert "\x1b" not in printed(sample_report())
    assert "\x1b[" in printed(sample_report(), color="standard")


def test_names_are_printed_as_they_are_and_never_as_markup() -> None:
    report = sample_report()
    odd = replace(report.artifacts[0], device="[red]x[/red]", notes=("[bold]loud[/nonsense]",))
    text = printed(replace(report, model="[/]model", metric="[blink]m", artifacts=(odd,)))
    for name in ("[red]x[/red]", "[bold]loud[/nonsense]", "[/]model", "[blink]m"):
        assert name in text


def test_a_dry_run_says_that_nothing_was_written() -> None:
    text = joined(printed(dry_run()))
    assert "this is a plan and nothing was written" in text
    assert text.count("planned only") == 3
    assert "Files" not in text


def test_a_run_without_artefacts_says_so_in_one_sentence() -> None:
    assert "No file came out." in printed(replace(sample_report(), artifacts=()))


def test_an_artefact_without_goals_and_checks_is_not_called_held() -> None:
    report = sample_report()
    bare = replace(report, artifacts=(replace(report.artifacts[0], goals=(), checks=()),))
    text = printed(bare)
    assert "not checked" in text
    assert "Nothing was checked." in text


def test_a_loss_without_a_unit_is_printed_without_points() -> None:
    report = sample_report()
    artifact = replace(report.artifacts[0], quality=0.3512, drop=0.0412, goals=(), checks=())
    loss = replace(report, metric="loss", unit="", quality=0.31, higher_is_better=False, artifacts=(artifact,))
    text = printed(loss)
    assert "0.3512" in text
    assert "0.0412" in text
    assert "points" not in text
