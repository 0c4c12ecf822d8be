"""Choose the policy of every module with parameters or buffers, before the analysis runs."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from hatify.errors import ConversionError
from hatify.nn.layers import LAYERS, HatLayer, family_of
from hatify.nn.norms import is_known
from hatify.ops import Trait, has_trait, operation_of
from hatify.ops.normalization import own_tensors
from hatify.ops.weighted import WeightedCall, layers_of, readers
from hatify.policy import SELECTABLE, Policy

#: The reason for a policy that `policies=` names.
CHOSEN = "chosen by the user"


@dataclass(frozen=True)
class Classification:
    """Policies before the analysis.

    Attributes:
        modules: {path: (policy, reason)} for every called module with parameters or buffers.
        layers: the weighted layers that the graphs call.
        functions: the same as `modules`, by their owners, for layers written as functions.
        tensors: the same for parameters and buffers of functions of which each task has its own.
    """

    modules: dict[str, tuple[Policy, str]]
    layers: Mapping[fx.Node, WeightedCall] = field(default_factory=dict)
    functions: Mapping[str, tuple[Policy, str]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Policy, str]] = field(default_factory=dict)

    def policy_of(self, layer: WeightedCall) -> Policy:
        """The policy of a weighted layer."""
        return (self.functions if layer.owner in self.functions else self.modules)[layer.owner][0]

    @property
    def connecting(self) -> frozenset[str]:
        """The parameters by which functions connect features: their entries have no labels."""
        written = [layer for layer in self.layers.values() if layer.owner in self.functions]
        return frozenset(name for layer in written for name in (layer.weight, layer.bias) if name is not None)

    def per_task(self, owners: Container[str], reason: str) -> Classification:
        """The same, but for modules that get one copy per task, and functions that are no layers."""
        functions = {owner: policy for owner, policy in self.functions.items() if owner not in owners}
        layers = {n: x for n, x in self.layers.items() if x.owner in functions or x.owner not in self.functions}
        copied = {path: (Policy.PER_TASK, reason) for path in self.modules if path in owners}
        return replace(self, modules=self.modules | copied, layers=layers, functions=functions)


def classify(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    heads: str | Iterable[str] | None,
    overrides: Mapping[str, str],
) -> Classification:
    """The policy of each module called by `graphs` that has parameters or buffers, and why.

    Raises:
        ConversionError: `heads` or `overrides` name something that is not there or a policy that cannot hold.
    """
    called = {str(n.target): net.get_submodule(str(n.target)) for g in graphs for n in g.nodes if n.op == "call_module"}
    owning = {path: m for path, m in called.items() if _has_state(m) or (is_known(m) and not is_altered(m))}
    policies = {path: _by_type(m) for path, m in owning.items()}
    for path, override in overrides.items():
        policies.update(_override(path, override, called, owning))
    layers = {n: x for n, x in layers_of(net, graphs).items() if n.op != "call_module" or x.owner in owning}
    chosen = _heads(net, graphs, heads, owning, layers)
    for path in chosen & policies.keys() - overrides.keys():
        policies[path] = (Policy.HEAD, "output layer")
    _settle_ties(net, policies, graphs)
    return Classification(policies, layers, *_written_as_functions(net, graphs, layers, chosen, owning))


def _written_as_functions(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    layers: Mapping[fx.Node, WeightedCall],
    heads: set[str],
    owning: Mapping[str, nn.Module],
) -> tuple[dict[str, tuple[Policy, str]], dict[str, tuple[Policy, str]]]:
    """Policies of the layers that are written as functions, and of tensors of functions that each task has its own of.

    A tensor of which each task has its own must be read nowhere else, and belong to no module that is called.
    """
    read = readers(graphs)
    claimed = {id(t) for m in owning.values() for t in (*m.parameters(), *m.buffers())}
    functions: dict[str, tuple[Policy, str]] = {}
    tensors: dict[str, tuple[Policy, str]] = {}
    outputs = {n: layer for n, layer in layers.items() if n.op != "call_module" and layer.owner in heads}

    def is_own(name: str, nodes: Container[fx.Node]) -> bool:
        return all(node in nodes for node in read[name]) and id(_attribute(net, name)) not in claimed

    for node, layer in layers.items():
        if node.op != "call_module":
            functions[layer.owner] = (Policy.SHARED, "weight of a layer written as a function")
    for layer in outputs.values():
        own = is_own(layer.weight, outputs) and isinstance(_attribute(net, layer.weight), nn.Parameter)
        names = [layer.weight] if own else []
        names += [layer.bias] if layer.bias is not None and is_own(layer.bias, outputs) else []
        tensors |= dict.fromkeys(names, (Policy.HEAD, "output layer"))
        functions[layer.owner] = (Policy.HEAD if own else Policy.UNMASKED, "weight of an output layer")
    for node in (n for graph in graphs for n in graph.nodes):
        for name in own_tensors(node, net):
            norms = {user for user in read[name] if name in own_tensors(user, net)}
            if is_own(name, norms):
                kind = getattr(node.target, "__name__", node.target)
                tensors[name] = (Policy.NORM, f"{kind}: statistics and affine part of each task")
    return functions, tensors


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _by_type(module: nn.Module) -> tuple[Policy, str]:
    kind = type(module).__name__
    if is_known(module) and not is_altered(module):
        return Policy.NORM, f"{kind}: statistics and affine part of each task"
    if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        return Policy.PER_TASK, f"{kind}: a normalisation of its own kind"
    family = family_of(module)
    if family is None:
        return Policy.PER_TASK, f"{kind}: no rule for sharing it"
    if is_plain(module, family):
        return Policy.SHARED, kind
    if rows_are_independent(module, family):
        return Policy.ROW, f"{kind}: an output feature depends on its own row of the weights"
    return (
        Policy.PER_TASK,
        f"{kind}: an output feature depends on other rows of the weights, or on moving buffers",
    )


def is_plain(module: nn.Module, family: type[HatLayer]) -> bool:
    """Whether `module` computes just what its torch base does with its weight."""
    kind, base = type(module), family.base
    same = all(getattr(kind, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
    altered = is_altered(module) or hasattr(module, "parametrizations")
    own_weight = isinstance(module._parameters.get("weight"), nn.Parameter)
    renormalises = getattr(module, "max_norm", None) is not None
    known = same or (kind.__module__, kind.__qualname__) in PLAIN_SUBCLASSES
    return known and not altered and own_weight and not renormalises


def is_altered(module: nn.Module) -> bool:
    """Whether hooks or a replaced ``forward`` make `module` compute something other than its class does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


