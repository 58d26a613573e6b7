"""Recurrent layers: x is [steps, batch, features], a state is [batch, hidden]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octoc.runtime.mil.operation import Table, UnsupportedOperation

# hard_sigmoid and scaled_tanh have constants that the operation reference does not state
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise UnsupportedOperation(f"recurrent activation {name!r}")
    return _ACTIVATIONS[name]


def _order(steps: int, direction: str) -> range:
    orders = {"forward": range(steps), "reverse": range(steps - 1, -1, -1)}
    if direction not in orders:
        raise UnsupportedOperation(f"recurrent direction {direction!r}")
    return orders[direction]


def _sequence(states: list[Tensor], output_sequence: bool) -> Tensor:
    """States in the order they were computed: all of them, or the last."""
    return torch.stack(states) if output_sequence else states[-1].unsqueeze(0)


def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    activate = _activation(activation)
    projected = x @ weight_ih.T + (0 if bias is None else bias)  # [steps, batch, hidden]
    hidden, states = initial_h, []
    for step in _order(x.shape[0], direction):
        hidden = activate(projected[step] + hidden @ weight_hh.T)
        states.append(hidden)
    return _sequence(states, output_sequence), hidden


def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order reset, output, update. The reset gate scales h before, or after, its product."""
    gate, activate = _activation(recurrent_activation), _activation(activation)
    projected = (x @ weight_ih.T + (0 if input_bias is None else input_bias)).chunk(3, -1)
    w_reset, w_out, w_update = weight_hh.chunk(3)
    zero = torch.zeros(weight_hh.shape[0])
    b_reset, b_out, b_update = (zero if bias is None else bias).chunk(3)
    hidden, states = initial_h, []
    for step in _order(x.shape[0], direction):
        reset = gate(projected[0][step] + hidden @ w_reset.T + b_reset)
        update = gate(projected[2][step] + hidden @ w_update.T + b_update)
        after, before = hidden @ w_out.T, (reset * hidden) @ w_out.T
        recurrent = reset * (after + b_out) if reset_after else before + b_out
        candidate = activate(projected[1][step] + recurrent)
        hidden = (1 - update) * candidate + update * hidden
        states.append(hidden)
    return _sequence(states, output_sequence), hidden


def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order input, forget, output, cell. Both directions are concatenated in the last axis."""
    functions = _activation(recurrent_activation), _activation(cell_activation), _activation(activation)
    if direction != "bidirectional":
        states, h, c = _lstm_pass(
            x, initial_h, initial_c, weight_ih, weight_hh, bias, peephole, direction, functions, clip
        )
        return _sequence(states, output_sequence), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise UnsupportedOperation("bidirectional lstm without backward weights")
    h0, c0 = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    ahead, h, c = _lstm_pass(x, h0[0], c0[0], weight_ih, weight_hh, bias, peephole, "forward", functions, clip)
    back, h_back, c_back = _lstm_pass(
        x, h0[1], c0[1], weight_ih_back, weight_hh_back, bias_back, peephole_back, "reverse", functions, clip
    )
    # Step t of the sequence holds both directions' states at time t; the single output holds both last states.
    back_sequence = list(reversed(back)) if output_sequence else back
    joined = torch.cat([_sequence(ahead, output_sequence), _sequence(back_sequence, output_sequence)], -1)
    return joined, torch.cat([h, h_back], -1), torch.cat([c, c_back], -1)


def _lstm_pass(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    direction: str,
    functions: tuple[Callable[[Tensor], Tensor], ...],
    clip: float | None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    gate, cell, activate = functions
    projected = x @ weight_ih.T + (0 if bias is None else bias)  # [steps, batch, 4 * hidden]
    peeps = torch.zeros(3, h.shape[-1]) if peephole is None else peephole.reshape(3, -1)
    states = []
    for step in _order(x.shape[0], direction):
        enter, forget, out, new = (projected[step] + h @ weight_hh.T).chunk(4, -1)
        c = gate(forget + peeps[1] * c) * c + gate(enter + peeps[0] * c) * cell(new)
        if clip is not None:
            c = c.clamp(-clip, clip)
        h = gate(out + peeps[2] * c) * activate(c)
        states.append(h)
    return states, h, c


OPERATIONS: Table = {"gru": gru, "lstm": lstm, "rnn": rnn}
