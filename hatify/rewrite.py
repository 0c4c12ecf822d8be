"""Graph surgery: turn a traced network into a mask-carrying one, following a plan."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from hatify.calls import CALLS
from hatify.classify import is_plain
from hatify.errors import ConversionError
from hatify.free import check_sizes
from hatify.nn.functional import masked, masked_off
from hatify.nn.layers import LAYERS, family_of
from hatify.nn.norms import keeps_features_apart, masked_norm, takes_inside, zero_at_zero
from hatify.nn.per_task import PerTask, PerTaskNorm, PerTaskTensor
from hatify.nn.state import STATE
from hatify.ops.normalization import as_module
from hatify.plan import MaskedNode, Plan
from hatify.policy import OWN, Policy


def rewrite_modules(
    net: nn.Module, plan: Plan, num_tasks: int, num_classes: Sequence[int] | None, on_base: bool
) -> None:
    """Swap the modules and tensors of `net`, in place: mask-carrying layers, copies per task, heads."""
    memos: list[dict[int, Any]] = [{} for _ in range(num_tasks - 1)]
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in net.modules():
        for name, child in owner._modules.items():
            places.setdefault(id(child), []).append((owner, name))
    for path, policy in plan.modules.items():
        module = net.get_submodule(path)
        if policy is Policy.NORM:
            replacement: PerTask = PerTaskNorm(module, memos)
        elif policy is Policy.PER_TASK or (policy is Policy.HEAD and num_classes is None):
            replacement = PerTask(module, memos)
        elif policy is Policy.HEAD:
            assert num_classes is not None
            replacement = heads_of_size(path, module, num_classes, on_base)
        else:
            continue
        replacement.train(module.training)
        for owner, name in places[id(module)]:
            owner._modules[name] = replacement
    for name, policy in plan.tensors.items():
        if policy in OWN and not _inside(name, plan):
            owner, attribute = parent(net, name)
            value = getattr(owner, attribute)
            delattr(owner, attribute)
            owner.add_module(attribute, PerTaskTensor(value, num_tasks))


def _inside(name: str, plan: Plan) -> bool:
    """Whether a parameter or buffer belongs to a module that has a policy of its own, as a whole."""
    return any(name.startswith(f"{path}.") for path in plan.modules)


def class_counts(num_tasks: int, num_classes: int | Iterable[int] | None) -> list[int] | None:
    """The number of classes of each of `num_tasks` tasks, or None.

    Raises:
        ValueError: there is not one positive integer for each.
    """
    if num_classes is None:
        return None
    classes = list(num_classes) if isinstance(num_classes, Iterable) else [num_classes] * num_tasks
    if len(classes) != num_tasks or not all(type(n) is int and n > 0 for n in classes):
        raise ValueError(f"num_classes must be a positive integer or {num_tasks} of them, not {num_classes!r}")
    return classes


@torch.no_grad()
def heads_of_size(path: str, head: nn.Module, num_classes: Sequence[int], on_base: bool) -> PerTask:
    """Freshly initialised heads like `head`, with one number of classes for each task.

    Behind a locked base (`on_base`) they begin at zero: features are good as they are, and what a random head makes of
    them would have to be unlearned first.
    """
    family = family_of(head)
    if family is None or not is_plain(head, family):
        raise ConversionError(
            f"{path}: cannot make a {type(head).__name__} with another number of classes; "
            "leave num_classes out, or name another layer with heads="
        )
    heads = PerTask(family.resized(head, num_classes[0]), [])
    heads.extend(family.resized(head, classes) for classes in num_classes[1:])
    for parameter in heads.parameters() if on_base else ():
        parameter.zero_()
    return heads


def rewrite_graph(net: nn.Module, graph: fx.Graph, plan: Plan, masked_nodes: dict[str, MaskedNode]) -> None:
    """Insert masks into `graph`, behind the nodes of these names; `net` holds the swapped modules.

    A layer's mask is left out where only normalisations follow that keep features apart and carry the same mask.
    """
    _check_sizes(graph, plan)
    _read_per_task_tensors(graph, plan)
    masks = _call_state(graph, plan)
    handles: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        planned = masked_nodes.get(node.name)
        if planned is None or _deferred(node, planned, net, plan, masked_nodes):
            continue
        if planned.mask not in handles:
            # Inputs come before anything that is computed.
            with graph.inserting_after(masks) if node.op == "placeholder" else graph.inserting_before(node):
                name = f"{planned.mask.replace('.', '_')}_mask"
                handles[planned.mask] = graph.create_node(
                    "call_function", operator.getitem, (masks, planned.mask), name=name
                )
        _apply(node, planned, handles[planned.mask], net, plan)
    graph.lint()


def _call_state(graph: fx.Graph, plan: Plan) -> fx.Node | None:
    """Call the task state once, ahead of everything else. Without masks it is still called, for its checks."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        return graph.create_node("call_module", STATE, name="masks")


