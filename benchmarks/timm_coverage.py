"""Convert every timm model, and measure on one model of every model file what conversion promises.

`--mode structure` converts each name on the meta device, where a network has shapes but no values: any size of network
takes seconds. `--mode numbers` takes the smallest model of every model file and the well-known ones, with real values
at a small image size: parity with the original, drift of a finished task, isolation, and tightness. Results go to a CSV
file, one row for each name, written after every model: an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import gc
import logging
import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.models import is_model_in_modules, list_modules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import hatify
from hatify.examples import infer_example_inputs
from hatify.lock import locked_entries
from hatify.timm_models import keep_interface

RESULTS = Path(__file__).parent / "results" / "timm_coverage.csv"

#: Measured beside the smallest model of every file.
WELL_KNOWN = (
    "resnet18", "resnet50", "resnext50_32x4d", "seresnet50", "densenet121", "efficientnet_b0", "mobilenetv3_small_050",
    "mobilenetv3_large_100", "regnety_002", "regnety_032", "convnext_atto", "convnext_tiny", "convnextv2_tiny",
    "nfnet_f0", "dm_nfnet_f0", "vit_tiny_patch16_224", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "swin_base_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_tiny_tf_224",
    "coatnet_0_rw_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "mixer_s32_224", "poolformer_s12",
    "mobilevit_s", "hrnet_w18_small", "dla34", "levit_128s", "xcit_nano_12_p16_224", "volo_d1_224", "cait_xxs24_224",
    "hiera_tiny_224", "fastvit_t8", "repvit_m1",
)  # fmt: skip

#: Conversion times that are promised: on the model's own input size.
TIMED = {"resnet50": 1.5, "vit_base_patch16_224": 3.0, "swin_base_patch4_window7_224": 10.0}

#: The smallest of these files are too large to be trained here several times over: fewer blocks of the same kind.
REDUCED = {"deepseek_vit_412m": {"depth": 2}, "gemma4_vit_167m": {"depth": 2}}

POLICIES = ("shared", "row", "unmasked", "masked", "norm", "head", "per_task", "unused")
STRUCTURE = ("converts", "device", "seconds_meta", "error")
NUMBERS = ("verified", "image", "seconds", "parity", "parity_training", "drift", "isolated", "tightness", "locked",
           "loosest", "missing", "numbers_error")  # fmt: skip
COLUMNS = ("name", "file", "parameters", *STRUCTURE, *NUMBERS, *POLICIES, "distinct")

Row = dict[str, Any]

# Creating networks ---------------------------------------------------------------------------------------------------

#: Edges of images to try, in pixels. At the first, the last feature map of nearly every network still has 2 × 2
#: positions or more: attention over a single position would not depend on its queries and keys.
EDGES = (96, 112, 128, 160, 192, 224, 240, 256, 288, 384, 448, 64)
BATCH = 2


@dataclass(frozen=True)
class Recipe:
    """How a network is made and what it is called with: image edge in pixels, and whether it is built for that edge."""

    name: str
    edge: int
    built_for: bool

    def network(self) -> nn.Module:
        """A fresh network, on the default device."""
        size = {"img_size": self.edge} if self.built_for else {}
        return timm.create_model(self.name, **size, **REDUCED.get(self.name, {}))

    def images(self, seed: int, batch: int = BATCH) -> Tensor:
        """Noise of shape (batch, channels, edge, edge)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, self.edge, self.edge, generator=generator)


def smallest_recipe(name: str) -> Recipe:
    """The smallest images that the network can be built for and trained on; found out on the meta device.

    Raises:
        RuntimeError: no size was accepted; says what the last one was refused for.
    """
    refusal: Exception | None = None
    nominal = timm.get_pretrained_cfg(name).input_size[-1] if timm.get_pretrained_cfg(name) else 224
    for edge in (*EDGES, nominal):
        for built_for in (True, False):
            recipe = Recipe(name, edge, built_for)
            try:
                with torch.device("meta"):
                    network = recipe.network().train()
                    network(torch.empty(BATCH, 3, edge, edge))
                    network.eval()(torch.empty(BATCH, 3, edge, edge))
            except Exception as error:
                refusal = error
                if built_for and not _refuses_size(error):
                    break
                continue
            return recipe
    raise RuntimeError(f"no image size was accepted: {brief(refusal)}")


def _refuses_size(error: Exception) -> bool:
    """Whether the model has no ``img_size`` argument."""
    return isinstance(error, TypeError) and "img_size" in str(error)


