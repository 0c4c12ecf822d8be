"""Capture a network's forward pass as torch.fx graphs, one for training and one for evaluation.

Symbolic tracing freezes every ``if self.training`` at the value it had while tracing. Networks are therefore traced
in both modes. Where the two graphs differ only in constants (functional dropout, attention dropout), they are merged
into one graph that reads the flag when it runs; where they differ in structure, both are kept.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _assert_is_none
from torch.nn.modules.batchnorm import _NormBase

from hatify.answers import AnsweringTracer, check_argument, factories_recorded
from hatify.calls import CALLS, RETURNED, Call
from hatify.errors import ConversionError
from hatify.nn.functional import by_mode
from hatify.notrace import timm_functions, timm_modules
from hatify.ops import OPERATIONS

#: Subclasses of these stay whole: what their ``forward`` does to the weight decides how the weight may be shared.
LEAF_BASES = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


#: Folders with code that a user looking for a mistake has not written.
_NOT_THE_USERS = tuple(f"{Path(package).parent}{os.sep}" for package in (__file__, torch.__file__))


@dataclass(frozen=True)
class Traced:
    """A network's graphs. ``training`` and ``evaluation`` are one and the same object where one graph serves both."""

    training: fx.Graph
    evaluation: fx.Graph

    @property
    def graphs(self) -> tuple[fx.Graph, ...]:
        """The distinct graphs."""
        return (self.evaluation,) if self.training is self.evaluation else (self.evaluation, self.training)


