"""Trained networks and real samples that tests of several rooms share."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octoc.qtensor import Array

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


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


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise convolution, then one of single pixels."""
    return nn.Sequential(*_convolution(inputs, inputs, 3, stride, inputs), *_convolution(inputs, outputs, 1, 1, 1))


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1)


class MobileNet(nn.Module):
    """Howard et al., 2017, a quarter as wide and with leaky ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(*_convolution(3, 8, 3, 2, 1))
        steps = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.stage1 = nn.Sequential(first, *(_separable(*step) for step in steps))
        self.stage2 = nn.Sequential(_separable(64, 128, 2), *(_separable(128, 128, 1) for _ in range(5)))
        self.stage3 = nn.Sequential(_separable(128, 256, 2), _separable(256, 256, 1))
        self.fc = nn.Linear(256, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


def trained_mobilenet() -> MobileNet:
    """MobileNetV1 of width 0.25, trained on ImageNet."""
    network = MobileNet()
    path = asset("mobilenetv1_025/mobilenetV1X0.25_pretrain.tar")
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): tensor for name, tensor in stored.items()})
    return network.eval()


def cifar10_test() -> tuple[Array, Array]:
    """The first 1000 test images: float32 [1000, 3, 32, 32] and labels int64 [1000]."""
    return _cifar10(50)


def cifar10_train(count: int) -> tuple[Array, Array]:
    """The first training images, at most 1000."""
    x, y = _cifar10(0)
    return x[:count], y[:count]


def _cifar10(batch: int) -> tuple[Array, Array]:
    """One picture holds a batch, an image a row; the labels are those of all batches in order."""
    labels = json.loads(asset("cifar10_lossless/cifar10_labels.js").read_text().partition("=")[2].strip(" ;\n"))
    pixels = _pixels(asset(f"cifar10_lossless/cifar10_batch_{batch}.png").read_bytes()).reshape(1000, 32, 32, 3)
    return _normalised(pixels), np.array(labels[1000 * batch :][:1000], np.int64)


def imagenet_halves() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Two halves of 500 images of as many classes: float32 [250, 3, 224, 224] and labels int64 [250] each."""
    with zipfile.ZipFile(asset("imagenet_sample_a/crops224.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        x = np.stack([_normalised(_pixels(archive.read(name))) for name in names])
    y = np.array([int(Path(name).name[:4]) for name in names], np.int64)
    return (x[0::2], y[0::2]), (x[1::2], y[1::2])


def _pixels(picture: bytes) -> Array:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def _normalised(pixels: Array) -> Array:
    """Bytes [..., height, width, 3] -> float32 [..., 3, height, width] as both networks were trained on."""
    return np.ascontiguousarray(np.moveaxis((pixels.astype(np.float32) / 255 - MEAN) / DEVIATION, -1, -3))
