"""What the benchmarks compare with: the float network as ONNX, and onnxruntime's own static quantizer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from octoc.qtensor import Array


def require_assets() -> None:
    """Ends the program with a line where the folder of trained networks is not known."""
    if not os.environ.get("OCTOC_ASSETS"):
        raise SystemExit("OCTOC_ASSETS names no folder of trained networks")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Exporters and quantizers talk on all channels."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_float(network: nn.Module, sample: Array, path: Path) -> Path:
    """The network in float32 with batch norms folded into convolutions, as torch's own exporter writes it."""
    with silence():
        torch.onnx.export(
            network,
            (torch.from_numpy(np.concatenate([sample, sample])),),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=["x"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    return path


def write_static(source: Path, calibration: Array, path: Path) -> Path:
    """int8 weights per channel and int8 activations by onnxruntime's quantizer with its usual calibration."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(range(len(calibration)))

        def get_next(self) -> Any:
            row = next(self.rows, None)
            return None if row is None else {"x": calibration[row : row + 1]}

    prepared = path.with_suffix(".prepared.onnx")
    with silence():
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path


def open_file(path: Path) -> onnxruntime.InferenceSession:
    """On one thread, with everything that onnxruntime optimises."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def count_right(path: Path, x: Array, y: Array) -> int:
    """Samples whose largest output is their label."""
    session = open_file(path)
    name = session.get_inputs()[0].name
    found = [session.run(None, {name: x[i : i + 50]})[0].argmax(1) for i in range(0, len(x), 50)]
    return int((np.concatenate(found) == y).sum())
