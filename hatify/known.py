"""What finished tasks answered before a task was learned, and whether they still do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hatify.asking import answers, equal
from hatify.converted import Converted
from hatify.errors import HatError
from hatify.structure import settings

M = TypeVar("M", bound=Converted)

#: Larger differences, in units of the largest number in an output, do not come from other kernels.
ROUNDING = 1e-3
#: Nor from lower precision, which ``model.forward`` may have been wrapped in meanwhile.
OF_LOWER_PRECISION = 0.1


class KnownAnswers:
    """The answers of finished tasks to the example inputs; None for a task that cannot be asked as things are."""

    def __init__(self) -> None:
        self.of: dict[int, list[Any] | None] = {}
        #: How the modules were set up then.
        self.settings: dict[str, Any] = {}

    def clear(self) -> None:
        """Ask anew the next time: on another device, or with other weights, answers are other ones."""
        self.of.clear()

    def ask(self, model: Converted, besides: int) -> None:
        """Note what finished tasks answer that are not known; the task `besides` may change.

        Raises:
            HatError: modules are not what they were when other tasks were asked, and now these answer otherwise.
        """
        self.of.pop(besides, None)
        if self.of and (changed := self._changed(model)):
            for task in self.of:
                if not self._is_as_known(model, task):
                    raise HatError(f"task {task} does not answer as before, since {changed}: put that back")
        self.settings = settings(model)
        for task in model.finished_tasks:
            if task != besides and task not in self.of:
                self.of[task] = _asked(model, task)

    def compare(self, model: M, learned: int, abort: Callable[[M], None]) -> None:
        """Raise a `HatError` if what happened while `learned` was trained changes what another task answers.

        `abort` undoes what has happened to a model since.
        """
        if model.task_state.scale.is_meta:
            return
        twins: tuple[M, M] | None = None
        for task in model.finished_tasks:
            if task == learned or self._is_as_known(model, task):
                continue
            known = self.of.get(task)
            if known is not None and (changed := self._changed(model)):
                raise HatError(
                    f"task {task} does not answer as before, since {changed} after task {learned} was opened: put that "
                    "back, or call abort_task()"
                )
            # Other threads, kernels or places in memory may round otherwise: ask both again, side by side.
            if twins is None:
                twins = copy.deepcopy(model), copy.deepcopy(model)
                abort(twins[0])
            then, now = (_asked(twin, task) for twin in twins)
            if then is not None and (now is None or not equal(then, now)):
                raise HatError(
                    f"task {task} does not answer as before: entries that no finished task uses became so large while "
                    f"task {learned} was trained that 0 times what they lead to is no number any more; call "
                    "abort_task(), and train with a smaller rate or clipped gradients"
                )
            found = _asked(model, task)
            wrapped = "forward" in vars(model)
            tolerance = OF_LOWER_PRECISION if wrapped else ROUNDING
            if known is not None and found is not None and not _are_close(found, known, tolerance):
                raise HatError(
                    f"task {task} does not answer as before, although its weights do not differ: something that is no "
                    f"part of the model, perhaps a hook, has changed after task {learned} was opened: undo that, or "
                    "call abort_task()"
                )

    def _is_as_known(self, model: Converted, task: int) -> bool:
        """Whether a task answers as it is known to, or could not be asked; False if nothing is known of it."""
        if task not in self.of:
            return False
        known, found = self.of[task], _asked(model, task)
        return known is None or (found is not None and equal(found, known))

    def _changed(self, model: Converted) -> str:
        """A setting that is another one now, in words; empty if none is."""
        now = settings(model)
        for name in (*self.settings, *now):
            before, after = self.settings.get(name), now.get(name)
            if type(before) is not type(after) or before != after:
                return f"{name} has changed" if isinstance(after, tuple) else f"{name} has become {after!r}"
        return ""


def _asked(model: Converted, task: int) -> list[Any] | None:
    try:
        return answers(model, task, model.example_inputs)
    except Exception:  # whatever an operation raises: parts on other devices, say
        return None


def _are_close(found: list[Any], known: list[Any], tolerance: float) -> bool:
    """Whether rounding explains the differences."""
    if len(found) != len(known):
        return False
    for a, b in zip(found, known, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape:
            largest = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
            allowed = max(tolerance, 16 * torch.finfo(a.dtype).eps)
            if not torch.allclose(a.double(), b.double(), rtol=allowed, atol=allowed * largest, equal_nan=True):
                return False
        elif not equal([a], [b]):
            return False
    return True
