"""What an operation's function looks like, and how a MIL operation is bound to it.

A function takes the operation's parameters by their MIL names. Its annotations say in which form it wants each:
`Tensor` as it is, `int`, `float`, `bool`, `str`, `Ints` and `Bools` as plain Python. Floating-point tensors are
float32 whatever their MIL type (the evaluator rounds each result to its declared type), integers narrower than
a byte are int8 or uint8.

    def clip(x: Tensor, alpha: float, beta: float) -> Tensor: ...

A parameter that the function does not know is an error: it would change the meaning.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from octoc.errors import ArtifactError

Ints = tuple[int, ...]
Bools = tuple[bool, ...]
Tensors = list[Tensor]
Function = Callable[..., Any]
Table = dict[str, Function]
BlockCall = Callable[[Sequence[Any]], list[Any]]


class UnsupportedOperation(ArtifactError):  # noqa: N818  (it names the operation, not a fault of the file)
    """An operation, or a parameter of one, that the evaluator does not implement."""


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, Tensor):
        return list(value.reshape(-1).tolist())
    return [_scalar(item) for item in value]


def _as_given(value: Any) -> Any:
    return value


_CONVERSIONS: dict[Any, Callable[[Any], Any]] = {
    Tensor: _as_given,
    Any: _as_given,
    str: str,
    int: lambda value: int(_scalar(value)),
    float: lambda value: float(_scalar(value)),
    bool: lambda value: bool(_scalar(value)),
    int | float: _scalar,
    Ints: lambda value: tuple(int(number) for number in _numbers(value)),
    Bools: lambda value: tuple(bool(number) for number in _numbers(value)),
    Tensors: lambda value: value if isinstance(value, list) else [value],
}


def reads_number(convert: Callable[[Any], Any]) -> bool:
    """Whether a conversion reads a tensor's elements, which a vectorised run cannot do for data."""
    return convert not in (_as_given, _CONVERSIONS[Tensors])


@cache
def conversions(function: Function) -> dict[str, Callable[[Any], Any]]:
    """Conversion by parameter name, from the function's annotations."""
    result = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        wanted = parameter.annotation
        members = getattr(wanted, "__args__", ())
        if type(None) in members:
            wanted = next(iter([m for m in members if m is not type(None)])) if len(members) == 2 else wanted
        result[name] = _CONVERSIONS[wanted]
    return result


def axes_of(x: Tensor, axes: Ints | None) -> Ints:
    """Axes as non-negative numbers; all of them for None."""
    rank = x.dim()
    return tuple(range(rank)) if axes is None else tuple(axis % rank for axis in axes)


def per_channel(values: Tensor, rank: int, axis: int = 1) -> Tensor:
    """values [C] shaped to broadcast along `axis` of a tensor of the given rank; a scalar stays one."""
    if values.dim() == 0:
        return values
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def is_float(x: Tensor) -> bool:
    """Whether x holds floating-point numbers."""
    return torch.is_floating_point(x)
