"""What a converted network costs, as ratios to the plain one in the same run.

Steps of both networks alternate, so that both see the same machine; each row gives the median of the paired ratios and
the quartiles. The converted network has one finished task, half of whose features are on, and is learning its second;
the step holds zero_grad, forward, loss (with regularisation), backward and the optimizer. The learning rate is too
small to fit the batch, so that neither side drifts into subnormal gradients. On a GPU, times are CUDA events, batches
are larger, and everything runs under autocast to bfloat16.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --compile          # with torch.compile, minutes more
    python benchmarks/overhead.py --rows "resnet18*" --steps 60
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import hatify

RESULTS = Path(__file__).parent / "results"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CLASSES = 10

#: Steps whose times are dropped first.
WARM_UP = 3


@dataclass(frozen=True)
class Setting:
    """A network, its batch on the CPU and on a GPU, its optimizer, and what its ratios should not exceed."""

    model: str
    edge: int
    batch: int
    gpu_batch: int
    optimizer: str
    train: float
    evaluate: float


SETTINGS = (
    Setting("resnet18", 32, 16, 1024, "SGD", 1.05, 1.03),
    Setting("vit_tiny_patch16_224", 224, 8, 256, "SGD", 1.10, 1.03),
    Setting("convnext_atto", 224, 8, 256, "AdamW", 1.15, 1.05),
    Setting("efficientnet_b0", 224, 8, 256, "AdamW", 1.15, 1.05),
    Setting("swin_tiny_patch4_window7_224", 224, 8, 128, "AdamW", 1.15, 1.05),
)
COMPILED_TARGETS = {"train": 1.05, "evaluate": 1.02}

Row = dict[str, Any]

# Networks and steps --------------------------------------------------------------------------------------------------


def half_on(model: hatify.HatModel, task: int) -> None:
    """Turn half of a task's features on, at random."""
    embedding = model.task_state.embeddings[task]
    generator = torch.Generator().manual_seed(task)
    on = torch.rand(embedding.shape, generator=generator) < 0.5
    with torch.no_grad():
        embedding.copy_(torch.where(on, 1.0, -1.0))


def converted(plain: nn.Module, setting: Setting, num_tasks: int = 2, finished: int = 1) -> hatify.HatModel:
    """The converted network with some finished tasks, learning the next."""
    example = (torch.zeros(2, 3, setting.edge, setting.edge, device=DEVICE),)
    model = hatify.hatify(plain, num_tasks, example)
    for task in range(finished):
        model.begin_task(task)
        half_on(model, task)
        model.end_task()
    model.begin_task(finished)
    return model


class Trainee:
    """A network with a batch and an optimizer."""

    def __init__(self, network: nn.Module, setting: Setting, compiled: bool = False) -> None:
        batch = setting.gpu_batch if CUDA else setting.batch
        self.network, self.regularised = network, isinstance(network, hatify.HatModel)
        self.call: Any = torch.compile(network, fullgraph=True) if compiled else network
        self.images = torch.randn(batch, 3, setting.edge, setting.edge, device=DEVICE)
        self.labels = torch.randint(CLASSES, (batch,), device=DEVICE)
        if setting.optimizer == "SGD":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-7)
        self.precision = torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext()

    def train(self) -> None:
        """One training step."""
        with self.precision:
            loss = F.cross_entropy(self.call(self.images), self.labels)
            if self.regularised:
                loss = loss + 0.75 * self.network.regularization()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """One forward pass."""
        with self.precision:
            self.call(self.images)


# Measuring -----------------------------------------------------------------------------------------------------------


def seconds(action: Callable[[], None]) -> float:
    """How long one call takes."""
    if CUDA:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def paired(plain: Callable[[], None], other: Callable[[], None], steps: int) -> Row:
    """Times of both in turn: medians, and the median and quartiles of the ratios."""
    for _ in range(WARM_UP):
        plain()
        other()
    gc.collect()
    times = []
    for i in range(steps):
        if i % 2:  # whoever comes second finds other caches
            a, b = seconds(plain), seconds(other)
        else:
            b, a = seconds(other), seconds(plain)
        times.append((a, b))
    ratios = sorted(b / a for a, b in times)
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(middle, 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "plain_ms": round(1e3 * statistics.median(a for a, _ in times), 3),
        "converted_ms": round(1e3 * statistics.median(b for _, b in times), 3),
        "steps": steps,
    }


