"""Which parameters take gradients: those of the open task, but for what the user has frozen."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hatify.nn.per_task import PER_TASK
from hatify.nn.state import STATE, TaskState


class Trainable:
    """Remembers what may learn, and what was frozen or thawed since.

    What is switched off for a while, because its task is not open, cannot be told from what the user switches off. So
    what is noticed on the open task's own parameters holds for those of tasks that are still to come, too.

    Args:
        names: the parameters that took gradients before anything was switched off.
    """

    def __init__(self, names: set[str]) -> None:
        self.names = names
        #: What each parameter was switched to here, and the task that was open then.
        self.switched: dict[str, bool] = {}
        self.open: int | None = None

    def settle(self, model: nn.Module, state: TaskState) -> None:
        """Let gradients flow to what the open task owns; with no task open, to what unfinished tasks own."""
        self._notice(model, state)
        self.open = state.learning
        for parameters in _places(model, state):
            for task, (name, parameter) in parameters.items():
                learns = not state.finished[task] if state.learning is None else state.learning == task
                # Where masks are chosen, embeddings are not the optimizer's.
                chosen = parameter is state.embeddings[task] and state.learning is not None and not state.course.learned
                self.switched[name] = learns and not chosen and name in self.names
                parameter.requires_grad_(self.switched[name])

    def _notice(self, model: nn.Module, state: TaskState) -> None:
        """Take note of what the user has switched."""
        for parameters in _places(model, state):
            changed = {
                task: parameter.requires_grad
                for task, (name, parameter) in parameters.items()
                if self.switched.get(name, parameter.requires_grad) != parameter.requires_grad
            }
            for task, takes in changed.items():
                alike = [
                    t for t, done in enumerate(state.finished) if not done and t not in changed and t in parameters
                ]
                names = {parameters[t][0] for t in ([task] if self.open is None else [task, *alike])}
                self.names = self.names | names if takes else self.names - names

    def as_it_is(self, model: nn.Module, never: set[str]) -> None:
        """Take the current switches for granted; the parameters in `never` are frozen for good."""
        parameters = dict(model.named_parameters())
        self.names = set(parameters.keys() - never)
        self.switched = {name: p.requires_grad for name, p in parameters.items()}


def _places(model: nn.Module, state: TaskState) -> Iterator[dict[int, tuple[str, nn.Parameter]]]:
    """For each parameter of which every task has its own: {task: (name, parameter)}."""
    names = {id(p): name for name, p in model.named_parameters()}
    holders: list[tuple[str, nn.Module]] = [
        (path, module) for path, module in model.named_modules() if isinstance(module, PER_TASK)
    ]
    holders.append((f"{STATE}.embeddings", state.embeddings))
    places: dict[str, dict[int, tuple[str, nn.Parameter]]] = {}
    for prefix, holder in holders:
        for rest, parameter in holder.named_parameters():
            task, _, inner = rest.partition(".")
            places.setdefault(f"{prefix}.{inner}", {})[int(task)] = (names[id(parameter)], parameter)
    yield from places.values()
