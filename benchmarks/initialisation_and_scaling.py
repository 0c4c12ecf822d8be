"""How soon does a mask find the features that matter? Table 1 of HAT-CL, and what really is fastest.

Five N(0, 1) features, of which three make the target y = x₀ − 2x₂ + 3x₄; one ``Linear(5, 1)`` with input and output
masks, converted by hatify. A network counts as trained when its binary masks are exactly (1, 0, 1, 0, 1) and (1). The
published protocol looks once in an epoch of 25 batches, so 25 is the least it can show; here every batch is looked at
as well, both for the first time the masks are right and for the time from which they stay right.

The authors' code differs from the paper in two ways that matter here, so each is tried both ways. It averages Equation
5 over the layers where the equation sums: with two masked layers, its factor 1 is a weight of 0.5. And it clamps |s·e|
at 50 in Equation 3, so that masks whose s·e is larger get no gradient: while the cosine schedule is high, the weights
learn before the masks do. The exact Equation 3 moves the masks at any s.

A second table is of the authors' other experiment: batches until the test loss of y = 2x₀ + 1 is below 0.1, without
regularisation. The grid then varies initialisation, schedule, clamp and s_max.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import hatify

BATCH, BATCHES, EPOCHS, GRID_EPOCHS = 32, 25, 100, 20
SCHEDULES = ("cosine", "linear", "exponential", "constant")
RIGHT = torch.tensor([True, False, True, False, True, True])  # five inputs, one output
CLAMPS = (50.0, None)  # of the authors' code; the exact Equation 3
#: What the paper's Table 1 gives, and what the authors' notebook prints for the convergence of the loss.
PUBLISHED = {("normal", "linear"): 338.50, ("dense", "cosine"): 25.00}
PUBLISHED_LOSS = {
    ("none", "", ""): 12.6,
    ("output", "normal", "linear"): 90.3,
    ("output", "dense", "cosine"): 12.5,
    ("input", "normal", "linear"): 99.4,
    ("input", "dense", "cosine"): 12.6,
}


@dataclass(frozen=True)
class Setting:
    """What is varied: initial embeddings, schedule, clamp in Equation 3, weight of Equation 5, and s_max."""

    init: str | float
    schedule: str
    clamp: float | None = 50.0
    weight: float = 0.5
    s_max: float = 100.0


@dataclass(frozen=True)
class Trial:
    """Batches until the masks were right: at the end of an epoch, at all, and for good; None: never within the limit.

    "For good" is up to the end of the epoch in which the run stops.
    """

    epoch: int | None
    first: int | None
    lasting: int | None


def problem(features: int, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 samples (1000, features) and targets (1000, 1): of Table 1 with five features, else y = 2x₀ + 1."""
    x = torch.randn(1000, features, generator=torch.Generator().manual_seed(seed))
    y = x[:, 0] - 2 * x[:, 2] + 3 * x[:, 4] if features == 5 else 2 * x[:, 0] + 1
    return x, y[:, None]


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of the 800 training samples, shuffled."""
    order = torch.randperm(BATCH * BATCHES).split(BATCH)
    return ((x[part], y[part]) for part in order)


def selection(setting: Setting, x: Tensor, y: Tensor, seed: int, epochs: int) -> Trial:
    """Train one network until its masks are right at the end of an epoch, for at most `epochs`."""
    torch.manual_seed(seed)
    options = {"mask_init": setting.init, "s_max": setting.s_max, "clamp": setting.clamp}
    model = hatify.hatify(nn.Sequential(nn.Linear(5, 1)), 1, x[:2], heads=None, mask_inputs=True, **options)
    model.begin_task(0)
    embedding = model.task_state.embeddings[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scale = hatify.MaskScale(model, steps=BATCHES, schedule=setting.schedule)
    right: list[bool] = []
    while not (right and right[-1]) and len(right) < epochs * BATCHES:
        for inputs, targets in batches(x, y):
            loss = F.mse_loss(model(inputs), targets) + setting.weight * model.regularization(quota=False)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scale.step()
            right.append(torch.equal(embedding > 0, RIGHT))
    first = right.index(True) + 1 if any(right) else None
    if not right[-1]:
        return Trial(None, first, None)
    wrong = [batch for batch, good in enumerate(right, 1) if not good]
    return Trial(len(right), first, max(wrong, default=0) + 1)


def convergence(
    masks: str, init: str, schedule: str, clamp: float | None, x: Tensor, y: Tensor, seed: int, epochs: int
) -> int | None:
    """Batches until the loss on the 200 test samples is below 0.1, looked at after each; None: never."""
    torch.manual_seed(seed)
    net: nn.Module = nn.Linear(2, 1)
    scale = None
    if masks != "none":
        net = hatify.hatify(
            nn.Sequential(net),
            1,
            x[:2],
            heads=None,
            mask_init=init,
            clamp=clamp,
            mask_inputs=masks != "output",
            policies={"0": "unmasked"} if masks == "input" else None,
        )
        net.begin_task(0)
        scale = hatify.MaskScale(net, steps=BATCHES, schedule=schedule)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    test_x, test_y = x[BATCH * BATCHES :], y[BATCH * BATCHES :]
    for epoch in range(epochs):
        for batch, (inputs, targets) in enumerate(batches(x, y), 1):
            loss = F.mse_loss(net(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scale is not None:
                net.mask_scale = net.s_max
            with torch.no_grad():
                # The mean over batches of batch means, as there.
                if statistics.mean(part.mean().item() for part in (net(test_x) - test_y).square().split(BATCH)) < 0.1:
                    return epoch * BATCHES + batch
            if scale is not None:
                scale.step()
    return None


def summary(values: list[int | None]) -> dict[str, Any]:
    """Mean, spread and failures of batch counts."""
    done = [value for value in values if value is not None]
    quartiles = statistics.quantiles(done, n=4) if len(done) > 1 else done * 3
    return {
        "mean": round(statistics.mean(done), 2) if done else None,
        "standard_deviation": round(statistics.pstdev(done), 2) if done else None,
        "range": [min(done), max(done)] if done else None,
        "quartiles": [round(q, 2) for q in quartiles],
        "failures": values.count(None),
        "networks": len(values),
    }


def selections(settings: list[Setting], networks: int, epochs: int, seed: int, what: str) -> list[dict[str, Any]]:
    """A row for each setting."""
    x, y = problem(5, seed)
    rows = []
    for setting in track(settings, description=what):
        trials = [selection(setting, x, y, 1000 * seed + network, epochs) for network in range(networks)]
        looks = {name: summary([getattr(trial, name) for trial in trials]) for name in ("epoch", "first", "lasting")}
        rows.append({**asdict(setting), **looks, "trials": [list(asdict(trial).values()) for trial in trials]})
    return rows


def convergences(networks: int, epochs: int, seed: int) -> list[dict[str, Any]]:
    """A row for each kind of masks."""
    x, y = problem(2, seed)
    rows = []
    kinds = [(masks, *pair, clamp) for masks in ("output", "input", "both") for pair in PUBLISHED for clamp in CLAMPS]
    for kind in track([("none", "", "", None), *kinds], description="convergence of the loss"):
        counts = [convergence(*kind, x, y, 1000 * seed + network, epochs) for network in range(networks)]
        published = PUBLISHED_LOSS.get(kind[:3])
        row = dict(zip(("masks", "init", "schedule", "clamp"), kind, strict=True))
        rows.append({**row, "published": published, **summary(counts)})
    return rows


def plot(table: list[dict[str, Any]], grid: list[dict[str, Any]], path: Path) -> None:
    """Left: the share of networks trained, over batches; right: the grid's cosine schedule, over s_max."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, row in enumerate(row for row in table if row["weight"] == 0.5):
        done = sorted(trial[2] for trial in row["trials"] if trial[2] is not None)
        share = [100 * (i + 1) / len(row["trials"]) for i in range(len(done))]
        name = f"{row['init']}, {row['schedule']}, {_clamp(row['clamp'])}"
        left.step(done, share, where="post", color=f"C{color}", label=name)
    left.axvline(BATCHES, color="grey", lw=0.8, ls=":", label="one epoch")
    left.set(xscale="log", xlabel="batches", title="networks with the right masks for good, in %")
    left.legend(fontsize="small")
    cosine = [row for row in grid if row["schedule"] == "cosine"]
    for init, style in zip(dict.fromkeys(row["init"] for row in cosine), ("-", "--", ":"), strict=False):
        for color, clamp in enumerate(dict.fromkeys(row["clamp"] for row in cosine)):
            line = [row for row in cosine if (row["init"], row["clamp"]) == (init, clamp)]
            name = f"{init}, {_clamp(clamp)}"
            means = [row["lasting"]["mean"] or float("nan") for row in line]
            right.plot([row["s_max"] for row in line], means, style, color=f"C{color}", label=name)
            failed = [row for row in line if row["epoch"]["failures"]]
            right.plot(
                [row["s_max"] for row in failed], [row["lasting"]["mean"] for row in failed], "x", color=f"C{color}"
            )
    right.set(
        xscale="log", yscale="log", xlabel="s_max", title="cosine schedule: mean number of batches (×: some failed)"
    )
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def _clamp(clamp: float | None) -> str:
    return "exact Eq. 3" if clamp is None else f"clamp {clamp:g}"


