"""Branches, loops, lists and states.

A list is a Python list that is copied on writing; a state is the only value that is changed in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octoc.runtime.mil.operation import BlockCall, Ints, Table


@dataclass
class State:
    """A value that outlives one call: its tensor now, and its declared MIL type."""

    value: Tensor
    dtype: str


def cond(pred: bool, blocks: Any) -> list[Any]:
    chosen: BlockCall = blocks[0] if pred else blocks[1]
    return chosen([])


def while_loop(loop_vars: Any, blocks: Any) -> list[Any]:
    go_on, body = blocks
    values = list(loop_vars)
    while bool(go_on(values)[0]):
        values = body(values)
    return values


def make_list(
    init_length: int = 1, dynamic_length: bool = True, elem_shape: Any = None, dtype: str = "fp32"
) -> list[Tensor | None]:
    return [None] * init_length


def list_length(ls: Any) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


def list_write(ls: Any, index: int, value: Tensor) -> list[Tensor | None]:
    written = list(ls) + [None] * (index + 1 - len(ls))
    written[index] = value
    return written


def list_read(ls: Any, index: int) -> Tensor:
    value: Tensor = ls[index]
    return value


def list_gather(ls: Any, indices: Ints) -> Tensor:
    return torch.stack([ls[index] for index in indices])


def list_scatter(ls: Any, indices: Ints, value: Tensor) -> list[Tensor | None]:
    for index, element in zip(indices, value, strict=True):
        ls = list_write(ls, index, element)
    return list(ls)


def read_state(input: Any) -> Tensor:
    value: Tensor = input.value
    return value


def write_state(input: Any, data: Tensor) -> tuple[()]:
    input.value = data
    return ()


def coreml_update_state(state: Any, value: Tensor) -> Tensor:
    state.value = value
    return value


OPERATIONS: Table = {
    "cond": cond,
    "coreml_update_state": coreml_update_state,
    "list_gather": list_gather,
    "list_length": list_length,
    "list_read": list_read,
    "list_scatter": list_scatter,
    "list_write": list_write,
    "make_list": make_list,
    "read_state": read_state,
    "while_loop": while_loop,
    "write_state": write_state,
}
