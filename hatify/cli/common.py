"""What the commands have in common: options, loading, progress, output."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from torch import nn

from hatify.errors import CheckpointError, HatWarning
from hatify.model import HatModel
from hatify.origin import declared_factory, find_factory
from hatify.saving import load

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Out = Annotated[Path, typer.Argument(help="The folder of a converted model.", metavar="OUT")]
Factory = Annotated[
    str | None,
    typer.Option(help="The network from code of your own, package.module:callable.", metavar="MODULE:CALLABLE"),
]
FactoryArg = Annotated[
    list[str] | None, typer.Option(help="An argument of --factory; repeat for more.", metavar="KEY=VALUE")
]


def loaded(out: Path, factory: str | None, factory_arg: list[str] | None) -> HatModel:
    """The model in the folder `out`, made by `factory` if there is one."""
    return load(out, None if factory is None else made(factory, arguments_of("--factory-arg", factory_arg)))


def made(factory: str, arguments: dict[str, Any]) -> nn.Module:
    """The network that a factory named on the command line makes."""
    net = find_factory(factory)(**arguments)
    if not isinstance(net, nn.Module):
        raise CheckpointError(f"factory {factory!r} returned a {type(net).__name__}, not a torch.nn.Module")
    try:
        declared_factory(factory)
    except CheckpointError as error:
        warnings.warn(f"{error} or --factory", HatWarning, stacklevel=1)
    return net


def arguments_of(option: str, given: list[str] | None) -> dict[str, Any]:
    """``key=value`` pairs; a value that is no literal of JSON or Python is a string."""
    arguments = {}
    for pair in given or ():
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise CheckpointError(f"{option} {pair!r}: expected key=value")
        arguments[key] = _literal(text)
    try:
        # As it will be read again: with lists for tuples.
        return json.loads(json.dumps(arguments))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{option}: only numbers, strings, lists and dicts of them: {error}") from error


def _literal(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """A provisional file of the same kind, which becomes `file` if all goes well."""
    part = file.with_name(f".{file.stem}.new{file.suffix}")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def progress(quiet: bool, steps: int) -> Iterator[Callable[[str], None]]:
    """Show on a terminal which step is being done, of how many, and for how long."""
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as shown:
        bar = shown.add_task("", total=steps, completed=-1)
        yield lambda what: shown.update(bar, description=what, advance=1)


def right(header: str) -> Column:
    """A column of numbers."""
    return Column(header, justify="right")


def print_json(value: Any) -> None:
    """The result of a command, for machines."""
    print(json.dumps(value, indent=2))
