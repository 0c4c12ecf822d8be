"""The original's tree of modules: a flat graph becomes one that calls blocks, each of which is a graph of its own.

Analysis, rewriting and extraction work on flat graphs; a model runs the nested ones, which compute the same. A block is
a module that tracing went through. What it reads of its own it reads itself; masks, and whatever else it needs, are
arguments. Containers that only call one child after the other stay what they are, and their children are called from
outside. As `torch.export.unflatten` does it, a block that is called more than once is one part if all calls do the
same; where that, or anything else, is in the way, its operations stay in the part around it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from hatify.calls import CALLS, RETURNED, Call
from hatify.nn.functional import masked, masked_off
from hatify.nn.per_task import PerTaskTensor
from hatify.nn.state import looks_up_mask
from hatify.part import TAKEN, Part

#: Methods of `torch.nn.Module` that a block may define without its part having to know.
_HARMLESS = {"__init__", "__call__", "forward", "extra_repr", "__repr__", "__dir__", "_get_name"}
#: The key of ``node.meta`` under which a node of a part has the name of the flat node that it is.
FLAT = "hatify_flat"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WRITABLE = (fx.Node, bool, int, float, complex, str, type(None), torch.dtype, torch.device)


def nest(root: nn.Module, graphs: Mapping[bool, fx.Graph]) -> tuple[dict[bool, fx.Graph], tuple[tuple[str, str], ...]]:
    """Put parts in the place of the blocks that `root` holds.

    Args:
        root: what the graphs were traced from, rewritten. Its blocks are replaced.
        graphs: its flat graphs, {training: graph}; they are left as they are, but for what tracing noted of calls.

    Returns:
        The nested graphs, and (path, reason) of every block that has no part.
    """
    names = _Names(root)
    called = {call.path: None for graph in graphs.values() for node in graph.nodes for call in node.meta.get(CALLS, ())}
    flat = {path: reason for path in called if (reason := _obstacle(names.modules[path])) is not None}
    while True:
        try:
            parts = {graph: _Nesting(graph, names, flat).parts for graph in dict.fromkeys(graphs.values())}
            written = {mode: parts[graph] for mode, graph in graphs.items()}
            break
        except _CannotNest as found:
            flat[found.path] = found.reason
    flat |= {path: "it computes nothing" for path in called if path not in {**flat, **written[False], **written[True]}}
    for path in {**written[False], **written[True]}:
        if not path:
            continue
        of_mode = {mode: found.get(path) or written[not mode][path] for mode, found in written.items()}
        if _alike(of_mode[True], of_mode[False]):
            of_mode[True] = of_mode[False]
        block = names.modules[path]
        part = Part(block, type(block).__name__)
        part.install(of_mode, root.training)
        names.replace(block, part)
    for node in (node for graph in graphs.values() for node in graph.nodes):
        for key in (CALLS, "nn_module_stack"):
            node.meta.pop(key, None)
    return {mode: found[""] for mode, found in written.items()}, tuple((p, r) for p, r in flat.items() if r)


def _obstacle(block: nn.Module) -> str | None:
    """Why a block has to stay what it is; empty for a container that only chains its children, None for no reason."""
    if isinstance(block, nn.Sequential) and type(block).forward is nn.Sequential.forward:
        return ""
    if isinstance(block, _CONTAINERS):
        return "it is a container with a forward of its own"
    for kind in type(block).__mro__[: type(block).__mro__.index(nn.Module)]:
        for name, value in vars(kind).items():
            if isinstance(value, FunctionType) and name not in _HARMLESS and hasattr(nn.Module, name):
                return f"{type(block).__name__} defines {name}"
    if bound := [
        name for name, hooks in vars(block).items() if "state_dict" in name and name[-5:] == "hooks" and hooks
    ]:
        return f"it has {bound[0].strip('_')}"
    if hidden := [
        name for name in (*block._modules, *block._parameters, *block._buffers) if name in TAKEN or hasattr(Part, name)
    ]:
        return f"a GraphModule needs the name {hidden[0]!r} for itself"
    return None


class _CannotNest(Exception):
    """A block has to stay flat."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason


class _Names:
    """The modules that `root` holds, each with all of its paths."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.paths: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            self.paths.setdefault(id(module), []).append(path)
        self.places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in root.modules():
            for name, child in module._modules.items():
                self.places.setdefault(id(child), []).append((module._modules, name))

    def below(self, path: str, block: str) -> str | None:
        """How the module at `block` calls the one at `path`; None if it does not hold it."""
        if not block:
            return path
        paths = (path, *self.paths.get(id(self.modules.get(path)), ()))
        return next((p.removeprefix(f"{block}.") for p in paths if p.startswith(f"{block}.")), None)

    def replace(self, module: nn.Module, part: Part) -> None:
        """Put `part` wherever `module` is."""
        for table, name in self.places[id(module)]:
            table[name] = part


class _Nesting:
    """Nests one flat graph.

    Attributes:
        parts: the graph of each part, by path; the outermost is ``""``.
    """

    def __init__(self, flat: fx.Graph, names: _Names, kept: Mapping[str, str]) -> None:
        self.flat, self.names = flat, names
        self.products = {n.args[0]: n for n in flat.nodes if n.target in (masked, masked_off)}
        self.home = {
            node: tuple(call for call in node.meta.get(CALLS, ()) if call.path not in kept and not self._is_read(node))
            for node in flat.nodes
        }
        for node in flat.nodes:
            if self._is_product(node):
                # Tracing reads a parameter once, whoever uses it.
                self.home[node] = _common([self.home[user] for user in node.users])
        self.members: dict[Call | None, list[fx.Node]] = {None: list(flat.nodes)}
        for node in flat.nodes:
            for call in self.home[node]:
                self.members.setdefault(call, []).append(node)
        self.parts: dict[str, fx.Graph] = {}
        self.write(None, ())

    def _is_read(self, node: fx.Node) -> bool:
        """Whether a node looks something up, and may as well do so elsewhere."""
        if node.op == "call_module":
            return isinstance(self.names.modules[str(node.target)], PerTaskTensor)
        return node.op == "get_attr" or looks_up_mask(node)

    def _is_product(self, node: fx.Node) -> bool:
        """Whether a node applies a mask to what has been looked up."""
        return node.target in (masked, masked_off) and self._is_read(node.args[0])  # type: ignore[arg-type]

    def write(self, call: Call | None, stack: tuple[Call, ...]) -> list[Any]:
        """Write the graph of what `call`, the last of `stack`, does; returns its arguments, in flat nodes."""
        path, depth = call.path if call is not None else "", len(stack)
        members = self.members[call]
        inside = set(members) if call is not None else set()
        graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
        given: list[Any] = []
        if call is None:
            graph._codegen = copy.deepcopy(self.flat._codegen)
            result = None
        else:
            result, outer = self._result(call), dict[fx.Node, None]()
            for node in self._used(call, stack):
                if node not in inside and not (self._is_read(node) and self._locally(node, stack) is not None):
                    outer[node] = None
            given = list(self._take_arguments(call, graph, outer, values))

        def value(node: fx.Node) -> fx.Node:
            if node not in values:
                target = self._locally(node, stack) if self._is_read(node) or self._is_product(node) else None
                if target is None:
                    raise _CannotNest(path or self._culprit(node), "its operations are mixed with those around it")
                args, kwargs = map_arg((node.args, node.kwargs), value)
                values[node] = self._copied(node, call, graph, target, args, kwargs)
            return values[node]

        done: set[Call] = set()
        for node in members:
            inner = self.home[node][depth : depth + 1]
            if inner and inner[0] not in done:
                done.add(inner[0])
                self._call(inner[0], stack, graph, values, value)
            elif not inner and not self._is_read(node) and node not in values:
                target = self.names.below(str(node.target), path) if node.op == "call_module" else node.target
                if target is None:
                    raise _CannotNest(path, f"it calls {node.target}, which it does not hold")
                args, kwargs = map_arg((node.args, node.kwargs), value)
                values[node] = self._copied(node, call, graph, target, args, kwargs)
        if call is not None:
            graph.output(map_arg(result, value))
        else:
            self._mark_returned(values)
        if path in self.parts and not _alike(self.parts[path], graph):
            raise _CannotNest(path, "its calls do not do the same")
        self.parts.setdefault(path, graph)
        return given

    @staticmethod
    def _copied(node: fx.Node, call: Call | None, graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """What a flat node is in the graph of a part."""
        made = graph.create_node(node.op, target, args, kwargs, node.name if call is None else None, node.type)
        made.meta[FLAT] = node.name
        return made

    def _mark_returned(self, values: dict[fx.Node, fx.Node]) -> None:
        """Mark what methods of the network have returned in the outermost graph, too, and with its mask."""
        for node in self.flat.nodes:
            product = self.products.get(node, node)
            if RETURNED in node.meta:
                for marked in (product, values.get(product, product)):
                    marked.meta[RETURNED] = node.meta[RETURNED]
                if product is not node:
                    del node.meta[RETURNED]

    def _locally(self, node: fx.Node, stack: tuple[Call, ...]) -> Any:
        """What a node that looks something up has for a target within the calls of `stack`; None if it is not there."""
        path = stack[-1].path if stack else ""
        if self._is_product(node):
            return node.target if self.home[node] == stack else None
        if node.op == "call_function":
            return None if path else node.target
        name = str(node.target)
        if node.op == "call_module":
            return self.names.below(name, path)
        return name.removeprefix(f"{path}.") if name.startswith(f"{path}.") or not path else None

    def _culprit(self, node: fx.Node) -> str:
        """The outermost block that makes `node`, which is needed before the block has been called."""
        return self.home[node][0].path

    def _mapped(self, structure: Any) -> Any:
        """A structure of nodes with masks applied."""
        return map_arg(structure, lambda node: self.products.get(node, node))

    def _escaping(self, call: Call) -> list[fx.Node]:
        """The values that are made in a call and used outside of it."""
        inside = set(self.members[call])
        return [node for node in self.members[call] if not inside.issuperset(node.users)]

    def _used(self, call: Call, stack: tuple[Call, ...]) -> Iterator[fx.Node]:
        """What is used in a call, in order: by its operations, as an argument or a result of a call within."""
        seen: set[Call] = set()
        for member in self.members[call]:
            for inner in self.home[member][len(stack) :]:
                if inner not in seen:
                    seen.add(inner)
                    for argument in inner.arguments.values():
                        yield from _places(self._mapped(argument))
            yield from member.all_input_nodes
        for inner in (*seen, call):
            yield from _places(self._result(inner))

    def _result(self, call: Call) -> Any:
        """What a part returns: what the original returned, if that can be written, else what is used of it."""
        escaping = self._escaping(call)
        if _is_writable(call.result):
            result = self._mapped(call.result)
            if set(escaping) <= _places(result).keys():
                return result
        return escaping[0] if len(escaping) == 1 else tuple(escaping)

    def _take_arguments(
        self, call: Call, graph: fx.Graph, needed: dict[fx.Node, None], values: dict[fx.Node, fx.Node]
    ) -> Iterator[Any]:
        """Make placeholders in `graph` for what a call is given, and for what else it needs; yields their values."""
        taken = set[str]()
        for name, argument in call.arguments.items():
            structure = self._mapped(argument) if _is_writable(argument) else ()
            places = _places(structure)
            if places:
                placeholder = graph.placeholder(name)
                taken.add(name)
                for node, keys in places.items():
                    if node in needed and node not in values:
                        values[node] = _reached(graph, placeholder, keys)
                yield structure
        others = [node for node in needed if node not in values]
        names = {node.name for node in others}
        for node in others:
            short = node.name.removeprefix(f"{call.path.replace('.', '_')}_")
            name = node.name if short in names else short
            while name in taken:
                name += "_"
            taken.add(name)
            values[node] = graph.placeholder(name)
            yield node

    def _call(
        self,
        call: Call,
        stack: tuple[Call, ...],
        graph: fx.Graph,
        values: dict[fx.Node, fx.Node],
        value: Callable[[fx.Node], fx.Node],
    ) -> None:
        """Write the call of a part into the graph of the one around it."""
        path = stack[-1].path if stack else ""
        target = self.names.below(call.path, path)
        if target is None:
            raise _CannotNest(path, f"it calls {call.path}, which it does not hold")
        given = self.write(call, (*stack, call))
        made = graph.call_module(target, tuple(map_arg(argument, value) for argument in given))
        places = _places(self._result(call))
        for node in self._escaping(call):
            values[node] = _reached(graph, made, places[node])


def _common(stacks: Sequence[tuple[Call, ...]]) -> tuple[Call, ...]:
    """What all stacks of calls begin with."""
    first, *others = stacks or [()]
    depth = next((d for d in range(len(first)) if any(other[d : d + 1] != first[d : d + 1] for other in others)), None)
    return first[:depth]


def _is_writable(structure: Any) -> bool:
    """Whether a structure of nodes can be written down in a graph."""
    found = True

    def look(leaf: Any) -> Any:
        nonlocal found
        found &= isinstance(leaf, _WRITABLE)
        return leaf

    map_aggregate(structure, look)
    return found


def _places(structure: Any) -> dict[fx.Node, tuple[Any, ...]]:
    """The nodes in a structure, each with the keys that lead to it."""
    found: dict[fx.Node, tuple[Any, ...]] = {}

    def walk(value: Any, keys: tuple[Any, ...]) -> None:
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, fx.Node):
            found.setdefault(value, keys)
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, (tuple, list)):
            items = enumerate(value)
        for key, item in items:
            walk(item, (*keys, key))

    walk(structure, ())
    return found


def _reached(graph: fx.Graph, node: fx.Node, keys: tuple[Any, ...]) -> fx.Node:
    """What the value of `node` has at `keys`."""
    for key in keys:
        node = graph.call_function(operator.getitem, (node, key))
    return node


def _alike(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs do the same, whatever their nodes are called."""
    if len(a.nodes) != len(b.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for one, other in zip(a.nodes, b.nodes, strict=True):
        arguments = map_arg((one.args, one.kwargs), twin.__getitem__)
        same_target = one.op == "placeholder" or one.target == other.target
        if one.op != other.op or not same_target or arguments != (other.args, other.kwargs):
            return False
        twin[one] = other
    return True
