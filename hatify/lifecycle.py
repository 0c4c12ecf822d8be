"""How tasks begin and end: each of these happens, or leaves everything as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hatify.choosing import LEAST, Course
from hatify.converted import Converted
from hatify.errors import CapacityWarning, HatError, HatWarning, TaskError, listed
from hatify.known import KnownAnswers
from hatify.lock import Guard, named_tensors
from hatify.nn.per_task import PER_TASK, owned_by
from hatify.opened import OpenTask
from hatify.pace import depends_on_width, quicken
from hatify.ranks import Note, agree, mean
from hatify.structure import check_structure
from hatify.undo import all_or_nothing, values_kept


class Learner(Converted):
    """A converted network whose tasks begin and end.

    Attributes:
        known_answers: what finished tasks answered to the example inputs.
        wrapper_note: the wrapper of several processes that the open task is trained through, or None.
    """

    known_answers: KnownAnswers
    wrapper_note: Note | None = None

    def over_ranks(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes that train the open task, in place."""
        return mean(values, self.wrapper_note)

    def take(self, features: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """What is to be done when the open task, trained by `optimizer`, has chosen its `features`."""
        if depends_on_width(optimizer):
            quicken(self, features)


def require_open(model: Learner, call: str) -> tuple[Guard, OpenTask]:
    """The guard and the open task.

    Raises:
        TaskError: no task is open.
    """
    if model.guard is None or model.opened is None:
        raise TaskError(f"{call}() needs an open task: call begin_task() first")
    return model.guard, model.opened


def begin(model: Learner, task: int, budget: float | Mapping[str, float] | None, like: int | None) -> None:
    """What `HatModel.begin_task` does."""
    model.check_task(task)
    course = Course(budget=_shares(model, budget))
    _check_example(model, task, like)
    if model.active_task is not None:
        raise TaskError(f"task {model.active_task} is still open: call end_task() or abort_task() first")
    if torch.is_inference_mode_enabled():
        raise TaskError("begin_task() inside torch.inference_mode(): nothing can be trained there; call it outside")
    check_structure(model)
    model.put_right()
    _warn_of_full_layers(model, task)
    with all_or_nothing(model):
        model.__dict__.pop("wrapper_note", None)
        model.known_answers.ask(model, besides=task)
        model.task_state.task_before = model.task_state.task
        model.task_state.learning = task
        # What a finished task has chosen, it keeps if it is reopened and nothing else is asked for.
        chosen = model.task_state.finished[task] and budget is None and like is None
        model.task_state.course = replace(course, chosen=chosen)
        model.task_state.choice.set(task)
        model.settle()
        model.guard_anew()
        model.task_state.scale.fill_(model.s_max)
        model.zero_grad(set_to_none=True)
        if like is not None:
            _begin_like(model, task, like)
        model.train()


def _shares(model: Converted, budget: float | Mapping[str, float] | None) -> dict[str, float] | None:
    """What a task may keep of what is free: {layer, under the name of its mask: share}; None for the usual share."""
    if budget is None:
        return None
    groups, owners = model.task_state.groups, model.plan.owners
    given = budget if isinstance(budget, Mapping) else dict.fromkeys(groups, budget)
    for layer, share in given.items():
        if owners.get(layer, layer) not in groups:
            raise ValueError(f"budget: there is no layer {layer!r} with a mask; there are {listed(list(owners))}")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"budget: the share of {layer} must be from 0 to 1, not {share!r}")
    return {owners.get(layer, layer): float(share) for layer, share in given.items()}


def _check_example(model: Learner, task: int, like: int | None) -> None:
    if like is None:
        return
    model.check_task(like)
    if like == task or like not in model.finished_tasks:
        finished = ", ".join(map(str, model.finished_tasks)) or "none"
        raise TaskError(f"like={like}: a task can only begin like another one that is finished ({finished})")


@torch.no_grad()
def _begin_like(model: Learner, task: int, like: int) -> None:
    """Let the open task read what task `like` reads, and begin with copies of what that one has of its own."""
    state, pairs = model.task_state, []
    for module in model.modules():
        if isinstance(module, PER_TASK):
            own = list(zip(owned_by(module, like), owned_by(module, task), strict=True))
            # A head with another number of classes begins afresh.
            pairs += own if all(old.shape == new.shape for old, new in own) else []
    on = state.finished_masks[like] | ~state.used(besides=task)
    e = state.embeddings[task]
    pairs.append((torch.where(on, e.abs().clamp_min(LEAST), torch.full_like(e, -1)), e))
    with values_kept(tensor for _, tensor in pairs):
        for value, tensor in pairs:
            tensor.copy_(value)
        model.guard_anew(model.values_before)


