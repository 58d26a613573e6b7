"""The graph as coremltools must see it, and coremltools called without a sound.

1. The model is exported anew for one sample; its weights are buffers under their own names.
2. Operations with arguments that coremltools' export frontend drops without a word are replaced; an argument that is
   left is refused.
3. `convert` runs coremltools and turns its failure into one line.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from octoc.errors import HostError, ModelError, first_line
from octoc.model import Model, aten

# Passes that compute new weights from weights and constants, or new quantization scales (batch norm is folded before
# this format is reached; what the file holds must be what was encoded), and one that drops a requantization around a
# reshape although the scales on its two sides differ.
_UNWANTED_PASSES = (
    "common::fuse_conv_batchnorm",
    "common::fuse_conv_scale",
    "common::distributive_quantized_binary_op_scale_normalization",
    "common::int_op_canonicalization",
)

# Keyword-only arguments that say nothing about values in this graph.
_HARMLESS = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "generator", "implicit"}
# Keyword-only arguments that the export frontend of coremltools 9 reads, by operation; "*" stands for any.
_READ = {
    "beta": {"addmm", "baddbmm"},
    "alpha": {"addmm", "baddbmm"},
    "rounding_mode": {"div"},
    "scale": {"scaled_dot_product_attention"},
    "correction": {"var", "var_mean", "std", "std_mean"},
    "dtype": {"*"},  # checked by value instead
    "reduce": {"scatter"},
    "right": {"bucketize", "searchsorted"},
    "side": {"searchsorted"},
}


def export(model: Model, overrides: Mapping[str, Tensor]) -> ExportedProgram:
    """The model for one sample, in operations that coremltools converts.

    Args:
        model: its graph is left as it is.
        overrides: tensors to use in place of those of the same name.

    Raises:
        ModelError: torch.export refuses the graph, or an argument has no counterpart.
    """
    for spec in model.inputs:
        if not spec.shape:
            raise ModelError(f"input {spec.name} is a scalar; Core ML takes arrays only")
    with _silence():
        try:
            module = model.as_module(overrides)
            _separate_outputs(module.graph)
            module.recompile()
            program = torch.export.export(module, model.examples(1))
            return _checked(program.run_decompositions(_DECOMPOSITIONS))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"Core ML: the graph cannot be exported again: {first_line(error)}") from error


def _separate_outputs(graph: fx.Graph) -> None:
    """Gives an output that is an input or another output an operation of its own, because Core ML names values once."""
    last = next(node for node in graph.nodes if node.op == "output")
    seen: set[fx.Node] = set()
    separate = []
    for node in last.args[0]:  # type: ignore[union-attr]
        assert isinstance(node, fx.Node)
        if node.op != "call_function" or node in seen:
            with graph.inserting_before(last):
                separate.append(graph.call_function(aten.clone.default, (node,)))
        else:
            separate.append(node)
        seen.add(node)
    last.args = (tuple(separate),)


def expand(program: ExportedProgram) -> ExportedProgram:
    """The program in core operations only: recurrent layers become loops written out.

    Raises:
        ModelError: torch cannot decompose the program.
    """
    with _silence():
        try:
            return _checked(program.run_decompositions({**torch.export.default_decompositions(), **_DECOMPOSITIONS}))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"Core ML: the graph cannot be decomposed: {first_line(error)}") from error


def convert(program: ExportedProgram, outputs: tuple[str, ...], compute: str) -> Any:
    """coremltools' model of an exported program.

    Args:
        program: from `export`.
        outputs: names of the outputs.
        compute: "float16" or "float32".

    Raises:
        ModelError: coremltools refuses an operation, which it names.
        HostError: coremltools is not installed.
    """
    ct = load_coremltools()
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_UNWANTED_PASSES)
    last = next(node for node in program.graph.nodes if node.op == "output")
    dtypes = [_output_dtype(node) for node in last.args[0]]
    with _silence(), _record_errors() as failed:
        try:
            return ct.convert(
                program,
                outputs=[ct.TensorType(name=name, dtype=dtype) for name, dtype in zip(outputs, dtypes, strict=True)],
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT16 if compute == "float16" else ct.precision.FLOAT32,
                pass_pipeline=passes,
                skip_model_load=True,
            )
        except Exception as error:
            # The frames hold a temporary folder that warns when it goes; here nobody hears it.
            traceback.clear_frames(error.__traceback__)
            where = f"operation {failed[0]}: " if failed else ""
            raise ModelError(f"Core ML: {where}{first_line(error)}") from error


def load_coremltools() -> Any:
    """The package, imported without its remarks on other packages' versions.

    Raises:
        HostError: it is not installed.
    """
    if find_spec("coremltools") is None:
        raise HostError("coremltools is not installed; `pip install coremltools` is needed to write Core ML packages")
    with _silence():
        package = importlib.import_module("coremltools")
        _register_replacements()
        return package


def _register_replacements() -> None:
    """Teaches the frontend the operations that `_checked` puts into a graph; again is harmless."""
    builder = importlib.import_module("coremltools.converters.mil").Builder
    registry = importlib.import_module("coremltools.converters.mil.frontend.torch.torch_op_registry")

    def convert_gelu_tanh(context: Any, node: Any) -> None:
        context.add(builder.gelu(x=context[node.inputs[0]], mode="TANH_APPROXIMATION", name=node.name))

    def convert_copy(context: Any, node: Any) -> None:
        context.add(builder.identity(x=context[node.inputs[0]], name=node.name))

    for function, convert_function in ((gelu_tanh, convert_gelu_tanh), (output_copy, convert_copy)):
        convert_function.__name__ = function.__name__  # the name it is registered under
        registry.register_torch_op(convert_function, override=True)


def _output_dtype(node: Any) -> type:
    return np.float32 if node.meta["val"].is_floating_point() else np.int32


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No warnings, log lines or progress bars of the converter; the previous state comes back."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def _record_errors() -> Iterator[list[str]]:
    """Operations that coremltools' log names as failed, which its exceptions do not; nothing is printed."""
    failed: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        match = re.search(r"converting '(.+?)' op", record.getMessage())
        if match:
            failed.append(match[1])
        return False

    log = logging.getLogger("coremltools")
    log.addFilter(note)
    try:
        yield failed
    finally:
        log.removeFilter(note)


