"""Make small Core ML packages for the runtime's tests."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from octoc.runtime.coreml import Session, open_session

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    import coremltools as ct
    from coremltools.converters.mil import Builder
mb = Builder  # the name that every MIL example uses


def convert(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    folder: Path,
    precision: str = "FLOAT32",
    traced: bool = False,
    flexible: bool = False,
) -> Path:
    """Convert a torch module; traced inputs are named in0, in1 ..., and `flexible` frees their first size."""
    options: dict[str, Any] = {
        "skip_model_load": True,
        "minimum_deployment_target": ct.target.iOS18,
        "compute_precision": getattr(ct.precision, precision),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if traced:
            source = torch.jit.trace(module.eval(), tuple(inputs), check_trace=False)
            options["inputs"] = [
                ct.TensorType(
                    f"in{i}",
                    shape=(ct.RangeDim(1, 64), *x.shape[1:]) if flexible else x.shape,
                    dtype=np.int32 if x.dtype == torch.int32 else np.float32,
                )
                for i, x in enumerate(inputs)
            ]
        else:
            source = torch.export.export(module.eval(), tuple(inputs)).run_decompositions({})
        package = ct.convert(source, **options)
        path = folder / f"{precision}.mlpackage"
        package.save(str(path))
    return path


def build(
    function: Callable[..., Any], shapes: Sequence[Any], folder: Path, target: str = "iOS18", skip_passes: bool = False
) -> Path:
    """Build a package with the MIL builder. A shape is of a float32 input, or a `mb.TensorSpec`."""
    specs = [mb.TensorSpec(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = mb.program(input_specs=specs, opset_version=getattr(ct.target, target))(function)
        package = ct.convert(
            program,
            skip_model_load=True,
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY if skip_passes else ct.PassPipeline.DEFAULT,
        )
        path = folder / "built.mlpackage"
        package.save(str(path))
    return path


def feeds_of(session: Session, inputs: Iterable[Any]) -> dict[str, np.ndarray]:
    """Inputs by position."""
    return {spec.name: np.asarray(value, spec.dtype) for spec, value in zip(session.inputs, inputs, strict=True)}


def run(path: Path, *inputs: Any) -> list[np.ndarray]:
    """Outputs of one call, in order."""
    session = open_session(path)
    outputs = session.run(feeds_of(session, inputs))
    return [outputs[spec.name] for spec in session.outputs]
