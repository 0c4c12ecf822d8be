"""Which features a task's network can do without: kept indices along every axis of every value.

An index is kept where an output needs it: at first nothing is, then what is needed is followed through the graph until
nothing changes. A contraction needs the indices at which its operands may be non-zero for the task, so what is left out
is what contributes nothing. Operations that are not known here need everything.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from hatify.answers import asks
from hatify.axes import Axis, Dims, Grouped, Relation, any_but
from hatify.classify import Classification, is_plain
from hatify.free import Free
from hatify.labels import ON, ZERO, LabelSpace, unexpanded
from hatify.model import HatModel
from hatify.nn.functional import by_mode, masked, masked_off, view_along
from hatify.nn.layers import HatLayer, family_of
from hatify.nn.norms import FEATURE_DIMS, NORMS, is_known, zero_at_zero
from hatify.nn.per_task import PerTaskNorm, PerTaskTensor
from hatify.nn.state import STATE, TaskState
from hatify.ops import OPERATIONS, Call, Findings, Labels, constant_labels, movement, operation_of
from hatify.rewrite import keeps_features_apart
from hatify.support import SupportInterpreter
from hatify.trace import reads_training_flag


class Removal(SupportInterpreter):
    """Runs the evaluation graph of a converted model, whose task is set, and finds out which indices can go.

    Args:
        children: what the model holds (`children_of`), on the CPU and in evaluation mode.
        graph: the model's.
        modules: the task's plain modules, by path.
        frozen: nodes whose inputs and outputs keep everything.
        compact: whether anything may go at all.
        free: the sizes that the network leaves free.

    Attributes:
        axes: of each node's output, in the structure of that output.
        attributes: of each parameter or buffer that the graph reads.
        layers: of each module that can be cut, its input (None for lookups) and output axes.
        norms: of each normalisation that can be cut, the axes of its parameters.
        masks: the mask of each node that applies one.
        dtypes: of each node's output, where that is a tensor.
        passed: calls of modules that do nothing in evaluation mode.
    """

    def __init__(
        self,
        children: nn.Module,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        frozen: set[fx.Node],
        compact: bool,
        free: Free,
    ) -> None:
        nothing = Classification({}, frozenset())
        super().__init__(children, graph, nothing, LabelSpace(couple=True), Findings(free))
        self.plain, self.frozen, self.compact = modules, frozen, compact
        self.axes: dict[fx.Node, Any] = {}
        self.attributes: dict[str, Dims] = {}
        self.layers: dict[str, tuple[Axis | None, Axis]] = {}
        self.norms: dict[str, Dims] = {}
        self.masks: dict[fx.Node, Tensor] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.passed: set[fx.Node] = set()
        self.relations: list[Relation] = []

    def find(self, *inputs: Any) -> Removal:
        """Run the graph on example inputs and settle what is kept."""
        self.run(*inputs)
        found = tree_leaves([*self.axes.values(), *self.attributes.values()])
        axes = [axis for dims in found if isinstance(dims, Dims) for axis in dims]
        axes += [a for pair in self.layers.values() for a in pair if a is not None]
        changed = True
        while changed:
            while any([relation.grow() for relation in self.relations]):
                pass
            empty = [axis for axis in axes if not axis.kept.any() and axis.kept.numel()]
            changed = any([axis.keep(torch.arange(axis.kept.numel()) == 0) for axis in empty])
        return self

    # Support ---------------------------------------------------------------------------------------------------------

    def _labels(self, node: fx.Node, out: Any) -> Labels:
        """Labels are reduced to two here: ZERO, and what may be non-zero for the task."""
        labels = self._task_labels(node, out)
        self.axes[node] = tree_map(lambda t: Dims(map(Axis, t.shape)) if isinstance(t, Tensor) else None, out)
        if isinstance(out, Tensor):
            self.dtypes[node] = out.dtype
        self._relate(node, out)
        return labels

    def _task_labels(self, node: fx.Node, out: Any) -> Labels:
        if node.op == "get_attr":
            return constant_labels(out, ON)
        mask = self._mask_of(node)
        if mask is not None:
            self.masks[node] = mask
        if node.target in (masked, masked_off):
            assert mask is not None
            view = view_along(mask, node.args[2])  # type: ignore[arg-type]
            return torch.where(view != 0, self._labels_of(node.args[0]), ZERO).expand(out.shape)
        if node.op != "call_module":
            return super()._labels(node, out)
        owner = self.fetch_attr(str(node.target))
        if isinstance(owner, (TaskState, PerTaskTensor)):
            return constant_labels(out, ON)
        module = self.plain[str(node.target)]
        if mask is not None and (layer_family(module) is not None or zero_at_zero(module)):
            dim = feature_dim(module, out.ndim, mask)
            view = mask.view(-1, *(1,) * (out.ndim - 1 - dim))
            return torch.where(view != 0, ON, ZERO).expand(out.shape)
        if layer_family(module) is not None or isinstance(owner, PerTaskNorm) or type(module) not in OPERATIONS:
            return constant_labels(out, ON)
        return super()._labels(node, out)

    def _mask_of(self, node: fx.Node) -> Tensor | None:
        if node.target in (masked, masked_off):
            return self.env[node.args[1]]  # type: ignore[index]
        mask = node.kwargs.get("mask") if node.op == "call_module" else None
        return self.env[mask] if isinstance(mask, fx.Node) and is_mask(mask) else None

    # Axes ------------------------------------------------------------------------------------------------------------

    def _relate(self, node: fx.Node, out: Any) -> None:
        known = self._known(node, out)
        if not known or not self.compact or node in self.frozen:
            for dims in tree_leaves([self.axes[node], *(self.axes[n] for n in node.all_input_nodes)]):
                if isinstance(dims, Dims):
                    dims.keep()

    def _known(self, node: fx.Node, out: Any) -> bool:
        """Relate the axes around a node; False where that is not possible."""
        if node.op in ("placeholder", "output"):
            return False
        if node.op == "get_attr":
            if isinstance(out, Tensor):
                self.axes[node] = self.attributes.setdefault(str(node.target), self.axes[node])
            return True
        if node.target is operator.getitem and not isinstance(self.env[node.args[0]], Tensor):  # type: ignore[index]
            if isinstance(node.args[1], fx.Node):
                return False  # which one it takes may depend on a size
            self.axes[node] = _item(self.axes[node.args[0]], node.args[1])  # type: ignore[index]
            return True
        if node.target in (masked, masked_off):
            return self.elementwise([self.axes[node], self.axes[node.args[0]]])  # type: ignore[index]
        if not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            of_tensors = any(isinstance(self.env[n], Tensor) for n in node.all_input_nodes)
            return asks(node) or node.target is by_mode or not of_tensors
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = Call(node, args, kwargs, out, None, self.space, self.findings, self._labels_of)
        call.operation = operation_of(node)
        if node.op == "call_module":
            owner = self.fetch_attr(str(node.target))
            if isinstance(owner, (TaskState, PerTaskTensor)):
                if isinstance(owner, PerTaskTensor):
                    self.axes[node] = self.attributes.setdefault(str(node.target), self.axes[node])
                return True
            return self._module(replace(call, module=self.plain[str(node.target)]))
        if call.operation is None:
            return isinstance(movement.found_to_move(call), Tensor) and movement.moved(self, call)
        return call.operation.cut is not None and call.operation.cut(self, call)

    def dims(self, argument: Any) -> Any:
        """The axes of a graph's argument, in the structure of its value; None for what is no node."""
        return self.axes.get(argument) if isinstance(argument, fx.Node) else None

    def elementwise(self, values: list[Any]) -> bool:
        """Dimensions are aligned at the last one; those of size 1 are spread."""
        tensors = [dims for dims in tree_leaves(values) if isinstance(dims, Dims)]
        for d in range(1, max(map(len, tensors)) + 1):
            axes = [dims[-d] for dims in tensors if len(dims) >= d and dims[-d].kept.numel() != 1]
            for axis in axes[1:]:
                axes[0].join(axis)
        return True

    # Contractions ----------------------------------------------------------------------------------------------------

    def contraction(self, operands: list[tuple[Any, str]], out: str, call: Call) -> bool:
        """Axes by letters: equal ones are one axis; a letter missing in the output is summed over."""
        axes: dict[str, Axis] = {}
        needed: dict[str, Tensor] = {}
        for node, letters in operands:
            labels = self._labels_of(node)
            for d, (letter, axis) in enumerate(zip(letters, self.dims(node), strict=True)):
                if axis.kept.numel() == 1:
                    continue
                axes.setdefault(letter, axis).join(axis)
                nonzero = may_be_nonzero(labels, d)
                needed[letter] = needed[letter] & nonzero if letter in needed else nonzero
        for letter, axis in zip(out, self.axes[call.node], strict=True):
            if letter in axes:
                axes[letter].join(axis)
        for letter, axis in axes.items():
            if letter not in out:
                axis.keep(needed[letter])
        return True

    # Modules ---------------------------------------------------------------------------------------------------------

    def _module(self, call: Call) -> bool:
        module: Any = call.module
        path, mask = str(call.node.target), self.masks.get(call.node)
        x = call.given(0, "x" if "x" in call.node.kwargs else "input")
        if not isinstance(self.dims(x), Dims):
            return False
        if self._passes(module, x, call.out):
            self.axes[call.node] = self.dims(x)
            self.passed.add(call.node)
            return True
        if layer_family(module) is not None:
            return self._layer(path, module, x, self.axes[call.node])
        if is_known(module):
            return self._norm(path, module, x, self.axes[call.node], mask)
        if type(module) is nn.PReLU:
            if module.num_parameters > 1:
                self.norms.setdefault(path, Dims([self.dims(x)[1]]))[0].join(self.dims(x)[1])
            return self.elementwise([self.dims(x), self.axes[call.node]])
        known = operation_of(call.node, module)
        return known is not None and known.cut is not None and known.cut(self, replace(call, operation=known))

    def _passes(self, module: nn.Module, x: fx.Node, out: Any) -> bool:
        """Whether a module passes its input on, as noise does in evaluation mode."""
        return out is self.env[x] and (type(module) is nn.Identity or reads_training_flag(module))

    def _layer(self, path: str, layer: Any, node: fx.Node, out: Dims) -> bool:
        family: Any = layer_family(layer)
        x = self.dims(node)
        read_dim, written_dim = family.dims(layer)
        kernel = len(getattr(layer, "kernel_size", ()))
        read, written = self.layers.setdefault(path, (None if read_dim is None else x[read_dim], out[written_dim]))
        written.join(out[written_dim])
        self.elementwise([Dims(out[: len(out) + written_dim]), Dims(x if read_dim is None else x[:read_dim])])
        for axis in (*x[len(x) - kernel :], *out[len(out) - kernel :]) if kernel else ():
            axis.keep()
        if read is not None:
            assert read_dim is not None
            read.join(x[read_dim])
            nonzero, groups = may_be_nonzero(self._labels_of(node), read_dim), getattr(layer, "groups", 1)
            if groups == 1:
                read.keep(nonzero)
            else:
                self.relations.append(Grouped(read, written, groups, nonzero))
        return True

    def _norm(self, path: str, norm: Any, node: fx.Node, out: Dims, mask: Tensor | None) -> bool:
        """Statistics need the features that the mask has on, and every position."""
        x = self.dims(node)
        self.elementwise([x, out])
        dims = FEATURE_DIMS[type(norm)](norm, len(x))
        feature = dims[0] if mask is None else feature_dim(norm, len(x), mask)
        own = self.norms.setdefault(path, Dims(x[d] for d in dims))
        for axis, d in zip(own, dims, strict=True):
            axis.join(x[d])
        if keeps_features_apart(norm):
            per_sample = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
            batch_statistics = getattr(norm, "running_mean", None) is None
            for axis in x[2:] if per_sample else (x[0], *x[2:]) if batch_statistics else ():
                axis.keep()
            return True
        groups = getattr(norm, "num_groups", 1)
        for d in (*dims, *(range(2, len(x)) if groups > 1 or NORMS[type(norm)].__name__ == "group_norm" else ())):
            if d != feature or mask is None:
                x[d].keep()
        if mask is not None:
            self.relations.append(Grouped(x[feature], x[feature], groups, mask != 0))
        return True


