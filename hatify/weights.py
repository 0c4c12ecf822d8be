"""Weights of the original network on a converted model, which has one copy per task of some of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from hatify.converted import Converted
from hatify.errors import CheckpointError, TaskError
from hatify.nn.per_task import PER_TASK
from hatify.nn.state import STATE, TaskState
from hatify.policy import Policy
from hatify.widening.widened import count_of, into_place


def refuse_plain_weights(model: Converted, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Keep ``load_state_dict`` from overwriting what tasks have learned with weights of the original.

    Raises:
        TaskError: tasks are finished, or one is open, and `state_dict` is not that of a converted model.
    """
    begun = (*model.finished_tasks, *(() if model.active_task is None else (model.active_task,)))
    if not begun or f"{prefix}{STATE}.finished_masks" in state_dict:
        return
    own = {f"{prefix}{name}" for name in model.task_state.tensor_names}
    spread = dict(state_dict)
    OriginalWeights.of(model)(spread, prefix)
    if not own.isdisjoint({*spread, *state_dict}):
        raise TaskError(
            f"load_state_dict: tasks {', '.join(map(str, begun))} have learned on this model, and weights of the "
            "original would overwrite what they know: load those into a model that was just converted, with "
            "hatify.load_plain_state_dict (a converted model's own state_dict() can be loaded at any time)"
        )


def refuse_parts(model: Converted, state_dict: Mapping[str, Any], prefix: str, strict: bool) -> None:
    """Keep ``load_state_dict`` from loading a part of what tasks have learned: all of it, or nothing, fits together.

    Raises:
        CheckpointError: names the first key that is missing, the first that the model has not, and the first of
            another shape.
    """
    given = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    masks = given.get(f"{prefix}{STATE}.finished_masks")
    if masks is None:
        return
    own = nn.Module.state_dict(model, prefix=prefix, keep_vars=True)
    progress = f"{prefix}{STATE}.{_EXTRA_STATE_KEY_SUFFIX}"  # in version 0.1 a dictionary, now a tensor
    _check_progress(given.get(progress), masks)
    check_keys(
        missing=[key for key in own if key not in given],
        unexpected=[key for key in given if key not in own] if strict else (),
        mismatched=[
            f"{key} {_shape(given[key])} instead of {_shape(value)}"
            for key, value in own.items()
            if key in given and key != progress and _shape(given[key]) != _shape(value)
        ],
    )


def _check_progress(progress: Any, masks: Tensor) -> None:
    """Raise a `CheckpointError` where masks of finished tasks come with a progress that knows nothing of them.

    Averaged models that were made before a task follow its tensors, but not that it has been finished since.
    """
    finished = progress[0].tolist() if isinstance(progress, Tensor) else (progress or {}).get("finished", ())
    masked = [task for task, mask in enumerate(masks) if mask.any()]
    lost = [task for task in masked if task < len(finished) and not finished[task]]
    if lost:
        raise CheckpointError(
            f"the state has masks of task {', '.join(map(str, lost))}, but counts it as not finished: a model that "
            "averages another one has to be made after that task has ended; or copy the averaged parameters alone"
        )


