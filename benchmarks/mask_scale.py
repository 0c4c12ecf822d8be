"""Which s_max, schedule and initialisation should be the defaults? Five tasks of two digits each, over several seeds.

For every combination a small convolutional network learns the five tasks one after the other; reported are the mean
accuracy over all tasks at the end, and the share of the features that are in use by then. Writes JSON and a PNG.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

import hatify
from digits_demo import NUM_TASKS, digit_tasks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

S_MAX = (25.0, 50.0, 100.0, 200.0, 400.0, 800.0)
SCHEDULES = ("cosine", "linear", "exponential", "constant")
INITS = ("dense", "normal")


def network() -> nn.Module:
    """A small network for digits, (N, 1, 32, 32) → (N, 2)."""
    return nn.Sequential(
        nn.AvgPool2d(4),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, 2),
    )


def run(s_max: float, schedule: str, init: str, seed: int, epochs: int, weight: float) -> tuple[float, float]:
    """Mean accuracy over all tasks after the last one, and the share of features in use, both in [0, 1]."""
    torch.manual_seed(seed)
    train, test = digit_tasks(seed)
    model = hatify.hatify(network(), NUM_TASKS, train[0][0][:2], s_max=s_max, mask_init=init)
    for task, (images, labels) in enumerate(train):
        steps = len(labels) // 32
        model.begin_task(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scale = hatify.MaskScale(model, steps=steps, schedule=schedule)
        for _ in range(epochs):
            for batch in torch.randperm(len(labels))[: steps * 32].split(32):
                loss = F.cross_entropy(model(images[batch]), labels[batch]) + weight * model.regularization()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                scale.step()
        model.end_task()
    accuracies = []
    with torch.no_grad():
        for task, (images, labels) in enumerate(test):
            model.set_task(task)
            accuracies.append((model(images).argmax(1) == labels).float().mean().item())
    used = torch.stack([torch.cat(list(model.masks(task).values())) for task in range(NUM_TASKS)]).any(0)
    return statistics.mean(accuracies), used.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--weight", type=float, default=0.75, help="of the regularisation (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mask_scale.json")
    parser.add_argument("--fast", action="store_true", help="one seed, one epoch, two values: shows that it runs")
    args = parser.parse_args()
    warnings.simplefilter("ignore", hatify.HatWarning)
    grid = list(itertools.product(S_MAX[2:5:2] if args.fast else S_MAX, SCHEDULES, INITS))
    rows = []
    for s_max, schedule, init in track(grid, description="configurations"):
        seeds = range(1 if args.fast else args.seeds)
        results = [run(s_max, schedule, init, seed, 1 if args.fast else args.epochs, args.weight) for seed in seeds]
        rows.append(
            {
                "s_max": s_max,
                "schedule": schedule,
                "mask_init": init,
                "accuracy": [round(accuracy, 4) for accuracy, _ in results],
                "used": [round(used, 4) for _, used in results],
            }
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    conditions = {
        "epochs": args.epochs,
        "weight": args.weight,
        "torch": torch.__version__,
        "optimizer": "SGD 0.05, 0.9",
    }
    args.output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy and use of capacity over s_max, a line per schedule and initialisation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for schedule, init in itertools.product(SCHEDULES, INITS):
        line = [row for row in rows if (row["schedule"], row["mask_init"]) == (schedule, init)]
        for axis, key in zip(axes, ("accuracy", "used"), strict=True):
            means = [statistics.mean(row[key]) for row in line]
            style = "-" if init == "dense" else "--"
            axis.plot([row["s_max"] for row in line], means, style, marker="o", label=f"{schedule}, {init}")
    axes[0].set(xscale="log", xlabel="s_max", ylabel="mean accuracy of five tasks")
    axes[1].set(xscale="log", xlabel="s_max", ylabel="share of features in use")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
