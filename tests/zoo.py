"""Small networks, each with something that some converter or quantizer gets silently wrong, and what judges them.

An artefact is run by its own runtime and compared with the module that it was made from: nothing of octoc's own
verification is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import octoc
from octoc.data import Dataset
from octoc.evaluate import open_session, predict
from octoc.qtensor import Array
from octoc.report import ArtifactReport, Report

# By their first formats: Core ML, TFLite, ONNX.
DEVICES = ("iphone-15-pro", "pixel-8", "raspberry-pi-5")
FORMATS = ("coreml", "tflite", "onnx")
COUNT = 40


class Graph(nn.Module):
    """A network written as one function of its parts and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


@dataclass(frozen=True)
class Case:
    """A network and its samples.

    Args:
        make: builds it.
        inputs: [samples, ...] each.
        options: of `compress_model`.
        batch: samples in one call of the module, where it does not take any number.
        limit: largest difference allowed, as a share of the largest output: what 8-bit weights cost here.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Array, ...]
    options: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None
    limit: float = 0.02


def normal(*shape: int, count: int = COUNT, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def whole(*shape: int, below: int) -> Array:
    return np.random.default_rng(0).integers(0, below, (COUNT, *shape))


def some_zeros(x: Array) -> Array:
    x[::3] = 0
    x[1::3, ::2] = 0
    return x


def gelu() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 8))


def tiny_addend() -> nn.Module:
    return Graph(lambda own, x: own.head(x / (x.abs() + 1e-12)), head=nn.Linear(16, 8))


def dead_channel() -> nn.Module:
    first = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        first.weight[2] = 0
        first.bias[2] = 0
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


def ten_channels() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))


def scalar() -> nn.Module:
    return Graph(lambda own, x: own.head(x).square().mean(), head=nn.Linear(16, 8))


def tied() -> nn.Module:
    """One matrix is the embedding and the last layer."""
    network = Graph(
        lambda own, i: own.head(F.relu(own.middle(own.embedding(i)))),
        embedding=nn.Embedding(20, 16),
        middle=nn.Linear(16, 16),
        head=nn.Linear(16, 20, bias=False),
    )
    network.head.weight = network.embedding.weight
    return network


def channels_last() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def masked_attention() -> nn.Module:
    def function(own: Any, x: Tensor) -> Tensor:
        q, k, v = own.project(x).chunk(3, -1)
        return own.out(((q @ k.transpose(1, 2)) * 0.25 + own.mask).softmax(-1) @ v)

    mask = torch.full((6, 6), float("-inf")).triu(1)
    return Graph(function, project=nn.Linear(16, 48), out=nn.Linear(16, 16), mask=mask)


def dilated_depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def two_inputs() -> nn.Module:
    """One of them whole numbers."""
    return Graph(
        lambda own, x, i: own.head(x) * own.embedding(i).sigmoid(), head=nn.Linear(16, 8), embedding=nn.Embedding(5, 8)
    )


def two_outputs() -> nn.Module:
    return Graph(lambda own, x: (own.one(x), own.other(x).relu()), one=nn.Linear(16, 8), other=nn.Linear(16, 3))


def pairs() -> nn.Module:
    """Takes exactly two samples a call."""
    return Graph(
        lambda own, x: own.body(x).reshape(2, 40) @ own.mix, body=nn.Linear(16, 8), mix=nn.Parameter(torch.randn(40, 3))
    )


# What octoc is asked for in every run of the quick tests.
CASES: dict[str, Case] = {
    "tanh-GELU": Case(gelu, (normal(16),)),
    "x / (|x| + 1e-12) of zeros": Case(tiny_addend, (some_zeros(normal(16)),)),
    "an all-zero channel": Case(dead_channel, (normal(3, 8, 8),)),
    "ten channels": Case(ten_channels, (normal(10),)),
    "a scalar output": Case(scalar, (normal(16),), batch=1),
    "a matrix used twice": Case(tied, (whole(6, below=20),)),
    "channels last": Case(channels_last, (normal(8, 8, 3).transpose(0, 3, 1, 2),)),
    "a mask of -inf": Case(masked_attention, (normal(6, 16),)),
    "a dilated depthwise convolution": Case(dilated_depthwise, (normal(8, 12, 12),)),
    "two inputs, one of whole numbers": Case(two_inputs, (normal(16), whole(below=5))),
    "two outputs": Case(two_outputs, (normal(16),)),
    "a batch of two": Case(pairs, (normal(5, 16),), batch=2),
}


def audio() -> nn.Module:
    first = (nn.Conv1d(1, 8, 16, 4), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(4))
    return nn.Sequential(*first, nn.Conv1d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 10))


def recurrent(kind: type[nn.LSTM] | type[nn.GRU]) -> nn.Module:
    return Graph(
        lambda own, x: own.head(own.body(x)[0][:, -1]), body=kind(8, 16, batch_first=True), head=nn.Linear(16, 4)
    )


def in_place() -> nn.Module:
    def function(own: Any, x: Tensor) -> Tensor:
        y = own.drop(own.body(x)).add_(1)
        y *= y.sigmoid()
        return own.head(F.relu_(y).flatten(1))

    return Graph(function, body=nn.Conv2d(3, 4, 3), drop=nn.Dropout(), head=nn.Linear(144, 5))


def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))


def shifted_norm() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    assert norm.running_mean is not None
    norm.running_mean += torch.tensor([1.0, 2.0, 3.0])
    return norm


def huge_kernel() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 31, padding=15), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# Other kinds of networks that a user has: the long tests.
MORE: dict[str, Case] = {
    "one-dimensional convolutions": Case(audio, (normal(1, 400),)),
    "an LSTM": Case(lambda: recurrent(nn.LSTM), (normal(10, 8),)),
    "a GRU": Case(lambda: recurrent(nn.GRU), (normal(10, 8),)),
    "a transformer's layer": Case(lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (normal(6, 16),)),
    "dropout and operations in place": Case(in_place, (normal(3, 8, 8),)),
    "three-dimensional convolutions": Case(volume, (normal(2, 6, 8, 8),)),
    "a batch norm alone": Case(shifted_norm, (normal(3, 8, 8),)),
    "no weights at all": Case(lambda: Graph(lambda own, x: 2 * x.tanh()), (normal(16),)),
    "a kernel of 31": Case(huge_kernel, (normal(3, 40, 40),)),
}


class Convolutional(nn.Module):
    """Ordinary, depthwise and pointwise convolutions, batch norm, two kinds of ReLU, a shortcut, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6())
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.max_pool2d(torch.relu(x + self.point(self.deep(x))), 2)
        return self.head(x.mean((2, 3)))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def compressed(network: nn.Module, inputs: Sequence[Array], out: Path, **options: Any) -> Report:
    """The network for `DEVICES`, judged by the cosine to the original on these samples."""
    given = {"devices": DEVICES, "data": Dataset(tuple(inputs), None, "some samples"), "out": out} | options
    return octoc.compress_model(network, **given)


def answers(artifact: ArtifactReport, out: Path, inputs: Sequence[Array]) -> list[Array]:
    """What the file gives, run by its own runtime."""
    assert artifact.path is not None
    return predict(open_session(artifact.format, out / artifact.path), inputs)


def expected(network: nn.Module, inputs: Sequence[Array], batch: int | None = None) -> list[Array]:
    """What the module gives in calls of `batch` samples; an output without samples stands for its call."""
    size = batch or len(inputs[0])
    columns: list[list[Array]] = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), size):
            found = network(*(torch.from_numpy(np.ascontiguousarray(x[start : start + size])) for x in inputs))
            outputs = [found] if isinstance(found, Tensor) else list(found)
            columns.append([np.atleast_1d(value.numpy()) for value in outputs])
    return [np.concatenate(column) for column in zip(*columns, strict=True)]


def difference(found: Sequence[Array], wanted: Sequence[Array]) -> float:
    """Largest difference as a share of the largest output; both must have the same shapes and be finite."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(a).all()
        worst = max(worst, float(np.abs(a - b).max() / np.abs(b).max()))
    return worst
