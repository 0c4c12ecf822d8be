"""What a trained network is worth as a start, and that nothing is lost by going on from it.

Without options: a small network is trained on the digits 0 to 4, then converted; the converted network settles these
five as its first task and learns {5, 6} and {7, 8, 9} after it, from few samples. With --checkpoint: a ResNet-20 for
CIFAR-10 (which has seen all ten classes) learns Split CIFAR-10's five tasks. Each time the same is done from scratch,
and the test accuracy of the task that is learning is taken every few batches. Exit status 1 if a finished task's
logits have changed by one bit, 2 if data or checkpoint cannot be had.

    python benchmarks/pretrained.py
    python benchmarks/pretrained.py --data DIR --checkpoint resnet20.th --output pretrained_cifar10.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import cifar10
import digits
import hatify
import resnet_cifar
from record import Record
from split_cifar10 import conditions, of_task

STARTS = ("pretrained", "scratch")


@dataclass
class Problem:
    """Tasks, the two networks to start from, and how training images are prepared."""

    names: list[str]
    train: list[tuple[Tensor, Tensor]]
    tests: list[tuple[Tensor, Tensor]]
    classes: list[int]
    nets: dict[str, nn.Module]
    prepare: Callable[[Tensor], Tensor]
    source: str
    batch: int
    lr: float


def of_digits(seed: int, args: argparse.Namespace) -> Problem:
    """A network trained on half of the digits, and few samples of every task."""
    torch.manual_seed(seed)
    data = digits.load(seed)
    groups = ((0, 1, 2, 3, 4), (5, 6), (7, 8, 9))
    tasks = [data.task(group) for group in groups]
    net = digits.network(5)
    (images, labels), _ = tasks[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2 if args.fast else 10):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    few = [_few(*train, args.samples) for train, _ in tasks]
    return Problem(
        names=[", ".join(map(str, group)) for group in groups],
        train=[tasks[0][0], *few[1:]],
        tests=[test for _, test in tasks],
        classes=[len(group) for group in groups],
        nets={"pretrained": net, "scratch": digits.network(5)},
        prepare=lambda x: x,
        source="scikit-learn's digits",
        batch=16,
        lr=0.02,
    )


def _few(images: Tensor, labels: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The first `samples` of each class."""
    rows = torch.cat([(labels == label).nonzero()[:samples, 0] for label in labels.unique()])
    return images[rows], labels[rows]


def of_cifar10(seed: int, args: argparse.Namespace) -> Problem:
    """Split CIFAR-10 and a checkpoint for all of it."""
    torch.manual_seed(seed)
    data = cifar10.load(args.data)
    generator = torch.Generator().manual_seed(seed)
    limit = 256 if args.fast else None
    nets = {start: resnet_cifar.resnet20() for start in STARTS}
    nets["pretrained"].load_state_dict(resnet_cifar.read_checkpoint(args.checkpoint))
    tests = [of_task(data.test_images, data.test_labels, task, limit) for task in range(5)]
    return Problem(
        names=["/".join(cifar10.CLASSES[2 * task : 2 * task + 2]) for task in range(5)],
        train=[of_task(data.train_images, data.train_labels, task, limit) for task in range(5)],
        tests=[(cifar10.normalise(images), labels) for images, labels in tests],
        classes=[2] * 5,
        nets=nets,
        prepare=lambda x: cifar10.normalise(cifar10.augment(x, generator)),
        source=data.source,
        batch=64,
        lr=0.05,
    )


def learn(problem: Problem, start: str, args: argparse.Namespace, advance: Callable[[], None]) -> dict[str, Any]:
    """All tasks by one converted network: learning curves, and the record of what was kept."""
    model = hatify.hatify(
        problem.nets[start],
        len(problem.train),
        problem.tests[0][0][:2],
        num_classes=problem.classes,
        clamp=args.clamp or None,
    )
    record = Record(problem.names, problem.tests)
    curves = []
    for task, (images, labels) in enumerate(problem.train):
        batch = min(problem.batch, len(labels))
        steps = len(labels) // batch
        total = args.epochs * steps
        model.begin_task(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=problem.lr, momentum=0.9)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, problem.lr, total_steps=total)
        scale = hatify.MaskScale(model, steps=steps)
        looks = {round(total * (i + 1) / args.looks) for i in range(args.looks)}
        curve, done = [], 0
        for _ in range(args.epochs):
            for part in torch.randperm(len(labels))[: steps * batch].split(batch):
                loss = F.cross_entropy(model(problem.prepare(images[part])), labels[part])
                loss = loss + args.regularization * model.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                scale.step()
                done += 1
                if done in looks:
                    curve.append((done, accuracy(model, *problem.tests[task])))
        model.end_task()
        record.task_ended(model, task)
        curves.append(curve)
        advance()
    return {"curves": curves, **record.as_dict(), "nothing_forgotten": record.nothing_forgotten}


