"""scikit-learn's 1,797 handwritten digits as tensors, the tasks they make, and a small network for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), float32 in [0, 1], and labels (N,); a quarter is for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def task(self, classes: Sequence[int]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test data of some classes, with labels that count from 0 in their order."""

        def of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.isin(labels, torch.tensor(classes))
            return images[rows], torch.stack([labels[rows] == c for c in classes]).long().argmax(0)

        return of(self.train_images, self.train_labels), of(self.test_images, self.test_labels)


def load(seed: int) -> Digits:
    """The digits, split by `seed`."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
    return Digits(images[train], labels[train], images[test], labels[test])


def network(classes: int, width: int = 32) -> nn.Module:
    """A small convolutional network, (N, 1, 8, 8) → (N, classes)."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, classes),
    )


def perceptron(classes: int, width: int = 64) -> nn.Module:
    """Two hidden layers of `width` features, (N, 64) → (N, classes)."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
