"""What each fast path for the CPU earns, and what putting back costs: the same step or pass with and without, in turn.

Without a fast path, a ratio of 1.03 says that going without makes a step 3 % longer. Putting locked entries back after
every step is no fast path but what the promise rests on; its ratio says how much longer a step is with it.

    python benchmarks/fast_paths.py
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from rich.console import Console
from rich.table import Table

from hatify.lock import Guard
from hatify.nn import layer_norm
from overhead import CLASSES, SETTINGS, Setting, Trainee, converted, paired

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


@contextmanager
def nothing_put_back() -> Iterator[None]:
    """Locked entries are left as a step leaves them; their gradients are zero all the same."""
    with patch.object(Guard, "after_step", lambda self, optimizer, held: None):
        yield


@contextmanager
def layer_norm_by_elementary_operations() -> Iterator[None]:
    """Without the hand-derived gradient of layer normalisation over active features."""

    def apply(*inputs: Any) -> tuple[torch.Tensor]:
        return (layer_norm.composite(*inputs),)

    with patch.object(layer_norm._MaskedLayerNorm, "apply", apply):
        yield


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """Masks are multiplied into the parameters of finished tasks at every pass."""

    def compute_again(module: Any, mask: Any, compute: Callable[[], Any]) -> Any:
        return compute()

    with (
        patch("hatify.nn.layers.remembered", compute_again),
        patch("hatify.nn.norms.remembered", compute_again),
        patch.object(layer_norm, "remembered", compute_again),
    ):
        yield


def rows(setting: Setting, steps: int) -> Iterator[Row]:
    """A training step without putting back and without the layer norm, an evaluation without remembering."""
    torch.manual_seed(0)
    plain = timm.create_model(setting.model, num_classes=CLASSES).train()
    trainee = Trainee(converted(plain, setting), setting)

    def without(what: Callable[[], Any], action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            with what():
                action()

        return run

    what = {"model": setting.model, "optimizer": setting.optimizer, "batch": len(trainee.images)}
    bare = without(nothing_put_back, trainee.train)
    yield {"row": "puts locked entries back", **what, **paired(bare, trainee.train, steps)}
    if any(isinstance(m, torch.nn.LayerNorm) for m in plain.modules()):
        composite = without(layer_norm_by_elementary_operations, trainee.train)
        yield {"row": "layer norm with a hand-derived gradient", **what, **paired(trainee.train, composite, steps)}
    trainee.network.end_task()
    trainee.network.set_task(0)
    evaluation = without(nothing_remembered, trainee.evaluate)
    yield {"row": "remembers masked weights", **what, **paired(trainee.evaluate, evaluation, 2 * steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps")
    parser.add_argument("--models", default="*", help="names to measure, with wildcards")
    parser.add_argument("--output", type=Path, default=RESULTS / "fast_paths.json")
    args = parser.parse_args()
    found: list[Row] = []
    table = Table("what", "model", "ratio", "quartiles")
    for setting in SETTINGS:
        if not fnmatch.fnmatch(setting.model, args.models):
            continue
        steps = 4 * args.steps if setting.edge < 100 else args.steps
        for row in rows(setting, steps):
            row = {key: value for key, value in row.items() if key not in ("plain_ms", "converted_ms")}
            found.append(row)
            table.add_row(row["row"], row["model"], f"{row['ratio']:.3f}", str(row["quartiles"]))
            args.output.write_text(
                json.dumps(
                    {
                        "rows": found,
                        "threads": torch.get_num_threads(),
                        "torch": torch.__version__,
                        "python": platform.python_version(),
                    },
                    indent=2,
                )
                + "\n"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
