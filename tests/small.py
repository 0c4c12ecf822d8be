"""A small network that can be imported by name, trained in a moment, and has every kind of state."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from hatify import HatModel, HatWarning, hatify

CLASSES = 3


class SmallNet(nn.Module):
    """Images (N, 3, 6, 6) → logits (N, CLASSES); made without arguments."""

    def __init__(self, width: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.tokens = nn.Parameter(torch.randn(width) * 0.1)
        self.act = nn.PReLU()
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        self.register_buffer("shift", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x + self.shift)))
        x = x.mean((2, 3)) + self.tokens
        return self.head(self.act(self.fc(x)))


def small_net(width: int = 8) -> nn.Module:
    return SmallNet(width)


def undeclared(width: int = 8):
    return SmallNet(width)


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(7))


def converted(num_tasks: int = 3, **options) -> HatModel:
    torch.manual_seed(1)
    return hatify(SmallNet(), num_tasks, (images(2),), **options)


def step(model: HatModel, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(x).square().mean() + 0.1 * model.regularization()).backward()
    optimizer.step()


def learn(model: HatModel, task: int, steps: int = 2) -> None:
    """A few steps; every third feature, beginning with `task`, is on."""
    model.begin_task(task)
    with torch.no_grad():
        on = torch.arange(model.task_state.num_slots) % 3 == task % 3
        model.task_state.embeddings[task].copy_(torch.where(on, 2.0, -2.0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for i in range(steps):
        step(model, optimizer, i)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model.end_task()


@torch.no_grad()
def answers(model: HatModel, tasks=None, x: Tensor | None = None) -> list[Tensor]:
    model.eval()
    found = []
    for task in model.finished_tasks if tasks is None else tasks:
        with model.task(task):
            found.append(model(images() if x is None else x))
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Every parameter and buffer, also those not in state dictionaries, bit for bit."""
    from hatify.lock import named_tensors

    one, two = dict(named_tensors(a)), dict(named_tensors(b))
    return one.keys() == two.keys() and all(
        x.dtype == two[n].dtype and x.stride() == two[n].stride() and torch.equal(x, two[n]) for n, x in one.items()
    )
