"""Give spare features to the smallest model of every timm file, and see whether its base notices.

Each network is converted with a locked base, widened by a quarter, and compared with the original in evaluation and in
training mode, at the smallest image size that it takes; then one task takes spare features, and a second one, and the
first must answer as before. Results go to a CSV file, one row for each name, written after every model: an interrupted
run continues where it stopped. Layers that are given nothing are counted by the reason.

    python benchmarks/timm_spare.py --largest 30000000
"""

from __future__ import annotations

import argparse
import csv
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import hatify
from timm_coverage import (
    RESULTS as COVERAGE,
)
from timm_coverage import (
    Row,
    brief,
    drift,
    enliven,
    file_of,
    isolation,
    load,
    parity,
    parity_in_training,
    smallest_of_every_file,
    smallest_recipe,
    time_limit,
)

RESULTS = Path(__file__).parent / "results" / "timm_spare.csv"
COLUMNS = (
    "name", "file", "parameters", "features", "spare", "layers", "refused", "parity", "parity_training", "drift",
    "isolated", "seconds_convert", "seconds_widen", "why", "error",
)  # fmt: skip


def measure(name: str, share: float) -> Row:
    """What becomes of one network."""
    recipe = smallest_recipe(name)
    torch.manual_seed(0)
    network = without_dropout(enliven(recipe.network()))
    begun = time.perf_counter()
    model = hatify.hatify(network, 2, (recipe.images(1),), base="locked")
    row: Row = {"parameters": sum(p.numel() for p in network.parameters()), "features": model.task_state.num_slots}
    row["seconds_convert"] = round(time.perf_counter() - begun, 2)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.widen(share)
    said = [str(w.message) for w in caught if issubclass(w.category, hatify.HatWarning)]
    row["seconds_widen"] = round(time.perf_counter() - begun, 2)
    row["spare"] = model.task_state.num_slots - int(row["features"])
    row["layers"] = len(set(model.plan.owners.values()))
    row["why"] = said[0].removeprefix("no features are added to ") if said else ""
    row["refused"] = sum(map(_layers_in, row["why"].split("; "))) if said else 0
    row["parity"] = f"{parity(network, model, recipe):.1e}"
    row["parity_training"] = f"{parity_in_training(network, model, recipe):.1e}"
    row["drift"], row["isolated"] = drift(model, recipe), isolation(model)
    return row


def without_dropout(network: nn.Module) -> nn.Module:
    """The network without noise that depends on how many features there are."""
    for module in network.modules():
        for name in ("p", "drop_rate", "drop_prob"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return network


def _layers_in(part: str) -> int:
    """How many layers are named for one reason: ``a, b and 3 more layers: …``."""
    names = part.partition(": ")[0]
    more = re.search(r" and (\d+) more layers$", names)
    return names.count(",") + 1 + (int(more[1]) if more else 0)


def run(args: argparse.Namespace, console: Console) -> None:
    """Measure what is not there yet."""
    rows, begun = load(args.output), time.perf_counter()
    for name in args.models or smallest_of_every_file(load(COVERAGE)):
        if time.perf_counter() - begun > args.time_budget:
            return
        if name in rows or int(load(COVERAGE).get(name, {}).get("parameters") or 0) > args.largest:
            continue
        try:
            with time_limit(args.limit):
                row = measure(name, args.share)
        except Exception as error:
            row = {"error": brief(error)}
        rows[name] = {"name": name, "file": file_of(name), **row}
        console.print(f"{name}: {rows[name].get('error') or rows[name]['spare']}", markup=False)
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows.values(), key=lambda row: (row["file"], row["name"])))


def summary(rows: dict[str, Row]) -> Table:
    """The counts."""
    done = [row for row in rows.values() if not row["error"]]
    counts = Counter(
        {
            "models": len(rows),
            "given spare features": len(done),
            "… in every layer": sum(int(row["refused"]) == 0 for row in done),
            "the same as the original (1e-4), in both modes": sum(
                max(float(row["parity"]), float(row["parity_training"])) < 1e-4 for row in done
            ),
            "isolated, without drift": sum(row["isolated"] == "yes" and float(row["drift"]) == 0 for row in done),
        }
    )
    table = Table("", "number")
    for what, count in counts.items():
        table.add_row(what, str(count))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="instead of the smallest of every file")
    parser.add_argument("--share", type=float, default=0.25, help="(%(default)s)")
    parser.add_argument("--largest", type=int, default=10**9, help="most parameters of a model")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one model (%(default)s)")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="begin no model after so many seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    args, console = parser.parse_args(), Console()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not args.summary:
        run(args, console)
    console.print(summary(load(args.output)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
