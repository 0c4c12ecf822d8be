"""What finished tasks answered before a task was learned, and whether they still do."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hatify.asking import answers, equal
from hatify.errors import HatError

if TYPE_CHECKING:
    from hatify.model import HatModel


class KnownAnswers:
    """The answers of finished tasks to the example inputs; None for a task that cannot be asked as things are."""

    def __init__(self) -> None:
        self.of: dict[int, list[Any] | None] = {}

    def forget(self) -> None:
        """Ask anew the next time: on another device, or with other weights, answers are other ones."""
        self.of.clear()

    def ask(self, model: HatModel, besides: int) -> None:
        """Note what finished tasks answer that are not known; the task `besides` may change."""
        self.of.pop(besides, None)
        for task in model.finished_tasks:
            if task != besides and task not in self.of:
                self.of[task] = _asked(model, task)

    def compare(self, model: HatModel, learned: int) -> None:
        """Raise a `HatError` if weights that were trained for `learned` change what another task answers: 0 · ∞ ≠ 0."""
        if model.task_state.scale.is_meta:
            return
        twins: tuple[HatModel, HatModel] | None = None
        for task in model.finished_tasks:
            if task == learned or self._is_as_known(model, task):
                continue
            # Other threads, kernels or places in memory may round otherwise: ask both again, side by side.
            if twins is None:
                twins = copy.deepcopy(model), copy.deepcopy(model)
                twins[0].abort_task()
            then, now = (_asked(twin, task) for twin in twins)
            if then is not None and (now is None or not equal(then, now)):
                raise HatError(
                    f"task {task} does not answer as before: entries that no finished task uses became so large while "
                    f"task {learned} was trained that 0 times what they lead to is no number any more; call "
                    "abort_task(), and train with a smaller rate or clipped gradients"
                )

    def _is_as_known(self, model: HatModel, task: int) -> bool:
        """Whether a task answers as it is known to, or could not be asked; False if nothing is known of it."""
        if task not in self.of:
            return False
        known, found = self.of[task], _asked(model, task)
        return known is None or (found is not None and equal(found, known))


def _asked(model: HatModel, task: int) -> list[Any] | None:
    try:
        return answers(model, task, model.example_inputs)
    except Exception:  # whatever an operation raises: parts on other devices, say
        return None
