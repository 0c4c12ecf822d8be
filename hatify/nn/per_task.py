"""Modules, parameters and buffers of which each task has its own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from hatify.errors import HatError
from hatify.nn.choice import Choice
from hatify.nn.norms import NORMS


class PerTask(nn.ModuleList):
    """One copy of a module per task; `choice`, which is the model's, says which one answers.

    Args:
        module: the original, which becomes the first task's copy.
        memos: one deep-copy memo per further task, so that parameters tied across modules stay tied within a task.
    """

    def __init__(self, module: nn.Module, memos: list[dict[int, Any]]) -> None:
        super().__init__([module, *(copy.deepcopy(module, memo) for memo in memos)])
        self.choice = Choice()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self[self.choice.task](*args, **kwargs)


class PerTaskNorm(PerTask):
    """One normalisation per task; with a mask of shape (features,), statistics are taken over the active features.

    Attributes:
        over: bool, shape (features,): the features over which they are taken instead; None: the active ones.
    """

    over: Tensor | None

    def __init__(self, module: nn.Module, memos: list[dict[int, Any]]) -> None:
        super().__init__(module, memos)
        self.register_buffer("over", None, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        norm = self._modules[str(self.choice.task)]
        assert norm is not None
        if mask is None:
            return norm(x)
        masked = NORMS.get(type(norm))
        if masked is None:
            raise HatError(
                f"a {type(norm).__name__} has taken the place of a normalisation since the conversion, and cannot be "
                "masked: put the original one back, or make the change before the conversion"
            )
        over = self._buffers["over"]
        return masked(norm, x, mask) if over is None else masked(norm, x, mask, over)


class PerTaskTensor(nn.Module):
    """One copy of a raw parameter or buffer per task, named ``"0"``, ``"1"``, …; calling it returns the task's."""

    def __init__(self, value: Tensor, num_tasks: int) -> None:
        super().__init__()
        self.choice = Choice()
        self._register(0, value)
        for task in range(1, num_tasks):
            self._register(task, self._copy(value))

    def add(self, source: int) -> None:
        """One more task, with a copy of that of `source`."""
        self._register(len(self._parameters) + len(self._buffers), self._copy(getattr(self, str(source))))

    def _register(self, task: int, value: Tensor) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(str(task), value)
        else:
            self.register_buffer(str(task), value)

    @staticmethod
    def _copy(value: Tensor) -> Tensor:
        copied = value.detach().clone()
        return nn.Parameter(copied, value.requires_grad) if isinstance(value, nn.Parameter) else copied

    def forward(self) -> Tensor:
        return getattr(self, str(self.choice.task))


def owned_by(module: nn.Module, task: int) -> list[Tensor]:
    """The parameters and buffers of a per-task module that belong to `task`."""
    if isinstance(module, PerTask):
        return [*module[task].parameters(), *module[task].buffers()]
    if isinstance(module, PerTaskTensor):
        return [getattr(module, str(task))]
    return []


PER_TASK = (PerTask, PerTaskTensor)
