"""Split CIFAR-10, beside what one would do without hatify; then one task is forgotten, and no other notices.

Five tasks of two classes each are learned one after the other by one converted network. In the same run, with the
same architecture and the same number of images per task: plain fine-tuning of one network (which forgets), a network
of its own for every task (which shares nothing), and joint training on all ten classes (which needs all data at once).

Two accuracies are given for each: with the task known, and over all ten classes by simply concatenating the logits of
all tasks. At last task 0 is forgotten in copies of the converted network. Exit status 1 if a finished task's logits
have ever changed by one bit, 2 if the data cannot be had.

    python benchmarks/selective_forgetting.py
    python benchmarks/selective_forgetting.py --model resnet18 --epochs 50 --device cuda --output resnet18.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
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
import hatify
from record import Record
from resnet_cifar import CifarResNet
from split_cifar10 import NUM_TASKS, build, conditions, of_task

Data = Sequence[tuple[Tensor, Tensor]]
#: Table 2 of HAT-CL, and what the authors' notebook (ResNet-18 for small images, 5 epochs a task, batch 128) prints.
PUBLISHED = {
    "Table 2, task known": [0.9965, 0.9505, 0.9655, 0.9875, 0.9780],
    "notebook, task known": [0.9210, 0.7705, 0.9190, 0.9680, 0.9545],
    "notebook, logits concatenated, mean": 0.4492,
    "Table 2, task 0 after forgetting": 0.5,
}


class Trainer:
    """Trains any of the networks below, on one budget: epochs, batch size, optimizer, augmentation."""

    def __init__(self, args: argparse.Namespace, progress: Progress, total: int) -> None:
        self.args, self.progress = args, progress
        self.device = torch.device(args.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.bar = progress.add_task("", total=total)

    def network(self, classes: int = 10) -> nn.Module:
        """A fresh network, the same one at each call."""
        torch.manual_seed(self.args.seed)
        if self.args.model == "resnet8":
            net: nn.Module = CifarResNet(1, classes, self.args.width, self.args.stride)
        else:
            net = build(self.args.model, small_images=self.args.model.startswith("resnet"))
            net.reset_classifier(classes)
        return net.to(self.device)

    def fit(self, net: nn.Module, images: Tensor, labels: Tensor, what: str, outputs: slice = slice(None)) -> None:
        """Train `net` on labels that count from 0 within `outputs`; an open task of a `HatModel` with its masks."""
        args = self.args
        steps = len(labels) // args.batch_size
        optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9, nesterov=True)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
        scale = hatify.MaskScale(net, steps=steps) if isinstance(net, hatify.HatModel) else None
        net.train()
        for epoch in range(args.epochs):
            self.progress.update(self.bar, description=f"{what}, epoch {epoch + 1}/{args.epochs}")
            order = torch.randperm(len(labels), generator=self.generator, device=self.device)
            for batch in order[: steps * args.batch_size].split(args.batch_size):
                logits = net(cifar10.normalise(cifar10.augment(images[batch], self.generator)))[:, outputs]
                loss = F.cross_entropy(logits, labels[batch])
                if scale is not None:
                    loss = loss + args.regularization * net.regularization()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                if scale is not None:
                    scale.step()
                self.progress.advance(self.bar)
        net.eval()


@torch.no_grad()
def score(answer: Callable[[Tensor, int], Tensor], tests: Data) -> dict[str, Any]:
    """Accuracy of each task, known or not; `answer` gives the logits of one task's classes for images of any."""
    known, concatenated = [], []
    for task, (images, labels) in enumerate(tests):
        logits = [torch.cat([answer(part, head) for part in images.split(500)]) for head in range(NUM_TASKS)]
        known.append((logits[task].argmax(1) == labels).float().mean().item())
        concatenated.append((torch.cat(logits, 1).argmax(1) == labels + 2 * task).float().mean().item())
    return {
        "task_known": known,
        "task_known_mean": statistics.mean(known),
        "concatenated": concatenated,
        "concatenated_mean": statistics.mean(concatenated),
    }


def pair(task: int) -> slice:
    """The outputs, of ten, that are a task's two classes."""
    return slice(2 * task, 2 * task + 2)