#: Subclasses with a ``forward`` of their own that only pads or casts around the ordinary layer.
PLAIN_SUBCLASSES = {("timm.layers.conv2d_same", "Conv2dSame"), ("timm.layers.linear", "Linear")}


@torch.no_grad()
def rows_are_independent(module: nn.Module, family: type[HatLayer]) -> bool:
    """Whether output feature o depends on row o of every parameter only, and no buffer moves in training.

    Found by experiment: half of the rows are replaced by noise, and the other features must come out bit for bit the
    same. On the meta device nothing can be tried, and the answer is no.
    """
    features, parameters = family.features(module), list(module.parameters())
    if any(p.is_meta or p.ndim == 0 or p.shape[0] != features for p in parameters):
        return False
    module = detached_copy(module)
    x = family.example_input(module)
    x = x.to(parameters[0]) if x.is_floating_point() else x.to(parameters[0].device)
    dim = family.dims(module)[1]
    with torch.random.fork_rng(devices=[]):
        before = [b.clone() for b in module.buffers()]
        module.train()(x)
        if not all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True)):
            return False
        module.eval()
        for parity in (0, 1):
            rows = torch.arange(features, device=x.device) % 2 == parity
            expected = module(x).movedim(dim, 0)[~rows]
            for p in module.parameters():
                p[rows] = torch.randn_like(p[rows])
            if not torch.equal(module(x).movedim(dim, 0)[~rows], expected):
                return False
    return True


def detached_copy(module: nn.Module) -> Any:
    """A deep copy, also of modules that keep a computed weight as an attribute (``torch.nn.utils.weight_norm``)."""
    return copy.deepcopy(module, computed_tensors(module))


def computed_tensors(module: nn.Module) -> dict[int, Any]:
    """A memo for a deep copy, with the values of tensors that modules keep and that torch refuses to copy."""
    values = (v for child in module.modules() for v in vars(child).values())
    return {id(v): v.detach().clone() for v in values if isinstance(v, Tensor) and not v.is_leaf}


def _override(
    path: str, override: str, called: Mapping[str, nn.Module], owning: Mapping[str, nn.Module]
) -> dict[str, tuple[Policy, str]]:
    selectable = ", ".join(repr(str(p)) for p in SELECTABLE)
    try:
        policy = Policy(override)
    except ValueError:
        raise ConversionError(f"policies[{path!r}]: unknown policy {override!r}; choose from {selectable}") from None
    if policy not in SELECTABLE:
        raise ConversionError(f"policies[{path!r}]: {override!r} cannot be chosen; choose from {selectable}")
    if path in called and path not in owning and policy is Policy.PER_TASK:
        return {}  # kept whole, but there is nothing to copy
    if path not in owning:
        known = ", ".join(sorted(owning)[:5])
        raise ConversionError(f"policies[{path!r}]: the graph calls no such module; it calls {known}, …")
    module, family = owning[path], family_of(owning[path])
    if policy in (Policy.SHARED, Policy.ROW, Policy.UNMASKED) and family is None:
        raise ConversionError(
            f"policies[{path!r}]: {type(module).__name__} has no features to mask; choose 'per_task' or 'head'"
        )
    if family is not None and policy in (Policy.SHARED, Policy.UNMASKED) and not is_plain(module, family):
        raise ConversionError(
            f"policies[{path!r}]: {type(module).__name__} is not a plain {family.base.__name__}, so single entries "
            "of its weight cannot be locked; choose 'row' or 'per_task'"
        )
    if policy is Policy.ROW and not rows_are_independent(module, family):  # type: ignore[arg-type]
        raise ConversionError(
            f"policies[{path!r}]: the output features of this {type(module).__name__} do not each depend on one row of "
            "its parameters only; choose 'shared' if it is plain, else 'per_task'"
        )
    return {path: (policy, CHOSEN)}


