"""One finished task as a plain network, without hatify."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from hatify.axes import Dims, Removal
from hatify.errors import HatError, TaskError
from hatify.model import HatModel
from hatify.plain import Writer, plain_modules
from hatify.resize import CannotCut
from hatify.support import buffers_restored, positional

#: Largest difference that rounding explains, in units of the largest number in a value.
ROUNDING = 1e-3


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
        compact: take out the features that the task has off, wherever the graph allows it; elsewhere they stay as
            zeros. Outputs then differ by rounding. False: masks are multiplied into the weights, and the outputs are,
            bit for bit, those of ``model`` with that task set, in evaluation mode.
        example_inputs: what the network is tried on; None: what the model was converted with.

    Returns:
        A `torch.fx.GraphModule`.

    Raises:
        TaskError: there is no such task, or it is not finished.
        HatError: `model` is not a converted model, or does not accept the inputs.
    """
    if not isinstance(model, HatModel):
        raise HatError(f"expected a converted model, not {type(model).__name__}: call hatify.hatify on it first")
    model._check_task(task)
    if task == model.active_task:
        raise TaskError(f"task {task} is open for training: call end_task() first")
    if task not in model.finished_tasks:
        raise TaskError(f"task {task} is not finished: train it and call end_task() first")
    inputs = model.example_inputs if example_inputs is None else example_inputs
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    inputs = tree_map_only(Tensor, lambda t: t.to(model.task_state.scale.device), inputs)
    with _answering(model, task):
        values = positional(model.graph, inputs)
        modules = plain_modules(model, task)
        frozen: set[fx.Node] = set()
        while True:
            removal = Removal(model, modules, frozen, compact).find(*values)
            writer = Writer(model, modules, removal, task)
            try:
                plain = writer.write()
                _Twins(model, writer, plain, removal).run(*values)
            except CannotCut as refusal:
                if refusal.node in frozen or not compact:
                    raise HatError(f"task {task} cannot be extracted: {refusal}: {refusal.__cause__}") from refusal.__cause__
                frozen.add(refusal.node)
            else:
                return plain


class _Twins(fx.Interpreter):
    """Runs the model's graph and the plain one side by side, and compares every value.

    Raises:
        CannotCut: names the first node whose plain counterpart fails or computes something else.
    """

    def __init__(self, model: HatModel, writer: Writer, plain: fx.GraphModule, removal: Removal) -> None:
        super().__init__(removal.module, graph=model.graph)
        self.writer, self.removal = writer, removal
        self.twin = fx.Interpreter(plain)
        self.last_uses = self.twin.user_to_last_uses

    def run(self, *args: Any) -> Any:
        self.twin.args_iter = iter(args)
        with torch.no_grad():
            return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for node in self.writer.written[n]:
            if node._erased:
                continue
            try:
                self.twin.env[node] = self.twin.run_node(node)
            except Exception as error:
                raise CannotCut(n) from error
        counterpart = self.writer.values[n]
        if isinstance(value, Tensor) and isinstance(counterpart, fx.Node) and n.op != "output":
            found = self.twin.env.get(counterpart)
            if not isinstance(found, Tensor) or not _agree(found, value, self.removal.axes[n]):
                raise CannotCut(n)
        for node in self.writer.written[n]:
            for done in self.last_uses.get(node, []):
                self.twin.env.pop(done, None)
        return value


def _agree(found: Tensor, value: Tensor, dims: Dims) -> bool:
    """Whether a plain value is the kept part of the model's, but for rounding."""
    for d, axis in enumerate(dims):
        if axis.cut:
            value = value.index_select(d, axis.index.to(value.device))
    if found.shape != value.shape or found.dtype != value.dtype:
        return False
    if not value.is_floating_point() or not value.numel():
        return True
    finite = value[value.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(found, value, rtol=ROUNDING, atol=ROUNDING * scale, equal_nan=True)


@contextmanager
def _answering(model: HatModel, task: int) -> Iterator[None]:
    """Within the context, `task` answers in evaluation mode; afterwards everything is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with model.task(task), torch.no_grad(), torch.random.fork_rng(devices=[]), buffers_restored(model):
            yield
    finally:
        model.train(modes[model])
        for module, mode in modes.items():
            module.training = mode
