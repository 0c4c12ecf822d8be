"""Show by experiment that nothing finished tasks answer can change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from hatify.errors import IsolationError, TaskError
from hatify.lock import locked_entries, named_tensors, owned_by_tasks
from hatify.model import HatModel
from hatify.policy import Policy
from hatify.support import buffers_restored


def verify_isolation(
    model: HatModel, example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None = None, seed: int = 0
) -> None:
    """Replace every entry that a finished task does not lock by noise, and compare that task's outputs bit for bit.

    This is done for every finished task. The model is left untouched.

    Args:
        model: a converted model with at least one finished task.
        example_inputs: inputs to compare on; None: those the model was converted with.
        seed: of the noise.

    Raises:
        IsolationError: an output changed; names the task and the parameters whose unlocked entries changed it.
        TaskError: no task is finished.
    """
    if not model.finished_tasks:
        raise TaskError("no task is finished: there is nothing to verify yet")
    inputs = model.example_inputs if example_inputs is None else example_inputs
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    for task in model.finished_tasks:
        unlocked = unlocked_entries(model, task)
        expected = answers(model, task, inputs)
        with perturbed(model, unlocked, seed):
            same = equal(answers(model, task, inputs), expected)
        if not same:
            guilty = []
            for name, entries in unlocked.items():
                with perturbed(model, {name: entries}, seed):
                    if not equal(answers(model, task, inputs), expected):
                        guilty.append(name)
            names = ", ".join(guilty) or "several parameters together"
            raise IsolationError(f"task {task}: outputs depend on entries that are not locked, of {names}")


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


def answers(model: HatModel, task: int, inputs: tuple[Any, ...] | dict[str, Any]) -> list[Any]:
    """The outputs of a task in evaluation mode, as a flat list, with the same random numbers each time.

    Modes, buffers, random numbers and the task that is set are restored.
    """
    modes = {module: module.training for module in model.modules()}
    device = model.task_state.scale.device
    inputs = tree_map_only(Tensor, lambda t: t.to(device), inputs)
    call: Callable[[], Any] = lambda: model(**inputs) if isinstance(inputs, dict) else model(*inputs)  # noqa: E731
    model.eval()
    try:
        with torch.no_grad(), buffers_restored(model), torch.random.fork_rng(), model.task(task):
            torch.manual_seed(0)
            return tree_leaves(call())
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode


def equal(a: list[Any], b: list[Any]) -> bool:
    """Whether two flat lists of outputs are equal, bit for bit but for the sign of zero; NaN equals NaN."""

    def same(x: Any, y: Any) -> bool:
        if not isinstance(x, Tensor):
            return bool(x == y)
        if not x.is_floating_point():
            return torch.equal(x, y)
        return x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all())

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
