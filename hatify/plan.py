"""The plan of a conversion: a policy for every parameter and buffer, a mask for every feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.classify import Classification
from hatify.errors import ConversionError
from hatify.labels import ON, ZERO, Classes, LabelSpace
from hatify.nn.layers import Entries, family_of
from hatify.policy import Policy
from hatify.rules import Findings


@dataclass(frozen=True)
class Entry:
    """One line of the census: a parameter or buffer of the original network, and what happens to it."""

    name: str
    kind: str  # "parameter" or "buffer"
    policy: Policy
    shape: tuple[int, ...]
    reason: str


class Census(tuple[Entry, ...]):
    """Every parameter and buffer of the original network with its policy; prints as a table."""

    def __str__(self) -> str:
        width = max((len(e.name) for e in self), default=4)
        lines = [f"{e.name:<{width}}  {e.kind:<9}  {e.policy:<9}  {e.shape!s:<18}  {e.reason}" for e in self]
        return "\n".join([*lines, "", self.summary()])

    def summary(self) -> str:
        """Elements per policy, in one line."""
        counts: Counter[str] = Counter()
        for entry in self:
            counts[str(entry.policy)] += torch.Size(entry.shape).numel()
        return ", ".join(f"{policy}: {count:,}" for policy, count in counts.most_common())


@dataclass(frozen=True)
class Layout:
    """Where each mask is in the flat vector of all slots.

    Attributes:
        groups: {layer or raw parameter: its range of slots}, without gaps; Equation 5 sums over these.
        indices: masks that are no group: {name: slots (features, K)}; a feature is on where one of its K slots is.
            Slot ``num_slots`` is always on.
    """

    groups: dict[str, tuple[int, int]]
    indices: dict[str, Tensor]

    @property
    def num_slots(self) -> int:
        """How many features are masked separately."""
        return max((stop for _, stop in self.groups.values()), default=0)


@dataclass(frozen=True)
class Use:
    """One way a shared parameter is used: the slots each entry writes and reads, broadcastable to (*shape, K)."""

    written: Tensor
    read: Tensor | None


@dataclass(frozen=True)
class MaskedNode:
    """A node whose output is masked: by which mask, along which of its dimensions (None: element by element)."""

    mask: str
    dim: int | None
    ndim: int


@dataclass
class Plan:
    """Everything the rewrite needs to know."""

    census: Census
    layout: Layout
    nodes: dict[fx.Node, MaskedNode]
    modules: dict[str, Policy]
    tensors: dict[str, Policy]
    uses: dict[str, list[Use]]
    #: Mask of each masked layer or raw parameter, for `HatModel.masks`.
    owners: dict[str, str] = field(default_factory=dict)


class Slots:
    """Turns labels into slots and hands out mask names."""

    def __init__(self, space: LabelSpace, classes: Classes) -> None:
        self.space = space
        self.classes = classes
        self.groups: dict[str, tuple[int, int]] = {}
        self.indices: dict[str, Tensor] = {}
        self.slot_of = torch.full((classes.features,), -1)
        start = 0
        for owner, leaves in space.features.items():
            roots = classes.of(torch.arange(leaves.first, leaves.first + leaves.count))
            own = torch.unique(roots[self.slot_of[roots] < 0])
            self.slot_of[own] = torch.arange(start, start + own.numel())
            if own.numel():
                self.groups[owner] = (start, start + own.numel())
                start += own.numel()
        self.count = start

    def of(self, labels: Tensor) -> Tensor:
        """Slots (*labels.shape, K): `count` for what is always on, and (harmlessly) for what is always zero."""
        roots = self.classes.of(labels.clamp(min=ZERO))
        slots = torch.where(roots > ON, self.slot_of[roots.clamp(max=self.classes.features - 1)], self.count)
        sets, position = labels[labels < ZERO].unique(return_inverse=True)
        rows = [self._members(label) for label in sets.tolist()]
        width = max(map(len, rows), default=1)
        slots = slots.unsqueeze(-1).repeat(*(1,) * labels.ndim, width)
        if rows:
            slots[labels < ZERO] = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows])[position]
        return slots

    def _members(self, label: int) -> list[int]:
        """The slots of a set of leaves."""
        members = self.of(torch.tensor(sorted(self.space.members(label))))
        return [self.count] if (members == self.count).any() else members.unique().tolist()

    def name(self, owner: str, slots: Tensor) -> str | None:
        """The name of the mask with these slots (features, K): a group's, or a new one; None if it is always on."""
        if bool((slots == self.count).any(1).all()):
            return None
        if slots.shape[1] == 1:
            flat = slots[:, 0]
            for group, (start, stop) in self.groups.items():
                if flat.numel() == stop - start and torch.equal(flat, torch.arange(start, stop)):
                    return group
        for known, index in self.indices.items():
            if index.shape == slots.shape and torch.equal(index, slots):
                return known
        name, suffix = owner, 1
        while name in self.groups or name in self.indices:
            suffix += 1
            name = f"{owner}#{suffix}"
        self.indices[name] = slots
        return name