def load_plain_state_dict(model: Converted, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights of the original network onto a model that has learned nothing yet.

    Weights that every task has its own of are loaded onto the copy of each task. Heads that were converted with
    ``num_classes`` were made afresh, and remain as they are where the weights do not fit them. Where features have been
    added since the conversion, the weights go to those of the original, and the others stay what they are.

    Args:
        model: a converted model without finished tasks or an open one.
        state_dict: the original's, {name: tensor}; of any floating dtype, on any device.

    Raises:
        CheckpointError: names the first key that is missing, the first that the original has not, and the first of
            another shape. Nothing has been loaded then.
        TaskError: tasks are finished, or one is open: their answers would change.
    """
    if model.finished_tasks:
        raise TaskError(
            f"tasks {', '.join(map(str, model.finished_tasks))} are finished, and other weights would change their "
            "answers: load them into a model that was just converted"
        )
    if model.active_task is not None:
        raise TaskError(f"task {model.active_task} is open: load weights before begin_task() or after abort_task()")
    spread = OriginalWeights.of(model)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{STATE}.")}
    given = dict(state_dict)
    spread(given, "")
    given |= dict(_in_place(model, given, own, spread))
    fresh = fresh_heads(model)
    fits = {key for key in own.keys() & given.keys() if _shape(own[key]) == _shape(given[key])}
    check_keys(
        missing=[spread.original(key) for key in own if key not in given and not _may_be_missing(key, fresh)],
        unexpected=[spread.original(key) for key in given if key not in own],
        mismatched=[
            f"{spread.original(key)} {_shape(given[key])} instead of {_shape(own[key])}"
            for key in own
            if key in given and key not in fits and not key.startswith(fresh)
        ],
    )
    model.load_state_dict({**model.state_dict(), **{key: given[key] for key in fits}})


def _in_place(
    model: Converted, given: Mapping[str, Tensor], own: Mapping[str, Tensor], spread: OriginalWeights
) -> Iterator[tuple[str, Tensor]]:
    """Those that have been widened, of the sizes they have now."""
    places = model.plan.widened.tensors
    for key, value in given.items():
        dims = places.get(spread.original(key))
        if dims is None or key not in own or not isinstance(value, Tensor) or value.ndim != len(dims):
            continue
        now = own[key]
        before = [n if place is None else count_of(place) for n, place in zip(now.shape, dims, strict=True)]
        if list(value.shape) == before:
            yield key, into_place(value.to(now), dims, now)


def check_keys(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    """Raise a `CheckpointError` that names the first key of each kind, and says how many there are."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = {fault: list(dict.fromkeys(keys)) for fault, keys in faults.items()}
    said = [
        f"{fault}: {keys[0]}" + (f" (and {len(keys) - 1} more)" if keys[1:] else "")
        for fault, keys in found.items()
        if keys
    ]
    if said:
        raise CheckpointError(f"the weights do not fit the network; {'; '.join(said)}")


@dataclass(frozen=True)
class OriginalWeights:
    """A hook of ``load_state_dict`` by which a converted model takes weights of the original.

    Each weight of a module or parameter that every task has its own of is repeated for each task. State dictionaries
    of converted models pass unchanged.

    Attributes:
        per_task: where the model has one copy per task.
        state: the state of its tasks.
    """

    per_task: frozenset[str]
    state: TaskState

    @classmethod
    def of(cls, model: Converted) -> OriginalWeights:
        """For a given model."""
        modules = model.named_modules(remove_duplicate=False)
        return cls(frozenset(path for path, m in modules if isinstance(m, PER_TASK)), model.task_state)

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if any(key.startswith(f"{prefix}{STATE}.") for key in state_dict):
            return
        for key in list(state_dict):
            place = self._place(key.removeprefix(prefix))
            if place is None or not key.startswith(prefix):
                continue
            value, rest = state_dict.pop(key), key[len(prefix) + len(place) :]
            tasks = range(len(self.state.embeddings))
            state_dict.update({f"{prefix}{place}.{task}{rest}": value for task in tasks})

    def original(self, key: str) -> str:
        """The original's name for what the converted model calls `key`."""
        place = self._place(key)
        if place is None:
            return key
        _, _, rest = key[len(place) + 1 :].partition(".")
        return f"{place}.{rest}" if rest else place

    def _place(self, key: str) -> str | None:
        parts = key.split(".")
        ancestors = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((place for place in ancestors if place in self.per_task), None)


def fresh_heads(model: Converted) -> tuple[str, ...]:
    """Prefixes of the output layers that were made afresh, each with a number of classes of its own."""
    if model.origin.arguments["num_classes"] is None:
        return ()
    return tuple({f"{e.name.rpartition('.')[0]}." for e in model.census if e.policy is Policy.HEAD})


def _may_be_missing(key: str, fresh: tuple[str, ...]) -> bool:
    """Old checkpoints do not count batches; heads made afresh need no weights."""
    return key.endswith("num_batches_tracked") or key.startswith(fresh)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
