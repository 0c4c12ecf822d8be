"""``hatify convert``, also ``hatify-convert``."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hatify.checkpoint import Checkpoint, read_checkpoint
from hatify.cli.common import Factory, FactoryArg, Json, arguments_of, made, print_json, progress, right
from hatify.convert import hatify
from hatify.errors import CheckpointError
from hatify.model import HatModel
from hatify.origin import Architecture, known_to_timm
from hatify.report import converted_layers, totals
from hatify.saving import check_replaceable, save
from hatify.weights import load_plain_state_dict


def convert(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Weights: .safetensors, sharded or not, or what torch.save wrote.", metavar="CHECKPOINT"),
    ] = None,
    *,
    num_tasks: Annotated[int, typer.Option(help="How many tasks there will be.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.", metavar="OUT")] = None,
    model: Annotated[str | None, typer.Option(help="The network, by timm's name.", metavar="NAME")] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="An argument of timm's model; repeat for more.", metavar="KEY=VALUE")
    ] = None,
    factory: Factory = None,
    factory_arg: FactoryArg = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Use timm's own weights, not a CHECKPOINT.")] = False,
    state_key: Annotated[
        str | None, typer.Option(help="Where in the checkpoint the weights are, like 'ema.model'; '' for at the top.")
    ] = None,
    strip_prefix: Annotated[
        str | None, typer.Option(help="What to take off the names of the weights, like 'module.'; '' for nothing.")
    ] = None,
    num_classes: Annotated[
        str | None, typer.Option(help="Outputs of each task's new head: one number, or N,N,… one per task.")
    ] = None,
    mask_init: Annotated[str, typer.Option(help="Initial embeddings: dense, normal, or a number.")] = "dense",
    heads: Annotated[str, typer.Option(help="The output layers: auto, none, or NAME,NAME,…")] = "auto",
    base: Annotated[
        str, typer.Option(help="What the weights are: a locked base that every task reads and none changes, or none.")
    ] = "locked",
    spare: Annotated[
        float, typer.Option(help="Features to add beside a locked base, as a share of those there are: 0.25.")
    ] = 0.0,
    input_shape: Annotated[
        str | None, typer.Option(help="The shape of one sample, like 3,224,224.", metavar="N,N,…")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the converted model that is in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Convert a saved checkpoint, or timm's own weights, into a network that learns task after task.

    OUT becomes a folder with model.safetensors and hatify.json. It is written whole or not at all.
    """
    _check_out(out, dry_run, force)
    if (checkpoint is None) != pretrained:
        raise CheckpointError("give either a CHECKPOINT, or --pretrained for timm's own weights")
    if pretrained and model is None:
        raise CheckpointError("--pretrained are timm's weights: name the network by --model")
    classes = _numbers("--num-classes", num_classes)
    shape = _numbers("--input-shape", input_shape)
    if spare < 0 or (spare and _base(base) is None):
        raise CheckpointError(f"--spare {spare}: expected 0 or more, beside --base locked")
    with progress(as_json, steps=6) as step:
        step("building the network")
        architecture, net = _network(model, model_arg, factory, factory_arg, pretrained)
        found = None
        if checkpoint is not None:
            step("reading the checkpoint")
            found = read_checkpoint(checkpoint, net.state_dict().keys(), state_key, strip_prefix)
        step("converting")
        result = hatify(
            net,
            num_tasks,
            None if shape is None else _sample(shape, net),
            num_classes=classes[0] if classes and len(classes) == 1 else classes,
            heads={"auto": "auto", "none": None}.get(heads, heads.split(",")),
            mask_init=mask_init if mask_init in ("dense", "normal") else _number("--mask-init", mask_init),
            base=_base(base),
        )
        result.__dict__["origin"] = replace(result.origin, architecture=architecture)
        if architecture.kind == "timm":
            from hatify.timm_models import keep_interface

            keep_interface(result)
        if found is not None:
            step("loading the weights")
            load_plain_state_dict(result, found.state)
        if spare:
            step("adding features")
            result.widen(spare)
        if not dry_run and out is not None:
            step("writing")
            save(result, out)
    _print_conversion(result, found, None if dry_run else out, as_json)


