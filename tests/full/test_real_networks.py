"""What octoc promises of trained networks on real images, counted by running the artefacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

import octoc
from benchmarks.latency_onnx import fastest
from benchmarks.peers import write_float
from octoc.data import Dataset
from octoc.errors import ModelError
from octoc.export import exporter
from octoc.proof import artifact_bytes
from octoc.qtensor import Array
from octoc.report import ArtifactReport, Report
from tests.networks import cifar10_test, cifar10_train, imagenet_halves, trained_mobilenet, trained_resnet20
from tests.zoo import DEVICES, FORMATS, MORE, answers, built, compressed, difference, expected, normal

pytest.importorskip("litert_torch", reason="the extra tflite is not installed")
pytestmark = pytest.mark.full

Samples = tuple[Array, Array]


def right(artifact: ArtifactReport, out: Path, data: Samples) -> int:
    """Samples that the file itself, run anew, gets right."""
    x, y = data
    return int((answers(artifact, out, [x])[0].argmax(1) == y).sum())


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained_resnet20()


@pytest.fixture(scope="module")
def train() -> Samples:
    """For calibration: training images."""
    return cifar10_train(512)


@pytest.fixture(scope="module")
def test() -> Samples:
    """For counting: test images."""
    return cifar10_test()


@pytest.fixture(scope="module")
def fleet(
    resnet: nn.Module, train: Samples, test: Samples, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    """ResNet-20 for three devices in one run."""
    out = tmp_path_factory.mktemp("fleet")
    return octoc.compress_model(resnet, devices=DEVICES, data=test, calibration=train, out=out), out


@pytest.fixture(scope="module")
def integers(
    resnet: nn.Module, train: Samples, test: Samples, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    """The same with int8 activations."""
    out = tmp_path_factory.mktemp("integers")
    given = {"data": test, "calibration": train, "activations": "int8"}
    return octoc.compress_model(resnet, devices=DEVICES, out=out, **given), out


@pytest.fixture(scope="module")
def floats(resnet: nn.Module, test: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original as a float32 ONNX file."""
    return write_float(resnet, test[0][:1], tmp_path_factory.mktemp("float") / "float.onnx")


def test_no_image_is_calibrated_on_and_counted(train: Samples, test: Samples) -> None:
    seen = {image.tobytes() for image in train[0]}
    assert not any(image.tobytes() in seen for image in test[0])


def test_resnet20_is_a_third_of_its_size_on_three_devices(
    fleet: tuple[Report, Path], floats: Path, test: Samples
) -> None:
    report, out = fleet
    assert report.held
    assert report.quality == pytest.approx(91.5)
    assert [artifact.format for artifact in report.artifacts] == list(FORMATS)
    for artifact in report.artifacts:
        size = artifact_bytes(out / str(artifact.path))
        assert size == artifact.nbytes
        assert size <= 0.33 * floats.stat().st_size
        assert right(artifact, out, test) >= 912
        assert artifact.quality == pytest.approx(right(artifact, out, test) / 10)


def test_half_of_the_run_is_the_converters_own(fleet: tuple[Report, Path]) -> None:
    seconds = fleet[0].seconds
    assert seconds["converters"] >= seconds["total"] / 2, seconds


def test_resnet20_in_integers_is_as_good(integers: tuple[Report, Path], test: Samples) -> None:
    report, out = integers
    for artifact in report.artifacts:
        assert artifact.held, artifact.failed
        assert "integer operations" in {check.name for check in artifact.checks}
        assert right(artifact, out, test) >= 912, artifact.format


def test_resnet20_in_integers_takes_three_fifths_of_the_time(
    integers: tuple[Report, Path], floats: Path, test: Samples
) -> None:
    report, out = integers
    path = next(out / str(artifact.path) for artifact in report.artifacts if artifact.format == "onnx")
    spent = fastest({"float32": floats, "octoc": path}, test[0][:1])
    assert spent["octoc"] <= 0.6 * spent["float32"], spent


