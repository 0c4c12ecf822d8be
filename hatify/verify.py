"""Show by experiment that nothing finished tasks answer can change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hatify.asking import answers, arguments, equal
from hatify.errors import IsolationError, TaskError
from hatify.lock import locked_entries, named_tensors, owned_by_tasks
from hatify.model import HatModel
from hatify.policy import Policy
from hatify.sizes import other_sizes
from hatify.undo import surroundings_kept


def verify_isolation(
    model: HatModel, example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None = None, seed: int = 0
) -> None:
    """Replace every entry that a finished task does not lock by noise, and compare that task's outputs bit for bit.

    This is done for every finished task, on the inputs as they are, in batches of one and three, and at larger and
    smaller sizes of every other dimension that the network leaves free (lengths of sequences, edges of images; those
    above 64 are made larger only where they cannot be made smaller). All happens in a copy of the model.

    Args:
        model: a converted model with at least one finished task.
        example_inputs: inputs to compare on; None: those the model was converted with.
        seed: of the noise.

    Raises:
        IsolationError: an output changed; names the task, the parameters whose unlocked entries changed it, and the
            shapes of the inputs.
        TaskError: no task is finished.
    """
    if not model.finished_tasks:
        raise TaskError("no task is finished: there is nothing to verify yet")
    with surroundings_kept():
        inputs = arguments(model, example_inputs)
        twin = unguarded_copy(model)
        probes = [inputs, *other_sizes(lambda other: _is_answered(twin, other), inputs, batches=(1, 3))]
        for task in twin.finished_tasks:
            unlocked = unlocked_entries(twin, task)
            for probe in probes:
                if guilty := _guilty(twin, task, unlocked, probe, seed):
                    where = "" if probe is inputs else f", for inputs of shape {_shapes(probe)}"
                    raise IsolationError(
                        f"task {task}: outputs depend on entries that are not locked, of {', '.join(guilty)}{where}"
                    )


def _guilty(model: HatModel, task: int, unlocked: dict[str, Tensor], inputs: Any, seed: int) -> list[str]:
    """The parameters and buffers through whose `unlocked` entries the outputs of `task` change."""
    expected = answers(model, task, inputs)

    def changed_by(entries: dict[str, Tensor]) -> bool:
        with perturbed(model, entries, seed):
            return not equal(answers(model, task, inputs), expected)

    if not changed_by(unlocked):
        return []
    return [name for name, entries in unlocked.items() if changed_by({name: entries})] or ["several together"]


def _shapes(inputs: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, Tensor))


def unguarded_copy(model: HatModel) -> HatModel:
    """A copy of a model in which nothing puts back what is written to it."""
    twin = copy.deepcopy(model)
    for watcher in twin.standing:
        watcher.disarm()
    twin.__dict__.update(guard=None, opened=None)
    return twin


def _is_answered(model: HatModel, inputs: Any) -> bool:
    """Whether the finished tasks answer such inputs."""
    try:
        answers(model, model.finished_tasks[0], inputs)
    except Exception:  # whatever an operation raises that cannot do with such sizes
        return False
    return True


def unlocked_entries(model: HatModel, task: int) -> dict[str, Tensor]:
    """The entries of every parameter and buffer that `task` does not lock: {name: bool, of the tensor's shape}."""
    own = {id(t) for t in owned_by_tasks(model, [task])}
    unread = {e.name for e in model.census if e.policy is Policy.UNUSED}
    foreign = {id(t) for t in owned_by_tasks(model, [t for t in range(model.num_tasks) if t != task])}
    unlocked = {}
    for name, tensor in named_tensors(model):
        if name in model.uses:
            masks = model.task_state.binary(task).unsqueeze(0)
            entries = ~locked_entries(model.uses[name], masks, tensor.shape)
        elif (name in unread or id(tensor) in foreign - own) and tensor.is_floating_point():
            entries = torch.ones_like(tensor, dtype=torch.bool)
        else:
            continue
        if entries.any():
            unlocked[name] = entries
    return unlocked


@contextmanager
def perturbed(model: HatModel, entries: dict[str, Tensor], seed: int) -> Iterator[None]:
    """Within the context, the given entries hold noise of their parameter's magnitude."""
    tensors = dict(named_tensors(model))
    saved = {name: tensors[name].detach().clone() for name in entries}
    try:
        with torch.no_grad():
            for i, (name, chosen) in enumerate(entries.items()):
                tensor = tensors[name]
                generator = torch.Generator().manual_seed(seed + i)
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                spread = tensor.float().std().nan_to_num().clamp_min(0.1).to(tensor.dtype) if tensor.numel() > 1 else 1
                tensor.copy_(torch.where(chosen, noise * spread, tensor))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value)
