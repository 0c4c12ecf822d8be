"""What a run over a sequence of tasks is judged by: what was learned, what was kept, what was used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

import hatify


@dataclass
class Record:
    """The figures of a run, extended by `task_ended` each time a task has ended.

    `tests[j]` holds task j's test inputs (N, ...) and labels (N,) on the model's device; `names[j]` is its
    title. In each of the triangular lists below, row i was taken after task i had ended and has one entry for
    each task j up to i, answered with the task known.
    """

    names: Sequence[str]
    tests: Sequence[tuple[Tensor, Tensor]]
    batch_size: int = 500

    accuracy: list[list[float]] = field(default_factory=list)
    """Share of correct answers."""
    drift: list[list[float]] = field(default_factory=list)
    """Largest absolute difference between task j's logits then and at the end of task j. Promised to be 0."""
    identical: list[list[bool]] = field(default_factory=list)
    """`torch.equal` of the same two: unlike a difference, it cannot be fooled by NaN."""
    use: list[dict[str, float]] = field(default_factory=list)
    """For each task, the share of a layer's features that its mask leaves on."""
    total_use: list[float] = field(default_factory=list)
    """For each task, the share of all layers' features that its masks leave on."""
    used_so_far: list[float] = field(default_factory=list)
    """The share of all layers' features that at least one task up to this one uses."""

    _logits: list[Tensor] = field(default_factory=list, repr=False)
    _union: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def task_ended(self, model: hatify.HatModel, task: int) -> None:
        """Evaluates every task up to `task`, which has just ended; leaves the model in the mode it was in."""
        logits = [self._answer(model, earlier) for earlier in range(task + 1)]
        self._logits.append(logits[task])
        self.accuracy.append(
            [
                (now.argmax(1) == labels).float().mean().item()
                for now, (_, labels) in zip(logits, self.tests, strict=False)
            ]
        )
        pairs = list(zip(logits, self._logits, strict=True))
        self.drift.append([(now - then).abs().max().item() for now, then in pairs])
        self.identical.append([torch.equal(now, then) for now, then in pairs])

        masks = {name: mask.flatten().cpu() for name, mask in model.masks(task).items()}
        self._union = {name: mask | self._union.get(name, mask) for name, mask in masks.items()}
        self.use.append({name: mask.float().mean().item() for name, mask in masks.items()})
        self.total_use.append(torch.cat(list(masks.values())).float().mean().item())
        self.used_so_far.append(torch.cat(list(self._union.values())).float().mean().item())

    @property
    def nothing_forgotten(self) -> bool:
        """Whether every task's logits were, at every look, those of the day it ended, bit for bit."""
        return all(all(row) for row in self.identical)

    def as_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "tasks": list(self.names),
            "accuracy": self.accuracy,
            "mean_final_accuracy": sum(self.accuracy[-1]) / len(self.accuracy[-1]),
            "drift": self.drift,
            "identical": self.identical,
            "features_used_per_layer": self.use,
            "features_used": self.total_use,
            "features_used_so_far": self.used_so_far,
        }

    def table(self) -> Table:
        """Accuracies so far, a row for each task: where nothing is forgotten, a row repeats one number."""
        table = Table(title="accuracy in % after each task")
        table.add_column("task", no_wrap=True)
        for task in range(len(self.accuracy)):
            table.add_column(str(task + 1), justify="right", no_wrap=True)
        table.add_column("logits", no_wrap=True)
        for task in range(len(self.accuracy)):
            figures = [f"{100 * row[task]:.2f}" if task < len(row) else "" for row in self.accuracy]
            drift, identical = self.drift[-1][task], self.identical[-1][task]
            table.add_row(self.names[task], *figures, "identical" if identical else f"[red]off {drift:.0e}")
        return table

    def plot(self, path: Path, title: str) -> None:
        """Writes a picture of two panels: accuracy (task by time), and mask use (layer by task)."""
        layers = list(self.use[0])
        count = len(self.accuracy)
        figure = Figure(figsize=(4.4 + 1.5 * count, max(3.8, 1.6 + 0.21 * len(layers))), layout="constrained")
        figure.suptitle(title)
        left, right = figure.subplots(1, 2)

        matrix = torch.full((count, count), torch.nan)
        for time, row in enumerate(self.accuracy):
            matrix[: len(row), time] = torch.tensor(row)
        _heatmap(left, 100 * matrix, "{:.2f}", low=50, cmap="Greens")
        left.set(title="accuracy in % after each task", xlabel="after learning", ylabel="task")
        left.set_xticks(range(count), self.names[:count], rotation=30, ha="right")
        left.set_yticks(range(count), self.names[:count])

        shares = torch.tensor([[use[layer] for use in self.use] for layer in layers])
        _heatmap(right, 100 * shares, "{:.0f}", low=0, cmap="Blues")
        right.set(title="features in use, in %", xlabel="task")
        right.set_xticks(range(count), self.names[:count], rotation=30, ha="right")
        right.set_yticks(range(len(layers)), layers, fontsize=7)
        figure.savefig(path, dpi=150)

    def _answer(self, model: hatify.HatModel, task: int) -> Tensor:
        """Logits for all of `task`'s test inputs, in evaluation mode."""
        training = model.training
        model.eval()
        with model.task(task), torch.no_grad():
            logits = torch.cat([model(inputs) for inputs in self.tests[task][0].split(self.batch_size)])
        model.train(training)
        return logits


def _heatmap(axes: Axes, values: Tensor, form: str, *, low: float, cmap: str) -> None:
    """Percentages as colours from `low` to 100 with the numbers on top; NaN stays blank."""
    axes.imshow(values.numpy(), vmin=low, vmax=100, cmap=cmap, aspect="auto")
    size = 9 if len(values) <= 12 else 6
    for (row, column), value in np.ndenumerate(values.numpy()):
        if not np.isnan(value):
            ink = "white" if value > (low + 100) / 2 else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize=size, color=ink)
