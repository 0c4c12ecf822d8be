"""One finished task as a plain network, without hatify."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hatify.asking import answering, arguments
from hatify.errors import HatError, HatWarning, TaskError
from hatify.examples import refusals_named
from hatify.extract.baking import bake
from hatify.extract.cutting import cut
from hatify.extract.lowering import lower
from hatify.extract.plain import Plain
from hatify.model import HatModel
from hatify.ops.resize import CannotCut
from hatify.sizes import other_sizes
from hatify.structure import children_of
from hatify.support import accepted_sizes, positional


def extract_task(
    model: HatModel,
    task: int,
    compact: bool = True,
    example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None = None,
) -> nn.Module:
    """One finished task as a plain network: torch's own modules and operations, nothing of hatify.

    The network is called like the model, is in evaluation mode, shares no memory with the model, and keeps the names of
    parameters. (A child whose name a `torch.fx.GraphModule` needs itself, such as ``graph``, gets an underscore.)
    Modules of other packages that the model holds as a whole stay what they are.

    Args:
        model: a converted model.
        task: a finished task.
        compact: take out the features that the task has off; where an operation cannot do without them, zeros are put
            back ahead of it. Outputs then differ by rounding. False: masks are multiplied into the weights, and the
            outputs are, bit for bit, those of ``model`` with that task set, in evaluation mode.
        example_inputs: what the network is tried on; None: what the model was converted with.

    Returns:
        A `torch.fx.GraphModule`.

    Raises:
        TaskError: there is no such task, or it is not finished.
        HatError: `model` is not a converted model, or does not accept the inputs.
    """
    if not isinstance(model, HatModel):
        raise HatError(f"expected a converted model, not {type(model).__name__}: call hatify.hatify on it first")
    model.check_task(task)
    if task == model.active_task:
        raise TaskError(f"task {task} is open for training: call end_task() first")
    if task not in model.finished_tasks:
        raise TaskError(f"task {task} is not finished: train it and call end_task() first")
    model.put_right()
    device = model.task_state.scale.device
    if compact and device.type != "cpu":
        model = copy.deepcopy(model).cpu()
    inputs = arguments(model, example_inputs)
    with refusals_named(model, inputs), answering(model, task):
        inputs = _filling(model, inputs)
        plain = bake(model, task, positional(model.flat_graph, inputs))
        if compact:
            plain = _smaller(plain, inputs, task)
    lower(plain)
    return plain.module(f"Task{task}").to(device)


def _smaller(baked: Plain, inputs: Any, task: int) -> Plain:
    """The network without the features that are off; or as it is, with a warning, if that computes something else."""
    net = baked.module("Baked")
    sizes, free = accepted_sizes(net, (baked.graph,), inputs)
    sensible = [given for given in sizes[1:] if _is_finite(net(*positional(baked.graph, given)))]
    try:
        return cut(baked, [sizes[0], *sensible], free)
    except CannotCut as refused:
        message = f"task {task} stays at full size: without the features that are off, {refused} would be another one"
        warnings.warn(message, HatWarning, stacklevel=3)
        return baked


def _is_finite(outputs: Any) -> bool:
    """Whether there are numbers to compare, as a variance of one position is none."""
    return all(bool(t.isfinite().all()) for t in tree_leaves(outputs) if isinstance(t, Tensor))


class _Fullness(fx.Interpreter):
    """Finds out whether inputs are taken, and whether they leave something empty (``h[:, 5:]`` of five positions)."""

    def of(self, inputs: Any) -> bool | None:
        """True if every tensor holds something, False if one is empty, None if the inputs are refused."""
        self.full = True
        try:
            self.run(*positional(self.graph, inputs))
        except Exception:  # whatever an operation raises that cannot do with such sizes
            return None
        return self.full

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.full &= all(t.numel() > 0 for t in tree_leaves(value) if isinstance(t, Tensor))
        return value


def _filling(model: HatModel, inputs: Any) -> Any:
    """The inputs, or larger ones of which nothing is empty."""
    fullness = _Fullness(children_of(model), graph=model.flat_graph)
    if fullness.of(inputs) is not False:
        return inputs
    others = other_sizes(lambda given: fullness.of(given) is not None, inputs)
    return next((other for other in others if fullness.of(other)), inputs)
