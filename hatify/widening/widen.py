"""`HatModel.widen`: more features in every layer, while finished tasks answer as before.

How the dimensions of the network belong together is found by running it once (`Plotted`). A copy of it gets what is new
(`Wider`), and is run beside it (`Beside`); where it computes something else, what grows there is left as it is, and
another copy is made. Then the model takes over what the copy has. What there was reads nothing of what is new, so that
outputs stay what they are but for rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hatify.asking import answering, answers, arguments
from hatify.census import Census
from hatify.errors import HatError, HatWarning, TaskError, listed
from hatify.lifecycle import Learner
from hatify.lock import named_tensors
from hatify.nn.per_task import PerTaskNorm
from hatify.nn.state import TaskState
from hatify.part import Part
from hatify.rounding import agree
from hatify.structure import check_structure, tensor_names
from hatify.undo import all_or_nothing
from hatify.widening.beside import CannotGrow
from hatify.widening.plotted import Plotted
from hatify.widening.statistics import normalise_over_base
from hatify.widening.wider import Wider


def widen(model: Learner, share: float) -> None:
    """What `HatModel.widen` does."""
    if model.active_task is not None:
        raise TaskError(f"task {model.active_task} is open: call end_task() or abort_task() before widening")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
        raise ValueError(f"the share of features to add must be a positive number, not {share!r}")
    if torch.is_inference_mode_enabled():
        raise TaskError("widen() inside torch.inference_mode(): nothing can be trained there; call it outside")
    check_structure(model)
    model.put_right()
    inputs, numbers = arguments(model, None), torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    with answering(model, model.task_state.task):
        plotted = Plotted(model, inputs)
        wider = _grown(plotted, share, numbers)
    _adopt(model, wider)


def _grown(plotted: Plotted, share: float, numbers: torch.Generator) -> Wider:
    """A copy that has grown, and computes the same."""
    while growth := plotted.growth(share):
        try:
            wider = Wider(plotted, growth, numbers)
            wider.verify()
        except CannotGrow as found:
            for axis, why in found.axes:
                for atom in axis.atoms():
                    if atom in growth:
                        atom.fix(why)
            continue
        _warn_of_rest(plotted.reasons(growth))
        return wider
    reasons = plotted.reasons({})
    first = next(iter(reasons.items()), ("the network", "it has no masked layers"))
    raise HatError(f"widen: no layer can be given more features; {first[0]}: {first[1]}")


def _warn_of_rest(reasons: Mapping[str, str]) -> None:
    if reasons:
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        said = "; ".join(f"{listed(names, 'layers')}: {reason}" for reason, names in by_reason.items())
        warnings.warn(f"no features are added to {said}", HatWarning, stacklevel=5)


# Taking over ---------------------------------------------------------------------------------------------------------


def _adopt(model: Learner, wider: Wider) -> None:
    """Let the model be what the copy is: the same objects, with the copy's sizes and values; or nothing happens."""
    copied = wider.model
    known = {task: answers(model, task, model.example_inputs) for task in model.finished_tasks}
    _finish(wider)
    for task, before in known.items():
        _check_answers(task, before, answers(copied, task, model.example_inputs))
    with all_or_nothing(model), _data_kept(model):
        for of_parameter in wider.widened:
            model.followed.add(*of_parameter)
        for module, twin in zip(model.modules(), copied.modules(), strict=True):
            vars(module).update(wider.settings.get(id(module), {}))
            for table in ("_parameters", "_buffers"):
                for name, value in vars(module)[table].items():
                    new = vars(twin)[table][name]
                    if value is not None and value.shape != new.shape:
                        _hold(value, new.data)
            if isinstance(module, PerTaskNorm) and isinstance(twin, PerTaskNorm):
                module.over = twin.over
            if isinstance(module, TaskState) and isinstance(twin, TaskState):
                module.take_layout(twin)
            if isinstance(module, Part) and isinstance(twin, Part):
                module.install(twin.graphs, module.training)
        model.__dict__.update({name: vars(copied)[name] for name in ("flat_graphs", "plan", "census", "uses")})
        model.task_state.tensor_names = tensor_names(model)
        model.known_answers.clear()
        model.settle()
        model.guard_anew()


def _hold(tensor: Tensor, data: Tensor) -> None:
    """Let `tensor` hold `data`, of another shape.

    Graphs that are still there keep what accumulates its gradient, which expects the old shape; torch lets go of that
    where the dtype changes.
    """
    tensor.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


@contextmanager
def _data_kept(model: Learner) -> Iterator[None]:
    """Undo what tensors are made to hold instead, if that is interrupted."""
    before = [(tensor, tensor.data) for _, tensor in named_tensors(model)]
    try:
        yield
    except BaseException:
        for tensor, data in before:
            if tensor.shape != data.shape:
                _hold(tensor, data)
        raise


def _check_answers(task: int, before: list[Any], now: list[Any]) -> None:
    """Raise a `HatError` unless a finished task answers the same but for rounding."""
    pairs = zip(before, now, strict=True)
    if not all(agree(b, a, []) if isinstance(a, Tensor) else a == b for a, b in pairs):
        raise HatError(f"widen: task {task} would answer otherwise; nothing has been changed")


def _finish(wider: Wider) -> None:
    """Make the copy a converted model again: its parts, its plan, and what its normalisations look at."""
    model: Any = wider.model
    for part in model.modules():
        if isinstance(part, Part):
            wider.rewrite_part(part)
            part.install(part.graphs, part.training)
    plan = wider.plan()
    census = Census(replace(entry, shape=wider.added.shape(entry.name, entry.shape)) for entry in model.census)
    census.flat = model.census.flat
    model.__dict__.update(plan=plan, uses=plan.uses, census=census)
    normalise_over_base(model)
    model.known_answers.clear()
    model.guard_anew()
