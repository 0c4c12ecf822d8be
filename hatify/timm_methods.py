"""timm's methods on a converted model: ``forward_features``, ``forward_head``, ``get_classifier``, and those around.

They run pieces of the model's own graph, so that they answer for the task that is set, with its masks. timm itself is
not needed here. A method that the original has and that cannot be offered raises a `HatError` that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from hatify.calls import RETURNED
from hatify.errors import HatError
from hatify.model import HatModel
from hatify.nn.per_task import PerTask
from hatify.structure import children_of


@dataclass(frozen=True)
class Interface:
    """What a converted model offers of the original's methods.

    Attributes:
        methods: {name: function of the model}.
        classifier: the paths of the output layers; a string if the original has one; None if it is not found.
    """

    methods: dict[str, Callable[..., Any]]
    classifier: str | tuple[str, ...] | None

    @classmethod
    def of(cls, net: nn.Module) -> Interface:
        """What can be offered of `net`, if it has timm's interface: ``forward_features`` and ``get_classifier``."""
        kind = type(net)
        if not (hasattr(kind, "forward_features") or hasattr(kind, "get_classifier")):
            return cls({}, None)
        methods = {name: method for name, method in _METHODS.items() if hasattr(kind, name)}
        paths = {id(module): path for path, module in net.named_modules()}
        found = net.get_classifier() if "get_classifier" in methods else None  # type: ignore[operator]
        layers = [paths.get(id(layer)) for layer in (found if isinstance(found, tuple) else (found,))]
        known = tuple(path for path in layers if path)
        if len(known) < len(layers):
            return cls(methods, None)
        return cls(methods, known if isinstance(found, tuple) else known[0])


# The methods ---------------------------------------------------------------------------------------------------------


def get_classifier(model: HatModel) -> Any:
    """The output layer of the task that is set, or a tuple of them where the original has several."""
    paths = model.interface.classifier
    if paths is None:
        raise HatError("get_classifier(): the original's output layer is none of its modules")
    return _layer(model, paths) if isinstance(paths, str) else tuple(_layer(model, path) for path in paths)


def forward_features(model: HatModel, x: Tensor) -> Any:
    """What the original's method returns, for the task that is set."""
    pieces = _Pieces(model, "forward_features", model.graph)
    return pieces.run_to([pieces.features()], pieces.inputs(x))[0]


def forward_head(model: HatModel, x: Tensor, pre_logits: bool = False) -> Any:
    """What the original's method makes of features; `pre_logits`: what its output layer is given, instead."""
    method = "forward_head"
    pieces = _Pieces(model, method, model.flat_graph if pre_logits else model.graph)
    if not pre_logits:
        (output,) = (node for node in model.graph.nodes if node.op == "output")
        return pieces.run_to([output], {pieces.features(): x})[0]
    path = model.interface.classifier
    kind = type(get_classifier(model)).__name__
    if not isinstance(path, str) or not isinstance(get_classifier(model), (nn.Linear, nn.Identity)):
        raise HatError(f"{method}(pre_logits=True): the original's output layer is no single Linear, but {kind}")
    layer = pieces.call_of(path)
    return pieces.run_to([layer.all_input_nodes[0]], {pieces.features(): x})[0]


def forward_intermediates(
    model: HatModel,
    x: Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """The outputs of blocks, as timm's vision transformers return them; other networks are refused.

    Raises:
        HatError: the network has no ``blocks`` that are called one after the other, each as a whole.
        ValueError: an argument is out of range.
    """
    method = "forward_intermediates"
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"{method}(): output_fmt must be 'NCHW' or 'NLC', not {output_fmt!r}")
    pieces = _Pieces(model, method, model.graph)
    blocks = model._modules.get("blocks")
    if "get_intermediate_layers" not in model.interface.methods or not isinstance(blocks, nn.Sequential):
        raise HatError(f"{method}(): offered for timm's vision transformers alone, which have a list of equal blocks")
    chosen = _chosen(method, len(blocks), indices)
    calls = [pieces.call_of(f"blocks.{i}") for i in sorted(chosen)]
    end = calls[-1] if stop_early else pieces.call_of(f"blocks.{len(blocks) - 1}")
    last = pieces.call_of("norm")
    wanted = list(dict.fromkeys([*calls, *(() if intermediates_only else (end,)), *last.all_input_nodes[1:]]))
    values = dict(zip(wanted, pieces.run_to(wanted, pieces.inputs(x)), strict=True))
    found = [pieces.again(last, values[call], values) if norm else values[call] for call in calls]
    prefix = getattr(model, "num_prefix_tokens", 0)
    tokens = [value[:, :prefix] for value in found]
    found = [value[:, prefix:] for value in found]
    if output_fmt == "NCHW":
        found = [_image(method, value, x, model) for value in found]
    result: list[Any] = list(zip(found, tokens, strict=True)) if return_prefix_tokens and prefix else found
    return result if intermediates_only else (pieces.again(last, values[end], values), result)


