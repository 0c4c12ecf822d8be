"""Whoever stands watch is told of every step of every optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Watcher(Protocol):
    """What is told of steps."""

    def before_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """Parameters with the identities `held` are going to be updated by `optimizer`."""

    def after_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """They have been, by `optimizer`."""


#: Those who watch: the guard of every model with finished tasks or an open one, every open task, and what follows
#: parameters that have been widened.
STANDING: weakref.WeakSet[Watcher] = weakref.WeakSet()


def watch(watcher: Watcher) -> None:
    """Tell `watcher` of every step from now on."""
    _watch_optimizers()
    STANDING.add(watcher)


def unwatch(watcher: Watcher) -> None:
    """Tell it no more."""
    STANDING.discard(watcher)


@cache
def _watch_optimizers() -> None:
    """Register the hooks, once.

    They stay: torch iterates over such hooks, and fails if one is removed meanwhile, as the garbage collector does with
    that of something it happens to find.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watcher in list(STANDING):
        watcher.before_step(optimizer, _held(optimizer))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watcher in list(STANDING):
        watcher.after_step(optimizer, _held(optimizer))


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
