"""What a user may ask of `compress_model`, and what becomes of it where parts fail."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import octoc
from octoc.errors import ModelError, UsageError
from octoc.recipe import read_recipe
from octoc.report import read_report

BOARD = "raspberry-pi-5"
X = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


@pytest.fixture(scope="module")
def labels(network: nn.Module) -> Any:
    with torch.no_grad():
        return network(torch.from_numpy(X)).argmax(1).numpy()


def test_the_calibration_set_is_used_and_what_is_evaluated_is_left_out(network: nn.Module, labels: Any) -> None:
    given: dict[str, Any] = {"devices": [BOARD], "dry_run": True}
    apart = octoc.compress_model(network, data=(X[:40], labels[:40]), calibration=octoc.load_data(X[40:]), **given)
    assert (apart.calibration, apart.evaluation) == (20, 40)
    shared = octoc.compress_model(network, data=(X[:40], labels[:40]), calibration=X[30:].copy(), **given)
    assert (shared.calibration, shared.evaluation) == (20, 40)
    assert any("calibrated on 20 samples instead of the 30" in note for note in shared.artifacts[0].notes)
    same = octoc.compress_model(network, data=(X, labels), calibration=X.copy(), **given)
    assert (same.calibration, same.evaluation) == (12, 48)


def test_labels_stored_as_floats_are_counted_as_classes(network: nn.Module, labels: Any) -> None:
    given: dict[str, Any] = {"devices": [BOARD], "dry_run": True}
    report = octoc.compress_model(network, data=(X, labels.astype(np.float64)), **given)
    assert (report.metric, report.quality) == ("top1", 100)
    assert octoc.compress_model(network, data=(X, labels + 0.5), **given).metric == "cosine"


def test_goals_may_be_numbers_and_the_folder_has_a_default(network: nn.Module, labels: Any) -> None:
    assert inspect.signature(octoc.compress_model).parameters["out"].default == "build/octoc"
    report = octoc.compress_model(
        network, devices=[BOARD], data=(X, labels), max_drop=0.00001, max_size=1e5, dry_run=True
    )
    assert report.held


@pytest.mark.parametrize("size", [0, -5, float("nan"), float("inf")])
def test_a_budget_that_is_no_size_is_refused(network: nn.Module, size: float) -> None:
    with pytest.raises(UsageError, match="150kB"):
        octoc.compress_model(network, devices=[BOARD], data=X, max_size=size, dry_run=True)


def test_weights_need_one_device_that_runs_them_and_are_noted_elsewhere(network: nn.Module) -> None:
    devices = [BOARD, "iphone-15-pro"]
    report = octoc.compress_model(network, devices=devices, data=X, weights="palette4", dry_run=True)
    assert report.artifacts[0].skipped
    assert not report.artifacts[1].skipped
    for weights in ("int5", "int2", "int4-group8"):
        with pytest.raises(UsageError, match=f"{weights}: {BOARD} onnx, iphone-15-pro coreml run no such weights"):
            octoc.compress_model(network, devices=devices, data=X, weights=weights, dry_run=True)


def test_a_replay_keeps_the_seed_of_its_recipe(network: nn.Module, tmp_path: Path) -> None:
    octoc.compress_model(network, devices=[BOARD], data=X, out=tmp_path / "one", seed=5)
    recipe = tmp_path / "one" / BOARD / "onnx" / "recipe.json"
    report = octoc.compress_model(network, devices=[BOARD], data=X, out=tmp_path / "other", recipe=recipe)
    assert report.seed == 5
    again = read_recipe(tmp_path / "other" / BOARD / "onnx" / "recipe.json")
    assert again == replace(read_recipe(recipe), version=again.version)


def test_a_format_that_refuses_does_not_end_the_others(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octoc.pipeline import build

    def some(job: Any, *given: Any) -> Any:
        if job.device.id == BOARD:
            raise ModelError("it has what onnx lacks")
        return build(job, *given)

    monkeypatch.setattr("octoc.pipeline.build", some)
    with pytest.raises(ModelError, match=f"^{BOARD} onnx was not made: it has what onnx lacks; the rest is in"):
        octoc.compress_model(network, devices=[BOARD, "iphone-15-pro"], data=X, out=tmp_path)
    (made,) = read_report(tmp_path / "report.json").artifacts
    assert made.device == "iphone-15-pro"
    assert made.held
    assert any("onnx was not made" in note for note in made.notes)
    with pytest.raises(ModelError, match=r"^it has what onnx lacks$"):
        octoc.compress_model(network, devices=[BOARD], data=X, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_bits_and_group_sizes_choose_among_what_the_device_runs(network: nn.Module) -> None:
    given: dict[str, Any] = {"devices": [BOARD], "data": X, "dry_run": True}
    (four,) = octoc.compress_model(network, bits=4, **given).artifacts
    assert {line.scheme.split("-")[0] for line in four.layers} == {"int4"}
    (grouped,) = octoc.compress_model(network, bits=4, group_size=16, **given).artifacts
    assert {line.scheme for line in grouped.layers} == {"int4-group16"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"bits": 3}, r"^--bits 3: raspberry-pi-5 onnx run no such weights; they run .*int4"),
        ({"bits": 9}, r"^--bits 9: codes have 1 to 8 bits$"),
        ({"bits": 0}, r"^--bits 0: codes have 1 to 8 bits$"),
        ({"group_size": 0}, r"^--group-size 0: a group holds at least 1 weight$"),
        ({"group_size": 7, "bits": 4}, r"^--bits 4 --group-size 7: raspberry-pi-5 onnx run no such weights"),
        ({"avg_bits": 0}, r"^--avg-bits 0 is not between 0 and 32$"),
        ({"weights": "int4", "bits": 4}, r"^--weights int4 beside --bits or --group-size: .* leave one of them out$"),
    ],
)
def test_widths_that_cannot_be_are_refused(network: nn.Module, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        octoc.compress_model(network, devices=[BOARD], data=X, dry_run=True, formats=["onnx"], **asked)


def test_average_bits_count_everything(network: nn.Module, tmp_path: Path) -> None:
    given: dict[str, Any] = {"devices": ["iphone-15-pro"], "data": X, "out": tmp_path}
    (artifact,) = octoc.compress_model(network, avg_bits=6.5, **given).artifacts
    weights = 16 * 32 + 32 * 10
    assert 8 * sum(line.nbytes for line in artifact.layers) <= 6.5 * weights
    assert next(goal for goal in artifact.goals if goal.name == "bits").held
    report = octoc.compress_model(network, avg_bits=0.01, **given)
    assert not report.held
    assert [check.name for check in report.artifacts[0].failed] == ["bits"]


def test_sensitivities_of_one_run_serve_another_on_the_same_network_only(network: nn.Module, tmp_path: Path) -> None:
    given: dict[str, Any] = {"devices": [BOARD], "data": X, "weights": "auto"}
    first = octoc.compress_model(network, out=tmp_path / "first", **given)
    kept = tmp_path / "first" / "sensitivity.json"
    again = octoc.compress_model(network, out=tmp_path / "again", sensitivity=kept, **given)
    assert "profile" in first.seconds
    assert "profile" not in again.seconds
    assert [line.sensitivity for line in again.artifacts[0].layers] == [
        line.sensitivity for line in first.artifacts[0].layers
    ]
    other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    with pytest.raises(UsageError, match="were measured on another network"):
        octoc.compress_model(other, out=tmp_path / "other", sensitivity=kept, **given)
    kept.write_text(kept.read_text()[:40])
    with pytest.raises(UsageError, match=r"^sensitivities .*sensitivity\.json cannot be read: JSONDecodeError"):
        octoc.compress_model(network, out=tmp_path / "again", sensitivity=kept, **given)


def test_a_method_that_makes_none_of_the_codes_is_refused_or_said(network: nn.Module) -> None:
    given: dict[str, Any] = {"devices": ["iphone-15-pro"], "data": X, "dry_run": True}
    with pytest.raises(UsageError, match=r"^--method higgs makes codebook encodings, and these devices run none"):
        octoc.compress_model(network, method="higgs", **given)
    (artifact,) = octoc.compress_model(network, method="palette", weights="int8", **given).artifacts
    said = {note.reason for note in artifact.skipped}
    assert any(reason.startswith("encoded by the usual method: palette makes no int8-") for reason in said)
    (artifact,) = octoc.compress_model(network, method="gptq", weights="int8", **given).artifacts
    assert artifact.skipped == ()
