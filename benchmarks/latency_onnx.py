"""ResNet-20 in onnxruntime on one thread: octoc's W8A8 file and onnxruntime's own, each as a share of float32.

The files take turns, a few calls each, so that whatever else the machine does hits all of them; of all turns the
fastest counts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import octoc
from benchmarks.peers import count_right, open_file, require_assets, write_float, write_static
from octoc.qtensor import Array
from tests.networks import cifar10_test, cifar10_train, trained_resnet20

TURNS, CALLS = 60, 20


def fastest(paths: dict[str, Path], sample: Array) -> dict[str, float]:
    """Milliseconds of a call of each file."""
    sessions = {name: open_file(path) for name, path in paths.items()}
    names = {name: session.get_inputs()[0].name for name, session in sessions.items()}
    best = dict.fromkeys(paths, float("inf"))
    for turn in range(TURNS + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                session.run(None, {names[name]: sample})
            spent = (time.perf_counter() - start) / CALLS * 1e3
            if turn:  # the first turn warms up
                best[name] = min(best[name], spent)
    return best


def make(folder: Path) -> dict[str, Path]:
    """The three files."""
    network, calibration, data = trained_resnet20(), cifar10_train(512), cifar10_test()
    report = octoc.compress_model(
        network, devices=["raspberry-pi-5"], data=data, calibration=calibration, out=folder, activations="int8"
    )
    assert report.held
    floats = write_float(network, data[0][:1], folder / "float.onnx")
    static = write_static(floats, calibration[0], folder / "static.onnx")
    return {"float32": floats, "octoc": folder / str(report.artifacts[0].path), "onnxruntime": static}


def main() -> None:
    require_assets()
    with tempfile.TemporaryDirectory() as folder:
        paths = make(Path(folder))
        x, y = cifar10_test()
        spent = fastest(paths, x[:1])
        for name, path in paths.items():
            share = spent[name] / spent["float32"]
            print(
                f"{name:12} {spent[name]:.3f} ms  {share:.2f} of float32  {count_right(path, x, y)} of {len(x)} right"
            )


if __name__ == "__main__":
    main()
