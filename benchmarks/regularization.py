"""Regularisation against gradient compensation: both push on the masks, in different ways.

Equation 5 pushes every mask down by the same amount. Equation 3 multiplies whatever pushes, by a factor that grows
with s_max in its numerator: the *compensation factor*, which is varied here beside the weight of Equation 5, as are
switching compensation off (the plain derivative s σ'(s e) of the gate) and the published clamp of |s·e| at 50. For
every combination a small convolutional network learns five tasks of two digits each; given are the mean accuracy over
all tasks at the end, and the share of the features in use by then. Writes JSON and a PNG.

The library always compensates with factor s_max. The experiment rescales the embeddings' gradients by a hook.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

import digits
import hatify

TASKS, BATCH, S_MAX = 5, 32, 100.0
WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0)
#: (compensation factor, clamp); factor None: no compensation.
COMPENSATIONS = (
    (None, None), (10.0, None), (30.0, None), (100.0, None), (300.0, None), (100.0, 17.0), (100.0, 50.0), (300.0, 50.0)
)  # fmt: skip


def rescale(model: hatify.HatModel, task: int, factor: float | None) -> None:
    """Make the compensation factor of a task's embedding `factor` instead of s_max, or undo the compensation."""
    embedding = model.task_state.embeddings[task]

    def other_factor(grad: Tensor) -> Tensor:
        if factor is not None:
            return grad * (factor / model.s_max)
        e, s = embedding.detach(), model.mask_scale
        plain = s * torch.sigmoid(s * e) * torch.sigmoid(-s * e)
        return grad * plain / (model.s_max * torch.sigmoid(e) * torch.sigmoid(-e))

    embedding.register_hook(other_factor)


def run(weight: float, factor: float | None, clamp: float | None, seed: int, epochs: int) -> tuple[float, float]:
    """Mean accuracy over all tasks after the last one, and the share of features in use, both in [0, 1]."""
    torch.manual_seed(seed)
    data = digits.load(seed)
    tasks = [data.task((2 * task, 2 * task + 1)) for task in range(TASKS)]
    model = hatify.hatify(digits.network(10), TASKS, data.test_images[:2], num_classes=2, s_max=S_MAX, clamp=clamp)
    for task, ((images, labels), _) in enumerate(tasks):
        steps = len(labels) // BATCH
        model.begin_task(task)
        model.learn_masks()
        rescale(model, task, factor)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scale = hatify.MaskScale(model, steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch]) + weight * model.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scale.step()
        model.end_task()
    accuracies = []
    with torch.no_grad():
        for task, (_, (images, labels)) in enumerate(tasks):
            with model.task(task):
                accuracies.append((model(images).argmax(1) == labels).float().mean().item())
    used = torch.stack([torch.cat(list(model.masks(task).values())) for task in range(TASKS)]).any(0)
    return statistics.mean(accuracies), used.float().mean().item()


def name(factor: float | None, clamp: float | None) -> str:
    """A column's title."""
    title = "off" if factor is None else f"{factor:g}"
    return title if clamp is None else f"{title},\nclamp {clamp:g}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Two maps, accuracy and features in use, over weight and compensation."""
    weights = sorted({row["weight"] for row in rows})
    columns = list(dict.fromkeys((row["factor"], row["clamp"]) for row in rows))
    figure = Figure(figsize=(12, 4), layout="constrained")
    titles = {"accuracy": "mean accuracy of five tasks, in %", "used": "features in use, in %"}
    for axis, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        means = {(row["weight"], row["factor"], row["clamp"]): 100 * statistics.mean(row[key]) for row in rows}
        values = [[means[(weight, *column)] for column in columns] for weight in weights]
        low = 50 if key == "accuracy" else 0
        axis.imshow(values, vmin=low, vmax=100, cmap="Greens" if key == "accuracy" else "Blues", aspect="auto")
        for (i, line), j in itertools.product(enumerate(values), range(len(columns))):
            ink = "white" if line[j] > (low + 100) / 2 else "black"
            axis.text(j, i, f"{line[j]:.1f}", ha="center", va="center", color=ink)
        axis.set_xticks(range(len(columns)), [name(*column) for column in columns], fontsize="small")
        axis.set_yticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axis.set(title=title, xlabel="compensation factor", ylabel="weight of Equation 5")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--epochs", type=int, default=8, help="per task (%(default)s)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "regularization.json")
    parser.add_argument("--fast", action="store_true", help="one seed, one epoch, four points: shows that it runs")
    args = parser.parse_args()
    if args.fast:
        args.seeds, args.epochs = 1, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hatify.HatWarning)
    grid = list(itertools.product(WEIGHTS[1:4:2] if args.fast else WEIGHTS,
                                  COMPENSATIONS[::3][:2] if args.fast else COMPENSATIONS))  # fmt: skip
    rows = []
    for weight, (factor, clamp) in track(grid, description="configurations"):
        seeds = range(args.seed, args.seed + args.seeds)
        results = [run(weight, factor, clamp, seed, args.epochs) for seed in seeds]
        figures = {"accuracy": [round(a, 4) for a, _ in results], "used": [round(u, 4) for _, u in results]}
        rows.append({"weight": weight, "factor": factor, "clamp": clamp, **figures})
    options = {k: v for k, v in vars(args).items() if k != "output"}
    conditions = {"torch": torch.__version__, "optimizer": "SGD 0.05, momentum 0.9", "s_max": S_MAX, **options}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
