"""A small network with every kind of compressed weight, for the tests of what trains."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.apply import encode_biases, quantize_activations
from octoc.compressed import Compressed
from octoc.graph import fold_batch_norm
from octoc.load import load_model
from octoc.model import Model
from octoc.qtensor import Array, QTensor, Scheme
from octoc.quantize import encode
from octoc.quantize.activations import calibrate

SCHEMES = {
    "first.weight": "int3-channel",
    "second.weight": "palette2-group2",
    "third.weight": "int4-tensor-sparse",
    "fourth.weight": "float16",
    "last.weight": "int8-channel",
}


class Residual(nn.Module):
    """A convolution, a residual block, one more, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.fourth = nn.Conv2d(4, 6, 1)
        self.last = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(x + self.third(F.relu(self.second(x))))
        return self.last(F.relu(self.fourth(x)).mean((2, 3)))


def samples(count: int = 40) -> Array:
    """Correlated images, float32 [count, 2, 6, 6]."""
    noise = np.random.default_rng(1).standard_normal((count, 2, 8, 8))
    smooth = sum(noise[:, :, i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 3
    return smooth.astype(np.float32)


@cache
def network() -> Model:
    """The network in floats, some of the third convolution's weights zero."""
    torch.manual_seed(0)
    module = Residual().eval()
    with torch.no_grad():
        module.third.weight *= torch.rand(module.third.weight.shape) < 0.7
        module.last.weight *= 4
    return fold_batch_norm(load_model(module, examples=[torch.zeros(2, 2, 6, 6)]))


def compressed(model: Model, dtype: str = "float32") -> Compressed:
    """The network with int8 activations and one encoding of each kind."""
    ranges = calibrate(model, [(torch.from_numpy(samples(8)),)])
    quantized = quantize_activations(model, ranges)
    coded: dict[str, QTensor] = {
        name: encode(model.tensors[name].numpy(), Scheme.parse(text), 0, dtype=dtype) for name, text in SCHEMES.items()
    }
    return Compressed(quantized, {**coded, **encode_biases(quantized, coded)})
