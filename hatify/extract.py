"""One finished task as a plain network, without hatify."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hatify.asking import answering, arguments
from hatify.axes import Dims
from hatify.errors import HatError, TaskError
from hatify.examples import refusals_named
from hatify.free import Free
from hatify.model import HatModel
from hatify.ops import Trait, has_trait
from hatify.plain import Writer, plain_modules
from hatify.removal import Removal, children_of
from hatify.sizes import other_sizes
from hatify.support import accepted_sizes, positional

#: Largest difference that rounding explains in single precision, in units of the largest number in a value.
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
    model.check_task(task)
    if task == model.active_task:
        raise TaskError(f"task {task} is open for training: call end_task() first")
    if task not in model.finished_tasks:
        raise TaskError(f"task {task} is not finished: train it and call end_task() first")
    model.put_right()
    inputs, device = arguments(model, example_inputs), model.task_state.scale.device
    with refusals_named(model, inputs), answering(model, task):
        values = positional(model.flat_graph, _filling(model, inputs))
        modules = plain_modules(model, task)
        children = children_of(model if device.type == "cpu" else copy.deepcopy(model).cpu())
        frozen: set[fx.Node] = set()
        sizes, free = accepted_sizes(children, (model.flat_graph,), inputs) if compact else ([inputs], Free())
        while True:
            removal = Removal(children, model.flat_graph, modules, frozen, compact, free).find(
                *tree_map_only(Tensor, Tensor.cpu, values)
            )
            writer = Writer(model, modules, removal, task)
            plain = writer.write()
            refused = writer.refused | _Twins(writer, plain).compare(*values)
            if not refused and not _agree_at(sizes[1:], writer, plain):
                refused = _misplaced(writer, free) - frozen or set(model.flat_graph.nodes)
            if not refused:
                return plain
            everything = set(model.flat_graph.nodes)
            if not compact or frozen == everything:
                names = ", ".join(sorted(node.name for node in refused))
                raise HatError(f"task {task} cannot be written as a plain network: {names} would be computed otherwise")
            frozen = everything if refused <= frozen else frozen | refused


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


class _Twins(fx.Interpreter):
    """Runs the model's graph and the plain one side by side, and compares every value."""

    def __init__(self, writer: Writer, plain: fx.GraphModule) -> None:
        super().__init__(writer.children.module, graph=writer.model.flat_graph)
        self.writer = writer
        self.twin = fx.Interpreter(plain)
        self.last_uses = self.twin.user_to_last_uses
        self.different: set[fx.Node] = set()

    def compare(self, *inputs: Any) -> set[fx.Node]:
        """The nodes whose plain counterparts fail or compute something else."""
        self.twin.args_iter = iter(inputs)
        self.run(*inputs)
        return self.different

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        written = [node for node in self.writer.written[n] if not node._erased]
        for node in written:
            try:
                self.twin.env[node] = self.twin.run_node(node)
            except Exception:  # whatever an operation raises that cannot do without what was taken out
                self.different.add(n)
                break
        counterpart = self.writer.values[n]
        is_there = isinstance(counterpart, fx.Node) and not counterpart._erased
        if isinstance(value, Tensor) and is_there and n.op != "output":
            expected = _kept(value, self.writer.removal.axes[n])
            operands = [t for t in map(self.env.get, n.all_input_nodes) if isinstance(t, Tensor)]
            if not _agree(self.twin.env.get(counterpart), expected, operands):
                self.different.add(n)
                self.twin.env[counterpart] = expected
        for node in written:
            for done in self.last_uses.get(node, []):
                self.twin.env.pop(done, None)
        return value


def _agree_at(sizes: list[Any], writer: Writer, plain: fx.GraphModule) -> bool:
    """Whether `plain` answers as the model does at other sizes, too."""
    whole = fx.Interpreter(writer.children.module, graph=writer.model.flat_graph)
    for inputs in sizes:
        values = positional(writer.model.flat_graph, inputs)
        expected = tree_leaves(whole.run(*values))
        try:
            found = tree_leaves(plain(*values))
        except Exception:  # whatever an operation raises that cannot do without what was taken out
            return False
        if any(isinstance(e, Tensor) and not _agree(f, e, []) for f, e in zip(found, expected, strict=True)):
            return False
    return True


def _misplaced(writer: Writer, free: Free) -> set[fx.Node]:
    """Nodes around which indices were taken out that may be others at other sizes.

    Those that are cut along a dimension whose size is free; if there are none, all movements that are cut.
    """
    axes = writer.removal.axes
    dims = {node: found for node, found in axes.items() if isinstance(found, Dims)}
    sliding = {n for n, found in dims.items() if any(d < len(found) and found[d].cut for d in free.dims(n))}
    cut = {node for node, found in dims.items() if any(axis.cut for axis in found)}
    return sliding or {node for node in cut if has_trait(node, Trait.MOVES)}


def _kept(value: Tensor, dims: Dims) -> Tensor:
    for d, axis in enumerate(dims):
        if axis.cut:
            value = value.index_select(d, axis.index.to(value.device))
    return value


def _agree(found: Any, expected: Tensor, operands: list[Tensor]) -> bool:
    """Whether a value is what it should be, but for rounding: of itself, or of large operands that cancel."""
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return True
    rounding = max(ROUNDING, 10 * torch.finfo(expected.dtype).eps)
    largest = max(_largest(t) for t in (expected, *operands) if t.is_floating_point())
    if float((found - expected).abs().max()) <= rounding * largest:
        return True
    return torch.allclose(found, expected, rounding, rounding * largest, equal_nan=True)


def _largest(value: Tensor) -> float:
    """The largest finite number."""
    magnitude = value.abs()
    if not magnitude.isfinite().all():
        magnitude = magnitude[magnitude.isfinite()]
    return float(magnitude.max()) if magnitude.numel() else 0.0
