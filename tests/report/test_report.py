"""`report.json`: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sample import dry_run, sample_report

from octoc.errors import ArtifactError
from octoc.report import Report, read_report


def reread(report: Report, folder: Path) -> Report:
    path = folder / "report.json"
    path.write_text(report.to_json())
    return read_report(path)


@pytest.mark.parametrize("report", [sample_report(), dry_run(), replace(sample_report(), artifacts=())])
def test_a_report_read_back_equals_the_one_written(report: Report, tmp_path: Path) -> None:
    assert reread(report, tmp_path) == report


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    report = replace(sample_report(), quality=math.inf)
    assert json.loads(report.to_json())["quality"] is None
    assert math.isnan(reread(report, tmp_path).quality)


def damaged(change: Any) -> str:
    data = json.loads(sample_report().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        damaged(lambda data: data.update(colour="red")),
        damaged(lambda data: data.pop("seed")),
        damaged(lambda data: data["artifacts"][0].update(colour="red")),
        damaged(lambda data: data["artifacts"][0]["layers"][3].pop("bits")),
        damaged(lambda data: data.update(seed="zero")),
        damaged(lambda data: data["artifacts"][0].update(reachable=[1])),
        damaged(lambda data: data.update(artifacts=3)),
        damaged(lambda data: data.update(seed=True)),
        damaged(lambda data: data.update(seconds=[])),
        damaged(lambda data: data["artifacts"][0].update(notes="abc")),
        "[" * 100_000,
        "[]",
        "3",
        "null",
        '"report"',
        "{",
        "",
    ],
)
def test_unknown_keys_missing_keys_and_wrong_types_are_refused_with_the_file_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"report\.json is not a report"):
        read_report(path)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ArtifactError):
        read_report(path)


def test_an_artefact_held_only_if_every_goal_and_check_held() -> None:
    report = sample_report()
    assert [artifact.held for artifact in report.artifacts] == [True, True, False]
    assert not report.held
    assert [check.name for check in report.artifacts[2].failed] == ["drop", "outputs"]


def test_average_bits_count_every_weight_once() -> None:
    artifact = sample_report().artifacts[0]
    weights = sum(math.prod(layer.shape) for layer in artifact.layers)
    assert artifact.bits == pytest.approx(
        sum(layer.bits * math.prod(layer.shape) for layer in artifact.layers) / weights
    )
    assert math.isnan(replace(artifact, layers=()).bits)
