"""More tasks than were foreseen at conversion."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hatify.converted import Converted
from hatify.errors import TaskError
from hatify.nn.per_task import PER_TASK, PerTask, PerTaskTensor
from hatify.nn.state import STATE, initial_embedding
from hatify.policy import Policy
from hatify.rewrite import class_counts, heads_of_size
from hatify.structure import tensor_names
from hatify.undo import all_or_nothing


@torch.no_grad()
def grow(model: Converted, n: int, num_classes: int | Iterable[int] | None) -> None:
    """What `HatModel.add_tasks` does."""
    if model.active_task is not None:
        raise TaskError(f"task {model.active_task} is open: call end_task() or abort_task() before adding tasks")
    model.put_right()
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"the number of tasks to add must be a positive integer, not {n!r}")
    classes = class_counts(n, _heads_like_before(model) if num_classes is None else num_classes)
    outputs = [e.name for e in model.census if e.policy is Policy.HEAD]
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, PER_TASK)]
    heads = [path for path, _ in modules if any(name.startswith(f"{path}.") for name in outputs)]
    if num_classes is not None and not heads:
        raise ValueError("num_classes is given, but the model has no heads")
    first, source = model.num_tasks, _source(model)
    # All heads at first: one that cannot be made leaves everything as it is.
    fresh = {
        path: list(heads_of_size(path, model.get_submodule(path)[0], classes, model.task_state.has_base))  # type: ignore[index]
        for path in heads
        if classes is not None
    }
    with all_or_nothing(model):
        model.settle()
        _grow_modules(model, modules, fresh, source, n)
        _grow_state(model, n)
        model.trainable.names |= {f"{STATE}.embeddings.{task}" for task in range(first, first + n)}
        model.__dict__["origin"] = replace(model.origin, added=(*model.origin.added, (n, classes)))
        of_each_task = model.__dict__.get("num_classes")
        if isinstance(of_each_task, tuple) and classes is not None:
            model.__dict__["num_classes"] = (*of_each_task, *classes)
        model.task_state.tensor_names = tensor_names(model)
        model.settle()
        model.guard_anew()


def _grow_modules(
    model: Converted, modules: Sequence[tuple[str, nn.Module]], fresh: dict[str, list[nn.Module]], source: int, n: int
) -> None:
    """`n` more copies of all that tasks do not share: heads as given in `fresh`, the others like those of `source`."""
    first, trainable = model.num_tasks, model.trainable
    memos: list[dict[int, Any]] = [{} for _ in range(n)]
    for path, module in modules:
        if isinstance(module, PerTask):
            new = fresh[path] if path in fresh else [copy.deepcopy(module[source], memo) for memo in memos]
            module.extend([m.train(module.training) for m in new])
        elif isinstance(module, PerTaskTensor):
            for _ in range(n):
                module.add(source)
        own = [name.removeprefix(f"{path}.{source}") for name in trainable.names if _below(name, f"{path}.{source}")]
        trainable.names |= {f"{path}.{task}{rest}" for task in range(first, first + n) for rest in own}


def _grow_state(model: Converted, n: int) -> None:
    state = model.task_state
    like = state.embeddings[0]
    state.embeddings.extend(
        initial_embedding(state.num_slots, state.mask_init, like.device, like.dtype) for _ in range(n)
    )
    state.finished_masks = torch.cat((state.finished_masks, state.finished_masks.new_zeros(n, state.num_slots)))
    state.finished += [False] * n


def _heads_like_before(model: Converted) -> int | None:
    """The number of classes of heads that were all made afresh with the same one."""
    classes = model.origin.arguments["num_classes"]
    if isinstance(classes, list):
        raise ValueError("the tasks have heads of their own numbers of classes: give num_classes for the new ones too")
    return None if classes is None else int(classes)


def _source(model: Converted) -> int:
    """The task whose copies new ones start from: one that has learned nothing, else the last."""
    unused = (task for task, done in enumerate(model.task_state.finished) if not done)
    return next(unused, model.num_tasks - 1)


def _below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")
