"""Which pixels does a digit need? Input masks as pictures.

A perceptron with masks on its 64 input pixels learns five tasks of two digits each, one after the other. A task's
input mask says which pixels it reads: changing any other changes nothing, to the last bit. With a stronger
regularisation fewer pixels survive; the share of runs, over several weights and seeds, in which a pixel survives is
its importance. Beside it stands the mutual information of pixel and class, which knows nothing of any network, and
the rank correlation of the two. Exit status 1 if a finished task's logits have changed.
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
from rich.progress import track
from rich.table import Table
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor

import digits
import hatify
from record import Record

TASKS, BATCH = 5, 32
WEIGHTS = (0.1, 0.2, 0.4, 0.8)


def run(weight: float, seed: int, args: argparse.Namespace) -> tuple[list[float], Tensor, bool]:
    """Accuracy of every task, its input mask (tasks, 64), and whether nothing was forgotten."""
    torch.manual_seed(seed)
    data = digits.load(seed)
    tasks = [data.task((2 * task, 2 * task + 1)) for task in range(TASKS)]
    tests = [(images.flatten(1), labels) for _, (images, labels) in tasks]
    model = hatify.hatify(
        digits.perceptron(2), TASKS, tests[0][0][:2], num_classes=2, mask_inputs=True, clamp=args.clamp or None
    )
    record = Record([f"{2 * task}/{2 * task + 1}" for task in range(TASKS)], tests)
    for task, ((images, labels), _) in enumerate(tasks):
        steps = len(labels) // BATCH
        model.begin_task(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
        scale = hatify.MaskScale(model, steps=steps)
        for _ in range(args.epochs):
            for batch in torch.randperm(len(labels))[: steps * BATCH].split(BATCH):
                loss = F.cross_entropy(model(images[batch].flatten(1)), labels[batch])
                # Without the quota: a task's fair share of the pixels is not what is asked for.
                loss = loss + weight * model.regularization(quota=False)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scale.step()
        model.end_task()
        record.task_ended(model, task)
    masks = torch.stack([model.masks(task)["input"] for task in range(TASKS)])
    return record.accuracy[-1], masks, record.nothing_forgotten


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, with the mean rank for ties."""

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        return (last - (counts - 1) / 2)[inverse]

    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))).double())[0, 1])


def plot(report: dict[str, Any], path: Path) -> None:
    """A column for each task: mean of each digit, importance, mutual information."""
    data = digits.load(0)
    figure = Figure(figsize=(2 * TASKS, 7.6), layout="constrained")
    axes = figure.subplots(4, TASKS)
    for task, column in enumerate(axes.T):
        means = [data.train_images[data.train_labels == 2 * task + i].mean(0)[0] for i in (0, 1)]
        importance = torch.tensor(report["importance"][task]).view(8, 8)
        information = torch.tensor(report["mutual_information"][task]).view(8, 8)
        titles = (f"mean {2 * task}", f"mean {2 * task + 1}", "pixel survives", "mutual information")
        for axis, picture, title in zip(column, (*means, importance, information), titles, strict=True):
            axis.imshow(picture, cmap="gray_r" if "mean" in title else "viridis", vmin=0)
            axis.set(title=title, xticks=[], yticks=[])
            axis.title.set_fontsize("small")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--epochs", type=int, default=20, help="per task (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--clamp", type=float, default=50.0, help="of |s·e| in Equation 3; 0 for none (%(default)s)")
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "feature_importance.json")
    parser.add_argument("--fast", action="store_true", help="one seed, one weight, two epochs: shows that it runs")
    args = parser.parse_args()
    weights = WEIGHTS[1:2] if args.fast else WEIGHTS
    if args.fast:
        args.seeds, args.epochs = 1, 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", hatify.HatWarning)
    rows, masks, kept = [], [], True
    for weight in track(weights, description="weights of Equation 5"):
        for seed in range(args.seed, args.seed + args.seeds):
            accuracy, mask, nothing_forgotten = run(weight, seed, args)
            kept &= nothing_forgotten
            masks.append(mask)
            pixels = mask.sum(1).tolist()
            rows.append({"weight": weight, "seed": seed, "accuracy": accuracy, "pixels": pixels})
    importance = torch.stack(masks).float().mean(0)
    data = digits.load(args.seed)
    information = []
    for task in range(TASKS):
        (images, labels), _ = data.task((2 * task, 2 * task + 1))
        information.append(torch.from_numpy(mutual_info_classif(images.flatten(1), labels, random_state=0)))
    correlation = [rank_correlation(i, m) for i, m in zip(importance, information, strict=True)]
    report: dict[str, Any] = {
        "conditions": {"torch": torch.__version__, **{k: v for k, v in vars(args).items() if k != "output"}},
        "rows": rows,
        "importance": [[round(p, 3) for p in task.tolist()] for task in importance],
        "mutual_information": [[round(p, 3) for p in task.tolist()] for task in information],
        "rank_correlation": correlation,
        "logits_of_finished_tasks_identical": kept,
    }
    table = Table(title="five tasks, mean over seeds")
    for column in ("weight", "accuracy in %", "pixels of 64"):
        table.add_column(column, justify="right")
    for weight in weights:
        chosen = [row for row in rows if row["weight"] == weight]
        figures = [statistics.mean(v for row in chosen for v in row[key]) for key in ("accuracy", "pixels")]
        table.add_row(f"{weight:g}", f"{100 * figures[0]:.2f}", f"{figures[1]:.1f}")
    console = Console()
    console.print(table, "rank correlation with mutual information:", [round(c, 2) for c in correlation])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report) + "\n")
    plot(report, args.output.with_suffix(".png"))
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