def get_intermediate_layers(
    model: HatModel,
    x: Tensor,
    n: int | Sequence[int] = 1,
    reshape: bool = False,
    return_prefix_tokens: bool = False,
    norm: bool = False,
) -> Any:
    """The outputs of the last `n` blocks, or of those numbered `n`; see `forward_intermediates`."""
    fmt = "NCHW" if reshape else "NLC"
    return forward_intermediates(model, x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True)


_METHODS: dict[str, Callable[..., Any]] = {
    method.__name__: method
    for method in (forward_features, forward_head, forward_intermediates, get_classifier, get_intermediate_layers)
}


# What they are made of -----------------------------------------------------------------------------------------------


def _layer(model: HatModel, path: str) -> Any:
    layer: Any = model
    for name in path.split("."):
        layer = layer._modules[name]
        layer = layer[layer.choice.task] if isinstance(layer, PerTask) else layer
    return layer


def _chosen(method: str, count: int, indices: int | Sequence[int] | None) -> list[int]:
    """The numbers of blocks that timm means by `indices`."""
    if indices is None or isinstance(indices, int):
        last = count if indices is None else indices
        chosen = list(range(count - last, count)) if 0 < last <= count else []
    else:
        chosen = [count + i if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < count for i in chosen):
        raise ValueError(f"{method}(): {indices!r} does not choose among {count} blocks")
    return chosen


def _image(method: str, tokens: Tensor, x: Tensor, model: HatModel) -> Tensor:
    """Tokens (N, L, C) as an image (N, C, H, W)."""
    size = getattr(model._modules.get("patch_embed"), "patch_size", None)
    height, width = (-(-s // p) for s, p in zip(x.shape[-2:], size, strict=True)) if size else (0, 0)
    if height * width != tokens.shape[1]:
        raise HatError(f"{method}(): {tokens.shape[1]} tokens are no grid of patches of {tuple(x.shape)}")
    return tokens.reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2).contiguous()


class _Pieces(fx.Interpreter):
    """Runs pieces of one of a model's graphs for a method that is named in errors."""

    def __init__(self, model: HatModel, method: str, graph: fx.Graph) -> None:
        if model.task_state.choice.of_samples is not None:
            raise HatError(f"{method}(): each sample has a task of its own: set one task")
        model.look_after(model.training)
        super().__init__(children_of(model), graph=graph)
        self.model, self.method = model, method

    def features(self) -> fx.Node:
        """The node that ``forward_features`` has returned."""
        found = [node for node in self.graph.nodes if "forward_features" in node.meta.get(RETURNED, ())]
        if len(found) != 1:
            raise HatError(
                f"{self.method}(): forward called the original's forward_features {len(found)} times with a tensor as "
                "its result; it takes exactly one to tell where features end"
            )
        return found[0]

    def call_of(self, path: str) -> fx.Node:
        """The call of a module that is called once."""
        found = [node for node in self.graph.nodes if node.op == "call_module" and node.target == path]
        if len(found) != 1:
            raise HatError(f"{self.method}(): {path} is called {len(found)} times as a whole; it takes exactly one")
        return found[0]

    def inputs(self, x: Any) -> dict[fx.Node, Any]:
        """The values of the graph's placeholders where only the first is given."""
        first, *others = (node for node in self.graph.nodes if node.op == "placeholder")
        return {first: x, **{node: node.args[0] if node.args else None for node in others}}

    def run_to(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """The values of nodes, from those that are given; checks and writes on the way are carried out."""
        wanted = list(wanted)
        needed, waiting = set[fx.Node](), list(wanted)
        while waiting:
            node = waiting.pop()
            if node not in needed and node not in given:
                needed.add(node)
                waiting += node.all_input_nodes
        if missing := [node for node in needed if node.op == "placeholder"]:
            raise HatError(f"{self.method}(): features alone do not do, the input {missing[0].target!r} is read again")
        self.env = dict(given)
        for node in self.graph.nodes:
            known = node.all_input_nodes and all(n in self.env for n in node.all_input_nodes)
            aside = not node.users and known and node.op != "output"
            if node in needed or (aside and node not in self.env):
                self.env[node] = self.run_node(node)
            if node in wanted and all(n in self.env for n in wanted):
                break
        return [self.env[node] for node in wanted]

    def again(self, call: fx.Node, x: Tensor, values: Mapping[fx.Node, Any]) -> Any:
        """The value of the call of a module with another first argument."""
        module = self.fetch_attr(str(call.target))
        args, kwargs = fx.node.map_arg((call.args[1:], call.kwargs), values.__getitem__)
        return module(x, *args, **kwargs)
