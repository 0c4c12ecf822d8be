"""Bake a task's masks into its network: the same graph, made of torch's own modules and operations, at full size."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hatify.answers import check_argument, check_size
from hatify.classify import detached_copy, is_altered, is_plain
from hatify.extract.plain import DTYPE, MASK, NDIM, Plain
from hatify.extract.recording import NormTracer
from hatify.free import check_sizes
from hatify.model import HatModel
from hatify.nn.functional import masked, masked_off, view_along
from hatify.nn.layers import HatLayer, family_of
from hatify.nn.norms import (
    FEATURE_DIMS,
    NORMS,
    AsModule,
    _masked_affine,
    is_known,
    keeps_features_apart,
    masked_norm,
    zero_at_zero,
)
from hatify.nn.per_task import PerTask, PerTaskTensor
from hatify.nn.state import TaskState, looks_up_mask
from hatify.structure import children_of
from hatify.trace import reads_training_flag

_WEIGHT_HOOKS: dict[type, Any] = {
    WeightNorm: nn.utils.remove_weight_norm,
    SpectralNorm: nn.utils.remove_spectral_norm,
}


class MaskedNorm(nn.Module):
    """A normalisation over the features that a mask, shape (features,), has on; or `over` some of these."""

    norm: nn.Module
    mask: Tensor
    over: Tensor | None

    def __init__(self, norm: nn.Module, mask: Tensor, over: Tensor | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("mask", mask)
        self.register_buffer("over", over)

    @property
    def features(self) -> tuple[Tensor, ...]:
        """What its masked form is given beside the input."""
        return (self.mask,) if self.over is None else (self.mask, self.over)

    def forward(self, x: Tensor) -> Tensor:
        return NORMS[type(self.norm)](self.norm, x, *self.features)


def bake(model: HatModel, task: int, inputs: tuple[Any, ...]) -> Plain:
    """The network of `task`, which has been set, as a plain one of the same size; `inputs` are run through it."""
    baker = _Baker(model, task)
    baker.run(*inputs)
    return baker.plain


def layer_family(module: nn.Module) -> type[HatLayer] | None:
    """The family of a weighted layer that computes what torch's own layer does; None for any other module."""
    family = family_of(module)
    return family if family is not None and is_plain(module, family) else None


def mask_dim(module: Any, ndim: int, mask: Tensor) -> int:
    """The dimension of the output of a mask-carrying layer or normalisation that its mask lies along."""
    family = layer_family(module)
    if family is not None:
        return ndim + family.dims(module)[1]
    dims = FEATURE_DIMS[type(module)](module, ndim)
    return dims[0] if len(dims) == 1 else dims[module.normalized_shape.index(mask.numel())]


