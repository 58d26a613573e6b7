"""ResNet-20 for three devices in one command: which share of the run converter libraries take for themselves."""

from __future__ import annotations

import tempfile
from pathlib import Path

import octoc
from benchmarks.peers import require_assets
from octoc.report import Report
from tests.networks import cifar10_test, cifar10_train, trained_resnet20

DEVICES = ("iphone-15-pro", "pixel-8", "raspberry-pi-5")


def run(folder: Path) -> Report:
    """The command."""
    return octoc.compress_model(
        trained_resnet20(), devices=DEVICES, data=cifar10_test(), calibration=cifar10_train(512), out=folder
    )


def main() -> None:
    require_assets()
    with tempfile.TemporaryDirectory() as folder:
        seconds = run(Path(folder)).seconds
    total = seconds.pop("total")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:12} {spent:6.2f} s  {spent / total:4.0%}")
    print(f"{'total':12} {total:6.2f} s")


if __name__ == "__main__":
    main()
