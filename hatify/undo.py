"""Either a call happens, or everything is as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hatify.converted import Converted

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Undo what happens to the gradient mode and the random numbers within the context if that is interrupted.

    Ctrl-C between the last line of a ``with`` and its exit leaves both as they were inside.
    """
    enabled, numbers = torch.is_grad_enabled(), torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(enabled)
        torch.set_rng_state(numbers)
        raise


@contextmanager
@torch.no_grad()
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo what is written to `tensors` within the context if that is interrupted, by an error or Ctrl-C."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in before:
            tensor.copy_(value)
        raise


@contextmanager
def all_or_nothing(model: Converted) -> Iterator[None]:
    """Undo what happens to a model within the context if that is interrupted, by an error or Ctrl-C.

    Put back are modules, parameters and buffers as objects, attributes, modes, gradients, which task answers, and the
    values of the state of the tasks. The values of other tensors are not: no call that uses this writes to them.
    """
    state = model.task_state
    held = [
        (vars(module), dict(vars(module)), [(v, copy.copy(v)) for v in vars(module).values() if type(v) in _CONTAINERS])
        for module in (*model.modules(), model.trainable)
    ]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    values = [(buffer, buffer.clone()) for buffer in state.buffers()]
    choose_as_before, standing = state.choice.restorer(), model.standing
    try:
        with surroundings_kept():
            yield
    except BaseException:
        new = [watcher for watcher in model.standing if watcher not in standing]
        for attributes, then, containers in held:
            attributes.clear()
            attributes.update(then)
            for container, contents in containers:
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        choose_as_before()
        for watcher in new:
            watcher.disarm()
        for watcher in standing:
            watcher.arm()
        model.select_graph(anew=True)
        raise
