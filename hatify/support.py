"""The support analysis: run a graph on example inputs, and propagate support labels beside the values."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hatify.agreement import agree_on_masks, agree_on_reads, agree_on_tables
from hatify.answers import asks
from hatify.asking import buffers_restored, in_evaluation
from hatify.classify import CHOSEN, Classification, is_altered
from hatify.errors import ConversionError
from hatify.free import Free, Watching
from hatify.labels import FIRST_RAW, ON, LabelSpace, unexpanded
from hatify.ops import Trait, operation_of
from hatify.ops.modules import module_labels
from hatify.ops.movement import found_to_move
from hatify.ops.registry import Call, Findings, Labels, Masked, constant_labels, like_input, scalar_label
from hatify.ops.weighted import weighted
from hatify.policy import SHARING, Policy
from hatify.singular import endangered
from hatify.sizes import other_sizes


class SupportInterpreter(fx.Interpreter):
    """Executes `graph` and computes the support labels of every value.

    Args:
        net: the network the graph was traced from.
        graph: one of its graphs.
        classification: the policy of each module with parameters or buffers.
        space: where leaves and couplings are recorded.
        findings: where reads and masks are recorded.
        mask_inputs: mask the features of floating-point inputs.
        unsure: nodes that get no mask, since other sizes would need other ones.
        shrunk: whether the graph is going to be run on inputs smaller than the example's.

    Example:
        >>> space, findings = LabelSpace(couple=True), Findings()
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> graph = fx.Tracer().trace(net)
        >>> policies = {"0": Policy.SHARED, "2": Policy.HEAD}
        >>> _ = SupportInterpreter(net, graph, classification, space, findings).run(torch.randn(2, 4))
        >>> [(node.name, masked.labels.tolist()) for node, (masked,) in findings.asked.items()]
        [('_0', [2, 3, 4])]
    """

    def __init__(
        self,
        net: nn.Module,
        graph: fx.Graph,
        classification: Classification,
        space: LabelSpace,
        findings: Findings,
        mask_inputs: bool = False,
        unsure: Container[fx.Node] = (),
        shrunk: bool = False,
    ) -> None:
        super().__init__(net, graph=graph)
        self.unsure, self.shrunk = unsure, shrunk
        self.mask_inputs = mask_inputs
        self.classification, self.modules = classification, classification.modules
        #: Parameters whose entries have no labels.
        self.unlabelled = {*classification.connecting, *classification.tensors}
        self.never_masked, steep = endangered(net, graph, self.modules)
        findings.steep |= steep
        self.space = space
        self.findings = findings
        self.labels: dict[fx.Node, Labels] = {}
        #: Nodes whose labels hold leaves of raw parameters.
        self.raw: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        versions = {node: self.env[node]._version for node in n.all_input_nodes if isinstance(self.env[node], Tensor)}
        numbers = torch.get_rng_state()
        out = super().run_node(n)
        if isinstance(out, nn.Parameter) or not torch.equal(numbers, torch.get_rng_state()):
            self.findings.unsteady.add(n)
        self.labels[n] = self._labels(n, out)
        if isinstance(out, Tensor):
            self.findings.shapes.setdefault(n, []).append(out.shape)
        if (n.op == "get_attr" or not self.raw.isdisjoint(n.all_input_nodes)) and _holds_raw(self.labels[n]):
            self.raw.add(n)
        for node, version in versions.items():
            if self.env[node]._version != version:
                self._written(node, n)
        for node in self.user_to_last_uses.get(n, []):
            self.labels.pop(node, None)
        return out

    def _labels(self, node: fx.Node, out: Any) -> Labels:
        if node.op == "placeholder":
            return self._input_labels(node, out) if self.mask_inputs else constant_labels(out, ON)
        if node.op == "get_attr":
            name, is_raw = str(node.target), isinstance(out, nn.Parameter) and out.is_floating_point()
            has_leaves = is_raw and name not in self.findings.whole and name not in self.unlabelled
            return self.space.raw_leaves(name, out.shape) if has_leaves else constant_labels(out, ON)
        if node.op == "output":
            self._note_seen(node)
            return None
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        call = Call(
            node,
            args,
            kwargs,
            out,
            module,
            self.space,
            self.findings,
            self._labels_of,
            self.env.__getitem__,
            node in self.never_masked,
            node in self.unsure,
            self.shrunk,
        )
        if asks(node):
            return None
        if not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            self._note_seen(node)
            return None
        layer = self.classification.layers.get(node)
        policy = None if layer is None else self.classification.policy_of(layer)
        if layer is not None and policy in (*SHARING, Policy.HEAD):
            self._note_seen(node)
            return weighted(call, layer, policy)
        if module is not None and str(node.target) in self.modules:
            self._note_seen(node)
            return module_labels(call, self.modules[str(node.target)][0])
        known = call.operation = None if module is not None and is_altered(module) else operation_of(node, module)
        moved = found_to_move(call) if known is None and not call.is_empty else None
        if moved is not None:
            return moved
        if not call.has_trait(Trait.MOVES):
            self._note_seen(node)
        if call.is_empty:
            return _unseen(call)
        return like_input(call) if known is None else known.labels(call)

    def _input_labels(self, node: fx.Node, value: Any) -> Labels:
        """Leaves for the features of an input, with a mask; ON for what is no batch of real features."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
            return constant_labels(value, ON)
        name = str(node.target)
        if name in self.modules or any(name == parameter for parameter, _ in self.module.named_parameters()):
            raise ConversionError(
                f"the input {name!r} has the name of a layer, so their masks would be confused; rename one"
            )
        dim = self._feature_dim(node, value) % value.ndim
        if dim in self.findings.free.dims(node):
            return constant_labels(value, ON)  # there may be more of them, or fewer
        leaves = self.space.feature_leaves(name, value.shape[dim])
        self.findings.asked.setdefault(node, []).append(Masked(leaves, dim, value.ndim, True))
        return leaves.view([-1 if d == dim else 1 for d in range(value.ndim)]).expand(value.shape)

    def _feature_dim(self, node: fx.Node, value: Tensor) -> int:
        """The dimension of an input that the first weighted layer to read it contracts, else the usual one."""
        for user in node.users:
            layer = self.classification.layers.get(user)
            if layer is not None and layer.input is node:
                return next(iter(layer.connection.input), -1)
        return 1 if value.ndim > 3 else -1

    def _labels_of(self, argument: Any) -> Labels:
        """Labels of a graph's argument: a node, a number, or a container of these."""
        if isinstance(argument, fx.Node):
            labels = self.labels.get(argument)
            if labels is None and isinstance(self.env.get(argument), (bool, int, float)):
                return torch.tensor(ON)  # a size, say, which other inputs make another one
            return labels
        if isinstance(argument, (tuple, list)):
            return tuple(self._labels_of(a) for a in argument)
        if isinstance(argument, (bool, int, float)):
            return scalar_label(argument)
        return None

    def _written(self, node: fx.Node, writer: fx.Node) -> None:
        """`writer` changed the value of `node` in place, and with it every other value in the same memory."""
        if node.op == "get_attr" and getattr(self.env[node], "requires_grad", False):
            raise ConversionError(
                f"{node.target}: forward writes to this parameter in place ({writer.target}), and tracing does not "
                "record torch.no_grad; write to a buffer, to its detach(), or keep that module whole with policies="
                "{name: 'per_task'}"
            )
        for name, tensor in (*self.module.named_buffers(), *self.module.named_parameters()):
            if _share_memory(tensor, self.env[node]):
                self.findings.moving.add(name)
        result, own = self.labels[writer], self.labels.get(node)
        for other, value in self.env.items():
            if any(isinstance(t, Tensor) and _share_memory(t, self.env[node]) for t in tree_leaves(value)):
                self.labels[other] = constant_labels(value, ON)
        # A mask is put behind the writer, so the value that was written to itself stays unmasked.
        masked = writer in self.findings.asked
        if not masked and isinstance(result, Tensor) and isinstance(own, Tensor) and result.shape == own.shape:
            self.labels[node] = result

    def _note_seen(self, node: fx.Node) -> None:
        """Note which entries of raw parameters `node`, which does not only move them, computes something from."""
        for source in self.raw.intersection(node.all_input_nodes):
            for labels in tree_leaves(self.labels.get(source)):
                if isinstance(labels, Tensor):
                    found = unexpanded(labels).unique()
                    self.findings.seen.append(found[found >= FIRST_RAW])


