"""A converted network as far as its tasks go: what everything that works on a `HatModel` may know of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.census import Census
from hatify.errors import TaskError
from hatify.lock import Guard
from hatify.nn.state import STATE, TaskState
from hatify.opened import OpenTask
from hatify.origin import Origin
from hatify.plan import Plan
from hatify.slots import Use
from hatify.stamps import can_be_looked_at
from hatify.trainable import Trainable
from hatify.widening.optimizers import Followed


class Converted(nn.Module):
    """The part of `HatModel` that knows its tasks, and keeps what the finished ones own.

    Attributes:
        plan: what the conversion decided, as data.
        census: what happens to every parameter and buffer of the original.
        uses: how the entries of each parameter that tasks share connect features.
        constants: buffers that never change.
        trainable: which parameters take gradients when their task is open.
        guard: keeps what finished tasks own; None as long as nothing needs it.
        opened: the open task, or None.
        followed: what has been widened, for what optimizers remember of it.
        flat_graphs: the whole network as one graph without blocks, {training: graph}; one and the same for both modes,
            if that will do.
    """

    plan: Plan
    census: Census
    s_max: float
    example_inputs: tuple[Any, ...] | dict[str, Any]
    uses: dict[str, list[Use]]
    constants: tuple[str, ...]
    origin: Origin
    trainable: Trainable
    guard: Guard | None
    opened: OpenTask | None
    followed: Followed
    flat_graphs: dict[bool, fx.Graph]

    @abstractmethod
    def select_graph(self, anew: bool = False) -> None:
        """Use the graph of the current mode; `anew`: write its code in any case."""

    def learn_masks(self) -> None:
        """Have the masks of the open task learned by their gradient, as in the paper.

        Raises:
            TaskError: no task is open.
        """
        if self.opened is None:
            raise TaskError("learn_masks() needs an open task: call begin_task() first")
        if not self.task_state.course.learned:
            self.opened.accept()
            self.task_state.course.learned = True
            self.settle()
            self.opened.learn()

    @property
    @abstractmethod
    def flat_graph(self) -> fx.Graph:
        """The whole network as one graph, of the current mode."""

    @abstractmethod
    def over_ranks(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes that train the open task, in place."""

    @abstractmethod
    def take(self, features: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """What is to be done when the open task, trained by `optimizer`, has chosen its `features`."""

    @property
    def task_state(self) -> TaskState:
        """The module that holds embeddings and masks."""
        return self._modules[STATE]  # type: ignore[return-value]

    @property
    def num_tasks(self) -> int:
        """How many tasks there is room for."""
        return len(self.task_state.embeddings)

    @property
    def finished_tasks(self) -> tuple[int, ...]:
        """The tasks that have been ended, in order of their numbers."""
        return tuple(t for t, done in enumerate(self.task_state.finished) if done)

    @property
    def active_task(self) -> int | None:
        """The task that is open for training, or None."""
        return self.task_state.learning

    @property
    def mask_scale(self) -> float:
        """s of Equation 1, positive; usually set by `MaskScale`.

        To set it while a task is open has that task's masks learned by their gradient.
        """
        return float(self.task_state.scale)

    @mask_scale.setter
    def mask_scale(self, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"the mask scale must be positive and finite, not {scale}")
        self.task_state.scale.fill_(scale)
        if self.opened is not None:
            self.learn_masks()
            self.opened.schedule_steps += 1

    def check_task(self, task: int) -> None:
        """Raise a `TaskError` unless there is such a task."""
        if isinstance(task, bool) or not isinstance(task, int) or not 0 <= task < self.num_tasks:
            raise TaskError(f"there is no task {task!r}: tasks are 0 … {self.num_tasks - 1}")

    def settle(self) -> None:
        """Let gradients flow to what the open task owns; with no task open, to what unfinished tasks own."""
        self.trainable.settle(self, self.task_state)

    @property
    def values_before(self) -> dict[str, Tensor] | None:
        """What `abort_task` returns to: every parameter and buffer, by name; None while no task is open."""
        return None if self.guard is None or self.guard.task is None else self.guard.all_saved()

    @property
    def standing(self) -> list[Guard | OpenTask]:
        """What watches the steps of optimizers for this model."""
        return [watcher for watcher in (self.guard, self.opened) if watcher is not None]

    def guard_anew(
        self,
        saved: Mapping[str, Tensor] | None = None,
        tensors: dict[str, Tensor] | None = None,
        built: bool = False,
    ) -> None:
        """Guard what is finished now and, while a task is open, what `abort_task` returns to: `saved`, else what is.

        `built`: keep a copy of what finished tasks own at once.
        """
        old, standing, task, state = self.guard, self.standing, self.active_task, self.task_state
        guard = None
        if task is not None or any(state.finished):
            guard = Guard(self, state, self.uses, self.constants, task, saved, tensors)
            guard.build() if built or (old is not None and old.is_built) else guard.sample()
        opened = None if task is None else OpenTask(self, state, task)
        self.__dict__.update(guard=guard, opened=opened)
        for watcher in standing:
            watcher.disarm()

    def look_after(self, training: bool = False) -> None:
        """Put right what finished tasks own before it is used, if anything seems to have been written to."""
        if self.guard is not None:
            self.guard.check(training)

    def put_right(self) -> dict[str, int]:
        """Put back all that finished tasks own, also into parameters that have become other objects."""
        if not can_be_looked_at():
            return {}
        if self.guard is not None and not self.guard.is_of(self):
            self.guard.check_fit(self)
            if self.guard.is_built:
                self.guard_anew(self.guard.all_saved())
        return {} if self.guard is None else self.guard.put_right()
