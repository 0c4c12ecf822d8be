"""Twenty tasks in a row: what is kept, what is used up, and what happens when nothing is left.

Every task is to read the ten digits with the pixels in an order of its own, by a perceptron with two hidden layers.
The networks differ in width and in the weight of Equation 5, so that one has no free feature left after its first
task and one has enough for all. Plotted are the accuracy of each task when it ends, which is its accuracy ever after
(the logits are compared bit for bit), the features left over, and what plain fine-tuning has kept of each task at the
end. The first `hatify.CapacityWarning` of each run is kept with the results. Exit status 1 if a finished task's
logits have changed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import digits
import hatify
from record import Record

BATCH = 32


def permuted(tasks: int, seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Training and test data (N, 64) of every task: the pixels of task 0 in their order, of the others shuffled."""
    data = digits.load(seed)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(64)] + [torch.randperm(64, generator=generator) for _ in range(tasks - 1)]

    def of(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(images.flatten(1)[:, order], labels) for order in orders]

    return of(data.train_images, data.train_labels), of(data.test_images, data.test_labels)


def epoch(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], weight: float, step: Any
) -> None:
    """One epoch of a plain network or of a converted one with an open task; `step` is called after each batch."""
    images, labels = data
    for batch in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        if isinstance(net, hatify.HatModel):
            loss = loss + weight * net.regularization()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step()


def converted(
    width: int, weight: float, args: argparse.Namespace, seed: int, advance: Any
) -> tuple[dict[str, Any], bool]:
    """The figures of one converted network, and whether nothing was forgotten."""
    torch.manual_seed(seed)
    train, tests = permuted(args.tasks, seed)
    model = hatify.hatify(digits.perceptron(10, width), args.tasks, tests[0][0][:2], clamp=args.clamp or None)
    record = Record([str(task) for task in range(args.tasks)], tests)
    free, warned = [], None
    for task, data in enumerate(train):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.begin_task(task)
        for warning in caught:
            if warned is None and warning.category is hatify.CapacityWarning:
                warned = {"task": task, "message": str(warning.message)}
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        scale = hatify.MaskScale(model, steps=len(data[1]) // BATCH)
        for _ in range(args.epochs):
            epoch(model, optimizer, data, weight, scale.step)
        model.end_task()
        record.task_ended(model, task)
        used = torch.stack([torch.cat(list(model.masks(t).values())) for t in range(task + 1)]).any(0)
        free.append(1 - used.float().mean().item())
        advance()
    accuracy = [row[-1] for row in record.accuracy]
    row = {"seed": seed, "accuracy": accuracy, "features_left": free, "features": len(used), "first_warning": warned}
    return row, record.nothing_forgotten


def fine_tuned(width: int, args: argparse.Namespace, seed: int) -> list[float]:
    """What a plain network with an output layer for each task answers right, of every task, after the last one."""
    torch.manual_seed(seed)
    train, tests = permuted(args.tasks, seed)
    body = digits.perceptron(10, width)
    heads = [nn.Linear(width, 10) for _ in range(args.tasks)]
    for head, data in zip(heads, train, strict=True):
        body[-1] = head
        optimizer = torch.optim.SGD(body.parameters(), lr=args.lr, momentum=0.9)
        for _ in range(args.epochs):
            epoch(body, optimizer, data, 0.0, lambda: None)
    accuracy = []
    for head, (images, labels) in zip(heads, tests, strict=True):
        body[-1] = head
        accuracy.append((body(images).argmax(1) == labels).float().mean().item())
    return accuracy


def mean(rows: list[list[float]]) -> list[float]:
    """Mean over seeds, task by task."""
    return [round(statistics.mean(values), 4) for values in zip(*rows, strict=True)]


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy and features left, over tasks."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, result) in enumerate(report["settings"].items()):
        tasks = range(1, len(result["accuracy"]) + 1)
        left.plot(tasks, [100 * a for a in result["accuracy"]], "o-", ms=4, color=f"C{i}", label=f"hatify, {name}")
        kept = [100 * a for a in result["fine_tuning"]]
        left.plot(tasks, kept, ":", color=f"C{i}", label=f"fine-tuning, {name.split(',')[0]}")
        right.plot(tasks, [100 * f for f in result["features_left"]], "o-", ms=4, color=f"C{i}", label=name)
    left.set(xlabel="task", xticks=tasks, title="accuracy of each task in %, after the last one", ylim=(0, 100))
    right.set(xlabel="task", xticks=tasks, title="features free of finished tasks, in %", ylim=(0, 100))
    left.legend(fontsize="small")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=20)
    settings = ["64:0", "64:0.1", "256:0.3"]
    parser.add_argument("--settings", nargs="+", default=settings, help="width:weight of Equation 5 (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="per task (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--clamp", type=float, default=50.0, help="of |s·e| in Equation 3; 0 for none (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "long_sequences.json")
    parser.add_argument("--fast", action="store_true", help="four tasks, one epoch, one network: shows that it runs")
    args = parser.parse_args()
    if args.fast:
        args.tasks, args.settings, args.epochs, args.seeds = 4, ["16:0"], 1, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hatify.HatWarning)
    console = Console()
    options = {k: v for k, v in vars(args).items() if k != "output"}
    report: dict[str, Any] = {"conditions": {"torch": torch.__version__, **options}, "settings": {}}
    kept = True
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(args.settings) * args.seeds * args.tasks)
        for setting in args.settings:
            width, weight = (kind(part) for kind, part in zip((int, float), setting.split(":"), strict=True))
            name = f"{width} wide, weight {weight:g}"
            progress.update(bar, description=name)
            rows, tuned = [], []
            for seed in range(args.seed, args.seed + args.seeds):
                row, nothing_forgotten = converted(width, weight, args, seed, lambda: progress.advance(bar))
                kept &= nothing_forgotten
                rows.append(row)
                tuned.append(fine_tuned(width, args, seed))
            report["settings"][name] = {
                "accuracy": mean([row["accuracy"] for row in rows]),
                "features_left": mean([row["features_left"] for row in rows]),
                "fine_tuning": mean(tuned),
                "runs": rows,
            }
    report["logits_of_finished_tasks_identical"] = kept
    table = Table(title="after the last task, in %")
    for column in (
        "network",
        "mean accuracy",
        "first task",
        "last task",
        "fine-tuning, mean",
        "features left",
        "warned",
    ):
        table.add_column(column, justify="right")
    for name, result in report["settings"].items():
        figures = (statistics.mean(result["accuracy"]), result["accuracy"][0], result["accuracy"][-1])
        figures = (*figures, statistics.mean(result["fine_tuning"]), result["features_left"][-1])
        warned = [str(row["first_warning"]["task"]) for row in result["runs"] if row["first_warning"]]
        table.add_row(
            name, *(f"{100 * figure:.1f}" for figure in figures), "task " + ", ".join(warned) if warned else ""
        )
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.output.with_suffix(".png"))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