class HatTracer(AnsweringTracer):
    """A tracer that keeps whole what must not be opened, and knows where it is when tracing fails.

    Leaves are torch's own modules (but not containers), subclasses of weighted and normalising layers, parametrised
    modules, those registered as operations, modules without children whose ``forward`` looks at ``self.training``,
    modules of the types in `leaf_types`, and the modules named in `leaves`.
    """

    def __init__(
        self,
        leaves: frozenset[str],
        leaf_types: tuple[type[nn.Module], ...],
        functions: tuple[Callable[..., Any], ...],
        proxy_buffers: bool,
        examples: dict[str, Any],
    ) -> None:
        super().__init__(examples, autowrap_functions=functions)
        self.proxy_buffer_attributes = proxy_buffers
        self.leaves = leaves
        self.leaf_types = leaf_types
        self.innermost = ""
        self.constants = 0
        self.calls: tuple[Call, ...] = ()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows within which calls of modules it was recorded."""
        node = super().create_node(*args, **kwargs)
        node.meta[CALLS] = self.calls
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.leaves or isinstance(m, self.leaf_types):
            return True
        if isinstance(m, LEAF_BASES) or hasattr(m, "parametrizations"):
            return True
        if super().is_leaf_module(m, module_qualified_name) or type(m) in OPERATIONS:
            return True
        return not any(m.children()) and not m._parameters and reads_training_flag(m)

    def create_arg(self, a: Any) -> Any:
        """A tensor made in ``forward`` is the one made there when the other mode was traced, if they are equal."""
        if isinstance(a, Tensor) and self.tensor_attrs.get(a) is None:
            name = f"_tensor_constant{self.constants}"
            self.constants += 1
            other = self.root.__dict__.get(name, self.root._buffers.get(name))
            if isinstance(other, Tensor) and other.dtype == a.dtype and torch.equal(other, a):
                self.tensor_attrs[a] = name
        return super().create_arg(a)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.answering:
            return super().call_module(m, forward, args, kwargs)
        outer, self.innermost = self.innermost, self.path_of_module(m)
        if self.is_leaf_module(m, self.innermost):
            result = super().call_module(m, forward, args, kwargs)
        else:
            call, around = Call.of(m, self.innermost, args, kwargs), self.calls
            self.calls = (*around, call)
            result = super().call_module(m, forward, args, kwargs)
            call.returns(result)
            self.calls = around
        self.innermost = outer
        return result


def trace(net: nn.Module, arguments: dict[str, Any], leaves: frozenset[str]) -> Traced:
    """Trace `net` in training and in evaluation mode; its own modes are left as they were.

    Args:
        net: the network.
        arguments: an example of every argument of ``forward``, from `bound_arguments`. Those that are None, numbers or
            strings are fixed: calling the result with another value for them raises.
        leaves: names of modules to be kept whole.

    Raises:
        ConversionError: symbolic tracing failed; names the module and the line.
    """
    with _modes_restored(net):
        net.train()
        training = _trace_once(net, arguments, leaves)
        net.eval()
        evaluation = _trace_once(net, arguments, leaves)
    merged = merge(training, evaluation)
    return Traced(merged, merged) if merged is not None else Traced(training, evaluation)


def merge(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph | None:
    """One graph for both modes, or None where they differ in more than constants.

    A constant that differs becomes a node that reads the ``training`` flag of the module the node came from.
    """
    pairs = list(zip(training.nodes, evaluation.nodes, strict=False))
    if len(training.nodes) != len(evaluation.nodes):
        return None
    twin = dict(pairs)
    differing: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any]]] = []
    for node, other in pairs:
        if (node.op, node.target) != (other.op, other.target):
            return None
        merged = _merge_arguments((node.args, node.kwargs), (other.args, other.kwargs), twin, other)
        if merged is None:
            return None
        arguments, changed = merged
        if changed:
            differing.append((other, *arguments))
    for node, args, kwargs in differing:
        node.args, node.kwargs = args, kwargs
    return evaluation


class _Differs(Exception):
    """Two arguments differ in structure."""


def _merge_arguments(a: Any, b: Any, twin: dict[fx.Node, fx.Node], at: fx.Node) -> tuple[Any, bool] | None:
    """Arguments `a` (training) and `b` (evaluation) as one; the nodes that choose are inserted before `at`."""
    changed = False

    def walk(x: Any, y: Any) -> Any:
        nonlocal changed
        if isinstance(x, fx.Node) or isinstance(y, fx.Node):
            if isinstance(x, fx.Node) and twin.get(x) is y:
                return y
            raise _Differs
        if type(x) is not type(y):
            raise _Differs
        if isinstance(x, (tuple, list)):
            if len(x) != len(y):
                raise _Differs
            return type(y)(walk(i, j) for i, j in zip(x, y, strict=True))
        if isinstance(x, dict):
            if x.keys() != y.keys():
                raise _Differs
            return {key: walk(x[key], y[key]) for key in x}
        if isinstance(x, slice):
            return slice(*(walk(i, j) for i, j in zip(_ends(x), _ends(y), strict=True)))
        if x == y or (x != x and y != y):
            return y
        if not isinstance(x, (bool, int, float)):
            raise _Differs
        changed = True
        return _mode_dependent(at, x, y)

    try:
        return walk(a, b), changed
    except _Differs:
        return None


def _ends(piece: slice) -> tuple[Any, Any, Any]:
    return piece.start, piece.stop, piece.step


def _mode_dependent(at: fx.Node, in_training: Any, in_evaluation: Any) -> fx.Node:
    """A node before `at` that yields `in_training` or `in_evaluation`, by the flag of the module `at` came from."""
    stack = at.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    with at.graph.inserting_before(at):
        flag = at.graph.create_node("get_attr", f"{path}.training" if path else "training", name="training")
        if in_training is True and in_evaluation is False:
            return flag
        if in_training is False and in_evaluation is True:
            chosen = at.graph.call_function(operator.not_, (flag,))
        else:
            chosen = at.graph.call_function(by_mode, (flag, in_training, in_evaluation))
        chosen.meta[CALLS] = at.meta[CALLS]
        return chosen


def _trace_once(net: nn.Module, arguments: dict[str, Any], leaves: frozenset[str]) -> fx.Graph:
    try:
        return _trace_strictly(net, arguments, leaves, proxy_buffers=True)
    except ConversionError:
        # Buffers behind proxies make writes to them visible, but cannot be used in Python's control flow.
        return _trace_strictly(net, arguments, leaves, proxy_buffers=False)


def _trace_strictly(net: nn.Module, arguments: dict[str, Any], leaves: frozenset[str], proxy_buffers: bool) -> fx.Graph:
    """Trace once, keeping whole those of timm's ``notrace`` modules that indeed cannot be traced.

    timm registers some modules for reasons that have gone since, and a module that is kept whole shares nothing between
    tasks; so each type is opened first, and closed where that fails.
    """
    notrace, functions = timm_modules(), (*timm_functions(), *_registered_functions())
    closed: set[type[nn.Module]] = set()
    while True:
        tracer = HatTracer(leaves, tuple(closed), functions, proxy_buffers, arguments)
        try:
            return _trace_with(tracer, net, arguments)
        except ConversionError:
            path = tracer.innermost.split(".")
            around = {type(net.get_submodule(".".join(path[:n]))) for n in range(1, len(path) + 1)}
            to_close = around & set(notrace) - closed
            if not to_close:
                raise
            closed |= to_close


def _trace_with(tracer: HatTracer, net: nn.Module, arguments: dict[str, Any]) -> fx.Graph:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(inspect.unwrap(net.forward)).parameters
    fixed = {
        name: value
        for name, value in arguments.items()
        if parameters[name].kind not in variadic and (value is None or isinstance(value, (bool, int, float, str)))
    }
    try:
        with _buffers_kept(net, tracer), factories_recorded(tracer), _methods_noted(net):
            graph = tracer.trace(net, concrete_args=fixed)
    except ConversionError:
        raise
    except Exception as error:
        where = tracer.innermost or "the network itself"
        kind = type(net.get_submodule(tracer.innermost)).__name__
        hint = (
            f"keep that module whole with policies={{{tracer.innermost!r}: 'per_task'}} (one copy per task)"
            if tracer.innermost
            else "move that code into a module of its own and keep it whole with policies={name: 'per_task'}"
        )
        raise ConversionError(f"{where} ({kind}): cannot be traced: {_location(error)}: {error}; {hint}") from error
    names = iter(parameters)
    for node in graph.nodes:
        if node.op == "placeholder":
            name = next(names)
            # Arguments with fixed values come out of fx with a number behind their names.
            node.target = name if node.target.startswith(f"{name}_") and name in fixed else node.target
            if name in fixed:
                _check_argument(graph, node, fixed[name])
        _register_constant(net, node)
    return graph


def _check_argument(graph: fx.Graph, argument: fx.Node, value: Any) -> None:
    """Let an argument with a fixed value be checked with an error of ours, in the place of torch.fx's assertion."""
    for user in list(argument.users):
        for check in (user, *user.users):
            if check.target in (torch._assert, _assert_is_none):
                with graph.inserting_before(check):
                    graph.call_function(check_argument, (argument, value, str(argument.target)))
                graph.erase_node(check)
                if check is not user:
                    graph.erase_node(user)
                return