def children_of(model: HatModel) -> nn.Module:
    """A module with the model's children and parameters, that has no attributes of its own to hide them."""
    bare = nn.Module()
    vars(bare).update({table: vars(model)[table] for table in ("_modules", "_parameters", "_buffers", "training")})
    return bare


def layer_family(module: nn.Module) -> type[HatLayer] | None:
    """The family of a weighted layer that computes what torch's own layer does; None for any other module."""
    family = family_of(module)
    return family if family is not None and is_plain(module, family) else None


def is_mask(node: fx.Node) -> bool:
    """Whether a node of a converted model's graph looks a mask up."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op == "call_module" and source.target == STATE


def feature_dim(module: Any, ndim: int, mask: Tensor) -> int:
    """The dimension of the output of a mask-carrying layer or normalisation that its mask lies along."""
    family = layer_family(module)
    if family is not None:
        return ndim + family.dims(module)[1]
    dims = FEATURE_DIMS[type(module)](module, ndim)
    return dims[0] if len(dims) == 1 else dims[module.normalized_shape.index(mask.numel())]


def may_be_nonzero(labels: Tensor, dim: int) -> Tensor:
    """At which indices along `dim` some element may be non-zero, bool, shape (size,)."""
    small = unexpanded(labels) != ZERO
    return any_but(small, dim % labels.ndim).expand(labels.shape[dim])


def _item(container: Any, key: Any) -> Any:
    return container[key] if isinstance(container, (tuple, list, dict)) and not isinstance(key, fx.Node) else None