def _scaled(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """`add` and `sub` with their factor written out as a product."""

    def decomposed(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
        return NotImplemented if alpha == 1 else combine(x, y * alpha)

    return decomposed


def gelu_tanh(x: Tensor) -> Tensor:
    """Stands in the graph for `gelu(approximate="tanh")`, whose argument the frontend drops."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def output_copy(x: Tensor) -> Tensor:
    """Stands in the graph for a copy, which the frontend takes for its source."""
    return x.clone()


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _scaled(torch.add),
    aten.sub.Tensor: _scaled(torch.sub),
}


def _checked(program: ExportedProgram) -> ExportedProgram:
    """Replaces operations whose arguments the frontend drops, or refuses them."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            node.target, node.kwargs = gelu_tanh, {}
        if node.target is aten.clone.default and any(user.op == "output" for user in node.users):
            node.target, node.kwargs = output_copy, {}
        for keyword, value in node.kwargs.items():
            if value is not None and not _is_understood(node, keyword, value):
                raise ModelError(f"Core ML: operation {node.name} ({node.target}): {keyword}={value} is not supported")
    return program


def _is_understood(node: fx.Node, keyword: str, value: Any) -> bool:
    if keyword in _HARMLESS:
        return True
    if keyword == "dtype" and isinstance(value, torch.dtype):
        return True
    default = _default(node, keyword)
    if default is not None and default == value:
        return True
    name = str(node.target).split(".")[1]
    return name in _READ.get(keyword, ()) or "*" in _READ.get(keyword, ())


def _default(node: fx.Node, keyword: str) -> Any:
    schema = getattr(node.target, "_schema", None)
    found = (argument for argument in getattr(schema, "arguments", ()) if argument.name == keyword)
    argument = next(found, None)
    return argument.default_value if argument is not None and argument.has_default_value() else None