@contextmanager
def _buffers_kept(net: nn.Module, tracer: HatTracer) -> Iterator[None]:
    """Refuse a ``forward`` that assigns to a buffer: tracing would lose the assignment, or carry it out."""
    kept = {path: (module, dict(module._buffers)) for path, module in net.named_modules()}
    versions = {id(b): b._version for b in net.buffers()}
    try:
        yield
    finally:
        assigned = []
        for path, (module, buffers) in kept.items():
            for name, buffer in buffers.items():
                now = module._buffers[name]
                if now is not buffer or (buffer is not None and buffer._version != versions[id(buffer)]):
                    assigned.append(f"{path}.{name}" if path else name)
            module._buffers.update(buffers)
    if assigned:
        owner = assigned[0].rpartition(".")[0]
        tracer.innermost = owner
        kind = type(net.get_submodule(owner))
        code = inspect.unwrap(kind.forward).__code__
        raise ConversionError(
            f"{assigned[0]}: assigned to by {kind.__name__}.forward ({code.co_filename}:{code.co_firstlineno}), "
            "which tracing cannot record; write in place with a tensor method (self.buffer.add_(1)), or put that code "
            "into a module of its own and keep it whole with policies={name: 'per_task'}"
        )


@contextmanager
def _methods_noted(net: nn.Module) -> Iterator[None]:
    """Within the context, what the methods return that ``forward`` consists of (``forward_features``) is noted."""
    own = type(net).__mro__[: type(net).__mro__.index(nn.Module)]
    names = {
        n for kind in own for n, f in vars(kind).items() if n.startswith("forward_") and isinstance(f, FunctionType)
    }
    methods = {name: getattr(net, name) for name in names - vars(net).keys()}

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if isinstance(result, fx.Proxy):
                result.node.meta[RETURNED] = (*result.node.meta.get(RETURNED, ()), name)
            return result

        return call

    vars(net).update({name: noted(name, method) for name, method in methods.items()})
    try:
        yield
    finally:
        for name in methods:
            vars(net).pop(name, None)


def _register_constant(net: nn.Module, node: fx.Node) -> None:
    """Make a buffer of a tensor that tracing met as a constant, so that ``.to()`` moves it."""
    name = str(node.target)
    value = net.__dict__.get(name) if node.op == "get_attr" else None
    if isinstance(value, torch.Tensor):
        del net.__dict__[name]
        net.register_buffer(name, value, persistent=False)


def _location(error: BaseException) -> str:
    """File and line of the innermost frame that is neither torch's nor ours."""
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [f for f in frames if not f.filename.startswith(_NOT_THE_USERS)]
    frame = (foreign or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def bound_arguments(net: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``net.forward`` by name, defaults filled in.

    Raises:
        ConversionError: ``forward`` cannot be called with these inputs.
    """
    signature = inspect.signature(inspect.unwrap(net.forward))
    try:
        bound = (
            signature.bind(**example_inputs) if isinstance(example_inputs, dict) else signature.bind(*example_inputs)
        )
    except TypeError as error:
        raise ConversionError(
            f"{type(net).__name__}.forward{signature} cannot be called with the example inputs: {error}; "
            "pass example_inputs, a tuple of positional or a dict of named inputs"
        ) from None
    bound.apply_defaults()
    return dict(bound.arguments)


@contextmanager
def _modes_restored(net: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def reads_training_flag(module: nn.Module) -> bool:
    """Whether the code of a module's ``forward`` mentions ``training``."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _registered_functions() -> list[Callable[..., Any]]:
    """Functions of Python that are registered as operations, and that torch would not record by itself."""
    recorded = torch.overrides.get_testing_overrides()
    return [target for target in OPERATIONS if isinstance(target, FunctionType) and target not in recorded]
