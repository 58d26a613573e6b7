"""Activations as uint8 codes.

`(code + 128) - (zero point + 128)` is `code - zero point`, so that a network computes the same with int8 and with uint8
activations. onnxruntime on x86 turns int8 activations into uint8 itself, but not those that several operations read:
where it stops half-way, the convolutions around them stay in floats. Mobile accelerators take uint8 as well.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


def to_unsigned(graph: onnx.GraphProto) -> None:
    """Turns int8 activations into uint8 in place, where nothing but DequantizeLinear reads their codes."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    quantize = [node for node in graph.node if node.op_type == _QUANTIZE]
    dequantize = [node for node in graph.node if node.op_type == _DEQUANTIZE]
    codes = {node.output[0] for node in quantize}
    elsewhere = {name for node in graph.node if node.op_type != _DEQUANTIZE for name in node.input}
    elsewhere |= {value.name for value in graph.output}
    if codes & elsewhere or any(node.input[0] not in codes for node in dequantize):
        return
    shifted: dict[str, str] = {}
    for node in (*quantize, *dequantize):
        point = initializers.get(node.input[2]) if len(node.input) > 2 else None
        if point is None or point.data_type != TensorProto.INT8:
            continue
        if point.name not in shifted:
            shifted[point.name] = f"{point.name}u"
            values = numpy_helper.to_array(point).astype(np.int16) + 128
            graph.initializer.append(numpy_helper.from_array(values.astype(np.uint8), shifted[point.name]))
        node.input[2] = shifted[point.name]
    used = {name for node in graph.node for name in node.input}
    for name in shifted.keys() - used:
        graph.initializer.remove(initializers[name])