def _check_out(out: Path | None, dry_run: bool, force: bool) -> None:
    if dry_run:
        return
    if out is None:
        raise CheckpointError("say where to write by -o OUT, or --dry-run to write nothing")
    if os.path.lexists(out):
        if not force:
            raise CheckpointError(f"{out} exists; --force replaces it if it is a converted model")
        check_replaceable(out)


def _network(
    model: str | None, model_arg: list[str] | None, factory: str | None, factory_arg: list[str] | None, pretrained: bool
) -> tuple[Architecture, nn.Module]:
    if (model is None) == (factory is None):
        raise CheckpointError("name the network by --model, or give --factory")
    if (model_arg and model is None) or (factory_arg and factory is None):
        raise CheckpointError("--model-arg goes with --model, --factory-arg with --factory")
    if factory is not None:
        arguments = arguments_of("--factory-arg", factory_arg)
        return Architecture("factory", factory, arguments), made(factory, arguments)
    import timm

    assert model is not None
    arguments = arguments_of("--model-arg", model_arg)
    net = timm.create_model(known_to_timm(model), pretrained=pretrained, **arguments)
    return Architecture("timm", model, arguments), net


def _numbers(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise CheckpointError(f"{option} {text!r}: expected positive integers, separated by commas")
    return numbers


def _base(text: str) -> str | None:
    if text not in ("locked", "none"):
        raise CheckpointError(f"--base {text!r}: expected locked or none")
    return None if text == "none" else text


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(f"{option} {text!r}: expected dense, normal or a number") from None


def _sample(shape: list[int], net: nn.Module) -> Tensor:
    # Two samples: with one, a network that takes statistics over the batch would be misread.
    sample = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return sample.to(next(net.parameters(), sample))


def _print_conversion(model: HatModel, found: Checkpoint | None, out: Path | None, as_json: bool) -> None:
    rows, sums = converted_layers(model), totals(model)
    notes: dict[str, Any] = {}
    if found is not None:
        notes = {
            "state_key": found.state_key,
            "prefix_stripped": found.prefix,
            "tensors": len(found.state),
            "left_out": list(found.left_out),
            "other_weights": list(found.other_keys),
        }
    notes["unused"] = [e.name for e in model.census if e.policy == "unused"]
    if as_json:
        written = None if out is None else str(out)
        print_json({"out": written, "checkpoint": notes, **sums, "layers": [asdict(row) for row in rows]})
        return
    table = Table("layer", "policy", *(right(h) for h in ("features", "parameters before", "after")))
    for row in rows:
        features = f"{row.features:,}" if row.features else ""
        table.add_row(row.layer, row.policy, features, f"{row.before:,}", f"{row.after:,}")
    console = Console()
    console.print(table)
    console.print(
        f"parameters: {sums['parameters_before']:,} before, {sums['parameters_after']:,} after, for {model.num_tasks} "
        f"tasks; {sums['parameters_per_task']:,} ({sums['per_task_share']:.1%}) are each task's own",
        soft_wrap=True,
    )
    if found is not None:
        console.print(
            f"checkpoint: {len(found.state):,} tensors"
            + (f", under {found.state_key!r}" if found.state_key else "")
            + (f", renamed: without {found.prefix!r}" if found.prefix else ""),
            markup=False,
            soft_wrap=True,
        )
    for label, key in (("skipped", "left_out"), ("other weights in it (--state-key)", "other_weights")):
        if notes.get(key):
            console.print(f"{label}: {', '.join(notes[key])}", markup=False, soft_wrap=True)
    if notes["unused"]:
        console.print(f"not read by the forward pass: {', '.join(notes['unused'])}", markup=False, soft_wrap=True)
    console.print("nothing written" if out is None else f"written to {out}", markup=False, soft_wrap=True)
