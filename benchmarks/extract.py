"""How much smaller and faster is one task's network than the plain one, with half of all features on?

Masks are drawn at random: half of the features of every mask are on, and half of the attention heads, as wholes (in
turns the smaller and the larger half of an odd number). The extracted network and timm's original are timed in turns on
one CPU thread; figures are medians. Prints a table and stores it as JSON.

    python benchmarks/extract.py
    python benchmarks/extract.py --models resnet18 --rounds 51
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hatify

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv3_small_050",
    "densenet121",
    "swin_tiny_patch4_window7_224",
)


def half_on(model: hatify.HatModel, net: nn.Module, task: int) -> None:
    """Set the embeddings of the open task so that half of the features are on."""
    state = model.task_state
    on = torch.zeros(state.num_slots, dtype=torch.bool)
    for start, stop in state.groups.values():
        on[start + torch.randperm(stop - start)[: (stop - start + 1) // 2]] = True
    slots = state.masks_from(torch.arange(state.num_slots, dtype=torch.float64))
    attentions = [(path, m.num_heads) for path, m in net.named_modules() if hasattr(m, "qkv")]
    for i, (path, heads) in enumerate(attentions):
        chosen = torch.zeros(heads, dtype=torch.bool)
        chosen[torch.randperm(heads)[: (heads + i % 2) // 2]] = True
        features = slots[model.plan.owners[f"{path}.qkv"]].long()
        on[features] = chosen.view(1, heads, 1).expand(3, heads, features.numel() // (3 * heads)).flatten()
    state.embeddings[task].data.copy_(torch.where(on, 2.0, -2.0))


@torch.no_grad()
def seconds(net: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    net(x)
    return time.perf_counter() - start


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    x = torch.randn(batch, 3, 224, 224)
    model = hatify.hatify(net, 2, x[:2])
    model.begin_task(0)
    half_on(model, net, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hatify.HatWarning)
        model.end_task()
    start = time.perf_counter()
    compact = hatify.extract_task(model, 0)
    took = time.perf_counter() - start
    with torch.no_grad():
        expected = model(x)
        same = torch.equal(hatify.extract_task(model, 0, compact=False)(x), expected)
        error = ((compact(x) - expected).abs().max() / expected.abs().max()).item()
    for _ in range(2):
        seconds(net, x), seconds(compact, x)
    pairs = [(seconds(net, x), seconds(compact, x)) for _ in range(rounds)]
    plain, ours = (sum(p.numel() for p in n.parameters()) for n in (net, compact))
    return {
        "model": name,
        "features_on": model.task_state.finished_masks[0].float().mean().item(),
        "parameters": plain,
        "parameters_extracted": ours,
        "share_of_parameters": ours / plain,
        "milliseconds": 1000 * statistics.median(a for a, _ in pairs),
        "milliseconds_extracted": 1000 * statistics.median(b for _, b in pairs),
        "speedup": statistics.median(a / b for a, b in pairs),
        "speedup_quartiles": statistics.quantiles([a / b for a, b in pairs], n=4)[::2],
        "relative_error": error,
        "uncompacted_equal_to_the_bit": same,
        "seconds_to_extract": took,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each network")
    parser.add_argument("--output", type=Path, default=RESULTS / "extract.json")
    args = parser.parse_args()

    torch.set_num_threads(1)
    console = Console()
    table = Table("model", "parameters", "extracted", "ms", "extracted", "speedup", "error", title="one task of two")
    rows = []
    for name in args.models:
        row = measure(name, args.batch, args.rounds)
        rows.append(row)
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['share_of_parameters']:.0%}",
            f"{row['milliseconds']:.0f}",
            f"{row['milliseconds_extracted']:.0f}",
            f"{row['speedup']:.2f}",
            f"{row['relative_error']:.0e}",
        )
        console.print(f"{name}: {row['speedup']:.2f} times as fast")
    report = {
        "models": rows,
        "batch": args.batch,
        "input": [3, 224, 224],
        "rounds": args.rounds,
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    console.print(table)
    console.print(f"stored in {args.output}")
    return 0 if all(row["uncompacted_equal_to_the_bit"] and row["relative_error"] < 1e-5 for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
