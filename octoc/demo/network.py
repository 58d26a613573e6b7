"""A small convolutional network for handwritten digits of 8 x 8 pixels: 37,418 parameters.

It has what phones' networks are made of: convolutions with batch norm, a depthwise one, two residual additions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH = 64


class Digits(nn.Module):
    """[n, 1, 8, 8] pixels from 0 to 1 -> [n, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _block(1, 32, 3)
        self.depthwise = _block(32, 32, 3, groups=32)
        self.pointwise = _block(32, 32, 1)
        self.down = _block(32, 48, 3, stride=2)
        self.deep = _block(48, 48, 3)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.pointwise(functional.relu(self.depthwise(x))))
        x = functional.relu(self.down(x))
        x = functional.relu(x + self.deep(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def _block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def digits() -> nn.Module:
    """The untrained network: what `octoc compress octoc.demo.network:digits` names."""
    return Digits()


def train(x: Tensor, y: Tensor, epochs: int, seed: int) -> Digits:
    """Trains from scratch; the same seed gives the same weights on the same kind of processor.

    Args:
        x: [n, 1, 8, 8] pixels.
        y: [n] labels.
        epochs: passes over the samples.
        seed: of the weights and of the order of the samples.
    """
    threads = torch.get_num_threads()
    # Threads cost more than they bring on arrays this small, and their number would change the weights.
    torch.set_num_threads(1)
    try:
        return _train(x, y, epochs, seed)
    finally:
        torch.set_num_threads(threads)


def _train(x: Tensor, y: Tensor, epochs: int, seed: int) -> Digits:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = digits().train()
        assert isinstance(network, Digits)
        steps = epochs * (len(x) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH):
                optimizer.zero_grad()
                functional.cross_entropy(network(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return network.eval()
