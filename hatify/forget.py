"""Forget one task, and nothing of the others."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hatify.errors import CheckpointError, HatWarning, TaskError
from hatify.lock import locked_entries, named_tensors, owned_by_tasks
from hatify.model import HatModel
from hatify.nn.per_task import PerTask, PerTaskTensor
from hatify.nn.state import STATE, initial_embedding
from hatify.undo import all_or_nothing
from hatify.weights import OriginalWeights, fresh_heads

RESETS = ("random", "original", "zero")


@torch.no_grad()
def forget_task(
    model: HatModel,
    task: int,
    reset: str = "random",
    dry_run: bool = False,
    original: nn.Module | Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Re-initialise what belongs to one finished task alone; the task can then be learned again.

    That is every entry of a shared parameter which this task locks (Equation 2) and no other finished task does, its
    copies of what tasks do not share, and its masks. Entries that no finished task locks are free, and left as they
    are. What other tasks answer stays equal bit for bit.

    Args:
        model: a converted model; no task may be open.
        task: a finished task.
        reset: what shared entries become. ``"random"``: as their layer initialises itself, or, where it does not, like
            entries of the same parameter that are not forgotten. ``"original"``: as in `original`. ``"zero"``: zero.
            The task's own copies become original ones, or else are initialised afresh; what does not initialise
            itself becomes like that of another task.
        dry_run: change nothing, only report.
        original: for ``"original"``, the weights of the network that was converted, or that network. The model does
            not keep them, since that would double its size.

    Returns:
        {name of the parameter or buffer: entries forgotten}, for those with any.

    Raises:
        TaskError: the task is not finished, or a task is open.
        ValueError: `reset` is none of the above, or `original` is missing or out of place.
        CheckpointError: `original` does not fit the model. Nothing is forgotten then.

    Warns:
        HatWarning: no shared entry belongs to the task alone.
    """
    _check(model, task, reset, original)
    model.put_right()
    entries = belongs_to(model, task)
    if not any(name in model.uses for name in entries):
        message = f"task {task}: no entry of any shared parameter belongs to it alone"
        warnings.warn(f"{message}; only its own copies and masks are forgotten", HatWarning, stacklevel=3)
    report = {name: int(chosen.sum()) for name, chosen in entries.items()}
    if dry_run:
        return report
    tensors, state = dict(named_tensors(model)), model.task_state
    # All values before any is written: if one cannot be had, nothing has changed.
    values = _Values(model, task, reset, original)
    fresh = {name: values.of(name, tensors[name], chosen) for name, chosen in entries.items()}
    with _kept_if_interrupted(model), all_or_nothing(model):
        for name, value in fresh.items():
            tensors[name].copy_(torch.where(entries[name], value.to(tensors[name]), tensors[name]))
        state.forget(task)
        model.settle()
        model.guard_anew()
    return report


@contextmanager
def _kept_if_interrupted(model: HatModel) -> Iterator[None]:
    """The guard puts back what finished tasks own, and with it what the task that was being forgotten owned."""
    guard = model.guard
    assert guard is not None
    guard.build()
    try:
        yield
    except BaseException:
        guard.put_right()
        raise


def _check(model: HatModel, task: int, reset: str, original: Any) -> None:
    model.check_task(task)
    if model.active_task is not None:
        raise TaskError(f"task {model.active_task} is open: call end_task() or abort_task() before forgetting a task")
    if task not in model.finished_tasks:
        raise TaskError(f"task {task} is not finished: there is nothing to forget")
    if reset not in RESETS:
        raise ValueError(f"reset must be one of {', '.join(map(repr, RESETS))}, not {reset!r}")
    if (reset == "original") != (original is not None):
        raise ValueError("reset='original' and original= go together: the model does not keep the original's weights")