def show(rows: list[dict[str, Any]], losses: list[dict[str, Any]], console: Console) -> None:
    """Print Table 1 and the convergence of the loss."""
    table = Table(title="batches until the masks are right: mean ± standard deviation (failures)")
    for column in ("init", "schedule", "Eq. 3", "weight", "published", "once an epoch", "first", "for good"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        looks = [row[look] for look in ("epoch", "first", "lasting")]
        cells = [f"{s['mean']} ± {s['standard_deviation']} ({s['failures']})" for s in looks]
        published = PUBLISHED[row["init"], row["schedule"]]
        cells = [row["init"], row["schedule"], _clamp(row["clamp"]), str(row["weight"]), f"{published:.2f}", *cells]
        table.add_row(*cells)
    loss = Table(title="batches until the test loss is below 0.1: mean ± standard deviation (failures)")
    for column in ("masks", "init", "schedule", "Eq. 3", "published", "here"):
        loss.add_column(column, justify="right", no_wrap=True)
    for row in losses:
        here = f"{row['mean']} ± {row['standard_deviation']} ({row['failures']})"
        loss.add_row(row["masks"], row["init"], row["schedule"], _clamp(row["clamp"]), str(row["published"]), here)
    console.print(table, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=100, help="per row of the tables (%(default)s)")
    parser.add_argument("--grid-networks", type=int, default=20, help="per point of the grid (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "initialisation_and_scaling.json")
    parser.add_argument(
        "--fast", action="store_true", help="two networks, few epochs, a small grid: shows that it runs"
    )
    args = parser.parse_args()
    if args.fast:
        args.networks = args.grid_networks = 2
    epochs = 4 if args.fast else EPOCHS
    torch.set_num_threads(1)
    console = Console()
    settings = [Setting(*pair, clamp, weight) for weight in (0.5, 1.0) for clamp in CLAMPS for pair in PUBLISHED]
    table = selections(settings, args.networks, epochs, args.seed, "Table 1")
    losses = convergences(args.networks, epochs, args.seed)
    show(table, losses, console)
    s_max = (100.0, 400.0) if args.fast else (25.0, 50.0, 100.0, 200.0, 400.0)
    inits = ("dense",) if args.fast else ("dense", 0.5, "normal")
    points = itertools.product(inits, SCHEDULES, (50.0, 17.0, None), (0.5,), s_max)
    grid = selections(
        [Setting(*point) for point in points], args.grid_networks, min(epochs, GRID_EPOCHS), args.seed, "grid"
    )
    report = {
        "conditions": {"torch": torch.__version__, "optimizer": "SGD 0.01, momentum 0.9", **vars(args)},
        "table": table,
        "loss": losses,
        "grid": grid,
    }
    report["conditions"].pop("output")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps(report, indent=None, separators=(",", ": ")).replace('{"init"', '\n{"init"') + "\n"
    )
    plot(table, grid, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
