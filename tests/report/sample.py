"""Reports as a run would leave them, without a run: numbers from seeded noise, shapes from real networks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from octoc.report import ArtifactReport, Check, LayerLine, Note, Point, Report

SCHEMES = {
    "coreml": [("palette3-tensor", 3), ("palette4-tensor", 4), ("palette6-tensor", 6), ("int8-channel", 8)],
    "tflite": [("int4-channel", 4), ("int8-channel", 8)],
    "onnx": [("int4-group32", 4), ("int8-channel", 8), ("float16", 16)],
}
DEVICES = {"coreml": "iphone-15-pro", "tflite": "pixel-8", "onnx": "raspberry-pi-5"}


def resnet20() -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, kind, shape, MACs) of the 20 weighted layers of ResNet-20 on 32 x 32 images."""
    layers: list[tuple[str, str, tuple[int, ...], int]] = [("conv1.weight", "conv2d", (16, 3, 3, 3), 442_368)]
    width_in = 16
    for stage, (width, side) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for block in range(3):
            for conv in (1, 2):
                shape = (width, width_in, 3, 3)
                macs = math.prod(shape) * side * side
                layers.append((f"layer{stage}.{block}.conv{conv}.weight", "conv2d", shape, macs))
                width_in = width
    return [*layers, ("linear.weight", "linear", (10, 64), 640)]


def deep(count: int) -> list[tuple[str, str, tuple[int, ...], int]]:
    """A transformer-like network of `count` weights with long names."""
    parts = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")
    names = [f"encoder.blocks.{i // 6}.{parts[i % 6]}.projection.weight" for i in range(count)]
    return [(name, "linear", (192, 768 if "down" in name else 192), 192 * 192 * 64) for name in names]


def artifact(format: str, layers: list[tuple[str, str, tuple[int, ...], int]], seed: int = 0) -> ArtifactReport:
    """One artefact that held its goals, in which more sensitive layers have more bits."""
    random = np.random.default_rng([seed, len(layers), len(format)])
    depth = np.linspace(0, 1, len(layers))
    sensitivity = np.exp(random.normal(-4 - 3 * depth, 0.9))
    sensitivity[-1] *= 20
    ranks = np.argsort(np.argsort(sensitivity)) / max(1, len(layers) - 1)
    lines = []
    for (name, kind, shape, macs), alpha, rank in zip(layers, sensitivity, ranks, strict=True):
        choices = SCHEMES[format]
        scheme, code = choices[min(len(choices) - 1, int(rank**2 * len(choices)))]
        weights = math.prod(shape)
        nbytes = math.ceil(weights * code / 8) + (2 * shape[0] if "channel" in scheme or "group" in scheme else 32)
        error = float(0.6 * 2.0**-code * np.exp(random.normal(0, 0.2)))
        lines.append(LayerLine(name, kind, shape, macs, scheme, 8 * nbytes / weights, nbytes, float(alpha), error))
    total = int(sum(line.nbytes for line in lines) * 1.06) + 18_000
    best = sum(line.sensitivity * line.error**2 for line in lines if line.sensitivity)
    sizes = np.linspace(0.6 * total, 2.4 * total, 60).astype(int)
    front = [Point(int(size), float(best * 2.0 ** (9 * (1 - size / total))), None, "front") for size in sizes]
    quality = 91.3 + 0.1 * seed
    front += [
        Point(int(total * 0.72), best * 7.1, 88.1, "rejected"),
        Point(int(total * 0.86), best * 2.7, 90.2, "rejected"),
        Point(int(total * 1.22), best * 0.31, 91.4, "tried"),
        Point(int(total * 1.55), best * 0.06, 91.5, "tried"),
        Point(total, best, quality, "chosen"),
    ]
    suffix = {"coreml": "mlpackage"}.get(format, format)
    return ArtifactReport(
        device=DEVICES[format],
        format=format,
        path=f"{DEVICES[format]}/{format}/model.{suffix}",
        nbytes=total,
        quality=quality,
        drop=91.5 - quality,
        agreement=98.7,
        goals=(
            Check("size", True, f"{total} B is within {int(total * 1.12)} B", limit=float(int(total * 1.12))),
            Check("drop", True, f"{91.5 - quality:.2f} points lost, 1 allowed", limit=90.5),
        ),
        checks=(
            Check("codes", True, f"{len(lines)} tensors read back bit for bit"),
            Check("outputs", True, "largest difference 3.1e-06 of 1e-04 allowed, on 16 samples"),
        ),
        layers=tuple(lines),
        front=tuple(front),
        reachable=(int(0.6 * total), int(2.4 * total)),
        skipped=(Note("conv1.weight", "3 input channels are not a multiple of groups of 32"),),
        fallbacks=tuple(Note(f"slice_{i}", "strided slice runs on the CPU") for i in range(1, 3)),
        notes=("package semantics verified, device unverified",) if format == "coreml" else (),
        activations="int8" if format == "tflite" else "float",
        seconds={"search": 4.1, "encode": 0.9, "write": 2.2, "verify": 1.4},
    )


def sample_report(layers: list[tuple[str, str, tuple[int, ...], int]] | None = None) -> Report:
    """Three artefacts of one network, the last of which fails a goal and a check."""
    layers = resnet20() if layers is None else layers
    phone, android, board = (artifact(format, layers, seed) for seed, format in enumerate(SCHEMES))
    board = replace(
        board,
        quality=90.1,
        drop=1.4,
        goals=(board.goals[0], Check("drop", False, "1.40 points lost, 1 allowed", limit=90.5)),
        checks=(
            board.checks[0],
            Check("outputs", False, "logits differ by 0.31, 1e-04 allowed; first at layer2.0.conv1"),
        ),
        front=tuple(replace(p, quality=90.1) if p.kind == "chosen" else p for p in board.front),
        fallbacks=(),
    )
    return Report(
        version="0.1.0",
        model="resnet20.pt2",
        parameters=sum(math.prod(shape) for _, _, shape, _ in layers),
        macs=sum(macs for *_, macs in layers),
        nbytes=4 * sum(math.prod(shape) for _, _, shape, _ in layers) + 9_000,
        quality=91.5,
        metric="top-1",
        unit="%",
        higher_is_better=True,
        calibration=256,
        evaluation=1000,
        seed=0,
        artifacts=(phone, android, board),
        seconds={"load": 0.8, "profile": 6.0, "plan": 0.3, "converters": 14.2, "verify": 4.2, "total": 29.6},
    )


def dry_run() -> Report:
    """A plan: nothing written, nothing counted."""
    report = sample_report()
    planned = [
        replace(a, path=None, quality=None, drop=None, agreement=None, checks=(), goals=()) for a in report.artifacts
    ]
    return replace(report, artifacts=tuple(planned))
