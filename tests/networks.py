"""Networks that tests of several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def asset(relative: str) -> Path:
    """A file of the folder that OCTOC_ASSETS names; the test is skipped where there is none."""
    folder = os.environ.get("OCTOC_ASSETS")
    if not folder:
        pytest.skip("OCTOC_ASSETS names no folder of trained networks")
    path = Path(folder) / relative
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:  # the shortcut without parameters
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al., 2015, section 4.2: three stages of `blocks` blocks for 32x32 images."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        later = [_Block(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_Block(inputs, outputs, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def trained_resnet20() -> CifarResNet:
    """ResNet-20, trained on CIFAR-10."""
    network = CifarResNet(3)
    stored = torch.load(asset("resnet_cifar10_a/resnet20-12fca82f.th"), map_location="cpu", weights_only=True)
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored["state_dict"].items()})
    return network.eval()
