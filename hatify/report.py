"""What a conversion did, and how much capacity tasks use: rows to print, and a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hatify.lock import owned_by_tasks
from hatify.model import HatModel
from hatify.weights import OriginalWeights


@dataclass(frozen=True)
class ConvertedLayer:
    """A layer or raw parameter of the original: its policy, its masked features, its parameters before and after."""

    layer: str
    policy: str
    features: int
    before: int
    after: int


@dataclass(frozen=True)
class LayerUse:
    """How many of the features that share a mask each finished task has on, and how many have no owner.

    `base` of them belong to a locked base.
    """

    layer: str
    features: int
    base: int
    used: dict[int, int]
    free: int


def converted_layers(model: HatModel) -> list[ConvertedLayer]:
    """One row for each part of the original that has parameters, in the network's order."""
    original = OriginalWeights.of(model).original
    after: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        after[original(name)] += parameter.numel()
    entries = {e.name: e for e in model.census if e.kind == "parameter" and e.name in after}
    rows: dict[str, list[str]] = {}
    for name in entries:
        rows.setdefault(name if name in model.plan.owners else name.rpartition(".")[0] or name, []).append(name)
    masks = model.masks(0)
    return [
        ConvertedLayer(
            layer,
            str(entries[names[0]].policy),
            masks[layer].numel() if layer in masks else 0,
            sum(torch.Size(entries[name].shape).numel() for name in names),
            sum(after[name] for name in names),
        )
        for layer, names in rows.items()
    ]


def totals(model: HatModel) -> dict[str, int | float]:
    """Parameters of the original and of the converted model, and what each task has of its own."""
    before = sum(row.before for row in converted_layers(model))
    own = sum(t.numel() for t in owned_by_tasks(model, [0]) if isinstance(t, nn.Parameter))
    after = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters_before": before,
        "parameters_after": after,
        "parameters_per_task": own,
        "per_task_share": own / max(before, 1),
        "masked_features": model.task_state.num_slots,
    }


def capacity(model: HatModel) -> list[LayerUse]:
    """One row for each layer's mask; layers whose features meet have one mask, under the name of the first."""
    state = model.task_state
    taken = state.used()
    return [
        LayerUse(
            layer,
            stop - start,
            int(state.base[start:stop].sum()),
            {task: int(state.finished_masks[task, start:stop].sum()) for task in model.finished_tasks},
            int((~taken[start:stop]).sum()),
        )
        for layer, (start, stop) in state.groups.items()
    ]


def plot_capacity(model: HatModel, path: Path) -> None:
    """A picture of what each task added to the features in use, layer by layer, as stacked bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    state = model.task_state
    rows = capacity(model)
    figure = Figure(figsize=(max(5.0, 0.22 * len(rows) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    owners = {"base": state.base} if state.has_base else {}
    owners |= {f"task {task}": state.finished_masks[task] for task in model.finished_tasks}
    bottom, taken = [0.0] * len(rows), torch.zeros_like(state.base)
    for label, mask in owners.items():
        added = mask & ~taken
        taken |= mask
        heights = [float(added[start:stop].float().mean()) for start, stop in state.groups.values()]
        axes.bar(range(len(rows)), heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.bar(range(len(rows)), [1 - b for b in bottom], bottom=bottom, color="0.9", label="free")
    axes.set_xticks(range(len(rows)), [row.layer for row in rows], rotation=90, fontsize="x-small")
    axes.set_ylabel("share of features, by the task that took them first")
    axes.set_ylim(0, 1)
    figure.legend(loc="outside upper center", ncols=8, fontsize="small")
    figure.savefig(path, dpi=150, format=path.suffix.removeprefix(".") or "png")