def with_hatify(trainer: Trainer, train: Data, record: Record) -> tuple[hatify.HatModel, dict[str, Any]]:
    """One converted network, task after task."""
    args, tests = trainer.args, record.tests
    example = tests[0][0][:2]
    model = hatify.hatify(trainer.network(), NUM_TASKS, example_inputs=example, num_classes=2, s_max=args.s_max)
    for task, (images, labels) in enumerate(train):
        model.begin_task(task)
        trainer.fit(model, images, labels, f"hatify, {record.names[task]}")
        model.end_task()
        record.task_ended(model, task)

    def answer(images: Tensor, task: int) -> Tensor:
        with model.task(task):
            return model(images)

    return model, {**score(answer, tests), "parameters": count(model)}


def fine_tuned(trainer: Trainer, train: Data, tests: Data, names: Sequence[str]) -> dict[str, Any]:
    """One plain network with two outputs for every task, trained on task after task."""
    net, history = trainer.network(), []
    for task, (images, labels) in enumerate(train):
        trainer.fit(net, images, labels, f"fine-tuning, {names[task]}", pair(task))
        scores = score(lambda x, head: net(x)[:, pair(head)], tests)
        history.append(scores["task_known"][: task + 1])
    return {**scores, "accuracy": history, "parameters": count(net)}


def separate(trainer: Trainer, train: Data, tests: Data, names: Sequence[str]) -> dict[str, Any]:
    """A plain network for every task."""
    nets = [trainer.network(2) for _ in train]
    for task, (images, labels) in enumerate(train):
        trainer.fit(nets[task], images, labels, f"separate, {names[task]}")
    return {**score(lambda x, head: nets[head](x), tests), "parameters": sum(map(count, nets))}


def joint(trainer: Trainer, train: Data, tests: Data) -> dict[str, Any]:
    """A plain network for ten classes that sees all of them at once."""
    net = trainer.network()
    images = torch.cat([images for images, _ in train])
    labels = torch.cat([labels + 2 * task for task, (_, labels) in enumerate(train)])
    trainer.fit(net, images, labels, "joint")
    return {**score(lambda x, head: net(x)[:, pair(head)], tests), "parameters": count(net)}


@torch.no_grad()
def forgetting(model: hatify.HatModel, tests: Data, repetitions: int) -> dict[str, Any]:
    """Forget task 0 in copies of the model: its accuracy then, and whether every other task's logits are the same.

    What is forgotten is filled with random numbers, so a single figure is chance in two senses.
    """

    def logits(of: hatify.HatModel, task: int) -> Tensor:
        with of.task(task):
            return torch.cat([of(part) for part in tests[task][0].split(500)])

    before = [logits(model, task) for task in range(NUM_TASKS)]
    accuracies, identical = [], True
    for seed in range(repetitions):
        copied = copy.deepcopy(model)
        torch.manual_seed(seed)
        forgotten = hatify.forget_task(copied, 0)
        accuracies.append((logits(copied, 0).argmax(1) == tests[0][1]).float().mean().item())
        identical &= all(torch.equal(logits(copied, task), before[task]) for task in range(1, NUM_TASKS))
    return {
        "accuracy_of_task_0": accuracies,
        "mean_accuracy_of_task_0": statistics.mean(accuracies),
        "others_identical": identical,
        "entries_forgotten": sum(forgotten.values()),
        "entries": count(model),
    }


def count(net: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in net.parameters())


def table(report: dict[str, Any], names: Sequence[str]) -> Table:
    """Known-task accuracies of every method, and the two means."""
    table = Table(title="accuracy in %")
    for column in ("", *names, "mean", "concatenated"):
        table.add_column(column, justify="right")
    for method, scores in report["methods"].items():
        figures = [*scores["task_known"], scores["task_known_mean"], scores["concatenated_mean"]]
        table.add_row(method, *(f"{100 * figure:.2f}" for figure in figures))
    return table