def belongs_to(model: HatModel, task: int) -> dict[str, Tensor]:
    """The entries that belong to a finished task alone: {name: bool, of the tensor's shape}, for those with any."""
    state = model.task_state
    others = state.finished_masks[[t for t in model.finished_tasks if t != task]]
    base = state.base if state.has_base else None
    kept = {id(t) for t in owned_by_tasks(model, [t for t in range(model.num_tasks) if t != task])}
    alone = {id(t) for t in owned_by_tasks(model, [task])} - kept
    entries = {}
    for name, tensor in named_tensors(model):
        if name in model.uses:
            own = locked_entries(model.uses[name], state.finished_masks[task : task + 1], tensor.shape)
            chosen = own & ~locked_entries(model.uses[name], others, tensor.shape, base)
        elif id(tensor) in alone:
            chosen = torch.ones_like(tensor, dtype=torch.bool)
        else:
            continue
        if chosen.any():
            entries[name] = chosen
    return entries


class _Values:
    """What the tensors of a task become."""

    def __init__(
        self, model: HatModel, task: int, reset: str, original: nn.Module | Mapping[str, Tensor] | None
    ) -> None:
        self.model, self.reset = model, reset
        self.embedding = f"{STATE}.embeddings.{task}"
        self.original = None if original is None else _spread(model, original)
        self.fresh = fresh_heads(model)
        self.initialised: dict[str, Tensor] = {}
        #: The same tensor of another task, one that has learned nothing if there is any.
        self.twins: dict[str, Tensor] = {}
        others = sorted({*range(model.num_tasks)} - {task}, key=lambda t: t in model.finished_tasks)
        for path, module in model.named_modules():
            if isinstance(module, PerTask):
                self._initialise(f"{path}.{task}", module[task])
                twins = named_tensors(module[others[0]]) if others else ()
                self.twins |= {f"{path}.{task}.{name}": tensor for name, tensor in twins}
            elif isinstance(module, PerTaskTensor) and others:
                self.twins[f"{path}.{task}"] = getattr(module, str(others[0]))

    def of(self, name: str, tensor: Tensor, chosen: Tensor) -> Tensor:
        """New values for `tensor`, of which the `chosen` entries will be used."""
        state = self.model.task_state
        if name == self.embedding:
            return initial_embedding(state.num_slots, state.mask_init, tensor.device, tensor.dtype)
        if state.has_base and self.fresh and name.startswith(self.fresh):
            return torch.zeros_like(tensor)
        if self.original is not None:
            value = self.original.get(name)
            if value is not None and value.shape == tensor.shape:
                return value
            # Heads that were made afresh have no original.
            if name in self.model.uses:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise CheckpointError(f"{name}: {found} in the original's weights, expected {tuple(tensor.shape)}")
        if self.reset == "zero" and name in self.model.uses:
            return torch.zeros_like(tensor)
        if name in self.model.uses and name not in self.initialised:
            owner = name.rpartition(".")[0]
            layer = self.model.get_submodule(owner)
            if not any(layer.children()):
                self._initialise(owner, layer)
        if name in self.initialised:
            return self.initialised[name]
        twin = self.twins.get(name)
        return twin if twin is not None and twin.shape == tensor.shape else _like_the_rest(tensor, ~chosen)

    def _initialise(self, path: str, module: nn.Module) -> None:
        """Note what the modules at `path` initialise themselves to, where they do."""
        blank = copy.deepcopy(module)
        for tensor in (*blank.parameters(), *blank.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        for part in blank.modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
        for name, tensor in named_tensors(blank):
            if not tensor.isnan().any():
                self.initialised[f"{path}.{name}"] = tensor


def _spread(model: HatModel, original: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's weights by the names of the converted model."""
    if isinstance(original, nn.Module):
        original = {**dict(named_tensors(original)), **original.state_dict()}
    weights = {name: value for name, value in original.items() if isinstance(value, Tensor)}
    OriginalWeights.of(model)(weights, "")
    return weights


def _like_the_rest(tensor: Tensor, rest: Tensor) -> Tensor:
    """Random values for a tensor that nothing initialises: drawn from its other entries, else of N(0, 0.02²)."""
    others = tensor[rest]
    if others.numel():
        return others[torch.randint(others.numel(), tensor.shape, device=tensor.device)]
    return torch.randn(tensor.shape, device=tensor.device).mul(0.02).to(tensor.dtype)
