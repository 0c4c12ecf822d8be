"""Split CIFAR-10: five tasks of two classes each, learned one after the other.

Prints and stores (JSON, and a picture beside it) the accuracy of every task after every task with the task
known, the drift of finished tasks' logits, which must be 0, the share of features in use, and the time it
took. Exit status 1 if a finished task's logits have changed by one bit, 2 if the data cannot be had.

    python benchmarks/split_cifar10.py --checkpoint resnet20.th --epochs 4 --output split.json
    python benchmarks/split_cifar10.py --model resnet18 --small-images --epochs 50 --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import cifar10
import hatify
import resnet_cifar
from record import Record

NUM_TASKS = 5


def build(name: str, *, small_images: bool) -> nn.Module:
    """An untrained network for ten classes: one of `resnet_cifar`'s, else one of timm's.

    `small_images` adapts the stem of a timm ResNet, made for 224 × 224 pixels, as is usual for 32 × 32: the
    first convolution becomes 3 × 3 with stride 1, and the pooling after it goes.
    """
    if name in ("resnet20", "resnet56"):
        return getattr(resnet_cifar, name)()
    net = timm.create_model(name, pretrained=False, num_classes=10)
    if small_images:
        stem = getattr(net, "conv1", None)
        if not isinstance(stem, nn.Conv2d) or not hasattr(net, "maxpool"):
            raise SystemExit(f"--small-images: {name} has no `conv1` and `maxpool` to replace")
        net.conv1 = nn.Conv2d(3, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def of_task(images: Tensor, labels: Tensor, task: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """The first `limit` images of each of the task's two classes, and labels 0 and 1."""
    rows = torch.cat([(labels == label).nonzero()[:limit, 0] for label in (2 * task, 2 * task + 1)])
    return images[rows], labels[rows] - 2 * task


def before_conversion(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What a network for ten classes knows already: its accuracy, and that within each task's two classes.

    A checkpoint has seen every class of every task; what continual learning adds is to be read against this.
    """
    net.eval()
    right, known = 0, []
    with torch.no_grad():
        for task, (images, labels) in enumerate(data):
            logits = torch.cat([net(part) for part in images.split(500)])
            right += (logits.argmax(1) == labels + 2 * task).sum().item()
            pair = logits[:, 2 * task : 2 * task + 2]
            known.append((pair.argmax(1) == labels).float().mean().item())
    return {
        "accuracy_of_ten_classes": right / sum(len(labels) for _, labels in data),
        "accuracy_task_known": known,
    }


def conditions(device: torch.device, source: str) -> dict[str, Any]:
    """Where the figures come from."""
    return {
        "data": source,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's own name for itself, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, see cifar10.py; without it, a download")
    parser.add_argument("--model", default="resnet20", help="resnet20, resnet56 or one of timm's (%(default)s)")
    parser.add_argument("--small-images", action="store_true", help="adapt a timm ResNet's stem to 32 × 32 pixels")
    parser.add_argument("--checkpoint", type=Path, help="weights for ten classes to start from")
    parser.add_argument("--epochs", type=int, default=4, help="epochs per task (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.05, help="peak of the one-cycle learning rate (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--regularization", type=float, default=0.3, help="weight of Eq. 5 (%(default)s)")
    # Compensated gradients grow with s_max and with the narrowness of a layer: at 400, resnet20's layers of 16
    # features had every feature off after the first epoch but the one that is always kept.
    parser.add_argument("--s-max", type=float, default=100.0, help="upper bound of the mask scale (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("split_cifar10.json"), help="(%(default)s)")
    parser.add_argument("--fast", action="store_true", help="few images and one epoch: shows that it runs, no more")
    return parser.parse_args()


def main() -> int:
    args = parse()
    console = Console()
    try:
        data = cifar10.load(args.data)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 2
    console.print(data.source)

    device = torch.device(args.device)
    # Equal bits are asked of equal computations, which cuDNN promises only on request.
    torch.backends.cudnn.deterministic = True
    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)
    epochs = 1 if args.fast else args.epochs
    limit = 4 * args.batch_size if args.fast else None

    train = [of_task(data.train_images.to(device), data.train_labels.to(device), t, limit) for t in range(NUM_TASKS)]
    test = [of_task(data.test_images.to(device), data.test_labels.to(device), t, limit) for t in range(NUM_TASKS)]
    test = [(cifar10.normalise(images), labels) for images, labels in test]
    names = ["/".join(cifar10.CLASSES[2 * task : 2 * task + 2]) for task in range(NUM_TASKS)]

    report: dict[str, Any] = {"conditions": conditions(device, data.source)}
    # Files by name alone: where somebody keeps them says nothing about the figures.
    report["options"] = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    net = build(args.model, small_images=args.small_images).to(device)
    if args.checkpoint:
        net.load_state_dict(resnet_cifar.read_checkpoint(args.checkpoint))
        report["checkpoint"] = before_conversion(net, test)
        known = ", ".join(f"{100 * share:.2f}" for share in report["checkpoint"]["accuracy_task_known"])
        console.print(f"the checkpoint as it is, within each task's two classes: {known} %")

    model = hatify.hatify(net, NUM_TASKS, example_inputs=(test[0][0][:2],), num_classes=2, s_max=args.s_max)
    record = Record(names, test)
    seconds: list[float] = []
    start = time.perf_counter()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=epochs * sum(len(labels) // args.batch_size for _, labels in train))
        for task, (images, labels) in enumerate(train):
            begun = time.perf_counter()
            steps = len(labels) // args.batch_size
            model.begin_task(task)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=epochs * steps)
            scale = hatify.MaskScale(model, steps=steps, schedule="cosine")
            for epoch in range(epochs):
                progress.update(bar, description=f"{names[task]}, epoch {epoch + 1}/{epochs}")
                order = torch.randperm(len(labels), generator=generator, device=device)
                for batch in order[: steps * args.batch_size].split(args.batch_size):
                    logits = model(cifar10.normalise(cifar10.augment(images[batch], generator)))
                    loss = F.cross_entropy(logits, labels[batch]) + args.regularization * model.regularization()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rate.step()
                    scale.step()
                    progress.advance(bar)
            model.end_task()
            seconds.append(time.perf_counter() - begun)
            record.task_ended(model, task)
            console.print(record.table())

    report |= record.as_dict()
    report["seconds_per_task"] = seconds
    report["seconds"] = time.perf_counter() - start
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    picture = args.output.with_suffix(".png")
    record.plot(picture, f"{args.model} on Split CIFAR-10")
    console.print(
        f"mean accuracy {100 * report['mean_final_accuracy']:.2f} %, {100 * record.used_so_far[-1]:.0f} % "
        f"of all features in use, {report['seconds']:.0f} s; {args.output}, {picture}"
    )
    if not record.nothing_forgotten:
        console.print("[red]The logits of a finished task have changed.")
        return 1
    console.print("Every finished task still gives exactly the logits it gave on the day it was finished.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
