"""``hatify inspect``, ``hatify verify`` and ``hatify forget``: what is done with a saved model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hatify.checkpoint import read_checkpoint
from hatify.cli.common import Factory, FactoryArg, Json, Out, loaded, print_json, progress, right, written_whole
from hatify.forget import forget_task
from hatify.report import capacity, plot_capacity, totals
from hatify.saving import read_description, save
from hatify.verify import unlocked_entries, verify_isolation


def inspect(
    out: Out,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the same into this picture (.png, .svg, .pdf).", metavar="FILE")
    ] = None,
    factory: Factory = None,
    factory_arg: FactoryArg = None,
    as_json: Json = False,
) -> None:
    """Show how many features each task uses in each layer, and how many are free."""
    model = loaded(out, factory, factory_arg)
    rows, state = capacity(model), model.task_state
    if plot is not None:
        with written_whole(plot) as part:
            plot_capacity(model, part)
    if as_json:
        description = read_description(out)
        print_json(
            {
                "architecture": description["architecture"],
                "versions": description["versions"],
                "num_tasks": model.num_tasks,
                "finished_tasks": list(model.finished_tasks),
                "open_task": model.active_task,
                **totals(model),
                "layers": [asdict(row) for row in rows],
            }
        )
        return
    table = Table("layer", *(right(h) for h in ("features", *(f"task {t}" for t in model.finished_tasks), "free")))
    for row in rows:
        table.add_row(row.layer, *(f"{n:,}" for n in (row.features, *row.used.values(), row.free)))
    used, total = int(state.used().sum()), max(state.num_slots, 1)
    console = Console()
    console.print(table)
    finished = ", ".join(map(str, model.finished_tasks)) or "none"
    opened = "none" if model.active_task is None else model.active_task
    console.print(f"tasks: {model.num_tasks}; finished: {finished}; open: {opened}")
    console.print(f"features in use: {used:,} of {state.num_slots:,} ({used / total:.1%})")
    if state.has_base:
        console.print(
            f"of these, {int(state.base.sum()):,} are a locked base: every task reads them, none changes them"
        )


def verify(out: Out, factory: Factory = None, factory_arg: FactoryArg = None, as_json: Json = False) -> None:
    """Replace all that finished tasks do not lock by noise, and check that their answers are equal bit for bit.

    Exit status 1 if one is not. The folder is left as it is.
    """
    model = loaded(out, factory, factory_arg)
    with progress(as_json, steps=1) as step:
        step("verifying")
        verify_isolation(model)
    replaced = {t: sum(int(e.sum()) for e in unlocked_entries(model, t).values()) for t in model.finished_tasks}
    if as_json:
        print_json({"isolated": True, "entries_replaced": replaced})
        return
    for task, count in replaced.items():
        typer.echo(f"task {task}: the same answers bit for bit, with {count:,} unlocked entries replaced by noise")


def forget(
    out: Out,
    task: Annotated[int, typer.Option(help="The task to forget.")],
    reset: Annotated[str, typer.Option(help="What its entries become: random, original or zero.")] = "random",
    original: Annotated[
        Path | None, typer.Option(help="For --reset original: the checkpoint that was converted.", metavar="CHECKPOINT")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; change nothing.")] = False,
    factory: Factory = None,
    factory_arg: FactoryArg = None,
    as_json: Json = False,
) -> None:
    """Re-initialise what belongs to one finished task alone. The others' answers stay equal bit for bit."""
    model = loaded(out, factory, factory_arg)
    weights = None if original is None else read_checkpoint(original, [e.name for e in model.census]).state
    forgotten = forget_task(model, task, reset, dry_run, weights)
    if not dry_run:
        save(model, out)
    if as_json:
        print_json({"task": task, "dry_run": dry_run, "forgotten": forgotten})
        return
    table = Table("parameter", right("entries to forget" if dry_run else "entries forgotten"))
    for name, count in forgotten.items():
        table.add_row(name, f"{count:,}")
    Console().print(table)
    typer.echo(f"{sum(forgotten.values()):,} entries in all" + ("; nothing was changed" if dry_run else ""))
