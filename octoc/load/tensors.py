"""A program's parameters, buffers and constants -> plain float32 or integer tensors, or the reason why not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from octoc.errors import ModelError

FLOATS = (torch.float64, torch.float16, torch.bfloat16)  # dtypes that become float32


def plain(name: str, tensor: Tensor, kind: InputKind) -> Tensor:
    """A dense CPU tensor; floats become float32, which is what the formats compute in.

    Args:
        name: for the error.
        tensor: as the program holds it; not changed.
        kind: a parameter must be finite, a buffer may hold -inf (attention masks do), a constant any infinity.

    Raises:
        ModelError: no values, values that no format holds, or values that are NaN or infinite where none may be.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        raise ModelError(f"weight {name} has a shape and no values (a meta tensor); load its weights first")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        form = tensor.dtype if tensor.is_quantized or tensor.is_complex() else tensor.layout
        raise ModelError(f"weight {name} is {form}; octoc takes dense real tensors, so give the network before that")
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise ModelError(f"weight {name} is a {type(tensor).__name__}; octoc takes plain tensors")
    dense = tensor.detach().cpu().contiguous()
    if not dense.is_floating_point():
        return dense
    single = dense.to(torch.float32)
    _check_values(name, dense, single, kind)
    return single


def _check_values(name: str, given: Tensor, single: Tensor, kind: InputKind) -> None:
    bad = torch.isnan(single)
    if kind == InputKind.PARAMETER:
        bad |= torch.isinf(single)
    elif kind == InputKind.BUFFER:
        bad |= torch.isposinf(single)
    if count := int(bad.sum()):
        raise ModelError(f"weight {name}: {count} of {given.numel()} values are NaN or infinite")
    overflown = torch.isinf(single) & torch.isfinite(given) if given.dtype == torch.float64 else bad
    if count := int(overflown.sum()):
        raise ModelError(f"weight {name}: {count} of {given.numel()} values are beyond float32")