def end(model: Learner) -> None:
    """What `HatModel.end_task` does."""
    task = require_open(model, "end_task")[1].task
    changed = model.put_right()
    guard = model.guard
    assert guard is not None
    # Before anything that may raise on one rank alone, where the others would wait for it.
    if model.wrapper_note is not None:
        agree(model, guard, model.wrapper_note)
        model.__dict__.pop("wrapper_note")
    check_structure(model)
    if changed and not guard.swapping:
        count = sum(changed.values())
        warnings.warn(
            f"{listed(list(changed))}: {count} entries that finished tasks own were changed during task {task}, "
            "outside any optimizer step; they have been put back",
            HatWarning,
            stacklevel=3,
        )
    for name, tensor in named_tensors(model):
        if not tensor.is_floating_point() or torch.isfinite(tensor.detach().sum()):
            continue
        # What was infinite to begin with ("no limit") is not a fault.
        before = guard.saved(name)
        if before is not None and (~torch.isfinite(tensor) & torch.isfinite(before)).any():
            raise HatError(f"{name} has values that are not finite after training task {task}: call abort_task()")
    state, opened = model.task_state, model.opened
    assert opened is not None
    surplus = opened.surplus()
    mask = state.binary(task) & ~surplus
    _warn_of_masks(model, opened, surplus)
    _warn_of_empty_layers(model, task, mask)
    with all_or_nothing(model), values_kept([opened.embedding]):
        model.known_answers.compare(model, task, abort)
        opened.chooser.drop(surplus)
        state.finish(task, mask)
        _close(model)


def abort(model: Learner) -> None:
    """What `HatModel.abort_task` does."""
    guard, opened = require_open(model, "abort_task")
    with torch.no_grad():
        # By the objects as well: a parameter may have another name by now, or be another object.
        for name, tensor in (*guard.tensors.items(), *named_tensors(model)):
            before = guard.saved(name)
            if before is not None and tensor.shape == before.shape:
                tensor.copy_(before)
    with all_or_nothing(model):
        model.task_state.finished[opened.task] = opened.was_finished
        model.task_state.choice.set(model.task_state.task_before)
        _close(model, guard.tensors)


def _close(model: Learner, tensors: dict[str, Tensor] | None = None) -> None:
    model.task_state.learning, model.task_state.course = None, Course()
    model.zero_grad(set_to_none=True)
    model.settle()
    model.guard_anew(tensors=tensors)
    model.eval()


def after_loading(model: Learner, incompatible: Any) -> None:
    """Take over the task state that was loaded; a model that was not at that point yet guards what was loaded."""
    model.settle()
    model.known_answers.clear()
    same = model.guard is not None and model.guard.is_for(model.task_state)
    model.guard_anew(model.values_before if same else None)


def _warn_of_full_layers(model: Learner, task: int) -> None:
    state = model.task_state
    used = state.used(besides=task)
    # Where there is nothing but a base, no task was ever to have features of its own.
    full = [
        name
        for name, (start, stop) in state.groups.items()
        if used[start:stop].all() and not state.base[start:stop].all()
    ]
    if full:
        layers = listed(full, "layers")
        message = (
            f"{layers}: no feature is left that is free of finished tasks; task {task} can only reuse them; "
            "model.widen(0.25) makes room"
        )
        warnings.warn(message, CapacityWarning, stacklevel=4)


def _warn_of_masks(model: Learner, opened: OpenTask, surplus: Tensor) -> None:
    """Warn, once, of all that keeps a task from having learned with the masks it will answer with."""
    if found := [*opened.doubts(surplus)]:
        warnings.warn(f"task {opened.task}: {'; '.join(found)}", HatWarning, stacklevel=4)


def _warn_of_empty_layers(model: Learner, task: int, mask: Tensor) -> None:
    forced = mask & (model.task_state.embeddings[task] <= 0) & ~model.task_state.base
    off = [name for name, (start, stop) in model.task_state.groups.items() if forced[start:stop].any()]
    if off:
        layers = listed(off, "layers")
        message = f"{layers}: task {task} has every feature off; its strongest one is kept on"
        warnings.warn(message, HatWarning, stacklevel=4)
