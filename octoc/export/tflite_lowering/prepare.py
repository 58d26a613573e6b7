"""The same function in a graph that the converter takes: what it gets wrong or refuses is written otherwise."""

from __future__ import annotations

from torch import fx

from octoc.model import KINDS, Model, argument, aten

_END = 2**63 - 1  # of a slice that goes on to the end
# Functions of one value that kernels apply to what they write, where nothing stands between.
_FUSED = {aten.relu.default, aten.relu6.default, aten.hardtanh.default}


def one_reader_each(model: Model) -> Model:
    """A DEQUANTIZE for every reader of one.

    litert-torch's layout pass lets a DEQUANTIZE share its mark with the transpose that it inserts behind it, and then
    takes the tensor for a transposed one wherever else it is read: a wrong result without an error.
    """
    separate = model.copy()
    for node in list(separate.graph.nodes):
        if str(node.target) == "quantized_decomposed.dequantize_per_tensor.default":
            for user in list(node.users)[1:]:
                with separate.graph.inserting_after(node):
                    user.replace_input_with(node, separate.graph.node_copy(node))
    return separate


def cropped(model: Model) -> Model:
    """Transposed convolutions without padding, and the edges that padding takes away cut off behind them.

    Padding p of a transposed convolution drops p rows at the start of what it computes and p at the end, less the
    output padding. TFLite's kernel knows no padding but SAME and VALID. The converter writes SAME where kernel less
    stride is twice the padding, and refuses what is neither.
    """
    result = model.copy()
    for node in list(result.graph.nodes):
        kind = KINDS.get(node.target) if node.op == "call_function" else None
        if kind is not None and kind.name == "conv_transpose":
            _crop(result, node)
    return result


def _crop(model: Model, node: fx.Node) -> None:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    kernel = model.tensors[str(weight.target)].shape[2:]
    rank = len(kernel)
    stride, padding, extra = (
        _each(argument(node, name, position, default), rank)
        for name, position, default in (("stride", 3, 1), ("padding", 4, 0), ("output_padding", 5, 0))
    )
    same = not any(extra) and all(k - s == 2 * p for k, s, p in zip(kernel, stride, padding, strict=True))
    if not any(padding) or same or set(stride) == {1}:  # of stride 1 the converter makes an ordinary convolution
        return
    more = [max(e - p, 0) for e, p in zip(extra, padding, strict=True)]
    kept = {key: value for key, value in node.kwargs.items() if key not in ("stride", "padding", "output_padding")}
    bias = argument(node, "bias", 2, None)
    node.args = (*node.args[:2], bias, stride, [0] * rank, more, *node.args[6:])
    node.kwargs = {key: value for key, value in kept.items() if key != "bias"}
    last = node
    if len(node.users) == 1 and next(iter(node.users)).target in _FUSED:
        last = next(iter(node.users))
    for axis, (p, e) in enumerate(zip(padding, extra, strict=True), 2):
        if p:
            users = list(last.users)
            with model.graph.inserting_after(last):
                end = min(e - p, 0) or _END
                cut = model.graph.call_function(aten.slice.Tensor, (last, axis, p, end))
            for user in users:
                user.replace_input_with(last, cut)
            last = cut


def _each(value: object, rank: int) -> list[int]:
    """A number for each axis, from one for all of them or from a list."""
    found = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]  # type: ignore[call-overload]
    return found * rank if len(found) == 1 else found