class _Baker(fx.Interpreter):
    """Runs the model's graph, and writes each node anew."""

    def __init__(self, model: HatModel, task: int) -> None:
        super().__init__(children_of(model), graph=model.flat_graph)
        self.task = task
        self.modules = _plain_modules(self.module, model.flat_graph, task)
        self.plain = Plain(model.flat_graph)
        self.values: dict[fx.Node, Any] = {}
        self.variants: dict[tuple[str, str | None], nn.Module] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        written = self.values[n] = self._written(n, out)
        if isinstance(written, fx.Node) and isinstance(out, Tensor):
            written.meta.update({DTYPE: out.dtype, NDIM: out.ndim})
        return out

    def _written(self, node: fx.Node, out: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if looks_up_mask(node):
            return None
        if node.op == "get_attr":
            return self._attribute(node, out)
        if node.op == "call_module":
            return self._called(node, args, kwargs, out)
        if node.target in (masked, masked_off):
            return self._masked(node, args[0])
        if node.target is masked_norm:
            return self._norm(node, args[0], kwargs)  # type: ignore[arg-type]
        if node.target in (check_size, check_argument):
            return self._guard(*args)
        if node.target is check_sizes:
            return self._guard_sizes(*args)
        if known := known_number(node, args, kwargs):
            return known[0]
        return self.plain.graph.create_node(node.op, node.target, args, kwargs, node.name)

    # Guards ----------------------------------------------------------------------------------------------------------

    def _guard(self, found: Any, traced: Any, name: Any = "a size or condition") -> None:
        if isinstance(found, fx.Node):
            same = self.plain.graph.call_function(operator.eq, (found, traced))
            message = f"the network was traced where {name} is {traced}, but this input makes it different"
            self.plain.graph.call_function(torch._assert, (same, message))

    def _guard_sizes(self, value: Any, name: Any, fixed: Any) -> None:
        """Of an input that is a tensor; the sizes of others are left to what they meet."""
        if not isinstance(value, fx.Node) or len(fixed) != 1:
            return
        for dims, sizes in _runs(fixed[0]):
            shape = self.plain.graph.call_function(getattr, (value, "shape"))
            found = self.plain.graph.call_function(operator.getitem, (shape, slice(dims[0], dims[-1] + 1 or None)))
            self._guard(found, sizes, f"the sizes of {name} from dimension {dims[0]} on")

    # Parameters and buffers ------------------------------------------------------------------------------------------

    def _attribute(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # whether the network is training
        name = str(node.target)
        if any(name.startswith(f"{path}.") for path in self.modules):
            name = name.replace(".", "_")
        held = value.detach()
        return self.plain.get(
            name, self.plain.parameter(value, held) if isinstance(value, nn.Parameter) else held.clone()
        )

    # Masks and modules -----------------------------------------------------------------------------------------------

    def _masked(self, node: fx.Node, x: Any) -> fx.Node:
        """The product with a mask."""
        mask: Tensor = self.env[node.args[1]]  # type: ignore[index]
        view = view_along(mask, node.args[2])  # type: ignore[arg-type]
        name, graph = str(node.args[1]), self.plain.graph
        dtype = self.env[node.args[0]].dtype  # type: ignore[index]
        product = graph.call_function(operator.mul, (x, self.plain.get(name, view.to(dtype, copy=True))))
        if node.target is masked_off:
            product.meta[MASK] = view != 0
            product = graph.call_function(torch.where, (self.plain.get(f"{name}_off", view == 0), 0.0, product))
        product.meta[MASK] = view != 0
        return product

    def _called(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        path = str(node.target)
        owner = self.fetch_attr(path)
        if isinstance(owner, TaskState):
            return None
        if isinstance(owner, PerTaskTensor):
            return self._attribute(node, out)
        given: Any = next(iter((*node.args, *node.kwargs.values())), None)
        if self._passes(self.modules[path], given, out):
            return self.values[given]
        looked_up = node.kwargs.get("mask")
        mask = self.env[looked_up] if isinstance(looked_up, fx.Node) and looks_up_mask(looked_up) else None
        key = (path, None if mask is None else str(looked_up))
        if key not in self.variants:
            self.variants[key] = self._variant(self.modules[path], mask, getattr(owner, "over", None))
        rest = {name: value for name, value in kwargs.items() if value is not None or name != "mask"}
        name = self.plain.store(path, self.variants[key])
        written = self.plain.graph.create_node("call_module", name, args, rest, node.name)
        if mask is not None:
            _note_mask(written, self.modules[path], mask, out.ndim)
        return written

    def _norm(self, node: fx.Node, x: fx.Node, given: dict[str, Any]) -> fx.Node:
        """A normalisation written as a function: the module that does the same, unless its parameters are computed."""
        (value, kind, mask), values = self.fetch_args_kwargs_from_env(node)
        if all(n.op == "get_attr" for n in given.values() if isinstance(n, fx.Node)):
            held = {name: self.plain.root[str(n.target)] for name, n in given.items() if isinstance(n, fx.Node)}
            module = AsModule(kind, {**given, **held}).module(value)
            if module is not None:
                name = self.plain.store(node.name, self._variant(module, mask, None))
                written = self.plain.graph.create_node("call_module", name, (x,), {}, node.name)
                _note_mask(written, module, mask, value.ndim)
                return written
        tracer = NormTracer(self.plain, node.name, {}, value.dtype, value.ndim)

        def operand(name: str, found: Any) -> Any:
            given_node = given[name]
            if isinstance(found, Tensor) and given_node.op == "get_attr":
                found = self.plain.root[str(given_node.target)]
                tracer.tensors[id(found)] = name
                return found
            return tracer.proxy(given_node) if isinstance(found, Tensor) else found

        norm = AsModule(kind, {name: operand(name, found) for name, found in values.items()})
        with torch.no_grad():
            return NORMS[norm.kind](norm, tracer.proxy(x), mask.clone()).node  # type: ignore[attr-defined]

    def _passes(self, module: nn.Module, x: Any, out: Any) -> bool:
        """Whether a module passes its input on, as noise does in evaluation mode."""
        return (
            isinstance(x, fx.Node)
            and out is self.env[x]
            and (type(module) is nn.Identity or reads_training_flag(module))
        )

    def _variant(self, module: nn.Module, mask: Tensor | None, over: Tensor | None) -> nn.Module:
        if mask is not None and is_known(module) and not keeps_features_apart(module):
            return MaskedNorm(module, mask.clone(), None if over is None else over.clone())
        return self._baked(module, mask)

    def _baked(self, module: Any, mask: Tensor | None) -> nn.Module:
        """`module` with the rows of the features that are off multiplied by zero.

        torch multiplies matrices in another order where a weight requires a gradient, so equality to the bit takes the
        flags that the weights have in the model.
        """
        masked: dict[str, Tensor | None] = {}
        family = layer_family(module)
        if mask is not None and family is not None:
            entries = family.entries(module, mask.to(module.weight.dtype).unsqueeze(1), None)
            values = {name: getattr(module, name) for name in entries}
            masked = {name: p if p is None else p * entries[name][0].squeeze(-1) for name, p in values.items()}
        elif mask is not None:
            masked = dict(zip(("weight", "bias"), _masked_affine(module, mask), strict=True))
        result = copy.copy(module)
        vars(result).pop("fold", None)
        result._parameters = dict(module._parameters)
        for name, value in masked.items():
            old = module._parameters[name]
            learns = old is not None and old.requires_grad and not getattr(module, "fold", False)
            value = None if value is None else nn.Parameter(value.detach(), learns)
            if value is not None and old is not None:
                value = self.plain.parameter(old, value)
            result._parameters[name] = value
        return result


def _note_mask(node: fx.Node, module: nn.Module, mask: Tensor, ndim: int) -> None:
    """Note where the output of a layer or normalisation is zero."""
    if layer_family(module) is not None or zero_at_zero(module):
        node.meta[MASK] = (mask != 0).view(-1, *(1,) * (ndim - 1 - mask_dim(module, ndim, mask)))


def known_number(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The number, or tuple of sizes, that a function makes of constants; nothing if it makes a tensor, or of values."""
    given = args[1:] if node.target in (operator.getitem, operator.add) and isinstance(args[0], tuple) else args
    found: list[fx.Node] = []
    fx.node.map_arg((given, kwargs), found.append)
    if node.op != "call_function" or not node.all_input_nodes or found:
        return []
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    return [value] if isinstance(value, (bool, int, float, tuple)) or value is None else []


def _plain_modules(children: nn.Module, graph: fx.Graph, task: int) -> dict[str, nn.Module]:
    """Copies of the modules that answer for `task`, by path: torch's own layers, without parametrisations.

    Tied parameters stay tied.
    """
    found = {}
    for path in dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"):
        module = children.get_submodule(path)
        if not isinstance(module, (TaskState, PerTaskTensor)):
            found[path] = module[task] if isinstance(module, PerTask) else module
    copies = detached_copy(nn.ModuleList(found.values())).eval()
    for module in copies.modules():
        if isinstance(module, HatLayer):
            module.__class__ = module.base
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear and _is_linear(module):
            module.__class__ = nn.Linear
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        for hook in list(module._forward_pre_hooks.values()):
            if type(hook) in _WEIGHT_HOOKS:
                _WEIGHT_HOOKS[type(hook)](module, hook.name)
                module.get_parameter(hook.name).requires_grad_(False)
    return dict(zip(found, copies, strict=True))


def _is_linear(module: nn.Linear) -> bool:
    """Whether a subclass has nothing but weight and bias, and is found to compute what torch's own layer does."""
    tensors = {*module._parameters, *module._buffers, *module._modules}
    if tensors != {"weight", "bias"} or is_altered(module) or module.weight.is_meta:
        return False
    x = torch.randn(3, module.in_features).to(module.weight)
    return torch.equal(module(x), nn.functional.linear(x, module.weight, module.bias))


def _unparametrize(module: Any) -> None:
    """As torch's ``remove_parametrizations``, which would damage the original: a copy shares its class."""
    values = {name: nn.Parameter(getattr(module, name).detach(), False) for name in module.parametrizations}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module._load_state_dict_pre_hooks.clear()
    for name, value in values.items():
        module.register_parameter(name, value)


def _runs(fixed: Iterable[tuple[int, int]]) -> list[tuple[list[int], tuple[int, ...]]]:
    """Dimensions that follow each other, with their sizes."""
    runs: list[tuple[list[int], tuple[int, ...]]] = []
    for dim, size in fixed:
        if runs and runs[-1][0][-1] == dim - 1:
            runs[-1] = ([*runs[-1][0], dim], (*runs[-1][1], size))
        else:
            runs.append(([dim], (size,)))
    return runs
