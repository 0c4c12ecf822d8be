"""Which features a task's network can do without: kept indices along every axis of every value.

An index is kept where an output needs it: at first nothing is, then what is needed is followed through the graph until
nothing changes. A contraction needs the indices at which its operands may be non-zero for the task, so what is left out
is what contributes nothing. Operations that are not known here need everything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from hatify.answers import asks
from hatify.axes import Axis, Dims, Grouped, Moved, Relation, any_but
from hatify.classify import Classification, is_plain
from hatify.labels import ON, ZERO, LabelSpace, compact
from hatify.model import HatModel
from hatify.nn.functional import by_mode, masked, masked_off, view_along
from hatify.nn.layers import HatLayer, family_of
from hatify.nn.norms import FEATURE_DIMS, NORMS, is_known, zero_at_zero
from hatify.nn.per_task import PerTaskNorm, PerTaskTensor
from hatify.nn.state import STATE, TaskState
from hatify.rewrite import keeps_features_apart
from hatify.rules import RULES, Call, Findings, Labels, constant_labels, contraction, movement, pointwise, reduction
from hatify.support import SupportInterpreter
from hatify.trace import reads_training_flag

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class Removal(SupportInterpreter):
    """Runs the evaluation graph of a converted model, whose task is set, and finds out which indices can go.

    Args:
        children: what the model holds (`children_of`), on the CPU and in evaluation mode.
        graph: the model's.
        modules: the task's plain modules, by path.
        frozen: nodes whose inputs and outputs keep everything.
        compact: whether anything may go at all.

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
        self, children: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], frozen: set[fx.Node], compact: bool
    ) -> None:
        nothing = Classification({}, frozenset())
        super().__init__(children, graph, nothing, LabelSpace(couple=True), Findings())
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
        if layer_family(module) is not None or isinstance(owner, PerTaskNorm) or type(module) not in RULES:
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
            self.axes[node] = _item(self.axes[node.args[0]], node.args[1])  # type: ignore[index]
            return True
        if node.target in (masked, masked_off):
            return self._elementwise([self.axes[node], self.axes[node.args[0]]])  # type: ignore[index]
        if not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            of_tensors = any(isinstance(self.env[n], Tensor) for n in node.all_input_nodes)
            return asks(node) or node.target is by_mode or not of_tensors
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = Call(node, args, kwargs, out, None, self.space, self.findings, self._labels_of)
        if node.op == "call_module":
            owner = self.fetch_attr(str(node.target))
            if isinstance(owner, (TaskState, PerTaskTensor)):
                if isinstance(owner, PerTaskTensor):
                    self.axes[node] = self.attributes.setdefault(str(node.target), self.axes[node])
                return True
            return self._module(replace(call, module=self.plain[str(node.target)]))
        rule = RULES.get(node.target)
        if rule is None and isinstance(movement.found_to_move(call), Tensor):
            rule = movement.run_on_labels
        return rule is not None and self._function(call, rule)

    def _dims(self, argument: Any) -> Any:
        return self.axes.get(argument) if isinstance(argument, fx.Node) else None

    def _function(self, call: Call, rule: Callable[[Call], Labels]) -> bool:
        out = self.axes[call.node]
        name = str(getattr(call.node.target, "__name__", call.node.target))
        if call.node.target in (F.normalize, F.local_response_norm):
            return False
        if rule in _ELEMENTWISE or (rule is movement.zeros and name.endswith(("_like", "_"))):
            return self._elementwise([out, *(self._dims(n) for n in call.node.all_input_nodes)])
        if call.node.target in _CONCATENATIONS:
            return self._concatenation(call)
        if rule in _MOVEMENTS:
            return self._movement(call, rule)
        handler = {
            reduction.spatial: self._spatial,
            reduction.reduce: self._reduction,
            reduction.mixing: self._mixing,
            contraction.matmul: self._matmul,
            contraction.attention: self._attention,
            contraction.einsum: self._einsum,
            contraction.functional_layer: self._functional_layer,
        }.get(rule)
        return handler is not None and handler(call)

    def _elementwise(self, values: list[Any]) -> bool:
        """Dimensions are aligned at the last one; those of size 1 are spread."""
        tensors = [dims for dims in tree_leaves(values) if isinstance(dims, Dims)]
        for d in range(1, max(map(len, tensors)) + 1):
            axes = [dims[-d] for dims in tensors if len(dims) >= d and dims[-d].kept.numel() != 1]
            for axis in axes[1:]:
                axes[0].join(axis)
        return True

    # Movement --------------------------------------------------------------------------------------------------------

    def _movement(self, call: Call, rule: Callable[[Call], Labels]) -> bool:
        """Run the operation on the indices of the elements, one dimension at a time."""
        source = call.node.args[0] if call.node.args else call.node.kwargs.get("input")
        dims, value = self._dims(source), self.env.get(source)  # type: ignore[arg-type]
        if not isinstance(dims, Dims) or value is None or movement.has_computed_indices(call):
            return False
        for other in call.node.all_input_nodes:
            for indices in tree_leaves(self.axes[other] if other is not source else None):
                if isinstance(indices, Dims):
                    indices.keep()
        outs = [d for d in tree_leaves(self.axes[call.node]) if isinstance(d, Dims)]
        if call.is_empty or any(isinstance(t, Tensor) and not t.numel() for t in tree_leaves(call.out)):
            return False  # at other sizes there may be something
        sources: list[list[tuple[Axis, Tensor]]] = [[] for _ in outs]
        for d, axis in enumerate(dims):
            size = value.shape[d]
            if size == 1:
                continue
            index = torch.arange(1, size + 1).view(-1, *(1,) * (value.ndim - 1 - d)).expand(value.shape)
            moved = tree_leaves(rule(replace(call, labels_of=lambda _, index=index: index)))  # type: ignore[misc]
            for out, found, leaf in zip(outs, sources, moved, strict=True):
                if leaf.shape != torch.Size(a.kept.numel() for a in out):
                    return False
                found.append((axis, _settled(leaf)))
        for out, found in zip(outs, sources, strict=True):
            self._moved(found, out)
        return True

    def _moved(self, sources: list[tuple[Axis, Tensor]], out: Dims) -> None:
        """Join axes that only changed places; relate the others, those together that meet along a dimension."""
        rest: list[tuple[set[int], list[tuple[Axis, Tensor]]]] = []
        for axis, index in sources:
            varying = {d for d, size in enumerate(index.shape) if size > 1}
            if not varying:
                axis.keep(torch.arange(1, axis.kept.numel() + 1) == index.flatten())
            elif len(varying) == 1 and torch.equal(index.flatten(), torch.arange(1, axis.kept.numel() + 1)):
                axis.join(out[varying.pop()])
            else:
                meeting = [r for r in rest if r[0] & varying]
                rest = [r for r in rest if not r[0] & varying]
                members = [pair for _, pairs in meeting for pair in pairs]
                rest.append((varying.union(*(r[0] for r in meeting)), [*members, (axis, index)]))
        self.relations += [Moved(members, out) for _, members in rest]

    def _concatenation(self, call: Call) -> bool:
        parts = [self._dims(n) for n in call.given(0, "tensors")]
        out, dim = self.axes[call.node], call.argument(1, "dim", 0)
        if any(not isinstance(p, Dims) or len(p) != len(out) for p in parts) or not isinstance(dim, int):
            return False
        dim, start = dim % len(out), 0
        for part in parts:
            size = part[dim].kept.numel()
            index = torch.zeros(out[dim].kept.numel(), dtype=torch.int64)
            index[start : start + size] = torch.arange(1, size + 1)
            if size:
                self.relations.append(Moved([(part[dim], index)], Dims([out[dim]])))
            start += size
            self._elementwise([Dims(a for d, a in enumerate(dims) if d != dim) for dims in (part, out)])
        return True

    # Reductions ------------------------------------------------------------------------------------------------------

    def _spatial(self, call: Call) -> bool:
        """Pooling and resampling need every position."""
        named = str(getattr(call.node.target, "__name__", type(call.module).__name__ if call.module else ""))
        x = self._dims(call.given(0, "input"))
        pools = "pool" in named.lower() and named[-2:-1].isdigit()
        positions = int(named[-2]) if pools else len(x) - 2
        for out in tree_leaves(self.axes[call.node]):
            for d, axis in enumerate(out):
                if d < len(out) - positions:
                    axis.join(x[d])
                else:
                    axis.keep()
                    x[d].keep()
        return True

    def _reduction(self, call: Call) -> bool:
        if isinstance(call.argument(1, "other"), Tensor):
            return self._elementwise([self.axes[call.node], *(self._dims(n) for n in call.node.all_input_nodes)])
        x = self._dims(call.given(0, "input"))
        reduced = reduction._dims(call.argument(1, "dim"), len(x))
        kept = Dims(a for d, a in enumerate(x) if d not in reduced)
        for d in reduced:
            x[d].keep()
        for out in tree_leaves(self.axes[call.node]):
            left = out if len(out) == len(kept) else Dims(a for d, a in enumerate(out) if d not in reduced)
            if len(left) != len(kept):
                return False
            self._elementwise([left, kept])
        return True

    def _mixing(self, call: Call) -> bool:
        dim = call.argument(1, "dim", getattr(call.module, "dim", None))
        x, out = self._dims(call.given(0, "input")), self.axes[call.node]
        if not isinstance(dim, int):
            return False
        x[dim].keep()
        return self._elementwise([x, out])

    # Contractions ----------------------------------------------------------------------------------------------------

    def _contraction(self, operands: list[tuple[Any, str]], out: str, call: Call) -> bool:
        """Axes by letters: equal ones are one axis; a letter missing in the output is summed over."""
        axes: dict[str, Axis] = {}
        needed: dict[str, Tensor] = {}
        for node, letters in operands:
            labels = self._labels_of(node)
            for d, (letter, axis) in enumerate(zip(letters, self._dims(node), strict=True)):
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

    def _matmul(self, call: Call) -> bool:
        a, b = call.given(0, "input"), call.given(1, "mat2" if call.given(1, "other") is None else "other")
        ndims = [len(self._dims(n)) for n in (a, b)]
        if min(ndims) < 2:
            return False
        batch = _LETTERS[: max(ndims) - 2]
        first, second = (batch[max(ndims) - n :] for n in ndims)
        return self._contraction([(a, first + "XY"), (b, second + "YZ")], batch + "XZ", call)

    def _attention(self, call: Call) -> bool:
        """softmax(q kᵀ + mask) v: every key is needed."""
        q, k, v, mask = (call.given(i, name) for i, name in enumerate(("query", "key", "value", "attn_mask")))
        ndims = {len(self._dims(n)) for n in (q, k, v)}
        if call.kwargs.get("enable_gqa") or len(ndims) > 1:
            return False
        batch = _LETTERS[: ndims.pop() - 2]
        self._dims(k)[-2].keep()
        if isinstance(mask, fx.Node):
            self._elementwise([self._dims(mask), Dims([*self._dims(q)[:-1], self._dims(k)[-2]])])
        return self._contraction([(q, batch + "XY"), (k, batch + "JY")], batch + "XZ", call) and self._contraction(
            [(v, batch + "JZ")], batch + "XZ", call
        )

    def _einsum(self, call: Call) -> bool:
        equation, *operands = call.node.args
        if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
            operands = list(operands[0])
        if not isinstance(equation, str) or "." in equation or "->" not in equation:
            return False
        inputs, out = equation.replace(" ", "").split("->")
        return self._contraction(list(zip(operands, inputs.split(","), strict=True)), out, call)

    def _functional_layer(self, call: Call) -> bool:
        x, weight, bias = (call.given(i, name) for i, name in enumerate(("input", "weight", "bias")))
        convolves = "conv" in str(call.node.target)
        if convolves and call.argument(6, "groups", 1) != 1:
            return False
        out, read, written = self.axes[call.node], self._dims(x), self._dims(weight)
        spatial = len(written) - 2
        for axis in (*written[2:], *(a for dims in (read, out) for a in dims[len(dims) - spatial :])):
            axis.keep()
        if isinstance(bias, fx.Node):
            self._dims(bias)[0].join(written[0])
        batch = _LETTERS[: len(out) - spatial - 1]
        positions, edges, taps = ("".join(chr(ord(c) + d) for d in range(spatial)) for c in "mru")
        return self._contraction([(x, batch + "X" + positions), (weight, "ZX" + taps)], batch + "Z" + edges, call)

    # Modules ---------------------------------------------------------------------------------------------------------

    def _module(self, call: Call) -> bool:
        module: Any = call.module
        path, mask = str(call.node.target), self.masks.get(call.node)
        x = call.given(0, "x" if "x" in call.node.kwargs else "input")
        if not isinstance(self._dims(x), Dims):
            return False
        if self._passes(module, x, call.out):
            self.axes[call.node] = self._dims(x)
            self.passed.add(call.node)
            return True
        if layer_family(module) is not None:
            return self._layer(path, module, x, self.axes[call.node])
        if is_known(module):
            return self._norm(path, module, x, self.axes[call.node], mask)
        if type(module) is nn.PReLU:
            if module.num_parameters > 1:
                self.norms.setdefault(path, Dims([self._dims(x)[1]]))[0].join(self._dims(x)[1])
            return self._elementwise([self._dims(x), self.axes[call.node]])
        rule = RULES.get(type(module))
        return rule is not None and not isinstance(module, nn.LocalResponseNorm) and self._function(call, rule)

    def _passes(self, module: nn.Module, x: fx.Node, out: Any) -> bool:
        """Whether a module passes its input on, as noise does in evaluation mode."""
        return out is self.env[x] and (type(module) is nn.Identity or reads_training_flag(module))

    def _layer(self, path: str, layer: Any, node: fx.Node, out: Dims) -> bool:
        family: Any = layer_family(layer)
        x = self._dims(node)
        read_dim, written_dim = family.dims(layer)
        kernel = len(getattr(layer, "kernel_size", ()))
        read, written = self.layers.setdefault(path, (None if read_dim is None else x[read_dim], out[written_dim]))
        written.join(out[written_dim])
        self._elementwise([Dims(out[: len(out) + written_dim]), Dims(x if read_dim is None else x[:read_dim])])
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
        x = self._dims(node)
        self._elementwise([x, out])
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


_LETTERS = "abcdefghijkl"
_ELEMENTWISE = {
    pointwise.zero_preserving,
    pointwise.bounded_at_zero,
    pointwise.clamp,
    pointwise.power,
    pointwise.divide,
    pointwise.add,
    pointwise.multiply,
    pointwise.where,
    pointwise.masked_fill,
    pointwise.blend,
    movement.cast,
}
_MOVEMENTS = {movement.run_on_labels, movement.item, movement.pad, movement.attribute}


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
    small = compact(labels) != ZERO
    return any_but(small, dim % labels.ndim).expand(labels.shape[dim])


def _item(container: Any, key: Any) -> Any:
    return container[key] if isinstance(container, (tuple, list, dict)) and not isinstance(key, fx.Node) else None


def _settled(index: Tensor) -> Tensor:
    """`index` with every dimension along which it is constant, but for zeros, reduced to size 1."""
    index = compact(index)
    for d, size in enumerate(index.shape):
        if size > 1 and bool((index == 0).any()):
            high = index.amax(d, keepdim=True)
            if bool(((index == high) | (index == 0)).all()):
                index = high
    return index
