"""Ask a task and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hatify.converted import Converted


@contextmanager
def buffers_restored(net: nn.Module) -> Iterator[None]:
    """Undo what happens to buffers within the context: writes to them, and new tensors in their place."""
    saved = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in saved:
            module._buffers[name] = buffer if buffer is None or value is None else buffer.copy_(value)


@contextmanager
def in_evaluation(net: nn.Module) -> Iterator[None]:
    """Within the context, every module is in evaluation mode; none is told, since some rewrite their weights then."""
    modes = {module: module.training for module in net.modules()}
    try:
        for module in modes:
            module.training = False
        _select_graph(net)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        _select_graph(net)


def _select_graph(net: nn.Module) -> None:
    select = getattr(type(net), "select_graph", None)  # of a converted model
    if select is not None:
        select(net)


@contextmanager
def same_numbers(model: Converted) -> Iterator[None]:
    """Within the context, random numbers are the same each time, on the CPU and where the model is."""
    device = model.task_state.scale.device
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


Arguments = tuple[Any, ...] | dict[str, Any]


def arguments(model: Converted, inputs: Arguments | Tensor | None) -> Arguments:
    """What to call a model with: `inputs`, or those of its conversion, where the model is, and as precise.

    Never the same tensors, since a network may write to its inputs.
    """
    scale = model.task_state.scale
    inputs = model.example_inputs if inputs is None else (inputs,) if isinstance(inputs, Tensor) else inputs

    def moved(t: Tensor) -> Tensor:
        return t.to(scale.device, scale.dtype if t.is_floating_point() else t.dtype, copy=True)

    return tree_map_only(Tensor, moved, inputs)


@contextmanager
def answering(model: Converted, task: int) -> Iterator[None]:
    """Within the context, `task` answers in evaluation mode, without autocast around it.

    Modes, buffers and random numbers are restored.
    """
    kind = model.task_state.scale.device.type
    with (
        torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext(),
        in_evaluation(model),
        torch.no_grad(),
        same_numbers(model),
        model.task_state.choice.within(task),
        buffers_restored(model),
    ):
        yield


def answers(model: Converted, task: int, inputs: Arguments) -> list[Any]:
    """The outputs of a task, as a flat list, with the same random numbers each time."""
    given = arguments(model, inputs)
    with answering(model, task):
        return tree_leaves(model(**given) if isinstance(given, dict) else model(*given))


def equal(a: list[Any], b: list[Any]) -> bool:
    """Whether two flat lists of outputs are equal, bit for bit but for the sign of zero; NaN equals NaN."""

    def same(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor):
            return bool(x == y)
        if not x.is_floating_point():
            return torch.equal(x, y)
        return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