@pytest.mark.parametrize(("device", "fmt"), [("raspberry-pi-5", "onnx"), ("iphone-15-pro", "coreml")])
def test_resnet20_fits_170_kb(
    device: str, fmt: str, resnet: nn.Module, train: Samples, test: Samples, tmp_path: Path
) -> None:
    given = {"data": test, "calibration": train, "formats": [fmt], "max_size": "170kB"}
    report = octoc.compress_model(resnet, devices=[device], out=tmp_path, **given)
    (artifact,) = report.artifacts
    assert report.held, artifact.failed
    assert artifact_bytes(tmp_path / str(artifact.path)) <= 170_000
    assert right(artifact, tmp_path, test) >= 900


def test_resnet20_does_not_fit_20_kb_and_octoc_says_what_does(
    resnet: nn.Module, train: Samples, test: Samples, tmp_path: Path
) -> None:
    given = {"data": test, "calibration": train, "max_size": "20kB"}
    report = octoc.compress_model(resnet, devices=DEVICES, out=tmp_path, **given)
    for artifact in report.artifacts:
        size = artifact_bytes(tmp_path / str(artifact.path))
        if size > 20_000:
            assert not artifact.held
            assert f"the smallest reachable here is {size} B" in artifact.failed[0].detail
        assert all(check.held for check in artifact.checks)


@pytest.fixture(scope="module")
def halves() -> tuple[Samples, Samples]:
    return imagenet_halves()


@pytest.mark.parametrize(
    ("activations", "devices"), [("float", DEVICES), ("int8", DEVICES[1:])], ids=["int8 weights", "int8 activations"]
)
def test_mobilenet_in_8_bits_keeps_255_of_265(
    activations: str, devices: tuple[str, ...], halves: tuple[Samples, Samples], tmp_path: Path
) -> None:
    network = trained_mobilenet()
    counts = dict.fromkeys(FORMATS[-len(devices) :], 0)
    originals = 0.0
    for i, (calibration, counted) in enumerate((halves, halves[::-1])):
        out = tmp_path / str(i)
        given = {"data": counted, "calibration": calibration, "activations": activations}
        report = octoc.compress_model(network, devices=devices, out=out, **given)
        originals += report.quality / 100 * len(counted[1])
        for artifact in report.artifacts:
            assert artifact.held, artifact.failed
            counts[artifact.format] += right(artifact, out, counted)
    assert originals == pytest.approx(265)
    assert min(counts.values()) >= 255, counts


@pytest.mark.parametrize("name", MORE)
def test_other_kinds_of_networks_come_out_right(name: str, tmp_path: Path) -> None:
    case = MORE[name]
    network = built(case.make)
    report = compressed(network, case.inputs, tmp_path, **case.options)
    for artifact in report.artifacts:
        assert artifact.held, (artifact.format, artifact.failed)
        found = answers(artifact, tmp_path, case.inputs)
        assert difference(found, expected(network, case.inputs, case.batch)) < case.limit, artifact.format


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", MORE)
def test_other_kinds_of_networks_run_in_integers_or_are_refused(name: str, fmt: str, tmp_path: Path) -> None:
    case = MORE[name]
    network = built(case.make)
    samples = tuple(normal(*x.shape[1:], count=256, seed=1) for x in case.inputs)
    given = {"calibration": Dataset(samples, None, "other samples"), "activations": "int8"}
    device = DEVICES[FORMATS.index(fmt)]
    try:
        (artifact,) = compressed(network, case.inputs, tmp_path, devices=[device], **given).artifacts
    except ModelError as error:
        pytest.skip(f"refused: {error}")
    if not artifact.held:
        assert artifact.path == f"{device}/{fmt}.unverified/{exporter(fmt).FILE}"
        pytest.skip(f"refused: {artifact.failed[0].detail}")
    for a, b in zip(answers(artifact, tmp_path, case.inputs), expected(network, case.inputs, case.batch), strict=True):
        assert (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) > 0.99