def _check_sizes(graph: fx.Graph, plan: Plan) -> None:
    """Let inputs be refused for which the plan was not made."""
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in (n for n in graph.nodes if n.op == "placeholder" and str(n.target) in plan.fixed):
        with graph.inserting_before(first):
            name = str(node.target)
            graph.call_function(check_sizes, (node, name.lstrip("*"), plan.fixed[name]))


def _read_per_task_tensors(graph: fx.Graph, plan: Plan) -> None:
    for node in graph.nodes:
        if node.op == "get_attr" and plan.tensors.get(str(node.target)) in OWN:
            node.op, node.args = "call_module", ()


def _deferred(
    node: fx.Node, planned: MaskedNode, net: nn.Module, plan: Plan, masked_nodes: dict[str, MaskedNode]
) -> bool:
    """Whether the mask of a layer can wait for the normalisations that are its only users."""
    if node.op != "call_module" or plan.modules.get(str(node.target)) not in (Policy.SHARED, Policy.ROW):
        return False
    for user in node.users:
        if user.op != "call_module" or plan.modules.get(str(user.target)) is not Policy.NORM:
            return False
        own = masked_nodes.get(user.name)
        norm = net.get_submodule(str(user.target))[0]  # type: ignore[index]
        if (
            own is None
            or own.mask != planned.mask
            or not takes_inside(norm, own.dim, own.ndim)
            or not keeps_features_apart(norm)
        ):
            return False
    return bool(node.users)


def _apply(node: fx.Node, planned: MaskedNode, mask: fx.Node, net: nn.Module, plan: Plan) -> None:
    """Hand the mask to the module at `node` if that can use it, else multiply the output."""
    path = str(node.target)
    policy = plan.modules.get(path) if node.op == "call_module" else None
    if policy is Policy.SHARED and not planned.steep and type(net.get_submodule(path)) in {*LAYERS, *LAYERS.values()}:
        layer = net.get_submodule(path)
        if type(layer) in LAYERS:
            LAYERS[type(layer)].adopt(layer, path in plan.folded)
        node.kwargs = {**node.kwargs, "mask": mask}
        return
    if policy is Policy.NORM:
        norm = net.get_submodule(path)[0]  # type: ignore[index]
        if takes_inside(norm, planned.dim, planned.ndim):
            node.kwargs = {**node.kwargs, "mask": mask}
            if zero_at_zero(norm):
                return
    if planned.inside:
        kind, given = as_module(node, node.args, node.kwargs)  # type: ignore[misc]
        node.target, node.args = masked_norm, (given.pop("input"), kind, mask)
        node.kwargs = given
        return
    dim = planned.dim - planned.ndim if isinstance(planned.dim, int) else planned.dim
    graph = node.graph
    with graph.inserting_after(mask if node.op == "placeholder" else node):
        product = graph.call_function(masked_off if planned.steep else masked, (node, mask, dim))
    product.meta[CALLS] = node.meta.get(CALLS, ())
    node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)


def parent(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds `name`, and the last part of the name."""
    owner, _, attribute = name.rpartition(".")
    return net.get_submodule(owner), attribute
