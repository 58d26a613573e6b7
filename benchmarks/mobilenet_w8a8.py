"""MobileNetV1-0.25 with int8 weights and activations: octoc's files and onnxruntime's own static quantizer.

Calibrated on one half of 500 images, counted on the other, then the other way round; the counts are added.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import octoc
from benchmarks.peers import count_right, require_assets, write_float, write_static
from tests.networks import imagenet_halves, trained_mobilenet


def main() -> None:
    require_assets()
    network, halves = trained_mobilenet(), imagenet_halves()
    right: Counter[str] = Counter()
    for calibration, counted in (halves, halves[::-1]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            floats = write_float(network, counted[0][:1], folder / "float.onnx")
            right["float32"] += count_right(floats, *counted)
            static = write_static(floats, calibration[0], folder / "static.onnx")
            right["onnxruntime's static quantizer"] += count_right(static, *counted)
            for activations in ("float", "int8"):
                report = octoc.compress_model(
                    network,
                    devices=["raspberry-pi-5"],
                    formats=["onnx", "tflite"],
                    data=counted,
                    calibration=calibration,
                    out=folder / activations,
                    activations=activations,
                )
                for artifact in report.artifacts:
                    assert artifact.quality is not None
                    what = f"octoc, {artifact.format}, {activations} activations"
                    right[what] += round(artifact.quality / 100 * len(counted[1]))
    for what, count in right.items():
        print(f"{what:36} {count} of 500")


if __name__ == "__main__":
    main()