def make_plan(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    classification: Classification,
    space: LabelSpace,
    findings: Findings,
) -> Plan:
    """Assign every parameter and buffer of `net` one policy, and every masked node its mask.

    Raises:
        ConversionError: no policy claims some parameter or buffer.
    """
    slots = Slots(space, space.classes())
    policies = classification.modules
    modules = {path: policy for path, (policy, _) in policies.items()}
    nodes, owners = {}, {}
    for graph in graphs:
        for node in graph.nodes:
            if node in findings.masks:
                vector, dim, ndim = findings.masks[node]
                owner = str(node.target) if node.op == "call_module" else node.name
                name = slots.name(owner, slots.of(vector))
                if name is not None:
                    nodes[node] = MaskedNode(name, dim, ndim)
                    if node.op == "call_module" and modules.get(owner) in (Policy.SHARED, Policy.ROW):
                        owners[owner] = name
    read_raw = {str(n.target) for g in graphs for n in g.nodes if n.op == "get_attr"}
    uses: dict[str, list[Use]] = {}
    tensors: dict[str, Policy] = {}
    entries = list(_entries(net, policies, read_raw, slots, findings, uses, tensors, nodes, owners, graphs))
    layout = Layout(slots.groups, slots.indices)
    return Plan(Census(entries), layout, nodes, modules, tensors, uses, owners)


def _entries(
    net: nn.Module,
    policies: Mapping[str, tuple[Policy, str]],
    read_raw: set[str],
    slots: Slots,
    findings: Findings,
    uses: dict[str, list[Use]],
    tensors: dict[str, Policy],
    nodes: dict[fx.Node, MaskedNode],
    owners: dict[str, str],
    graphs: tuple[fx.Graph, ...],
) -> Iterator[Entry]:
    """The census, line by line; fills `uses`, `tensors`, and the masks of raw parameters."""
    names = canonical_names(net)
    for path, (policy, _) in policies.items():
        if policy in (Policy.SHARED, Policy.ROW, Policy.UNMASKED):
            for name, use in _layer_uses(net.get_submodule(path), path, policy, slots, findings):
                uses.setdefault(names[name], []).append(use)
    for name, value in (
        *net.named_parameters(remove_duplicate=False),
        *net.named_buffers(remove_duplicate=False),
    ):
        kind = "parameter" if isinstance(value, nn.Parameter) else "buffer"
        path, (policy, reason) = _claim(name, policies)
        first = names[name]
        if first != name:
            policy = tensors.get(first, policy)
            reason = f"the same tensor as {first}"
        elif name in read_raw and kind == "parameter":
            policy, reason = _raw_policy(name, value, policy, reason, slots, findings, uses, nodes, owners, graphs)
        elif name in read_raw:
            moving = name in findings.moving
            policy = Policy.PER_TASK if moving else Policy.CONSTANT
            reason = "written to by the forward pass" if moving else "only read"
        elif policy in (Policy.SHARED, Policy.ROW, Policy.UNMASKED) and kind == "buffer":
            policy, reason = Policy.CONSTANT, "only read"
        tensors[first] = policy
        yield Entry(name, kind, policy, tuple(value.shape), reason)


def canonical_names(net: nn.Module) -> dict[str, str]:
    """The first name of every parameter and buffer, by each of its names."""
    first: dict[int, str] = {}
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(value), name) for name, value in named}


