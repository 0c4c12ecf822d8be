"""Five tasks of two digits each, learned one after the other by one of timm's networks: `make demo`.

After every task all tasks so far are answered again. The numbers of a finished task repeat, and not only
they: its logits are compared bit for bit with those it gave on the day it was finished. Exit status 1 if any
differ.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

import hatify
from record import Record

NUM_TASKS = 5
BATCH_SIZE = 32
PEAK_LR = 0.05


def digit_tasks(seed: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Training and test data of the tasks {0, 1}, {2, 3}, …, {8, 9}.

    Each task is a pair of images (N, 1, 32, 32), float32, and labels (N,), 0 for the even digit and 1 for the
    odd one. A quarter of scikit-learn's 1,797 digits, which are 8 × 8 pixels of 0 to 16, is kept for testing.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target)
    train, test = map(
        torch.from_numpy,
        train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=seed),
    )
    images = (images - images[train].mean()) / images[train].std()

    def tasks(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        parts = [rows[labels[rows] // 2 == task] for task in range(NUM_TASKS)]
        return [(images[part], labels[part] % 2) for part in parts]

    return tasks(train), tasks(test)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a timm model that takes 32 × 32 images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="epochs per task (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits_demo.png"), help="picture (%(default)s)")
    parser.add_argument("--figures", type=Path, help="JSON file for accuracies and features in use")
    parser.add_argument("--fast", action="store_true", help="one epoch per task: shows that it runs, no more")
    args = parser.parse_args()
    epochs = 1 if args.fast else args.epochs

    torch.manual_seed(args.seed)
    train, test = digit_tasks(args.seed)
    net = timm.create_model(args.model, pretrained=False, in_chans=1, num_classes=10)
    model = hatify.hatify(net, NUM_TASKS, example_inputs=(train[0][0][:2],), num_classes=2)
    record = Record([f"{2 * task}/{2 * task + 1}" for task in range(NUM_TASKS)], test)

    console = Console()
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(epochs * (len(y) // BATCH_SIZE) for _, y in train))
        for task, (images, labels) in enumerate(train):
            # The tail of an epoch is dropped: a batch norm cannot learn from the one sample it might hold.
            steps = len(labels) // BATCH_SIZE
            model.begin_task(task)
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9)
            rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps)
            for epoch in range(epochs):
                progress.update(bar, description=f"digits {record.names[task]}, epoch {epoch + 1}/{epochs}")
                for batch in torch.randperm(len(labels))[: steps * BATCH_SIZE].split(BATCH_SIZE):
                    loss = F.cross_entropy(model(images[batch]), labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rate.step()
                    progress.advance(bar)
            model.end_task()
            record.task_ended(model, task)
            console.print(record.table())

    if args.figures is not None:
        args.figures.write_text(json.dumps(record.as_dict(), indent=1) + "\n")
    record.plot(args.output, f"{args.model} on digits, two at a time")
    console.print(f"{100 * record.used_so_far[-1]:.0f} % of all features are in use. Picture: {args.output}")
    if not record.nothing_forgotten:
        console.print("[red]The logits of a finished task have changed.")
        return 1
    console.print("Every finished task still gives exactly the logits it gave on the day it was finished.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
