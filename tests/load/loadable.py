"""Small networks, each with something that a reader must get right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

torch.manual_seed(0)


class Classifier(nn.Module):
    """Convolution, batch norm with statistics of its own, in-place ReLU, dropout, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 5)
        nn.init.uniform_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(input)))
        y += input[:, :1]
        return self.head(self.drop(y).mean((2, 3)))


class InPlaceOnInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(x) * 2


class InPlaceThroughView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y.relu_() + y


class InPlaceUnderView(nn.Module):
    """A view taken before the write sees it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y[:, 1:]
        y.relu_()
        return view * 3


class WithoutGradient(nn.Module):
    """A block under no_grad, which torch.export keeps as a graph inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.body(x).relu()
        return self.head(y)


class NamedOutputs(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": x * 2, "x": [x + 1, x + 2], "aux.loss": x - 1, "nothing": None}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


class TwoInputs(nn.Module):
    """Integer token ids, and a mask that can only be given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, ids: Tensor, *, mask: Tensor, scale: float = 2.0) -> Tensor:
        return (self.table(ids) * mask[..., None]).sum(1) * scale


class Scaled(nn.Module):
    """An input without dimensions."""

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor


class Variadic(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]


class Masked(nn.Module):
    """Attention with an -inf mask."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(1, 2) + self.mask, -1) @ x


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


class BatchOfOne(nn.Module):
    """Written for one sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 12)


class Flattened(nn.Module):
    """A view that is valid only where a convolution's output is laid out channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.permute(0, 2, 3, 1).view(y.shape[0], -1) + 0.5


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Mixed(nn.Module):
    """A block under autocast, which becomes float32 like the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.body(x)
        return y.float() + 1


class Mean(nn.Module):
    """A scalar output, which no free batch can give."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class Counting(nn.Module):
    """State that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class Shape(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, x.shape[0]


class DataDependent(nn.Module):
    """Python control flow on values, which torch.export refuses."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x
