"""``hatify extract``: one task as a plain network, for deployment."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hatify.cli.common import Factory, FactoryArg, Json, Out, loaded, print_json, progress, written_whole
from hatify.errors import CheckpointError
from hatify.extract import extract_task
from hatify.report import totals
from hatify.saving import storable


def extract(
    out: Out,
    task: Annotated[int, typer.Option(help="The task to extract.")],
    file: Annotated[
        Path, typer.Option("--output", "-o", help="The file: .pt2, .onnx or .safetensors.", metavar="FILE")
    ],
    compact: Annotated[bool, typer.Option(help="Remove features that are off, wherever the graph allows it.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    factory: Factory = None,
    factory_arg: FactoryArg = None,
    as_json: Json = False,
) -> None:
    """Write one task as a plain network: exported by torch (.pt2), as .onnx, or its weights alone (.safetensors)."""
    if file.suffix not in WRITERS:
        raise CheckpointError(f"{file}: the name must end in {', '.join(WRITERS)}")
    if os.path.lexists(file) and not force:
        raise CheckpointError(f"{file} exists; --force replaces it")
    if file.suffix == ".onnx":
        _require_onnx()
    model = loaded(out, factory, factory_arg)
    with progress(as_json, steps=2) as step:
        step("extracting")
        network = extract_task(model, task, compact=compact).eval()
        step("writing")
        with written_whole(file) as part:
            WRITERS[file.suffix](network, model.example_inputs, part)
    written = {
        "file": str(file),
        "task": task,
        "compact": compact,
        "parameters_before": int(totals(model)["parameters_before"]),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    if as_json:
        print_json(written)
        return
    before = f"{written['parameters_before']:,}"
    typer.echo(f"{file}: task {task}, {written['parameters']:,} parameters; the original has {before}")


def _call_arguments(inputs: tuple[Any, ...] | dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def _any_batch(inputs: Any) -> Any:
    """Dimensions that may differ from the example's: the first of every tensor."""
    return tree_map(lambda t: {0: torch.export.Dim.AUTO} if isinstance(t, Tensor) and t.ndim else None, inputs)


def _write_pt2(network: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], path: Path) -> None:
    args, kwargs = _call_arguments(inputs)
    torch.export.save(torch.export.export(network, args, kwargs, dynamic_shapes=_any_batch(inputs)), path)


def _write_onnx(network: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], path: Path) -> None:
    args, kwargs = _call_arguments(inputs)
    program = torch.onnx.export(
        network, args, kwargs=kwargs, dynamo=True, dynamic_shapes=_any_batch(inputs), verbose=False
    )
    assert program is not None
    program.save(path)


def _write_safetensors(network: nn.Module, inputs: Any, path: Path) -> None:
    save_file(storable(network.state_dict()), path)


WRITERS: dict[str, Callable[[nn.Module, Any, Path], None]] = {
    ".pt2": _write_pt2,
    ".onnx": _write_onnx,
    ".safetensors": _write_safetensors,
}


def _require_onnx() -> None:
    if absent := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise CheckpointError(f"writing .onnx needs {' and '.join(absent)}: pip install {' '.join(absent)}")
