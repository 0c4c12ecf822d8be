"""Saved models of every kind, small, for later versions to open; run by the version whose format they are to keep.

``python tests/saved/make.py 0.1`` writes tests/saved/0.1/<kind>/, with what each finished task answered then beside it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import hatify

HERE = Path(__file__).parent


class Own(nn.Module):
    """Token ids (N, L) → logits (N, L, 12): a raw table of positions, a shared scale, and an output tied to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.positions = nn.Parameter(torch.randn(1, 10, 8) * 0.1)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions[:, : ids.shape[1]]
        x = x + self.second(torch.relu(self.first(self.norm(x)))) * self.scale
        return self.head(x)


class Plain(nn.Module):
    """Images (N, 3, 6, 6) → logits (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(torch.relu(self.fc(x.mean((2, 3)))))


RESNET = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 8, "num_classes": 3}
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 16, "img_size": 32, "num_classes": 3}


def network(kind: str) -> nn.Module:
    """The network of a kind, with the weights that a seed gives."""
    torch.manual_seed(0)
    if kind == "resnet":
        return timm.create_model("test_resnet", **RESNET)
    if kind == "vit":
        return timm.create_model("test_vit", **VIT)
    return Own() if kind == "own" else Plain()


def inputs(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "own":
        return torch.randint(12, (2, 6), generator=generator)
    edge = 32 if kind in ("resnet", "vit") else 6
    return torch.randn(2, 3, edge, edge, generator=generator)


def learn(model: hatify.HatModel, task: int, x: Tensor, end: bool = True) -> None:
    """Two steps with every third feature on, beginning with `task`."""
    model.begin_task(task)
    with torch.no_grad():
        on = torch.arange(model.task_state.num_slots) % 3 == task % 3
        model.task_state.embeddings[task].copy_(torch.where(on, 2.0, -2.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().mean() + 0.1 * model.regularization()).backward()
        optimizer.step()
    if end:
        model.end_task()


def converted(kind: str) -> hatify.HatModel:
    """A model of a kind, with finished tasks."""
    x = inputs(kind)
    model = hatify.hatify(network(kind), 3, (x,))
    for task in range(2):
        learn(model, task, x)
    if kind == "opened":
        learn(model, 2, x, end=False)
    if kind == "grown":
        model.add_tasks(2)
        learn(model, 3, x)
    return model


KINDS = ("resnet", "vit", "own", "opened", "grown")


@torch.no_grad()
def answers(model: hatify.HatModel, x: Tensor) -> dict[str, Tensor]:
    """What each finished task answers."""
    model.eval()
    found = {}
    for task in model.finished_tasks:
        with model.task(task):
            found[str(task)] = model(x)
    return found


def kernels() -> str:
    """Where this is the same, answers are equal to the bit."""
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    folder = HERE / sys.argv[1]
    warnings.simplefilter("ignore")
    for kind in KINDS:
        model = converted(kind)
        folder.mkdir(exist_ok=True)
        hatify.save(model, folder / kind)
        save_file(answers(model, inputs(kind)), folder / f"{kind}.safetensors", {"kernels": kernels()})


if __name__ == "__main__":
    main()
