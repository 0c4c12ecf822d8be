"""How locked entries are put back fastest: by the numbers of their runs, by those of the free ones, or by a mask.

One parameter, of which a task owns some rows and, of these, some columns. Each way writes the same entries, in turn
with the others, on one thread; times are medians. ``FEW`` and ``SINGLE`` in hatify/lock/entries.py are read off here.

    python benchmarks/putting_back.py
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
SHAPES = ((256, 256, 3, 3), (512, 512, 3, 3), (768, 192), (768, 768))
#: Shares of the rows and of the columns that are on.
ON = ((0.25, 0.25), (0.5, 0.5), (0.5, 1.0), (1.0, 0.5), (0.9, 0.9), (0.97, 0.97))
WAYS = ("locked runs", "free runs set aside", "mask")

Row = dict[str, Any]


def ways(shape: tuple[int, ...], rows: float, columns: float) -> tuple[float, dict[str, Callable[[], Any]]]:
    """The share of entries that is locked, and each way to put them back."""
    on = (torch.rand(shape[0]) < rows).view(-1, 1) & (torch.rand(shape[1]) < columns)
    lock = on.view(*on.shape, *(1,) * (len(shape) - 2)).expand(shape)
    parameter, saved = torch.randn(shape), torch.randn(shape)
    to, held = (t.view(on.numel(), -1) for t in (parameter, saved))
    locked, free = (chosen.view(-1).nonzero().squeeze(1) for chosen in (on, ~on))
    of_locked = held[locked]

    def set_aside() -> None:
        aside = to[free]
        to.copy_(held)
        to.index_copy_(0, free, aside)

    actions = (
        lambda: to.index_copy_(0, locked, of_locked),
        set_aside,
        lambda: torch.where(lock, saved, parameter, out=parameter),
    )
    return float(on.float().mean()), dict(zip(WAYS, actions, strict=True))


def medians(actions: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """The time of each, in turn, in microseconds."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(times):
        for name, action in actions.items():
            begun = time.perf_counter()
            action()
            found[name].append(time.perf_counter() - begun)
    return {name: round(1e6 * statistics.median(taken[3:]), 1) for name, taken in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS / "putting_back.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found: list[Row] = []
    table = Table("shape", "rows, columns on", "locked", *WAYS)
    for shape in SHAPES:
        for rows, columns in ON:
            share, actions = ways(shape, rows, columns)
            row = medians(actions, args.times)
            found.append({"shape": shape, "rows": rows, "columns": columns, "locked": round(share, 3), **row})
            table.add_row(str(shape), f"{rows}, {columns}", f"{share:.2f}", *map(str, row.values()))
    versions = {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    args.output.write_text(json.dumps({"rows": found, "unit": "microseconds", **versions}, indent=2) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
