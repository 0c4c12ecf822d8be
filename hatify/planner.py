"""Make the plan of a conversion from what the analysis has found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.answers import asks
from hatify.census import Census, Entry
from hatify.classify import Classification
from hatify.errors import ConversionError
from hatify.labels import LabelSpace
from hatify.ops import Findings
from hatify.ops.weighted import WeightedCall, readers
from hatify.plan import GraphPlan, MaskedNode, Plan, outline
from hatify.policy import SHARING, Policy
from hatify.slots import Layout, Slots, Use


def make_plan(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    classification: Classification,
    space: LabelSpace,
    findings: Findings,
) -> Plan:
    """Assign every parameter and buffer of `net` one policy, and every masked node its mask.

    Raises:
        ConversionError: no policy claims some parameter or buffer that the graphs reach.
    """
    planner = _Planner(net, graphs, classification, space, findings)
    planner.plan_nodes()
    planner.plan_layers()
    planner.plan_census()
    plan = planner.plan()
    _check_complete(plan, graphs)
    return plan


class _Planner:
    """Collects what a plan is made of, step by step."""

    def __init__(
        self,
        net: nn.Module,
        graphs: tuple[fx.Graph, ...],
        classification: Classification,
        space: LabelSpace,
        findings: Findings,
    ) -> None:
        self.net, self.graphs, self.findings = net, graphs, findings
        self.classification, self.policies = classification, classification.modules
        self.slots = Slots(space, space.classes())
        self.census: list[Entry] = []
        self.nodes: dict[fx.Node, MaskedNode] = {}
        self.tensors: dict[str, Policy] = {}
        self.uses: dict[str, list[Use]] = {}
        self.owners: dict[str, str] = {}
        self.names, self.parameters = canonical_names(net), dict(net.named_parameters())
        self.readers = readers(graphs)
        self.read: dict[str, list[fx.Node]] = {}
        for node in (n for graph in graphs for n in graph.nodes if n.op == "get_attr"):
            self.read.setdefault(str(node.target), []).append(node)

    def plan_nodes(self) -> None:
        """Name the masks that the analysis asked for."""
        layers, policies = self.classification.layers, {**self.policies, **self.classification.functions}
        for node, (labels, dim, ndim, _) in self.findings.masks.items():
            owner = str(node.target) if node.op in ("call_module", "placeholder") else node.name
            owner = layers[node].owner if node in layers else owner
            mask = self.slots.name(owner, self.slots.of(labels))
            if mask is not None:
                steep, inside = node in self.findings.steep, node in self.findings.inside
                self.nodes[node] = MaskedNode(mask, dim, ndim, steep, inside)
                if node.op == "placeholder" or (owner in policies and policies[owner][0] in SHARING):
                    self.owners[owner] = mask

    def plan_layers(self) -> None:
        """Note what the parameters of weighted layers connect, once for every call."""
        calls: dict[str, list[WeightedCall]] = {}
        for layer in self.classification.layers.values():
            # A head that is a function may share its bias with others.
            if self.classification.policy_of(layer) in SHARING or layer.owner in self.classification.functions:
                calls.setdefault(layer.owner, []).append(layer)
        for owner, (layer, *others) in calls.items():
            written = self.slots.written_by(owner, layer.features)
            biases = dict.fromkeys(call.bias for call in (layer, *others))
            for labels in self.findings.reads.get(owner, [None]):
                if self.classification.policy_of(layer) is Policy.ROW:
                    for name, p in self.net.get_submodule(owner).named_parameters():
                        self._use(f"{owner}.{name}" if owner else name, Use(_rows(written, p.ndim), None))
                    continue
                read = None if labels is None else self.slots.of(labels)
                self._use(layer.weight, Use(*layer.connection.entries(layer.shape, written, read)))
                for bias in biases:
                    if bias is not None:
                        shape = self.parameters[self.names[bias]].shape
                        self._use(bias, Use(written.view(*shape, written.shape[1]), None))

    def plan_census(self) -> None:
        """Give every parameter and buffer its line, in the network's order; parameters first."""
        named = (*self.net.named_parameters(remove_duplicate=False), *self.net.named_buffers(remove_duplicate=False))
        for name, value in named:
            kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
            policy, reason = self._claim(name)
            first = self.names[name]
            if first != name:
                policy, reason = self.tensors[first], f"the same tensor as {first}"
            elif policy in SHARING and self._read_by_its_layer_alone(name):
                if kind == "buffer":
                    policy, reason = Policy.CONSTANT, "only read"
            elif name in self.classification.tensors:
                policy, reason = self.classification.tensors[name]
            elif name in self.read and kind == "parameter":
                policy, reason = self._raw_parameter(name, value, policy, reason)
            elif name in self.read:
                moving = name in self.findings.moving
                policy = Policy.PER_TASK if moving else Policy.CONSTANT
                reason = "written to by the forward pass" if moving else "only read"
            self.tensors[first] = policy
            self.census.append(Entry(name, kind, policy, tuple(value.shape), reason))

    def plan(self) -> Plan:
        """What has been collected."""
        return Plan(
            {path: policy for path, (policy, _) in self.policies.items()},
            self.tensors,
            Census(self.census),
            Layout(self.slots.groups, self.slots.indices),
            tuple(
                GraphPlan(outline(graph), {n.name: masked for n, masked in self.nodes.items() if n.graph is graph})
                for graph in self.graphs
            ),
            self.uses,
            self.owners,
            frozenset(path for path, on_weight in self.findings.fold.items() if on_weight),
            self.findings.free.fixed(),
        )

    def _claim(self, name: str) -> tuple[Policy, str]:
        """What the policies of modules say about a parameter or buffer."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in self.policies:
                return self.policies[path]
        return Policy.UNUSED, "not read by the forward pass"

    def _read_by_its_layer_alone(self, name: str) -> bool:
        return all(asks(user) for node in self.read.get(name, ()) for user in node.users)

    def _use(self, name: str, use: Use) -> None:
        # Nobody shares what each task has its own of, and nothing changes a constant.
        if self.names[name] in self.parameters and name not in self.classification.tensors:
            self.uses.setdefault(self.names[name], []).append(use)

    def _raw_parameter(self, name: str, value: Tensor, policy: Policy, reason: str) -> tuple[Policy, str]:
        """The policy of a parameter that a graph reads directly; plans its mask at the source."""
        if name in self.classification.connecting:
            return self._connecting(name, value, policy, reason)
        if name in self.findings.whole:
            if name not in self.uses:
                return Policy.PER_TASK, "the inputs tried read parts of it, which do not tell what the rest would meet"
            self._use(name, Use(torch.full((1,) * (value.ndim + 1), self.slots.count), None))
            return policy, reason
        leaves = self.slots.space.raw.get(name)
        if leaves is None:
            return policy, reason
        labels = self.findings.continued.get(name, leaves.all.view(value.shape))
        index = _compact(self.slots.of(labels))
        featured = bool((index != self.slots.count).any())
        owned = name in self.uses
        if featured:
            self._mask_source(name, value, index)
        if not owned and not featured:
            return Policy.PER_TASK, "not tied to features"
        if not owned and name in self.findings.opaque | self.findings.moving:
            return Policy.PER_TASK, "acts as a whole"
        self._use(name, Use(index, None))
        return (policy, reason) if owned else (Policy.MASKED, "features that meet those of a layer")

    def _connecting(self, name: str, value: Tensor, policy: Policy, reason: str) -> tuple[Policy, str]:
        """The policy of a weight or bias of layers written as functions; whatever else reads it needs all of it."""
        layers = self.classification.layers
        own = {node: layer for node, layer in layers.items() if name in (layer.weight, layer.bias)}
        if any(node not in own for node in self.readers[name]):
            self._use(name, Use(torch.full((1,) * (value.ndim + 1), self.slots.count), None))
        if policy is not Policy.UNUSED:
            return policy, reason
        functions = [self.classification.functions[x.owner] for n, x in own.items() if n.op != "call_module"]
        return min(functions, key=lambda found: (*SHARING, Policy.HEAD).index(found[0]))

    def _mask_source(self, name: str, value: Tensor, index: Tensor) -> None:
        """Mask a raw parameter where it is read, along the dimension its features lie in."""
        dims = [d for d, n in enumerate(index.shape[:-1]) if n > 1]
        dim: int | tuple[int, ...] = dims[0] if dims else value.ndim - 1
        if len(dims) > 1:
            dim, index = tuple(value.shape), index.expand(*value.shape, -1)
        mask = self.slots.name(name, index.reshape(-1, index.shape[-1]))
        assert mask is not None
        self.owners[name] = mask
        for node in self.read[name]:
            self.nodes[node] = MaskedNode(mask, dim, value.ndim)


def canonical_names(net: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by each of its names."""
    first: dict[int, str] = {}
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(value), name) for name, value in named}


def _rows(written: Tensor, ndim: int) -> Tensor:
    """Slots (features, K) as (features, 1, …, K), for a parameter with `ndim` dimensions."""
    return written.view(-1, *(1,) * (ndim - 1), written.shape[1])


def _compact(index: Tensor) -> Tensor:
    """`index` (*shape, K) with every dimension of the shape along which it is constant reduced to size 1."""
    for d in range(index.ndim - 1):
        first = index.narrow(d, 0, 1) if index.shape[d] else index
        if bool((index == first).all()):
            index = first
    return index


def _check_complete(plan: Plan, graphs: tuple[fx.Graph, ...]) -> None:
    """Every parameter and buffer that the graphs reach has a policy other than UNUSED."""
    called: set[Any] = {n.target for g in graphs for n in g.nodes if n.op in ("call_module", "get_attr")}
    for entry in plan.census:
        parts = entry.name.split(".")
        reached = any(".".join(parts[:n]) in called for n in range(1, len(parts) + 1))
        if entry.policy is Policy.UNUSED and reached:
            owner = entry.name.rpartition(".")[0]
            raise ConversionError(
                f"{entry.name}: no policy claims this {entry.kind}; pass policies={{{owner!r}: 'per_task'}}"
            )