@torch.no_grad()
def accuracy(model: hatify.HatModel, images: Tensor, labels: Tensor) -> float:
    """Of the task that is learning, as it would answer now; on at most 1,000 samples."""
    model.eval()
    right = [
        (model(x).argmax(1) == y).float() for x, y in zip(images.split(250)[:4], labels.split(250)[:4], strict=True)
    ]
    model.train()
    return torch.cat(right).mean().item()


def shuffled(data: list[tuple[Tensor, Tensor]], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each task's samples in random order, so that its first ones are a fair sample."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _, labels in data]
    return [(images[order], labels[order]) for (images, labels), order in zip(data, orders, strict=True)]


def plot(runs: dict[str, list[dict[str, Any]]], names: list[str], path: Path) -> None:
    """A panel for each task: accuracy over batches, mean of all seeds."""
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    for task, axis in enumerate(figure.subplots(1, len(names), sharey=True)):
        for start, style in zip(STARTS, ("o-", "s--"), strict=True):
            batches = [batch for batch, _ in runs[start][0]["curves"][task]]
            curves = [[100 * share for _, share in run["curves"][task]] for run in runs[start]]
            axis.plot(batches, [statistics.mean(at) for at in zip(*curves, strict=True)], style, ms=4, label=start)
        axis.set(title=names[task], xlabel="batches")
    figure.axes[0].set(ylabel="test accuracy of the task, in %")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a ResNet-20 for CIFAR-10 to start from, instead of digits")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, see cifar10.py; without it, a download")
    parser.add_argument("--epochs", type=int, help="per task (10; 1 with a checkpoint)")
    parser.add_argument("--samples", type=int, default=20, help="of each new digit (%(default)s)")
    parser.add_argument("--looks", type=int, default=10, help="at the accuracy, per task (%(default)s)")
    parser.add_argument("--regularization", type=float, default=0.3, help="weight of Eq. 5 (%(default)s)")
    parser.add_argument("--clamp", type=float, default=50.0, help="of |s·e| in Equation 3; 0 for none (%(default)s)")
    parser.add_argument("--seeds", type=int, help="(5; 1 with a checkpoint)")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "pretrained.json")
    parser.add_argument("--fast", action="store_true", help="one epoch, one seed: shows that it runs, no more")
    args = parser.parse_args()
    args.epochs = 1 if args.fast else args.epochs or (1 if args.checkpoint else 10)
    args.seeds = 1 if args.fast else args.seeds or (1 if args.checkpoint else 5)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hatify.HatWarning)
    console = Console()
    begun = time.perf_counter()
    runs: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=args.seeds * 2 * (5 if args.checkpoint else 3))
        for seed in range(args.seed, args.seed + args.seeds):
            try:
                problem = of_cifar10(seed, args) if args.checkpoint else of_digits(seed, args)
            except (cifar10.DataError, OSError) as error:
                print(error, file=sys.stderr)
                return 2
            problem.tests = shuffled(problem.tests, seed)
            for start in STARTS:
                progress.update(bar, description=f"{start}, seed {seed}")
                torch.manual_seed(seed)
                runs[start].append(learn(problem, start, args, lambda: progress.advance(bar)))
    table = Table(title="test accuracy in %, mean over seeds")
    for column in ("start", "task", f"after 1/{args.looks} of the batches", "half", "end", "kept, bit for bit"):
        table.add_column(column, justify="right")
    for start in STARTS:
        for task, name in enumerate(problem.names):
            curves = [run["curves"][task] for run in runs[start]]
            looks = (0, len(curves[0]) // 2, -1)
            figures = [100 * statistics.mean(curve[look][1] for curve in curves) for look in looks]
            kept = all(row[task] for run in runs[start] for row in run["identical"][task:])
            table.add_row(start, name, *(f"{figure:.1f}" for figure in figures), "yes" if kept else "[red]no")
    console.print(table)
    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items() if k != "output"}
    report = {"conditions": {**conditions(torch.device("cpu"), problem.source), **options}, "tasks": problem.names}
    report |= {"seconds": round(time.perf_counter() - begun, 1), "runs": runs}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report) + "\n")
    plot(runs, problem.names, args.output.with_suffix(".png"))
    return 0 if all(run["nothing_forgotten"] for start in STARTS for run in runs[start]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