# Heads ---------------------------------------------------------------------------------------------------------------


def _heads(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    heads: str | Iterable[str] | None,
    owning: Mapping[str, nn.Module],
    layers: Mapping[fx.Node, WeightedCall],
) -> set[str]:
    """The owners of the output layers."""
    if heads is None:
        return set()
    if heads == "auto":
        return set().union(*(_output_layers(net, graph, owning, layers) for graph in graphs))
    names = {heads} if isinstance(heads, str) else set(heads)
    weights = {layer.owner for layer in layers.values()}
    for name in names:
        if name not in owning and name not in weights:
            known = ", ".join(sorted(owning)[-5:])
            raise ConversionError(
                f"heads: the graph calls no module {name!r} with parameters, and reads no such weight; "
                f"the last ones are {known}"
            )
    return names


def _output_layers(
    net: nn.Module, graph: fx.Graph, owning: Mapping[str, nn.Module], layers: Mapping[fx.Node, WeightedCall]
) -> set[str]:
    """Weighted layers that reach an output of `graph` without making features for another layer on the way."""
    (output,) = (n for n in graph.nodes if n.op == "output")
    feeding = _nodes_feeding_layers(graph, owning, layers)
    found: set[str] = set()
    for node in output.all_input_nodes:
        found |= _layers_behind(node, net, owning, layers, feeding) or set()
    return found


def _nodes_feeding_layers(
    graph: fx.Graph, owning: Mapping[str, nn.Module], layers: Mapping[fx.Node, WeightedCall]
) -> set[fx.Node]:
    """Nodes whose value some layer or module with parameters reads, directly or not."""
    feeding: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in feeding or node in layers or (node.op == "call_module" and node.target in owning):
            feeding.update(node.all_input_nodes)
    return feeding


def _layers_behind(
    node: fx.Node,
    net: nn.Module,
    owning: Mapping[str, nn.Module],
    layers: Mapping[fx.Node, WeightedCall],
    feeding: set[fx.Node],
) -> set[str] | None:
    """The output layers behind `node`, or None if anything else makes its features."""
    if node.op == "get_attr":
        return set()
    if node.op == "placeholder" or node in feeding:
        return None
    if node in layers or (node.op == "call_module" and node.target in owning):
        return {layers[node].owner} if node in layers else None
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        known = operation_of(node, module)
        allowed = (known is not None and Trait.AFTER_HEADS in known.traits) or not isinstance(module, tuple(LAYERS))
    else:
        allowed = has_trait(node, Trait.AFTER_HEADS)
    if not allowed:
        return None
    found: set[str] = set()
    for source in node.all_input_nodes:
        if _is_size(source):
            continue
        behind = _layers_behind(source, net, owning, layers, feeding)
        if behind is None:
            return None
        found |= behind
    return found


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a shape or a number computed from shapes."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(map(_is_size, inputs))


# Ties ----------------------------------------------------------------------------------------------------------------


def _settle_ties(net: nn.Module, policies: dict[str, tuple[Policy, str]], graphs: tuple[fx.Graph, ...]) -> None:
    """Give modules that share a parameter policies that can hold together.

    A shared output layer that is tied to another layer (an embedding) stays shared, without a mask. Any other module
    tied to one that has a copy per task gets a copy per task too.
    """
    read = {id(p) for g in graphs for n in g.nodes if n.op == "get_attr" for p in [_attribute(net, str(n.target))]}
    changed = True
    while changed:
        changed = False
        owners: dict[int, list[str]] = {}
        for path in policies:
            for parameter in net.get_submodule(path).parameters():
                owners.setdefault(id(parameter), []).append(path)
        for key, paths in owners.items():
            tied = len(paths) > 1 or key in read
            heads_first = sorted(paths, key=lambda path: policies[path][0] is not Policy.HEAD)
            for path in heads_first if tied else ():
                changed |= _settle(net, path, paths, policies, key in read)


def _settle(net: nn.Module, path: str, paths: list[str], policies: dict[str, tuple[Policy, str]], read: bool) -> bool:
    policy = policies[path][0]
    layer = net.get_submodule(path)
    family = family_of(layer)
    plain = family is not None and is_plain(layer, family)
    if policy is Policy.HEAD and plain:
        others = [policies[p][0] for p in paths if p != path]
        if not all(p is Policy.HEAD for p in others) or read:
            policies[path] = (Policy.UNMASKED, "output layer that shares its weight with another layer")
            return True
    separate = (Policy.PER_TASK, Policy.NORM, Policy.HEAD)
    if policy not in separate and any(policies[p][0] in separate for p in paths):
        policies[path] = (Policy.PER_TASK, "shares a parameter with a module that each task has its own of")
        return True
    if policy in separate and read:
        raise ConversionError(
            f"{path}: a parameter that each task has its own copy of is also read directly by another part of the "
            "network; keep both parts in one module and convert that with policies={name: 'per_task'}"
        )
    return False


def _attribute(net: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(net.get_submodule(owner), name)
