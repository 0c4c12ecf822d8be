"""The residual networks for 32 × 32 images of He et al. (2015, arXiv:1512.03385), section 4.2.

A 3 × 3 convolution, three stages of n blocks with 16, 32 and 64 features on 32 × 32, 16 × 16 and 8 × 8
positions, global average pooling and a linear layer: 6n + 2 weighted layers. All shortcuts are the paper's
option A, without parameters. Module names follow the checkpoints in public use, so that these load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut: (N, inputs, H, W) → (N, features, H / stride, W / stride)."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.stride = stride
        self.missing = features - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th position, and zeros for the features that x lacks.

        The paper leaves open on which side the zeros go; the checkpoints were trained with half on each.
        """
        if self.stride == 1 and self.missing == 0:
            return x
        before = self.missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))


class CifarResNet(nn.Module):
    """The network of depth 6n + 2 with n blocks a stage: images (N, 3, H, W) → logits (N, num_classes).

    Its stages have `width`, 2 `width` and 4 `width` features, and its first convolution a `stride`; 16 and 1 in the
    paper.
    """

    def __init__(self, blocks: int, num_classes: int = 10, width: int = 16, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """20 weighted layers, 0.27 million parameters."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """56 weighted layers, 0.85 million parameters."""
    return CifarResNet(9, num_classes)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, without `nn.DataParallel`'s prefix and the dict around it."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state: Mapping[str, Tensor] = content.get("state_dict", content)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _stage(inputs: int, features: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, features, stride)
    return nn.Sequential(first, *(BasicBlock(features, features, 1) for _ in range(blocks - 1)))
