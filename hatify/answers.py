"""Answer Python's questions about sizes while a network is being traced.

Symbolic tracing runs a network on placeholders, which have no size; code such as ``if height % window:`` or
``range(depth)`` then fails. Here such questions are answered from example inputs, and a guard is left in the graph that
raises if another input would have been answered differently. Questions about the values of tensors are not answered:
which path they choose is for the data to say.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from hatify.errors import HatError

#: Attributes and methods of a tensor that do not depend on its values.
QUESTIONS = frozenset(
    {"shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "size", "dim", "ndimension", "numel", "nelement"}
)


def asks(node: fx.Node) -> bool:
    """Whether `node` asks a tensor for what does not depend on its values."""
    asked = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return asked in QUESTIONS


def check_size(found: Any, traced: Any) -> None:
    """Raise where a size that chose the traced path is another one now."""
    if found != traced:
        raise HatError(
            f"the network was traced where a size or condition is {traced}, but this input makes it {found}; "
            "convert it with example inputs of this size"
        )


def check_argument(found: Any, traced: Any, name: str) -> None:
    """Raise where an argument that is no tensor, and chose the traced path, has another value now."""
    if isinstance(found, Tensor) or found != traced:
        now = "a tensor" if isinstance(found, Tensor) else repr(found)
        raise HatError(
            f"the network was converted with {name}={traced!r} and computes what it does with that, not with {now}: "
            f"convert it with example inputs in which {name} is that"
        )


class SizedProxy(fx.Proxy):
    """A proxy that knows the sizes an example input leads to."""

    tracer: AnsweringTracer

    def __index__(self) -> int:
        value = self.tracer.answer(self)
        if not isinstance(value, int):
            raise TypeError(f"{self.node} is not an integer")
        return value

    def __int__(self) -> int:
        return int(self.tracer.answer(self))

    def __float__(self) -> float:
        return float(self.tracer.answer(self))

    def __len__(self) -> int:
        return self.tracer.length(self)


class AnsweringTracer(fx.Tracer):
    """An ``fx.Tracer`` that answers questions about sizes by running what has been traced so far on example inputs."""

    def __init__(self, examples: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.examples = examples
        self.values: dict[fx.Node, Any] = {}
        self.answering = False

    def proxy(self, node: fx.Node) -> SizedProxy:
        return SizedProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.answer(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            return iter([operator.getitem(obj, i) for i in range(self.length(obj))])

    def length(self, obj: fx.Proxy) -> int:
        """How many elements a shape or tuple has; a guard is left in the graph where other sizes may make more."""
        value = self.evaluate(obj.node)
        if not isinstance(value, (tuple, list)):
            raise fx.proxy.TraceError("the length of a tensor depends on the input")
        if not isinstance(value, torch.Size):
            found = self.create_proxy("call_function", len, (obj,), {})
            self.create_proxy("call_function", check_size, (found, len(value)), {})
        return len(value)

    def answer(self, obj: fx.Proxy) -> Any:
        """The value of a number computed from sizes; leaves a guard in the graph."""
        value = self.evaluate(obj.node)
        if not isinstance(value, (bool, int, float)):
            raise fx.proxy.TraceError("the path taken depends on the values of a tensor")
        self.create_proxy("call_function", check_size, (obj, value), {})
        return value

    def evaluate(self, node: fx.Node) -> Any:
        """The value of `node` for the example inputs; every node is run once at most."""
        with self._answers(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            for earlier in self.graph.nodes:
                if earlier not in self.values and earlier.op != "output":
                    self.values[earlier] = self._run(earlier)
                if earlier is node:
                    break
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if node.op == "placeholder":
            name = str(node.target).lstrip("*")
            return self.examples[name] if name in self.examples else self.examples[name.rpartition("_")[0]]
        if node.op == "get_attr":
            value: Any = self.root
            for part in str(node.target).split("."):
                value = getattr(value, part)
            # Functions, unlike modules, cannot be kept from writing to buffers, such as running statistics.
            return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return _in_evaluation(self.root.get_submodule(str(node.target)))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """While answering, modules are called and parameters read for real."""
        before, self.answering = self.answering, True
        try:
            yield
        finally:
            self.answering = before

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.answering else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self.answering else super().call_module(m, forward, args, kwargs)


#: Functions of torch that make tensors from sizes alone, and therefore do not notice a proxy by themselves.
FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")


@contextmanager
def factories_recorded(tracer: fx.Tracer) -> Iterator[None]:
    """Record calls such as ``torch.arange(length)`` in the graph when a size is a proxy."""
    originals = {name: getattr(torch, name) for name in FACTORIES}

    def recording(original: Callable[..., Any]) -> Callable[..., Any]:
        def factory(*args: Any, **kwargs: Any) -> Any:
            found = any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs)))
            return tracer.create_proxy("call_function", original, args, kwargs) if found else original(*args, **kwargs)

        return factory

    try:
        for name, original in originals.items():
            setattr(torch, name, recording(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _in_evaluation(module: nn.Module) -> Callable[..., Any]:
    """Call `module` in evaluation mode, so that nothing in it moves."""

    def call(*args: Any, **kwargs: Any) -> Any:
        modes = {m: m.training for m in module.modules()}
        module.eval()
        try:
            return module(*args, **kwargs)
        finally:
            for m, mode in modes.items():
                m.training = mode

    return call