def network_rows(setting: Setting, steps: int, compiled: bool) -> Iterator[Row]:
    """A training step of the second task, and an evaluation of the finished first."""
    torch.manual_seed(0)
    plain = timm.create_model(setting.model, num_classes=CLASSES).to(DEVICE).train()
    model = converted(plain, setting)
    a, b = Trainee(plain, setting, compiled), Trainee(model, setting, compiled)
    name = f"{setting.model}{', compiled' if compiled else ''}"
    what = {"model": setting.model, "optimizer": setting.optimizer, "compiled": compiled, "batch": len(a.images)}
    target = COMPILED_TARGETS["train"] if compiled else setting.train
    yield {"row": f"{name}: train", **what, "target": target, **paired(a.train, b.train, steps)}
    model.end_task()
    model.set_task(0)
    plain.eval()
    target = COMPILED_TARGETS["evaluate"] if compiled else setting.evaluate
    yield {"row": f"{name}: evaluate", **what, "target": target, **paired(a.evaluate, b.evaluate, 2 * steps)}


def scaling_rows(steps: int) -> Iterator[Row]:
    """The same step with more tasks finished, and with more tasks foreseen; against the fewest."""
    setting = SETTINGS[0]
    plain = timm.create_model(setting.model, num_classes=CLASSES).to(DEVICE).train()
    base = Trainee(converted(plain, setting, 21, 1), setting)
    for finished in (5, 20):
        other = Trainee(converted(plain, setting, 21, finished), setting)
        row = f"{setting.model}: {finished} finished tasks ÷ 1"
        yield {"row": row, "model": setting.model, "target": 1.05, **paired(base.train, other.train, steps)}
    base = Trainee(converted(plain, setting, 2, 1), setting)
    for num_tasks in (5, 20):
        other = Trainee(converted(plain, setting, num_tasks, 1), setting)
        row = f"{setting.model}: num_tasks {num_tasks} ÷ 2"
        yield {"row": row, "model": setting.model, "target": 1.05, **paired(base.train, other.train, steps)}


