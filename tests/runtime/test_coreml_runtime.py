"""Packages converted from torch compute what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coreml_packages import convert, feeds_of
from torch import Tensor, nn

from octoc.runtime.coreml import open_session


class Call(nn.Module):
    """A function as a module, with submodules passed by keyword."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_children()))


def several(*functions: Callable[[Tensor], Tensor]) -> Call:
    """One program with many outputs, so that one conversion tests many operations."""
    return Call(lambda x: tuple(function(x) for function in functions))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, steps, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mask = torch.ones(steps, steps, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return x + self.out(y.transpose(1, 2).reshape(batch, steps, width))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        return x + self.attention(x, x, x, need_weights=False)[0]


def image(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape),)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "convolutions": (
        lambda: Call(
            lambda x, **parts: tuple(part(x) for part in parts.values()),
            plain=nn.Conv2d(4, 6, 3, padding=1),
            strided=nn.Conv2d(4, 6, 3, stride=2),
            grouped=nn.Conv2d(4, 8, 3, groups=2, bias=False),
            depthwise=nn.Conv2d(4, 4, 5, groups=4, padding=2),
            dilated=nn.Conv2d(4, 6, 3, dilation=2, padding=2),
            same=nn.Conv2d(4, 6, 5, padding="same"),
            uneven=nn.Conv2d(4, 6, (1, 3), padding=(0, 1), stride=(1, 2)),
        ),
        lambda: image(2, 4, 11, 12),
    ),
    "transposed convolutions": (
        lambda: Call(
            lambda x, **parts: tuple(part(x) for part in parts.values()),
            plain=nn.ConvTranspose2d(4, 6, 3),
            strided=nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
            output_padding=nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
            grouped=nn.ConvTranspose2d(4, 6, 3, groups=2),
        ),
        lambda: image(1, 4, 6, 7),
    ),
    "1d": (
        lambda: Call(
            lambda x, conv, up: (conv(x), up(x), F.max_pool1d(x, 3, 2, 1), F.avg_pool1d(x, 3, 2, 1)),
            conv=nn.Conv1d(4, 6, 3, padding=1, dilation=2),
            up=nn.ConvTranspose1d(4, 6, 4, stride=2),
        ),
        lambda: image(1, 4, 15),
    ),
    "3d": (
        lambda: Call(
            lambda x, conv: (conv(x), F.max_pool3d(x, 2, 2), F.avg_pool3d(x, 3, 2, 1)),
            conv=nn.Conv3d(2, 4, 3, padding=1),
        ),
        lambda: image(1, 2, 6, 7, 8),
    ),
    "pooling": (
        lambda: several(
            lambda x: F.max_pool2d(x, 3, 2, 1),
            lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 3, 2, 1),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
            lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
            lambda x: F.adaptive_avg_pool2d(x, 1),
        ),
        lambda: image(1, 3, 12, 13),
    ),
    "normalisations": (
        lambda: Call(
            lambda x, **parts: tuple(part(x) for part in parts.values()),
            batch=nn.BatchNorm2d(4),
            group=nn.GroupNorm(2, 4),
            instance=nn.InstanceNorm2d(4, affine=True),
            layer=nn.LayerNorm([5, 6]),
            local=nn.LocalResponseNorm(3),
        ),
        lambda: image(2, 4, 5, 6),
    ),
    "activations": (
        lambda: several(
            F.relu,
            F.relu6,
            F.gelu,
            F.silu,
            F.elu,
            F.softplus,
            F.hardswish,
            F.hardsigmoid,
            F.softsign,
            F.mish,
            F.selu,
            torch.sigmoid,
            torch.tanh,
            lambda x: F.leaky_relu(x, 0.2),
            lambda x: F.softmax(x, 1),
            lambda x: F.log_softmax(x, -1),
            lambda x: F.threshold(x, 0.3, 0.3),
            lambda x: F.hardtanh(x, -0.4, 0.7),
            lambda x: F.glu(x, 1),
            lambda x: F.prelu(x, torch.linspace(0.1, 0.4, 4)),
        ),
        lambda: image(2, 4, 3, 6),
    ),
    "elementwise": (
        lambda: several(
            torch.abs,
            torch.ceil,
            torch.cos,
            torch.erf,
            torch.exp,
            torch.exp2,
            torch.floor,
            torch.round,
            torch.sign,
            torch.sin,
            torch.square,
            torch.atan,
            torch.cosh,
            torch.sinh,
            lambda x: torch.sqrt(x.abs() + 1),
            lambda x: torch.rsqrt(x.abs() + 1),
            lambda x: torch.log(x.abs() + 1),
            lambda x: torch.acos(torch.tanh(x)),
            lambda x: torch.asin(torch.tanh(x)),
            lambda x: (x.abs() + 1) ** 1.5,
            lambda x: x / (x.abs() + 1) - 2 * x,
            lambda x: torch.maximum(x, -x),
            lambda x: torch.minimum(x, x * x),
            lambda x: torch.remainder(x, 0.7),
            lambda x: torch.floor_divide(x, 0.7),
            lambda x: torch.where(torch.logical_and(x > 0, x < 1), x, 2 * x),
            lambda x: x.clamp(-0.5, 0.5),
        ),
        lambda: image(3, 7),
    ),
    "reductions": (
        lambda: several(
            lambda x: x.sum(1),
            lambda x: x.mean((1, 2), keepdim=True),
            lambda x: x.amax(-1),
            lambda x: x.amin((0, 2)),
            lambda x: x.norm(dim=1),
            lambda x: torch.logsumexp(x, 2),
            lambda x: x.var(2),
            lambda x: x.argmax(1),
            lambda x: x.argmin(-1, keepdim=True),
            lambda x: x.cumsum(1),
            lambda x: torch.topk(x, 2, dim=2).values,
            lambda x: torch.sort(x, dim=1).values,
            lambda x: x.argsort(2, descending=True),
        ),
        lambda: image(3, 4, 5),
    ),
    "layout": (
        lambda: several(
            lambda x: x.reshape(2, -1),
            lambda x: x.permute(3, 0, 2, 1),
            lambda x: torch.cat([x, x[:, :1]], 1),
            lambda x: torch.stack([x, -x], 2),
            lambda x: x[:, 1:3, ::2, -3:],
            lambda x: x[:, 0],
            lambda x: x.split([1, 3], 1)[1],
            lambda x: x.chunk(2, 3)[0],
            lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
            lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
            lambda x: F.pad(x, (1, 2, 2, 1), mode="replicate"),
            lambda x: x.repeat(1, 2, 1, 3),
            lambda x: x.flip(2, 3),
            lambda x: F.pixel_shuffle(x, 2),
            lambda x: F.pixel_unshuffle(x, 2),
            lambda x: x.tril(1),
            lambda x: x.triu(),
            lambda x: x.unsqueeze(1).squeeze(1),
            lambda x: torch.roll(x, 1, 2),
            lambda x: x.index_select(1, torch.tensor([2, 0])),
        ),
        lambda: image(2, 4, 6, 8),
    ),
    "gather": (
        lambda: Call(
            lambda x, i: (torch.gather(x, 1, i.long()), x[:, i[0, :2].long()], x[i[:, 0].long(), i[:, 1].long()])
        ),
        lambda: (torch.randn(3, 5), torch.tensor([[0, 4, 2], [1, 1, 3], [2, 0, 0]], dtype=torch.int32)),
    ),
    "resizing": (
        lambda: several(
            lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
            lambda x: F.interpolate(x, size=(9, 11), mode="bilinear", align_corners=True),
        ),
        lambda: image(1, 3, 5, 6),
    ),
    "sampling": (
        lambda: Call(
            lambda x, g: (
                F.grid_sample(x, g, align_corners=False),
                F.grid_sample(x, g, padding_mode="border", align_corners=True),
                F.grid_sample(x, g, padding_mode="reflection", align_corners=False),
                F.grid_sample(x, g, mode="nearest", align_corners=True),
            )
        ),
        lambda: (torch.randn(1, 2, 5, 6), torch.rand(1, 4, 4, 2) * 3 - 1.5),
    ),
    "products": (
        lambda: Call(
            lambda x, y: (x @ y, torch.einsum("bij,bjk->bik", x, y), x @ x.transpose(1, 2), torch.bmm(x, y)),
        ),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 4, 5)),
    ),
    "causal attention": (Attention, lambda: image(2, 6, 16)),
    "tokens": (Embedded, lambda: (torch.tensor([[1, 5, 19, 0]], dtype=torch.int32),)),
}
TRACED = {
    "lstm": (lambda: Call(lambda x, net: net(x), net=nn.LSTM(5, 7, 2)), lambda: image(6, 2, 5)),
    "bidirectional lstm": (
        lambda: Call(lambda x, net: net(x), net=nn.LSTM(5, 7, bidirectional=True, batch_first=True)),
        lambda: image(2, 6, 5),
    ),
    "gru": (lambda: Call(lambda x, net: net(x), net=nn.GRU(5, 7)), lambda: image(6, 2, 5)),
    "rnn": (lambda: Call(lambda x, net: net(x), net=nn.RNN(5, 7)), lambda: image(6, 2, 5)),
}
ALL = {**MODULES, **TRACED}


def flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


Case = tuple[nn.Module, tuple[Tensor, ...], Path]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Module, inputs and float32 package by name; each is converted once."""

    @cache
    def make(name: str) -> Case:
        torch.manual_seed(0)
        make_module, make_inputs = ALL[name]
        module, inputs = make_module().eval(), make_inputs()
        return module, inputs, convert(module, inputs, tmp_path_factory.mktemp("case"), traced=name in TRACED)

    return make


@pytest.mark.parametrize("name", ALL)
def test_a_converted_module_computes_what_torch_computes(name: str, case: Callable[[str], Case]) -> None:
    module, inputs, path = case(name)
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in flat(module(*inputs))]
    session = open_session(path)
    outputs = session.run(feeds_of(session, inputs))
    assert len(expected) == len(session.outputs)
    for index, (spec, wanted) in enumerate(zip(session.outputs, expected, strict=True)):
        got = outputs[spec.name]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=f"output {index} of {name}")
        assert got.dtype == spec.dtype
        assert all(want in (None, have) for want, have in zip(spec.shape, got.shape, strict=True))


@pytest.mark.parametrize("name", ["convolutions", "normalisations", "causal attention", "lstm"])
def test_a_float16_package_agrees_to_float16_precision(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    make_module, make_inputs = ALL[name]
    module, inputs = make_module().eval(), make_inputs()
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in flat(module(*inputs))]
    session = open_session(convert(module, inputs, tmp_path, "FLOAT16", traced=name in TRACED))
    feeds = feeds_of(session, inputs)
    outputs = session.run(feeds)
    for spec, wanted in zip(session.outputs, expected, strict=True):
        np.testing.assert_allclose(outputs[spec.name].astype(np.float32), wanted, rtol=5e-3, atol=5e-3)
    halves = [value for record in session.trace(feeds) for value in record.outputs.values()]
    assert any(value.dtype == np.float16 for value in halves)


@pytest.mark.parametrize("name", ALL)
def test_many_calls_at_once_give_the_numbers_of_separate_calls(name: str, case: Callable[[str], Case]) -> None:
    _, inputs, path = case(name)
    session = open_session(path)
    calls = []
    for n in range(3):
        changed = (x.roll(n, 0) if x.dtype == torch.int32 else x.roll(n, 0) * (1 + n / 2) for x in inputs)
        calls.append(feeds_of(session, changed))
    many = session.run_many({name: np.stack([call[name] for call in calls]) for name in calls[0]})
    for number, call in enumerate(calls):
        for output, value in session.run(call).items():
            np.testing.assert_allclose(many[output][number], value, rtol=1e-5, atol=1e-5, err_msg=output)


def test_the_trace_names_every_operation_and_ends_in_the_outputs(case: Callable[[str], Case]) -> None:
    _, inputs, path = case("causal attention")
    session = open_session(path)
    feeds = feeds_of(session, inputs)
    records = session.trace(feeds)
    defined = {name: value for record in records for name, value in record.outputs.items()}
    assert {"linear", "softmax"} & {record.kind for record in records}
    assert "const" not in {record.kind for record in records}
    for name, value in session.run(feeds).items():
        np.testing.assert_array_equal(defined[name], value)


def test_a_flexible_dimension_takes_any_size(tmp_path: Path) -> None:
    path = convert(nn.Linear(4, 3), image(2, 4), tmp_path, traced=True, flexible=True)
    session = open_session(path, threads=1)
    assert session.inputs[0].shape == (None, 4)
    for rows in (1, 5):
        assert session.run({"in0": np.ones((rows, 4), np.float32)})[session.outputs[0].name].shape == (rows, 3)