@torch.no_grad()
def enliven(network: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to parameters that are all one number (scales of 0 or 10⁻⁶, biases): no branch may stay silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.is_floating_point() and parameter.numel() and bool(parameter.max() == parameter.min()):
            spread = 0.1 if parameter.ndim < 2 else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return network


def shares(model: hatify.HatModel) -> Row:
    """The share of the original's parameters that each policy has, and `distinct`."""
    counts: Counter[str] = Counter()
    for entry in model.census:
        if entry.kind == "parameter" and not entry.reason.startswith("the same tensor as"):
            counts[str(entry.policy)] += torch.Size(entry.shape).numel()
    total = max(1, counts.total())
    return {policy: round(counts[policy] / total, 4) for policy in POLICIES} | {"distinct": distinct(model)}


def distinct(model: hatify.HatModel) -> float:
    """Slots over features, counted within each layer: 1 where every feature can be on or off by itself."""
    features = slots = 0
    for name, uses in model.uses.items():
        written = uses[0].written
        if name.endswith("weight") and written.ndim > 2:
            rows = written.flatten(0, -2)
            features += len(rows)
            slots += len(rows.unique(dim=0))
    return round(slots / max(1, features), 4)


# Structure -----------------------------------------------------------------------------------------------------------


def structure(name: str) -> Row:
    """Convert a network on the meta device, for the input size that is its own, and look at what comes out.

    The converted network must give outputs of the original's shapes, take the original's weights, and have one
    classifier for each task. A network that cannot be made or run on the meta device is made for real with as small
    images as it takes; ``device`` tells why.
    """
    row: Row = {"converts": "no", "device": "meta", "error": ""}
    try:
        with torch.device("meta"):
            network = timm.create_model(name).eval()
        example = infer_example_inputs(network)
        expected = shapes(network, example)
    except Exception as error:
        row.update(device=f"cpu ({brief(error)})")
        recipe = smallest_recipe(name)
        network, example = recipe.network().eval(), (recipe.images(0),)
        expected = shapes(network, example)
    row.update(parameters=sum(p.numel() for p in network.parameters()))
    start = time.perf_counter()
    model = hatify.hatify(network, 2, example).eval()
    row.update(seconds_meta=round(time.perf_counter() - start, 2), **shares(model))
    keep_interface(model)
    problems = []
    if (found := shapes(model, example)) != expected:
        problems.append(f"answers of shape {found} instead of {expected}")
    try:
        model.load_state_dict(network.state_dict())
    except RuntimeError as error:
        problems.append(f"weights of the original: {brief(error)}")
    if not has_own_classifiers(model, network):
        problems.append("the classifier is not a head")
    row.update(error="; ".join(problems), converts="no" if problems else "yes")
    return row


def shapes(network: nn.Module, example: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Of everything the network answers."""
    with torch.no_grad():
        return [tuple(y.shape) for y in tree_leaves(network(*example)) if isinstance(y, Tensor)]


def has_own_classifiers(model: hatify.HatModel, network: Any) -> bool:
    """Whether every task has its own output layer in what timm calls the classifier (which may have hidden layers)."""
    if not getattr(network, "num_classes", 0) or not hasattr(network, "get_classifier"):
        return True
    found = network.get_classifier()
    layers = found if isinstance(found, tuple) else (found,)
    own = {id(p) for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()}
    names = {name for name, p in network.named_parameters(remove_duplicate=False) if id(p) in own}
    policies = {str(entry.policy) for entry in model.census if entry.name in names}
    return "head" in policies or not own


# Numbers -------------------------------------------------------------------------------------------------------------


def numbers(name: str) -> Row:
    """Everything that is promised, measured on real values: see the functions below."""
    recipe = smallest_recipe(name)
    torch.manual_seed(0)
    network = enliven(recipe.network())
    model = hatify.hatify(network, 2, (recipe.images(1),))
    row: Row = {"image": recipe.edge, "parameters": sum(p.numel() for p in network.parameters()), **shares(model)}
    differences = parity(network, model, recipe), parity_in_training(network, model, recipe)
    moved = drift(model, recipe)
    isolated = isolation(model)
    row.update(tightness(model, recipe))
    del model
    gc.collect()
    row.update(
        seconds=round(seconds_to_convert(name), 2),
        parity=f"{differences[0]:.1e}",
        parity_training=f"{differences[1]:.1e}",
        drift=moved,
        isolated=isolated,
    )
    good = max(differences) < TOLERANCE and moved == 0 and isolated == "yes" and row["missing"] == 0
    row.update(verified="yes" if good else "no")
    return row


#: Of float rounding, relative to the largest output.
TOLERANCE = 1e-4


def parity(network: nn.Module, model: hatify.HatModel, recipe: Recipe) -> float:
    """The largest difference from the original's outputs in evaluation mode, in units of their largest number.

    For both tasks, and for another batch size than the one that the network was converted with.
    """
    network.eval()
    model.eval()
    worst = 0.0
    for task, batch in ((0, BATCH), (1, BATCH + 1)):
        images = recipe.images(2, batch)
        with torch.no_grad(), model.task(task):
            worst = max(worst, difference(model(images), network(images)))
    return worst


def parity_in_training(network: nn.Module, model: hatify.HatModel, recipe: Recipe) -> float:
    """As `parity`, in training mode and with the same random numbers; both networks are left as they were."""
    saved = {name: value.clone() for name, value in network.state_dict().items()}
    images = recipe.images(2)
    network.train()
    model.begin_task(0)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = network(images)
        torch.manual_seed(0)
        found = model(images)
    model.abort_task()
    network.load_state_dict(saved)
    return difference(found, expected)


def difference(found: Any, expected: Any) -> float:
    """The largest difference between two outputs, in units of the largest expected number."""
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        raise RuntimeError(f"shapes {[tuple(a.shape) for a, _ in pairs]}, not {[tuple(b.shape) for _, b in pairs]}")
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def drift(model: hatify.HatModel, recipe: Recipe) -> float:
    """Train task 0, then task 1, both with random half of the features; how far task 0's outputs moved, or NaN."""
    learn(model, 0, recipe)
    with torch.no_grad(), model.task(0):
        before = tree_leaves(model(recipe.images(3)))
    learn(model, 1, recipe)
    with torch.no_grad(), model.task(0):
        after = tree_leaves(model(recipe.images(3)))
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return 0.0
    return max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) or float("nan")


def isolation(model: hatify.HatModel) -> str:
    """ "yes", or what `hatify.verify_isolation` found."""
    try:
        hatify.verify_isolation(model)
    except hatify.IsolationError as error:
        return f"no: {error}"
    return "yes"


def learn(model: hatify.HatModel, task: int, recipe: Recipe, steps: int = 2) -> None:
    """A task of noise: random half of its features on, and as many steps of AdamW with weight decay."""
    model.begin_task(task)
    source = torch.Generator().manual_seed(task)
    embedding = model.task_state.embeddings[task]
    with torch.no_grad():
        embedding.copy_(torch.where(torch.rand(embedding.shape, generator=source) < 0.5, -2.0, 2.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    torch.manual_seed(task)
    for step in range(steps):
        outputs = tree_leaves(model(recipe.images(10 * task + step)))
        loss = sum((y - torch.randn_like(y)).square().mean() for y in outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hatify.HatWarning)
        model.end_task()


def tightness(model: hatify.HatModel, recipe: Recipe, task: int = 0) -> Row:
    """Entries that a finished task locks over entries that its outputs depend on.

    Dependence is a derivative in float64 that is not zero, for any of a few random inputs and projections of the
    outputs. Entries of one convolution kernel count together, since which of them meet only padding depends on the
    image size, and bends of activations are made smooth (see `Smooth`). ``locked`` is the share of all shared entries
    that are locked, about a quarter where half of the features on both sides are on; ``loosest`` names the parameters
    with most entries locked for nothing, as locked/needed; ``missing`` counts entries that matter and are not locked.
    """
    model.double().eval()
    parameters = {name: p for name, p in model.named_parameters() if name in model.uses}
    needed = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    kernels = {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    torch.manual_seed(0)
    with model.task(task), Smooth():
        for seed in range(3):
            outputs = [y for y in tree_leaves(model(recipe.images(20 + seed).double())) if y.is_floating_point()]
            total = sum((torch.randn_like(y) * y).sum() for y in outputs)
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    needed[name] |= over_kernel(gradient != 0) if name in kernels else gradient != 0
    masks = model.task_state.binary(task).unsqueeze(0)
    locked = {name: locked_entries(model.uses[name], masks, p.shape) for name, p in parameters.items()}
    counts = {name: (int(locked[name].sum()), int(needed[name].sum())) for name in parameters}
    missing = sum(int((needed[name] & ~locked[name]).sum()) for name in parameters)
    all_locked, all_needed = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    worst = sorted(counts, key=lambda name: counts[name][1] - counts[name][0])[:3]
    loosest = [f"{name} {a}/{b}" for name in worst for a, b in [counts[name]] if a - b > 0.001 * all_locked]
    return {
        "tightness": f"{all_locked / max(1, all_needed):.4f}",
        "locked": f"{all_locked / max(1, sum(p.numel() for p in parameters.values())):.4f}",
        "loosest": "; ".join(loosest),
        "missing": missing,
    }


def over_kernel(entries: Tensor) -> Tensor:
    """Whether any entry of a convolution kernel is chosen, for every entry of it; shape (O, I, *kernel) is kept."""
    return entries.flatten(2).any(2).view(*entries.shape[:2], *(1,) * (entries.ndim - 2)).expand(entries.shape)


class Smooth(TorchFunctionMode):
    """Within the context, activations with a zero derivative somewhere are replaced by similar ones without.

    With random weights and a few inputs, some units of a ReLU never wake up; what they read would seem not to matter.
    Values at zero stay what they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        smooth = SMOOTH.get(func)
        return func(*args, **(kwargs or {})) if smooth is None else smooth(args[0])


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.3)


SMOOTH: dict[Any, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((F.relu, F.relu_, F.relu6, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _leaky),
    F.hardtanh: _leaky,
    F.hardtanh_: _leaky,
    F.hardswish: F.silu,
    F.hardsigmoid: torch.sigmoid,
}


def seconds_to_convert(name: str) -> float:
    """Of the network as timm makes it, for the input size that is its own."""
    network = timm.create_model(name, **REDUCED.get(name, {}))
    start = time.perf_counter()
    hatify.hatify(network, 2)
    return time.perf_counter() - start


# Running -------------------------------------------------------------------------------------------------------------


def measure(kind: str, name: str, limit: float) -> Row:
    """One job of a worker process: a row, with the error in it if there was one."""
    row: Row = {}
    try:
        with time_limit(limit), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = {"structure": structure, "numbers": numbers}[kind](name)
    except Exception as error:
        row = failed(kind, brief(error)) | {"traceback": traceback.format_exc()}
    gc.collect()
    return {"name": name, "file": file_of(name), **row}


def failed(kind: str, reason: str) -> Row:
    """What is written of a job that came to no end."""
    return {"converts": "no", "error": reason} if kind == "structure" else {"verified": "no", "numbers_error": reason}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def brief(error: BaseException | None) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def run(kind: str, names: Sequence[str], processes: int, limit: float, deadline: float) -> Iterator[Row]:
    """Measure in worker processes, one thread each; no job is begun after `deadline`, in seconds of `time.monotonic`.

    Each worker has a pool of its own, so that one that dies (for lack of memory, say) takes no other job along.
    """
    waiting = deque(names)
    pools = [new_pool() for _ in range(min(processes, len(names)))]
    running: dict[Future[Row], tuple[int, str]] = {}
    idle = list(range(len(pools)))
    try:
        while True:
            while idle and waiting and time.monotonic() < deadline:
                name, slot = waiting.popleft(), idle.pop()
                running[pools[slot].submit(measure, kind, name, limit)] = slot, name
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, name = running.pop(future)
                idle.append(slot)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    pools[slot] = new_pool()
                    yield {"name": name, "file": file_of(name), **failed(kind, "the process was killed")}
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def new_pool() -> ProcessPoolExecutor:
    """A pool of one process, which computes with one thread."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def smallest_of_every_file(known: dict[str, Row]) -> list[str]:
    """The model with fewest parameters of every model file; `known` rows save counting again."""
    best: dict[str, tuple[int, str]] = {}
    for name in all_names():
        count = int(known.get(name, {}).get("parameters") or 0) or parameters_of(name)
        best[file_of(name)] = min(best.get(file_of(name), (count, name)), (count, name))
    return [name for _, name in sorted(best.values())]


def parameters_of(name: str) -> int:
    """How many parameters a network has."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def all_names() -> list[str]:
    """Every name of timm's own."""
    return timm.list_models(exclude_filters="hat_*")


@cache
def file_of(name: str) -> str:
    """The timm model file that defines a name."""
    return next(file for file in list_modules() if is_model_in_modules(name, file))


# Results -------------------------------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Row]:
    """Rows by name; none if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: dict(row) for row in csv.DictReader(file)}


def save(path: Path, rows: dict[str, Row]) -> None:
    """All rows, by file and name. Whoever reads meanwhile sees the old file or the new one."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: (row["file"], row["name"])))
    os.replace(part, path)


def summary(rows: dict[str, Row]) -> str:
    """A Markdown table of the counts, and of what is not as promised."""
    converted = [row for row in rows.values() if row["converts"]]
    measured = [row for row in rows.values() if row["verified"]]
    tight = {row["name"]: float(row["tightness"]) for row in measured if row["tightness"]}
    smallest = set(smallest_of_every_file(rows))
    by_file = [value for name, value in tight.items() if name in smallest]
    worst = sorted(tight, key=lambda name: -tight[name])[:5]

    def largest(column: str) -> str:
        return f"{max((float(row[column]) for row in measured if row[column]), default=math.nan):.1e}"

    def count(chosen: list[Row], column: str) -> str:
        return f"{sum(row[column] == 'yes' for row in chosen)} of {len(chosen)}"

    lines = [
        f"| timm {timm.__version__}, {len(all_names())} names in {len(list_files())} files | |",
        "| --- | --- |",
        f"| converted | {count(converted, 'converts')} |",
        f"| verified with numbers | {count(measured, 'verified')}, from {len({r['file'] for r in measured})} files |",
        f"| isolated bit for bit | {count([r for r in measured if r['isolated']], 'isolated')} |",
        f"| largest drift of a finished task | {largest('drift')} |",
        f"| largest difference from the original | {largest('parity')} ({largest('parity_training')} in training) |",
        f"| locked ÷ needed, median over files | {statistics.median(by_file) if by_file else math.nan:.3f} |",
        f"| locked ÷ needed, worst five | {', '.join(f'{name} {tight[name]:.2f}' for name in worst)} |",
    ]
    times = [f"{n} {rows[n]['seconds']} s (promised: {t} s)" for n, t in TIMED.items() if n in rows]
    lines.append(f"| seconds to convert, one thread | {', '.join(times)} |")
    lines += [f"| `{row['name']}` does not convert | {row['error']} |" for row in converted if row["converts"] != "yes"]
    lines += [
        f"| `{row['name']}` is not as promised | {row['numbers_error'] or explanation(row)} |"
        for row in measured
        if row["verified"] != "yes"
    ]
    return "\n".join(lines)


def list_files() -> set[str]:
    """The model files of timm's own names."""
    return {file_of(name) for name in all_names()}


def explanation(row: Row) -> str:
    """Why a measured row is not verified."""
    columns = ("parity", "parity_training", "drift", "isolated", "missing")
    return ", ".join(f"{column} {row[column]}" for column in columns)


def chosen(patterns: list[str] | None, files: list[str] | None) -> list[str]:
    """The names that match one of the patterns and come from one of the files."""
    return [
        name
        for name in all_names()
        if (not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
        and (not files or file_of(name) in files)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("structure", "numbers", "both"), default="both", help="(%(default)s)")
    parser.add_argument("--names", nargs="+", metavar="PATTERN", help="only these names, wildcards allowed")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="only names of these model files, such as resnet")
    parser.add_argument("--processes", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--time-budget", type=float, default=math.inf, help="begin no model after so many seconds")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model (%(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--retry", action="store_true", help="measure what was not as promised, too")
    parser.add_argument("--traceback", action="store_true", help="show where errors come from")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file (%(default)s)")
    parser.add_argument("--summary", action="store_true", help="only print a table of the results, in Markdown")
    args = parser.parse_args()
    logging.getLogger("timm").setLevel(logging.ERROR)

    rows = load(args.output)
    if args.summary:
        print(summary(rows))
        return 0

    deadline = time.monotonic() + args.time_budget
    console = Console()
    selected = chosen(args.names, args.files)
    bad = 0
    for kind, column in (("structure", "converts"), ("numbers", "verified")):
        if args.mode not in (kind, "both"):
            continue
        names = selected
        if kind == "numbers" and not args.names:
            worth = {*smallest_of_every_file(rows), *WELL_KNOWN}
            names = [name for name in selected if name in worth]
        done = ("yes",) if args.retry else ("yes", "no")
        todo = [name for name in names if args.again or rows.get(name, {}).get(column) not in done]
        with Progress(*PROGRESS, console=console) as progress:
            bar = progress.add_task(kind, total=len(names), completed=len(names) - len(todo))
            for row in run(kind, todo, args.processes, args.limit, deadline):
                stale = dict.fromkeys(STRUCTURE if kind == "structure" else NUMBERS, "")
                rows[row["name"]] = rows.get(row["name"], {}) | stale | row
                save(args.output, rows)
                progress.advance(bar)
                if row[column] != "yes":
                    bad += 1
                    reason = row.get("error") or row.get("numbers_error") or explanation(row)
                    console.print(f"{row['name']}: {reason}", style="red", markup=False)
                    if args.traceback:
                        console.print(row.get("traceback", ""), markup=False)
    return 1 if bad else 0


PROGRESS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)

if __name__ == "__main__":
    raise SystemExit(main())
