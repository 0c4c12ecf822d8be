"""Where the values of a baked network are zero for good, and how their dimensions belong together."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.answers import asks
from hatify.axes import Axes, Kept, Moves, Names, any_but, everything, levelled
from hatify.classify import Classification
from hatify.extract.baking import MaskedNorm, layer_family, mask_dim
from hatify.extract.plain import MASK
from hatify.free import Free
from hatify.labels import ON, ZERO, LabelSpace, unexpanded
from hatify.nn.norms import FEATURE_DIMS, is_known, keeps_features_apart
from hatify.ops import OPERATIONS, Call, Findings, Labels, constant_labels, operation_of
from hatify.ops.movement import found_to_move, moved
from hatify.stepwise import tensors_in
from hatify.support import SupportInterpreter


class Zeros(SupportInterpreter):
    """Runs a baked network, and propagates support labels of two values: ZERO, and what may be non-zero.

    Attributes:
        nonzero: at which indices along each dimension something may be non-zero, of each tensor that a node makes.
        items: of nodes that take something out of a container, which of its tensors these are.
        axes: how the axes around each node belong together; None: nothing can be taken out of them.
    """

    def __init__(self, net: nn.Module, graph: fx.Graph, free: Free) -> None:
        super().__init__(net, graph, Classification({}), LabelSpace(couple=True), Findings(free))
        self.nonzero: dict[fx.Node, list[Kept]] = {}
        self.items: dict[fx.Node, list[int]] = {}
        self.axes: dict[fx.Node, Axes | Moves | None] = {}

    def _labels(self, node: fx.Node, out: Any) -> Labels:
        axes = self.axes[node] = self._axes(node, out)
        source = self.env.get(node.args[0]) if node.target is operator.getitem else None  # type: ignore[arg-type]
        if isinstance(source, (tuple, list, dict)) and tensors_in(source):
            places = {id(t): i for i, t in enumerate(tensors_in(source))}
            self.items[node] = [places[id(t)] for t in tensors_in(out)]
        labels = self._unmasked_labels(node, out)
        mask = node.meta.get(MASK)
        if mask is not None:
            if isinstance(axes, Axes) and axes.grouped and "written" in axes.grouped:
                # What a group has to keep, since others do, counts as more of the same.
                mask = levelled([mask.flatten()], axes.groups)[0].view(mask.shape)
            labels = torch.where(mask, labels, ZERO).expand(out.shape)
        self.nonzero[node] = [everything(t.shape) for t in tensors_in(out)]
        if isinstance(out, Tensor) and isinstance(labels, Tensor) and labels.shape == out.shape:
            self.nonzero[node] = [self._nonzero(node, labels)]
        return labels

    def _nonzero(self, node: fx.Node, labels: Tensor) -> Kept:
        free = self.findings.free.dims(node)
        return tuple(
            torch.ones(n, dtype=torch.bool) if d in free else may_be_nonzero(labels, d)
            for d, n in enumerate(labels.shape)
        )

    def _written(self, node: fx.Node, writer: fx.Node) -> None:
        """What was zero before, and is written to, may be non-zero for some of its readers."""
        super()._written(node, writer)
        for other, labels in self.labels.items():
            if other in self.nonzero and isinstance(labels, Tensor):
                (before,) = self.nonzero[other]
                self.nonzero[other] = [tuple(a | b for a, b in zip(before, self._nonzero(other, labels), strict=True))]

    def _unmasked_labels(self, node: fx.Node, out: Any) -> Labels:
        if node.op == "get_attr":
            return constant_labels(out, ON)
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            if type(module) not in OPERATIONS or layer_family(module) is not None:
                return constant_labels(out, ON)
        return super()._labels(node, out)

    def _axes(self, node: fx.Node, out: Any) -> Axes | Moves | None:
        if node.op not in ("call_module", "call_function", "call_method") or asks(node) or node in self.items:
            return None
        if not tensors_in(out):
            return None
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = Call(node, args, kwargs, out, module, self.space, self.findings, self._labels_of, self.env.__getitem__)
        if module is not None and (axes := _of_module(call)) is not None:
            return axes
        call.operation = operation_of(node, module)
        if call.operation is None:
            return moved(call) if isinstance(found_to_move(call), Tensor) else None
        return None if call.operation.cut is None else call.operation.cut(call)


def may_be_nonzero(labels: Tensor, dim: int) -> Tensor:
    """At which indices along `dim` some element may be non-zero, bool, shape (size,)."""
    small = unexpanded(labels) != ZERO
    return any_but(small, dim % labels.ndim).expand(labels.shape[dim])


def _of_module(call: Call) -> Axes | None:
    """The axes around a layer or normalisation; "read" and "written" are the features of a layer."""
    module: Any = call.module
    x = next(iter((*call.node.args, *call.node.kwargs.values())), None)
    value = call.value_of(x) if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(call.out, Tensor):
        return None
    assert isinstance(x, fx.Node)
    if layer_family(module) is not None:
        return _of_layer(call, module, x)
    norm, mask = (module.norm, module.mask) if isinstance(module, MaskedNorm) else (module, None)
    if is_known(norm):
        return _of_norm(call, norm, mask, x, value.ndim)
    if type(module) is nn.PReLU:
        return call.axes([(x, tuple(range(value.ndim)))], tuple(range(value.ndim)))
    return None


def _of_layer(call: Call, layer: Any, x: fx.Node) -> Axes | None:
    family: Any = layer_family(layer)
    read, _ = family.dims(layer)
    spatial = len(getattr(layer, "kernel_size", ()))
    lead: Names = tuple(range(call.out.ndim - 1 - spatial))
    positions, edges = (tuple(f"{kind}{d}" for d in range(spatial)) for kind in "xy")
    given = lead if read is None else (*lead, "read", *positions)
    groups = getattr(layer, "groups", 1)
    return call.axes(
        [(x, given)],
        (*lead, "written", *edges),
        whole=(*positions, *edges),
        grouped=("read", "written") if groups > 1 else (),
        groups=groups,
    )


def _of_norm(call: Call, norm: Any, mask: Tensor | None, x: fx.Node, ndim: int) -> Axes | None:
    """Statistics need the features that the mask has on, and every position."""
    dims, names = FEATURE_DIMS[type(norm)](norm, ndim), tuple(range(ndim))
    if keeps_features_apart(norm):
        per_sample = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
        batch_statistics = getattr(norm, "running_mean", None) is None
        whole = names[2:] if per_sample else (0, *names[2:]) if batch_statistics else ()
        return call.axes([(x, names)], names, filled=whole)
    groups = getattr(norm, "num_groups", 1)
    over = {*dims, *(range(2, ndim) if groups > 1 or hasattr(norm, "num_groups") else ())}
    feature = None if mask is None else mask_dim(norm, ndim, mask)
    needed = {} if mask is None else {feature: mask != 0}
    grouped = (feature,) if groups > 1 and mask is not None else ()
    return call.axes(
        [(x, names)], names, filled=over - {feature}, needed=needed, grouped=grouped, groups=groups if grouped else 1
    )
