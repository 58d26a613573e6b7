"""Training as a step of a run: in the report and the recipe, resumed where it was broken off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import octoc
from octoc.errors import UsageError
from octoc.progress import Silent
from octoc.recipe import Recover, read_recipe
from octoc.report import ArtifactReport

BOARD = "iphone-15-pro"
X, SAMPLES = np.split(np.random.default_rng(0).normal(size=(800, 16)).astype(np.float32), [160])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


def run(network: nn.Module, out: Path, **options: Any) -> ArtifactReport:
    given: dict[str, Any] = {
        "devices": [BOARD],
        "formats": ["coreml"],
        "data": X,
        "out": out,
        "weights": "palette1-tensor",
        "method": "palette",
        "calibration": SAMPLES,
    }
    if "recipe" in options:
        del given["weights"], given["method"]
    return octoc.compress_model(network, **(given | options)).artifacts[0]


@pytest.fixture(scope="module")
def trained(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactReport, Path]:
    out = tmp_path_factory.mktemp("trained")
    return run(network, out, recover="2s"), out


def files(out: Path) -> dict[str, bytes]:
    folder = out / BOARD / "coreml"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_helps_and_stands_in_the_report_and_the_recipe(
    network: nn.Module, trained: tuple[ArtifactReport, Path], tmp_path: Path
) -> None:
    artifact, out = trained
    assert artifact.held, artifact.failed
    assert artifact.quality > run(network, tmp_path).quality  # type: ignore[operator]
    (note,) = [note for note in artifact.notes if note.startswith("trained by distill, ")]
    assert "divergence on held-out samples" in note
    (step,) = read_recipe(out / BOARD / "coreml" / "recipe.json").of(Recover)
    assert (step.method, step.seed) == ("distill", 0)
    assert f"of {step.steps} steps" in note
    assert [path.name for path in out.iterdir() if "recovery" in path.name] == []


@pytest.mark.parametrize("recompute", [False, True])
def test_a_recipe_with_training_gives_the_same_bytes(
    network: nn.Module, trained: tuple[ArtifactReport, Path], recompute: bool, tmp_path: Path
) -> None:
    artifact, out = trained
    again = run(network, tmp_path, recipe=out / BOARD / "coreml" / "recipe.json", recompute=recompute)
    assert again.quality == artifact.quality
    assert files(tmp_path) == files(out)


class Impatient(Silent):
    """Somebody who breaks the run off when training is half done."""

    def __init__(self) -> None:
        self.what, self.done = "", 0

    def start(self, what: str, total: int | None) -> None:
        self.what, self.done = what, 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        if self.what.startswith("Training") and self.done >= 50:
            raise KeyboardInterrupt


def test_training_that_was_broken_off_is_resumed_and_leaves_no_artefact_before(
    network: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(network, tmp_path, recover="2s", progress=Impatient())
    (state,) = tmp_path.iterdir()
    assert state.name.startswith(f".{BOARD}-coreml-")
    assert state.name.endswith(".recovery")
    artifact = run(network, tmp_path, recover="2s")
    assert artifact.held, artifact.failed
    assert not state.exists()
    once = tmp_path / "once"
    run(network, once, recipe=tmp_path / BOARD / "coreml" / "recipe.json", recompute=True)
    assert files(once) == files(tmp_path), "as if it had never been broken off"


@pytest.mark.parametrize("text", ["15", "0s", "soon", "-1min", 0, float("inf")])
def test_times_that_are_none_are_refused(network: nn.Module, text: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="such as 15min"):
        run(network, tmp_path, recover=text)


def test_none_trains_nothing(network: nn.Module, tmp_path: Path) -> None:
    artifact = run(network, tmp_path, recover="none")
    assert not any(note.startswith("trained ") for note in artifact.notes)