def plot(report: dict[str, Any], names: Sequence[str], path: Path) -> None:
    """Task 0 while the others are learned and after it is forgotten, and all methods side by side."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, style in (("hatify", "o-"), ("fine-tuning", "s--")):
        line = [100 * row[0] for row in report["methods"][name]["accuracy"]]
        left.plot(range(NUM_TASKS), line, style, label=name)
    if forgot := report.get("forgetting"):
        spread = [100 * accuracy for accuracy in forgot["accuracy_of_task_0"]]
        left.plot([NUM_TASKS] * len(spread), spread, "x", color="C3", label=f"forgotten, {len(spread)} times")
    left.axhline(50, color="grey", lw=0.8, ls=":")
    left.set(title=f"accuracy of task 0 ({names[0]}) in %", ylim=(30, 100))
    left.set_xticks(range(NUM_TASKS + 1), [*names, "forgetting"], rotation=20)
    left.legend()
    width = 0.8 / len(report["methods"])
    for i, (method, scores) in enumerate(report["methods"].items()):
        heights = [100 * s for s in (*scores["task_known"], scores["task_known_mean"], scores["concatenated_mean"])]
        right.bar([x + i * width for x in range(len(heights))], heights, width, label=method)
    right.set(title="accuracy in % at the end, task known, and over all ten classes", ylim=(0, 100))
    labels = [*names, "mean", "concatenated"]
    right.set_xticks([x + 1.5 * width for x in range(len(labels))], labels, rotation=20)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, see cifar10.py; without it, a download")
    parser.add_argument("--model", default="resnet8", help="resnet8, or one of timm's (%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="features of resnet8's first stage (%(default)s)")
    parser.add_argument("--stride", type=int, default=2, help="of resnet8's first convolution (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle learning rate (%(default)s)")
    parser.add_argument("--regularization", type=float, default=0.3, help="weight of Eq. 5 (%(default)s)")
    parser.add_argument("--s-max", type=float, default=100.0, help="upper bound of the mask scale (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=20, help="how often task 0 is forgotten (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "selective_forgetting.json", help="(%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few images and one epoch: shows that it runs, no more")
    args = parser.parse_args()
    if args.fast:
        args.epochs, args.repetitions = 1, 2
    return args


def main() -> int:
    args = parse()
    console = Console()
    warnings.simplefilter("ignore", hatify.HatWarning)
    try:
        data = cifar10.load(args.data)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 2
    torch.backends.cudnn.deterministic = True
    device, limit = torch.device(args.device), 2 * args.batch_size if args.fast else None
    train = [of_task(data.train_images.to(device), data.train_labels.to(device), t, limit) for t in range(NUM_TASKS)]
    tests = [of_task(data.test_images.to(device), data.test_labels.to(device), t, limit) for t in range(NUM_TASKS)]
    tests = [(cifar10.normalise(images), labels) for images, labels in tests]
    names = ["/".join(cifar10.CLASSES[pair(task)]) for task in range(NUM_TASKS)]

    options = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report: dict[str, Any] = {"conditions": conditions(device, data.source), "options": options, "methods": {}}
    report["published"] = PUBLISHED
    record = Record(names, tests)
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        steps = [len(labels) // args.batch_size for _, labels in train]
        joined = sum(len(labels) for _, labels in train) // args.batch_size
        trainer = Trainer(args, progress, args.epochs * (3 * sum(steps) + joined))
        start = time.perf_counter()

        def add(method: str, scores: dict[str, Any]) -> None:
            nonlocal start
            report["methods"][method] = {**scores, "seconds": round(time.perf_counter() - start, 1)}
            start = time.perf_counter()

        model, scores = with_hatify(trainer, train, record)
        add("hatify", {**scores, **record.as_dict()})
        add("fine-tuning", fine_tuned(trainer, train, tests, names))
        add("separate", separate(trainer, train, tests, names))
        add("joint", joint(trainer, train, tests))
    report["forgetting"] = forgetting(model, tests, args.repetitions)
    report["seconds"] = round(sum(scores["seconds"] for scores in report["methods"].values()), 1)
    console.print(record.table(), table(report, names))
    forgot = report["forgetting"]
    console.print(
        f"task 0 after forgetting: {100 * forgot['mean_accuracy_of_task_0']:.2f} % on average of {args.repetitions}; "
        f"the other tasks' logits are {'identical' if forgot['others_identical'] else '[red]changed'}"
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, names, args.output.with_suffix(".png"))
    return 0 if record.nothing_forgotten and forgot["others_identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
