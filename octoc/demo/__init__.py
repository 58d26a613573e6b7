"""`octoc demo`: scikit-learn's digits, a network trained on the spot, and the main job on both."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octoc.errors import HostError
from octoc.progress import Progress, Silent

if TYPE_CHECKING:
    from octoc.report import Report

MODEL = "octoc.demo.network:digits"
DEVICES = ("iphone-15-pro", "pixel-8", "raspberry-pi-5")
MAX_DROP = "1"
EPOCHS = 10
TEST_SAMPLES = 500
SEED = 0


@dataclass(frozen=True)
class Files:
    """What the demo makes for `octoc compress`.

    Args:
        out: folder of the results.
        weights: of the trained network.
        test: samples and labels that quality is counted on.
        train: samples for calibration.
    """

    out: Path
    weights: Path
    test: Path
    train: Path


def prepare(out: Path, progress: Progress | None = None) -> Files:
    """Trains the network and writes its weights and the digits to a folder.

    Raises:
        HostError: scikit-learn is not installed, or the folder cannot be written.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise HostError("the demo's digits come with scikit-learn, which is not installed; pip install 'octoc[demo]'")
    watcher = progress or Silent()
    files = Files(out, out / "digits.safetensors", out / "digits_test.npz", out / "digits_train.npz")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot write to {out}: {error.strerror}; give another folder with --out") from error
    watcher.start("Training a network on handwritten digits", None)
    _make(files)
    watcher.finish()
    return files


def run(files: Files, progress: Progress | None = None) -> Report:
    """The main job, as `command_lines` says it."""
    from octoc.pipeline import compress_model

    return compress_model(
        MODEL,
        weights_file=files.weights,
        devices=DEVICES,
        data=str(files.test),
        calibration=str(files.train),
        max_drop=MAX_DROP,
        out=files.out,
        progress=progress,
    )


def command_lines(files: Files) -> list[str]:
    """The command line that does the same as `run`."""
    return [
        "Trained a network; compressing it is the same as",
        f"  octoc compress {MODEL} --weights-file {files.weights} \\",
        f"    {' '.join(f'--device {name}' for name in DEVICES)} \\",
        f"    --data {files.test} --calibration {files.train} --max-drop {MAX_DROP} --out {files.out}",
    ]


def _make(files: Files) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save
    from sklearn.datasets import load_digits

    from octoc.demo.network import train

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(labels))
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)[order]
    y = labels.astype(np.int64)[order]
    _save(files.test, x=x[:TEST_SAMPLES], y=y[:TEST_SAMPLES])
    _save(files.train, x=x[TEST_SAMPLES:], y=y[TEST_SAMPLES:])
    network = train(torch.from_numpy(x[TEST_SAMPLES:]), torch.from_numpy(y[TEST_SAMPLES:]), EPOCHS, SEED)
    files.weights.write_bytes(save(network.state_dict()))


def _save(path: Path, **arrays: Any) -> None:
    import numpy as np

    np.savez(path, **arrays)
