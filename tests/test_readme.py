"""What the documents say is true: the README's commands run, and report.md names what a report holds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from octoc.report import ArtifactReport, Check, LayerLine, Note, Point, Report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]


def environment(folder: Path) -> dict[str, str]:
    """The README's `octoc`, whatever is installed where."""
    script = folder / "octoc"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m octoc "$@"\n')
    script.chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **paths, "COLUMNS": "100", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_commands_and_the_python_of_the_readme_run_in_their_order(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    given = environment(tmp_path)
    octoc = [command for command in commands() if command.startswith("octoc")]
    assert len(octoc) >= 5
    for command in octoc:
        found = subprocess.run(command, shell=True, cwd=tmp_path, env=given, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == (0, ""), (command, found.stderr)
    said = []
    for block in blocks("python"):
        found = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=given, capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        said.append(found.stdout)
    held, quantized = said
    assert held.startswith("True ")
    bits, quality = map(float, quantized.split())
    assert 4 < bits < 5
    assert quality > 99
    assert (tmp_path / "build/python/digits.onnx").exists()
    assert (tmp_path / "build/demo/report.html").stat().st_size > 10_000


def test_every_other_command_of_the_readme_is_a_target_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    others = [command.split() for command in commands() if not command.startswith("octoc")]
    assert others
    assert all(words[0] == "make" and set(words[1:]) <= targets for words in others)


def test_every_option_in_the_readme_exists() -> None:
    from octoc.cli import cli

    known = {opt for command in cli.commands.values() for p in command.params for opt in p.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--help"} <= known


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), (path.name, link)


@pytest.mark.parametrize("kind", [Report, ArtifactReport, Check, LayerLine, Point, Note])
def test_report_md_names_every_field(kind: type) -> None:
    text = (ROOT / "docs" / "report.md").read_text()
    assert [entry.name for entry in fields(kind) if f"`{entry.name}`" not in text] == []


def test_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [name for name in re.findall(r"octoc/[\w/]+(?:\.py|/)", text) if not (ROOT / name).exists()] == []
