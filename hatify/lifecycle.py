"""How tasks begin and end: each of these happens, or leaves everything as it was."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from hatify.converted import Converted
from hatify.errors import CapacityWarning, HatError, HatWarning, TaskError, listed
from hatify.known import KnownAnswers
from hatify.lock import Guard, named_tensors
from hatify.opened import OpenTask
from hatify.ranks import Note, agree
from hatify.structure import check_structure
from hatify.undo import all_or_nothing


class Learner(Converted):
    """A converted network whose tasks begin and end.

    Attributes:
        known_answers: what finished tasks answered to the example inputs.
        wrapper_note: the wrapper of several processes that the open task is trained through, or None.
    """

    known_answers: KnownAnswers
    wrapper_note: Note | None = None


def require_open(model: Learner, call: str) -> tuple[Guard, OpenTask]:
    """The guard and the open task.

    Raises:
        TaskError: no task is open.
    """
    if model.guard is None or model.opened is None:
        raise TaskError(f"{call}() needs an open task: call begin_task() first")
    return model.guard, model.opened


def begin(model: Learner, task: int) -> None:
    """What `HatModel.begin_task` does."""
    model.check_task(task)
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
        model.task_state.choice.set(task)
        model.settle()
        model.guard_anew()
        model.mask_scale = model.s_max
        model.zero_grad(set_to_none=True)
        model.train()


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
    state = model.task_state
    mask = state.binary(task)
    _warn_of_empty_layers(model, task, mask)
    with all_or_nothing(model):
        model.known_answers.compare(model, task, abort)
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
    model.task_state.learning = None
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
    used = model.task_state.used(besides=task)
    full = [name for name, (start, stop) in model.task_state.groups.items() if used[start:stop].all()]
    if full:
        layers = listed(full, "layers")
        message = f"{layers}: no feature is left that is free of finished tasks; task {task} can only reuse them"
        warnings.warn(message, CapacityWarning, stacklevel=4)


def _warn_of_empty_layers(model: Learner, task: int, mask: Tensor) -> None:
    forced = mask & (model.task_state.embeddings[task] <= 0)
    off = [name for name, (start, stop) in model.task_state.groups.items() if forced[start:stop].any()]
    if off:
        layers = listed(off, "layers")
        message = f"{layers}: task {task} has every feature off; its strongest one is kept on"
        warnings.warn(message, HatWarning, stacklevel=4)
