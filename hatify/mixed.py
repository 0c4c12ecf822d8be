"""Batches in which each sample belongs to a task of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from hatify.converted import Converted
from hatify.errors import TaskError


def check_tasks(model: Converted, tasks: Tensor) -> None:
    """Raise a `TaskError` unless `tasks` names a finished task for each sample."""
    if tasks.dtype != torch.int64 or tasks.ndim != 1 or not tasks.numel():
        raise TaskError(f"expected one task per sample, int64 (batch,), not {tasks.dtype} {tuple(tasks.shape)}")
    for task in tasks.unique().tolist():
        model.check_task(task)
        if task not in model.finished_tasks or task == model.active_task:
            raise TaskError(f"task {task} is not finished: only finished tasks answer side by side")


def answer_each(model: Converted, tasks: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `model` once per task, on that task's samples, and put the answers together in the samples' order.

    Args:
        model: in evaluation mode.
        tasks: the task of each sample, int64, shape (batch,).
        args: positional inputs; every tensor in them, but scalars, has the batch as its first dimension.
        kwargs: named inputs, likewise.

    Returns:
        What the model returns; every tensor in it has the batch as its first dimension.

    Raises:
        TaskError: training mode; an input of another length; outputs of different shapes, or without a batch.
    """
    if model.training:
        raise TaskError("samples of several tasks are answered in evaluation mode only: call eval(), or set one task")
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] != len(tasks):
            raise TaskError(f"tasks of {len(tasks)} samples are set, but an input has the shape {tuple(leaf.shape)}")
    parts, rows = {}, []
    for task in tasks.unique().tolist():
        rows.append((tasks == task).nonzero().squeeze(1))
        own_args, own_kwargs = _samples_at((args, kwargs), rows[-1])
        with model.task_state.choice.within(task):
            parts[task] = model(*own_args, **own_kwargs)
    return _together(parts, torch.cat(rows))


def _samples_at(inputs: Any, rows: Tensor) -> Any:
    return tree_map_only(Tensor, lambda t: t[rows.to(t.device)] if t.ndim else t, inputs)


def _together(parts: dict[int, Any], rows: Tensor) -> Any:
    """One output of those of each task; row i of them, one after the other, is that of sample ``rows[i]``."""
    flat = {task: tree_flatten(part) for task, part in parts.items()}
    first, *others = flat
    for task in others:
        if flat[task][1] != flat[first][1]:
            raise TaskError(f"tasks {first} and {task} answer with different structures: ask for one at a time")
    order = rows.argsort()
    columns = zip(*(leaves for leaves, _ in flat.values()), strict=True)
    return tree_unflatten([_joined(dict(zip(flat, column, strict=True)), order) for column in columns], flat[first][1])


def _joined(answers: dict[int, Any], order: Tensor) -> Any:
    (first, expected), *others = answers.items()
    if not isinstance(expected, Tensor):
        if any(type(other) is not type(expected) or other != expected for _, other in others):
            raise TaskError(f"an output, of type {type(expected).__name__}, is no tensor and differs between tasks")
        return expected
    for task, other in others:
        if other.shape[1:] != expected.shape[1:] or other.dtype != expected.dtype:
            raise TaskError(
                f"tasks {first} and {task} answer with different shapes or dtypes, {tuple(expected.shape)} "
                f"{expected.dtype} and {tuple(other.shape)} {other.dtype}: ask for one at a time"
            )
    if any(answer.ndim == 0 for answer in answers.values()) or sum(map(len, answers.values())) != len(order):
        raise TaskError(
            f"an output of shape {tuple(expected.shape)} has no row for each sample: ask one task at a time"
        )
    return torch.cat(list(answers.values()))[order.to(expected.device)]
