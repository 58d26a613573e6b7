"""A `.mlpackage` folder: a manifest, the model, and its weights. The same content gives the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from octoc.export.coreml_lowering.storage import WeightWriter

# The manifest names its items by UUIDs, which coremltools draws anew for each file; any two will do.
_MODEL = "6f63746f-6300-4000-8000-000000000001"
_WEIGHTS = "6f63746f-6300-4000-8000-000000000002"


def write_package(path: Path, build: Callable[[WeightWriter], bytes]) -> None:
    """Writes the folder, completely or not at all; `path` does not exist before.

    Args:
        path: the folder.
        build: stores arrays and returns the serialised `Model` message.
    """
    path.mkdir(parents=True)  # outside: a folder that was there is not ours to remove
    try:
        _write(path, build)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _write(path: Path, build: Callable[[WeightWriter], bytes]) -> None:
    data = path / "Data" / "com.apple.CoreML"
    (data / "weights").mkdir(parents=True)
    with (data / "weights" / "weight.bin").open("wb") as file:
        weights = WeightWriter(file)
        model = build(weights)
        weights.finish()
    (data / "model.mlmodel").write_bytes(model)
    items = {
        _MODEL: ("model.mlmodel", "CoreML Model Specification"),
        _WEIGHTS: ("weights", "CoreML Model Weights"),
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            key: {
                "author": "com.apple.CoreML",
                "description": text,
                "name": name,
                "path": f"com.apple.CoreML/{name}",
            }
            for key, (name, text) in items.items()
        },
        "rootModelIdentifier": _MODEL,
    }
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