def _holds_raw(labels: Labels) -> bool:
    return any(
        isinstance(t, Tensor) and t.numel() and bool((unexpanded(t) >= FIRST_RAW).any()) for t in tree_leaves(labels)
    )


def _unseen(call: Call) -> Labels:
    """Labels where something that goes in is empty at this size (``h[:, 5:]`` of five positions), but not at others.

    What it would add is unknown; a mask behind the operation keeps it to the features that the rest has.
    """
    if not call.has_trait(Trait.MOVES) or not isinstance(call.out, Tensor) or not call.out.numel():
        return call.all_on()
    assert call.operation is not None
    return call.mask(call.operation.labels(call))


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def accepted_sizes(net: nn.Module, graphs: tuple[fx.Graph, ...], example_inputs: Any) -> tuple[list[Any], Free]:
    """The example inputs, and the same at other sizes that the network takes; and what is free in its graphs."""
    free = Free()

    def is_accepted(inputs: Any) -> bool:
        watching = [Watching(net, graph) for graph in graphs]
        try:
            for run in watching:
                run.run(*positional(run.graph, inputs))
        except Exception:  # whatever an operation raises that cannot do with such sizes
            return False
        for run in watching:
            free.learn(run.seen)
            names = (str(node.target) for node in run.graph.nodes if node.op == "placeholder")
            free.learn_inputs(dict(zip(names, positional(run.graph, inputs), strict=False)))
        return True

    with in_evaluation(net), buffers_restored(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
        is_accepted(example_inputs)
        return [example_inputs, *other_sizes(is_accepted, example_inputs)], free


def analyse(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    sizes: Sequence[Any],
    free: Free,
    classification: Classification,
    couple: bool,
    mask_inputs: bool = False,
) -> tuple[LabelSpace, Findings]:
    """Run every graph of `net` in evaluation mode, on inputs of several `sizes`, and collect what the analysis finds.

    `free` is what differs between sizes. Where they disagree, there is no mask, and what was to be masked counts as
    ON. Buffers are restored.
    """
    unsure: set[fx.Node] = set()
    whole: frozenset[str] = frozenset()
    while True:
        space, findings = LabelSpace(couple), Findings(free, whole=whole)
        with in_evaluation(net), buffers_restored(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for inputs in sizes:
                shrunk = _elements(inputs) < _elements(sizes[0])
                for graph in graphs:
                    SupportInterpreter(net, graph, classification, space, findings, mask_inputs, unsure, shrunk).run(
                        *positional(graph, inputs)
                    )
        classes = space.classes()
        agree_on_reads(findings, classes)
        disagreeing = agree_on_masks(findings, classes)
        partly_read = agree_on_tables(space, findings, classes)
        if not disagreeing and not partly_read:
            return space, findings
        unsure |= disagreeing
        whole |= partly_read


def _elements(inputs: Any) -> int:
    return sum(t.numel() for t in tree_leaves(inputs) if isinstance(t, Tensor))


#: More features than attention has heads are worth a mask.
MANY_HEADS = 64


def only_weighing(space: LabelSpace, findings: Findings, classification: Classification) -> list[str]:
    """Masked layers whose features end in the weights with which others are summed, and are read by no layer.

    Such features are attention's heads, mixed by talking-heads attention or biased by a position network. A head that
    is off weighs all positions alike, so that its queries and keys would be locked for nothing, and there are few heads
    to choose from.
    """
    if not findings.weighing:
        return []
    classes = space.classes()

    def found(labels: Iterable[Tensor]) -> Tensor:
        different = set().union(*(unexpanded(one).unique().tolist() for one in labels))
        leaves = sorted(set().union(*(space.members(label) for label in different)))
        return classes.of(torch.tensor(leaves, dtype=torch.int64)).unique()

    weighing = found(findings.weighing)
    reads = found(label for labels in findings.reads.values() for label in labels)
    only = weighing[~torch.isin(weighing, reads) & (weighing > ON)]
    policies = {**classification.modules, **classification.functions}
    return [
        owner
        for owner, leaves in space.features.items()
        if owner in policies
        and policies[owner][0] in (Policy.SHARED, Policy.ROW)
        and policies[owner][1] != CHOSEN
        and leaves.count <= MANY_HEADS
        and torch.isin(classes.of(torch.arange(leaves.first, leaves.first + leaves.count)), only).all()
    ]


def positional(graph: fx.Graph, example_inputs: tuple[Any, ...] | dict[str, Any]) -> tuple[Any, ...]:
    """Example inputs in the order of the graph's placeholders, defaults filled in."""
    names = [(node.target, node.args) for node in graph.nodes if node.op == "placeholder"]
    if isinstance(example_inputs, dict):
        return tuple(example_inputs.get(str(name), default[0] if default else None) for name, default in names)
    rest = names[len(example_inputs) :]
    return (*example_inputs, *(default[0] if default else None for _, default in rest))
