"""Thousands of generated networks: is the function kept, and does a finished task's answer ever change?

Every network is converted; its outputs are compared with the original's for every task, several batch sizes, and other
lengths or image sizes than those of the conversion; a few tasks are trained, with half of the features on at random and
an optimizer drawn at random, and finished tasks are asked again at every turn; at last every entry that a finished task
does not lock is replaced by noise. The networks are those of the tests (`tests/networks.py`), from other seeds. Prints
a summary and stores it as JSON. Exit status 1 if a network failed.

    python benchmarks/generated_networks.py --count 5000
    python benchmarks/generated_networks.py --count 100000 --time-budget 3600 --seed 1000000
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import hatify

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from networks import FRONTS, generate
from oracles import broken_promises, leaks, locks, parity_errors, refuses

NUM_TASKS = 3
ROUNDING = 1e-5
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Findings:
    """What a run found out; `failures` holds what to pass to `generate` to see each one again."""

    networks: int = 0
    parameters: int = 0
    other_sizes: int = 0
    other_sizes_refused: int = 0
    finished_tasks: int = 0
    entries_locked: int = 0
    entries_replaced_by_noise: int = 0
    largest_parity_error: float = 0.0
    parity_failures: int = 0
    changed_answers: int = 0
    leaks: int = 0
    disagreements_with_verify_isolation: int = 0
    crashes: int = 0
    failures: list[dict[str, str | int]] = field(default_factory=list)
    blocks: Counter[str] = field(default_factory=Counter)


def examine(front: str, seed: int, findings: Findings) -> None:
    """Generate, convert, train and probe one network."""
    source = random.Random(seed)
    generated = generate(source, front)
    findings.networks += 1
    findings.parameters += sum(p.numel() for p in generated.net.parameters())
    findings.blocks.update(generated.blocks)

    def failed(kind: str, what: object) -> None:
        setattr(findings, kind, getattr(findings, kind) + 1)
        findings.failures.append({"front": front, "seed": seed, "kind": kind, "what": str(what)[:500]})

    try:
        original = generated.net.eval()
        coupled = source.choice((True, True, False))
        model = hatify.hatify(original, NUM_TASKS, generated.inputs(2), couple=coupled)
        findings.other_sizes += len(generated.others)
        findings.other_sizes_refused += len(generated.others)
        generated = generated.accepted(lambda inputs: not refuses(model, inputs))
        findings.other_sizes_refused -= len(generated.others)
        probes = generated.probes()
        for error in parity_errors(model, original, probes):
            findings.largest_parity_error = max(findings.largest_parity_error, error)
            if error > ROUNDING:
                failed("parity_failures", error)
        for broken in broken_promises(model, generated.of_any_size, source, probes=probes):
            failed("changed_answers", broken)
        leaking = False
        for task in model.finished_tasks:
            findings.finished_tasks += 1
            owned = [locked for name, locked in locks(model, task).items() if name in model.uses]
            findings.entries_locked += sum(int(locked.sum()) for locked in owned)
            findings.entries_replaced_by_noise += sum(int((~locked).sum()) for locked in owned)
            if found := leaks(model, task, probes):
                leaking = True
                failed("leaks", f"task {task}: {', '.join(found)}")
        try:
            if model.finished_tasks:
                hatify.verify_isolation(model, probes[1])
        except hatify.IsolationError as error:
            if not leaking:
                failed("disagreements_with_verify_isolation", error)
    except Exception as error:  # every network counts, whatever it meets
        failed("crashes", f"{type(error).__name__}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2100, help="how many networks")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first network; the others follow")
    parser.add_argument("--time-budget", type=float, help="stop after so many seconds")
    parser.add_argument("--output", type=Path, default=RESULTS / "generated_networks.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    findings, start = Findings(), time.perf_counter()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    console = Console()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("networks", total=args.count)
        for i in range(args.count):
            if args.time_budget is not None and time.perf_counter() - start > args.time_budget:
                break
            examine(FRONTS[i % len(FRONTS)], args.seed + i, findings)
            progress.update(bar, advance=1, description=f"networks ({len(findings.failures)} failures)")

    seconds = time.perf_counter() - start
    report = {
        **asdict(findings),
        "blocks": dict(sorted(findings.blocks.items())),
        "kinds_of_blocks": len(findings.blocks),
        "tasks_per_network": NUM_TASKS,
        "first_seed": args.seed,
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")

    table = Table(title=f"{findings.networks} generated networks in {seconds:.0f} s", show_header=False)
    for name, value in report.items():
        if name not in ("failures", "blocks"):
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)
    for failure in findings.failures[:20]:
        console.print(
            f"[red]{failure['kind']}[/]: {failure['front']}, seed {failure['seed']}: {failure['what']}", markup=True
        )
    console.print(f"stored in {args.output}")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
