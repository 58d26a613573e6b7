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
