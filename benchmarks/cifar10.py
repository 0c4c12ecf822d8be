"""CIFAR-10 as tensors, from a folder or by download, and the light augmentation that suits it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# Channel statistics of ImageNet: what the public CIFAR-10 checkpoints were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

ARCHIVE = "cifar10-jpeg.tar.xz"
EXTRACTED = "cifar-10-batches-py"

# Quality 75 with halved chroma costs a network that knows only the original pixels ten points: the resnet20
# checkpoint of 91.7 % answers 81.0 % of the archive's test images correctly.
JPEG_SOURCE = "CIFAR-10 as JPEG (lossy: quality 75, chroma halved): accuracies lie below those on the original pixels"


class DataError(Exception):
    """The data set is not where it was looked for; the message says what would do."""


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 in memory.

    Images are uint8 of shape (N, 3, 32, 32), labels int64 of shape (N,), N being 50,000 for training and
    10,000 for testing. `source` says where the pixels come from, and is to stand beside every figure made
    with them.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


def load(data: Path | None = None) -> Cifar10:
    """CIFAR-10 from the folder `data`, or through torchvision's downloader if that is None.

    A folder may hold the original pixels as torchvision lays them out (`cifar-10-batches-py`) or the same
    images as JPEG files in one archive (`cifar10-jpeg.tar.xz`: `train/<class>/*.jpg`, `test/<class>/*.jpg`).
    Nothing is written to it: decoded images are kept in the user's cache. Raises `DataError` if there is
    neither.
    """
    if data is None:
        return _original(_cache(), download=True)
    if (data / EXTRACTED).is_dir():
        return _original(data, download=False)
    if (data / ARCHIVE).is_file():
        return _jpeg(data / ARCHIVE)
    raise DataError(f"{data}: neither {EXTRACTED}/ nor {ARCHIVE} in it; without --data, CIFAR-10 is downloaded")


def normalise(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) as float32, shifted and scaled by `MEAN` and `STD`."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(3, 1, 1) * 255
    return (images - mean) / std


def augment(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image mirrored with probability one half and shifted by up to `padding` pixels over black.

    Takes and returns uint8 images (N, C, H, W). The whole batch is one gather: sample n reads rows y[n] + i
    and columns x[n] + j of its padded self, the columns backwards where it is mirrored. `generator` lives on
    the images' device.
    """
    count, channels, height, width = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count, 1), generator=generator, device=device)

    rows = draw(2 * padding + 1) + torch.arange(height, device=device)
    columns = draw(2 * padding + 1) + torch.arange(width, device=device)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return padded[
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.view(count, 1, height, 1),
        columns.view(count, 1, 1, width),
    ]


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "hatify"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _original(root: Path, *, download: bool) -> Cifar10:
    from torchvision.datasets import CIFAR10

    def split(train: bool) -> tuple[Tensor, Tensor]:
        dataset = CIFAR10(str(root), train=train, download=download)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)

    try:
        return Cifar10(*split(True), *split(False), source="CIFAR-10, original pixels (torchvision)")
    except (URLError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 could not be read or downloaded ({error}); name its folder by --data") from error


def _jpeg(archive: Path) -> Cifar10:
    """The archive's images, decoded once: the cache is named after the archive's content."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    cached = _cache() / f"cifar10-jpeg-{digest}.pt"
    if not cached.exists():
        # Written beside its final name and then moved: another process sees all of it or none.
        with tempfile.TemporaryDirectory(dir=cached.parent) as scratch:
            part = Path(scratch) / cached.name
            torch.save(_decode(archive), part)
            os.replace(part, cached)
    return Cifar10(**torch.load(cached, weights_only=True), source=JPEG_SOURCE)


def _decode(archive: Path) -> dict[str, Tensor]:
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.endswith(".jpg"):
                continue
            split, name, _ = member.name.split("/")
            file = tar.extractfile(member)
            assert file is not None
            images[split].append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
            labels[split].append(CLASSES.index(name))
    tensors: dict[str, Tensor] = {}
    for split in images:
        tensors[f"{split}_images"] = torch.from_numpy(np.stack(images[split])).permute(0, 3, 1, 2).contiguous()
        tensors[f"{split}_labels"] = torch.tensor(labels[split])
    return tensors
