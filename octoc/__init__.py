"""octoc: a trained network and a device name go in; verified CoreML, TFLite and ONNX files come out.

octoc.load_model(source)                                      any input -> Model
octoc.compress_model(module_or_path, devices=[...], data=..., out=...)   -> Report
octoc.quantize_model(module, bits=4, method=..., calibration_data=...)      -> a network that runs and exports
octoc.verify_file(path)                                       -> list of checks
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_model": "octoc.load",
    "compress_model": "octoc.pipeline",
    "quantize_model": "octoc.quantized",
    "verify_file": "octoc.verify",
    "load_data": "octoc.data",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: `import octoc` costs nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'octoc' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