def task_rows(steps: int) -> Iterator[Row]:
    """begin_task with end_task, in training steps; and what the regularisation adds to a step."""
    for setting in SETTINGS[:2]:
        plain = timm.create_model(setting.model, num_classes=CLASSES).to(DEVICE).train()
        model = converted(plain, setting)
        trainee = Trainee(plain, setting)

        def begin_and_end(model: hatify.HatModel = model) -> None:
            model.end_task()
            model.begin_task(1)

        few = max(5, steps // 4)
        row = f"{setting.model}: begin_task and end_task ÷ plain step"
        yield {"row": row, "model": setting.model, "target": 2.0, **paired(trainee.train, begin_and_end, few)}
        with_it = Trainee(model, setting)
        without = copy.copy(with_it)
        without.regularised = False
        row = f"{setting.model}: step with regularisation ÷ without"
        pairs = 4 * steps if setting.edge < 100 else steps
        yield {"row": row, "model": setting.model, "target": 1.01, **paired(without.train, with_it.train, pairs)}


def _peak(converts: bool, setting: Setting, answer: Any) -> None:
    """In a process of its own: bytes above the start at the peak of a training step, and bytes of parameters."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    plain = timm.create_model(setting.model, num_classes=CLASSES).to(DEVICE).train()
    parameters = sum(p.numel() * p.element_size() for p in plain.parameters())
    network: nn.Module = converted(plain, setting) if converts else plain
    del plain
    trainee = Trainee(network, setting)
    for _ in range(2):
        trainee.train()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        trainee.train()
        answer.put((torch.cuda.max_memory_allocated(), parameters))
        return
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    trainee.train()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer.put((int(status["VmHWM"].split()[0]) * 1024 - _libraries(), parameters))


def _libraries() -> int:
    """Resident bytes of files, such as shared libraries, which are no part of the network."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0]) * 1024


def memory_rows() -> Iterator[Row]:
    """Peak memory of a training step, each side in a fresh process; on the CPU, of Linux' accounting."""
    if not CUDA and not Path("/proc/self/clear_refs").exists():
        return
    context = multiprocessing.get_context("spawn")
    for setting in SETTINGS:
        peaks = []
        for converts in (False, True):
            answer: Any = context.Queue()
            process = context.Process(target=_peak, args=(converts, setting, answer))
            process.start()
            peak, parameters = answer.get()
            process.join()
            peaks.append(peak)
        plain, other = peaks
        yield {
            "row": f"{setting.model}: peak memory, less the parameters' own size",
            "model": setting.model,
            "target": 1.25,
            "ratio": round((other - parameters) / plain, 4),
            "plain_mb": round(plain / 2**20, 1),
            "converted_mb": round(other / 2**20, 1),
            "parameters_mb": round(parameters / 2**20, 1),
        }


# Results -------------------------------------------------------------------------------------------------------------


def every_row(steps: int, compiled: bool) -> Iterator[tuple[str, Callable[[], Iterator[Row]]]]:
    """Groups of rows, by a name that `--rows` selects."""
    for setting in SETTINGS:
        count = steps if setting.edge < 100 else max(8, steps // 4)
        yield setting.model, lambda setting=setting, count=count: network_rows(setting, count, False)  # type: ignore[misc]
    if compiled:
        for setting in SETTINGS[:2]:
            count = steps if setting.edge < 100 else max(8, steps // 4)
            yield (
                f"{setting.model}, compiled",
                lambda setting=setting, count=count: network_rows(setting, count, True),  # type: ignore[misc]
            )
    yield "scaling", lambda: scaling_rows(steps)
    yield "tasks", lambda: task_rows(steps)
    yield "memory", memory_rows


def table(rows: list[Row]) -> Table:
    """The rows for reading."""
    shown = Table(title="converted ÷ plain")
    for column in ("row", "ratio", "quartiles", "at most", ""):
        shown.add_column(column, justify="left" if column in ("row", "") else "right")
    for row in rows:
        quartiles = "–".join(f"{q:.3f}" for q in row.get("quartiles", ()))
        met = "[green]met" if row["ratio"] <= row["target"] else "[red]missed"
        shown.add_row(row["row"], f"{row['ratio']:.3f}", quartiles, f"{row['target']:g}", met)
    return shown


def plot(rows: list[Row], path: Path) -> None:
    """A bar for every ratio that should be about one."""
    shown = [row for row in rows if row["target"] > 1 and row["target"] < 2]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    for i, row in enumerate(reversed(shown)):
        low, high = row.get("quartiles", (row["ratio"], row["ratio"]))
        axes.barh(i, row["ratio"], color="tab:blue" if row["ratio"] <= row["target"] else "tab:orange")
        axes.plot([low, high], [i, i], color="black", linewidth=1)
        axes.plot([row["target"]] * 2, [i - 0.4, i + 0.4], color="tab:red")
    axes.set_yticks(range(len(shown)), [row["row"] for row in reversed(shown)], fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set_xlim(0.8)
    axes.set_xlabel("converted ÷ plain (red: at most)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="only groups of rows whose names match")
    parser.add_argument("--steps", type=int, default=60, help="pairs of steps for small images; a quarter for large")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--compile", action="store_true", help="with torch.compile, too")
    parser.add_argument("--output", type=Path, default=RESULTS / f"overhead{'_gpu' if CUDA else ''}.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", hatify.HatWarning)

    rows: list[Row] = []
    console = Console()
    groups = [(n, g) for n, g in every_row(args.steps, args.compile) if fnmatch.fnmatch(n, args.rows)]
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(groups))
        for name, group in groups:
            progress.update(bar, description=name)
            rows.extend(group())
            progress.advance(bar)
    console.print(table(rows))
    conditions = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    args.output.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))
    console.print(f"stored in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