def _claim(name: str, policies: Mapping[str, tuple[Policy, str]]) -> tuple[str, tuple[Policy, str]]:
    """The module that a parameter or buffer belongs to, among those with a policy."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in policies:
            return path, policies[path]
    return "", (Policy.UNUSED, "not read by the forward pass")


def _layer_uses(
    layer: nn.Module, path: str, policy: Policy, slots: Slots, findings: Findings
) -> Iterator[tuple[str, Use]]:
    """How the entries of a weighted layer's parameters connect features, once for every call."""
    family = family_of(layer)
    assert family is not None
    leaves = slots.space.features.get(path)
    if policy is Policy.UNMASKED or leaves is None:
        written = torch.full((family.features(layer), 1), slots.count)
    else:
        written = slots.of(torch.arange(leaves.first, leaves.first + leaves.count))
    reads: list[Tensor | None] = [slots.of(labels) for labels in findings.reads.get(path, [])] or [None]
    for read in reads:
        if policy is Policy.ROW:
            entries: Entries = {
                name: (written.view(-1, *(1,) * (p.ndim - 1), written.shape[1]), None)
                for name, p in layer.named_parameters()
            }
        else:
            entries = family.entries(layer, written, read)
            entries = {name: pair for name, pair in entries.items() if getattr(layer, name) is not None}
        for name, (writes, reading) in entries.items():
            yield f"{path}.{name}" if path else name, Use(writes, reading)


def _raw_policy(
    name: str,
    value: Tensor,
    policy: Policy,
    reason: str,
    slots: Slots,
    findings: Findings,
    uses: dict[str, list[Use]],
    nodes: dict[fx.Node, MaskedNode],
    owners: dict[str, str],
    graphs: tuple[fx.Graph, ...],
) -> tuple[Policy, str]:
    """The policy of a parameter that the graph reads directly; plans its mask at the source."""
    if policy is Policy.HEAD:
        return policy, reason
    functional = slots.space.features.get(name)
    if name in findings.reads:
        if functional is None:
            written = torch.full((value.shape[0], 1), slots.count)
        else:
            written = slots.of(torch.arange(functional.first, functional.first + functional.count))
        written = written.view(-1, *(1,) * (value.ndim - 1), written.shape[1])
        for labels in findings.reads[name]:
            read = slots.of(labels)
            uses.setdefault(name, []).append(Use(written, read.view(1, read.shape[0], *(1,) * (value.ndim - 2), -1)))
        shared = Policy.UNMASKED if functional is None else Policy.SHARED
        return (policy, reason) if policy is not Policy.UNUSED else (shared, "weight of a layer written as a function")
    leaves = slots.space.raw.get(name)
    if leaves is None:
        return policy, reason
    index = _compact(slots.of(torch.arange(leaves.first, leaves.first + leaves.count).view(value.shape)))
    featured = bool((index != slots.count).any())
    owned = name in uses
    if featured:
        _mask_source(name, value, index, slots, nodes, owners, graphs)
    if not owned and (not featured or name in findings.opaque):
        return Policy.PER_TASK, "acts as a whole" if featured else "not tied to features"
    uses.setdefault(name, []).append(Use(index, None))
    return (policy, reason) if owned else (Policy.MASKED, "features that meet those of a layer")


def _mask_source(
    name: str,
    value: Tensor,
    index: Tensor,
    slots: Slots,
    nodes: dict[fx.Node, MaskedNode],
    owners: dict[str, str],
    graphs: tuple[fx.Graph, ...],
) -> None:
    """Mask a raw parameter where it is read, along the dimension its features lie in."""
    dims = [d for d, n in enumerate(index.shape[:-1]) if n > 1]
    dim = None if len(dims) > 1 else (dims[0] if dims else value.ndim - 1)
    if dim is None:
        index = index.expand(*value.shape, -1)
    mask = slots.name(name, index.reshape(-1, index.shape[-1]))
    assert mask is not None
    owners[name] = mask
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "get_attr" and node.target == name:
                nodes[node] = MaskedNode(mask, dim, value.ndim)


def _compact(index: Tensor) -> Tensor:
    """`index` (*shape, K) with every dimension of the shape along which it is constant reduced to size 1."""
    for d in range(index.ndim - 1):
        first = index.narrow(d, 0, 1) if index.shape[d] else index
        if bool((index == first).all()):
            index = first
    return index


def check_complete(net: nn.Module, plan: Plan, graphs: tuple[fx.Graph, ...]) -> None:
    """Every parameter and buffer the graphs can reach has a policy other than UNUSED.

    Raises:
        ConversionError: names the one that has not.
    """
    called = {str(n.target) for g in graphs for n in g.nodes if n.op in ("call_module", "get_attr")}
    for entry in plan.census:
        reached = entry.name in called or any(entry.name.startswith(f"{path}.") for path in called)
        if entry.policy is Policy.UNUSED and reached:
            owner: Any = entry.name.rpartition(".")[0]
            raise ConversionError(
                f"{entry.name}: no policy claims this {entry.kind}; pass policies={{{owner!r}: 'per_task'}}"
            )
