"""Write one task's network down: a graph of torch's own operations and modules, with the masks baked in."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer
from torch.nn.utils import parametrize

from hatify.answers import check_argument, check_size
from hatify.axes import Dims
from hatify.classify import detached_copy, is_altered
from hatify.cutting import cut_along, cut_layer, cut_norm
from hatify.free import check_sizes
from hatify.model import HatModel
from hatify.nesting import TAKEN
from hatify.nn.functional import by_mode, masked, masked_off, view_along
from hatify.nn.layers import HatLayer
from hatify.nn.norms import NORMS, _masked_affine, is_known
from hatify.nn.per_task import PerTask, PerTaskTensor
from hatify.nn.state import TaskState
from hatify.ops.resize import CannotCut, resized
from hatify.removal import Removal, children_of, is_mask, layer_family
from hatify.rewrite import keeps_features_apart

#: Operations on sizes that can be carried out once the sizes are known.
_ARITHMETIC = ("_operator", "operator", "math", "builtins")
_WEIGHT_HOOKS = {"WeightNorm": nn.utils.remove_weight_norm, "SpectralNorm": nn.utils.remove_spectral_norm}


def plain_modules(model: HatModel, task: int) -> dict[str, nn.Module]:
    """Copies of the modules that answer for `task`, by path: torch's own layers, without parametrisations.

    Tied parameters stay tied.
    """
    children, found = children_of(model), {}
    for path in dict.fromkeys(str(n.target) for n in model.flat_graph.nodes if n.op == "call_module"):
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
            if type(hook).__name__ in _WEIGHT_HOOKS:
                _WEIGHT_HOOKS[type(hook).__name__](module, hook.name)
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


class Writer:
    """Writes the network of one task, node by node.

    Args:
        model: the converted model, in evaluation mode.
        modules: the task's plain modules; those that change are copied.
        removal: which indices are kept.
        task: the task.

    Attributes:
        values: what each node of the model's graph has become: a node of the new graph, or a constant.
        written: the new nodes for each node of the model's graph.
        refused: nodes of the model's graph that cannot do without what was to go.
    """

    def __init__(self, model: HatModel, modules: dict[str, nn.Module], removal: Removal, task: int) -> None:
        self.model, self.modules, self.removal, self.task = model, modules, removal, task
        self.children = fx.Interpreter(children_of(model), graph=model.flat_graph)
        self.device = model.task_state.scale.device
        self.graph = fx.Graph()
        self.graph._codegen = copy.deepcopy(model.flat_graph._codegen)
        self.root: dict[str, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self.cut: dict[str, nn.Module] = {}
        self.variants: dict[tuple[str, str | None], nn.Module] = {}
        self.refused: set[fx.Node] = set()
        self.identity = nn.Identity()
        self.tied: dict[int, list[nn.Parameter]] = {}

    def write(self) -> fx.GraphModule:
        """The network, in evaluation mode."""
        for node in self.model.flat_graph.nodes:
            last = next(iter(reversed(self.graph.nodes)), None)
            self.values[node] = self._write(node)
            self.written[node] = _after(self.graph, last)
        for node in reversed(self.graph.nodes):
            if not node.users and _only_reads(node):
                self.graph.erase_node(node)
        return fx.GraphModule(self.root, self.graph, class_name=f"Task{self.task}").eval()

    def _write(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if is_mask(node):
            return None
        if node.op == "get_attr":
            return self._attribute(node, self.children.fetch_attr(str(node.target)))
        if node.op == "call_module":
            owner = self.children.fetch_attr(str(node.target))
            if isinstance(owner, TaskState):
                return None
            if isinstance(owner, PerTaskTensor):
                return self._attribute(node, getattr(owner, str(self.task)))
            return self._module(node, args, {k: v for k, v in kwargs.items() if v is not None or k != "mask"})
        if node.target in (masked, masked_off):
            return self._masked(node, args[0])
        if node.target in (check_size, check_argument):
            return self._guard(*args)
        if node.target is check_sizes:
            return self._guard_sizes(*args)
        if node.target in (getattr, "size") and (sizes := self._sizes(node, args, kwargs)) is not None:
            return sizes
        if node.op in ("call_function", "call_method"):
            if node.target is by_mode or _is_known(node, args):
                return node.target(*args, **kwargs)  # type: ignore[operator]
            try:
                target, args, kwargs = resized(node, args, kwargs, self.removal.axes)
            except CannotCut:
                self.refused.add(node)
                target = node.target
            op = "call_method" if isinstance(target, str) else "call_function"
            return self.graph.create_node(op, target, args, kwargs, node.name)
        return self.graph.create_node(node.op, node.target, args, kwargs, node.name)

    # Sizes -----------------------------------------------------------------------------------------------------------

    def _sizes(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A size that was cut counts as it was wherever it is used as a number; None if none was."""
        dims = self.removal.axes[node.args[0]]  # type: ignore[index]
        if not isinstance(dims, Dims) or not any(axis.cut for axis in dims):
            return None
        if node.target is getattr:
            if args[1] != "shape":
                return None
        elif args[1:] or kwargs:
            axis = dims[args[1] if args[1:] else kwargs["dim"]]
            return axis.kept.numel() if axis.cut else None
        shape = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        return tuple(
            axis.kept.numel() if axis.cut else self.graph.call_function(operator.getitem, (shape, d))
            for d, axis in enumerate(dims)
        )

    def _guard(self, found: Any, traced: Any, name: Any = "a size or condition") -> None:
        if isinstance(found, fx.Node):
            same = self.graph.call_function(operator.eq, (found, traced))
            message = f"the network was traced where {name} is {traced}, but this input makes it different"
            self.graph.call_function(torch._assert, (same, message))

    def _guard_sizes(self, value: Any, name: Any, fixed: Any) -> None:
        """Of an input that is a tensor; the sizes of others are left to what they meet."""
        if not isinstance(value, fx.Node) or len(fixed) != 1:
            return
        for dims, sizes in _runs(fixed[0]):
            shape = self.graph.call_function(getattr, (value, "shape"))
            found = self.graph.call_function(operator.getitem, (shape, slice(dims[0], dims[-1] + 1 or None)))
            self._guard(found, sizes, f"the sizes of {name} from dimension {dims[0]} on")

    # Parameters and buffers ------------------------------------------------------------------------------------------

    def _attribute(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value  # whether the network is training
        name = str(node.target)
        cut = cut_along(value.detach(), self.removal.axes[node])
        cut = self._parameter(value, cut) if isinstance(value, nn.Parameter) else cut.clone()
        inside = next((path for path in self.modules if name.startswith(f"{path}.")), None)
        if inside is not None:
            name = name.replace(".", "_")
        read = self._get(name, cut)
        alone = any(user.op == "call_method" or len(user.all_input_nodes) == 1 for user in node.users)
        if isinstance(cut, nn.Parameter) or not alone:
            return read
        # Unpickling traces the code, where buffers, unlike outputs of modules, are tensors that meet no placeholders.
        return self.graph.create_node("call_module", self._store("buffer", self.identity), (read,))

    def _get(self, name: str, value: Tensor) -> fx.Node:
        """A node that reads a parameter or buffer, which is stored under `name` if that is free."""
        return self.graph.create_node("get_attr", self._store(name, value))

    def _store(self, name: str, value: Any) -> str:
        """Keep a module, parameter or buffer under `name`, or under a similar one where that is taken."""
        first, dot, rest = name.partition(".")
        name = f"{first}_{dot}{rest}" if first in TAKEN else name
        if any(name.startswith(f"{path}.") for path, held in self.root.items() if isinstance(held, nn.Module)):
            name = name.replace(".", "_")
        free, number = name, 1
        while self._is_taken(free, value):
            number += 1
            free = f"{name}_{number}"
        self.root[free] = value
        return free

    def _is_taken(self, name: str, value: Any) -> bool:
        inside = isinstance(value, nn.Module) and any(path.startswith(f"{name}.") for path in self.root)
        return inside or self.root.get(name, value) is not value

    def _parameter(self, source: Tensor, value: Tensor) -> nn.Parameter:
        """`value` as a parameter: one and the same for equal parts of one source, so that ties hold."""
        known = self.tied.setdefault(id(source), [])
        for parameter in known:
            if torch.equal(parameter, value):
                return parameter
        known.append(value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone(), source.requires_grad))
        return known[-1]

    # Masks -----------------------------------------------------------------------------------------------------------

    def _masked(self, node: fx.Node, x: Any) -> Any:
        """The product with a mask, left out where what is kept is on."""
        dims = self.removal.axes[node]
        view = view_along(self.removal.masks[node], node.args[2])  # type: ignore[arg-type]
        view = cut_along(view, dims).to(self.device)
        if self.removal.compact and view.all():
            return x
        name = str(node.args[1])
        factor = self._get(name, view.to(self.removal.dtypes[node], copy=True))
        product = self.graph.call_function(operator.mul, (x, factor))
        if node.target is masked:
            return product
        return self.graph.call_function(torch.where, (self._get(f"{name}_off", view == 0), 0.0, product))

    def _module(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if node in self.removal.passed:
            return x
        path, mask = str(node.target), self.removal.masks.get(node)
        if mask is not None:
            mask = self._cut_mask(path, mask)
        norm = is_known(self.modules[path])
        if norm and mask is not None and not keeps_features_apart(self.modules[path]):
            return self._recorded(path, self._cut(path), NORMS[type(self.modules[path])], x, node, mask)
        key = (path, None if mask is None else str(node.kwargs["mask"]))
        if key not in self.variants:
            self.variants[key] = self._baked(self._cut(path), self.modules[path], mask)
        module = self.variants[key]
        if norm and not type(module).__module__.startswith("torch."):
            return self._recorded(path, module, type(module).forward, x, node)
        return self.graph.create_node("call_module", self._store(path, module), args, kwargs, node.name)

    def _cut_mask(self, path: str, mask: Tensor) -> Tensor | None:
        """The kept part of a mask; None if all of that is on.

        To the bit, a product with ones is not the same as none: it changes which kernels follow.
        """
        if path in self.removal.layers:
            mask = mask[self.removal.layers[path][1].kept]
        elif path in self.removal.norms:
            dims = self.removal.norms[path]
            feature = 0 if len(dims) == 1 else [a.kept.numel() for a in dims].index(mask.numel())
            mask = mask[dims[feature].kept]
        return None if self.removal.compact and mask.all() else mask.to(self.device)

    def _cut(self, path: str) -> nn.Module:
        """The module without the features that go."""
        if path in self.cut:
            return self.cut[path]
        module: Any = self.modules[path]
        if path in self.removal.layers:
            read, written = self.removal.layers[path]
            if written.cut or (read is not None and read.cut):
                module = copy.deepcopy(module)
                cut_layer(module, None if read is None else read.kept, written.kept)
        elif path in self.removal.norms and any(axis.cut for axis in self.removal.norms[path]):
            module = copy.deepcopy(module)
            cut_norm(module, self.removal.norms[path])
        self.cut[path] = module
        return module

    def _baked(self, module: Any, source: Any, mask: Tensor | None) -> nn.Module:
        """`module`, made of `source`, with the rows of the features that are off multiplied by zero.

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
            result._parameters[name] = None if value is None else nn.Parameter(value.detach(), learns)
        for name, parameter in result._parameters.items():
            before = source._parameters[name]
            if parameter is not None and before is not None and parameter is not before:
                result._parameters[name] = self._parameter(before, parameter)
        return result

    def _recorded(
        self,
        path: str,
        norm: nn.Module,
        forward: Callable[..., Any],
        x: fx.Node,
        node: fx.Node,
        *mask: Tensor,
    ) -> fx.Node:
        """A normalisation in torch's own operations."""
        tensors = {id(t): name for name, t in (*norm.named_parameters(), *norm.named_buffers())}
        dtype, ndim = self.removal.dtypes[node.all_input_nodes[0]], len(self.removal.axes[node])
        with torch.no_grad():
            return forward(norm, _NormTracer(self, path, tensors, dtype, ndim).proxy(x), *mask).node


class _NormTracer(GraphAppendingTracer):
    """Records a normalisation; all that does not depend on its input becomes a constant."""

    def __init__(self, writer: Writer, path: str, tensors: dict[int, str], dtype: torch.dtype, ndim: int) -> None:
        super().__init__(writer.graph)
        self.writer, self.path, self.tensors, self.dtype, self.ndim = writer, path, tensors, dtype, ndim

    def proxy(self, node: fx.Node) -> _NormProxy:
        return _NormProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        for name in ("weight", "bias"):
            value = kwargs.get(name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                kwargs = {**kwargs, name: nn.Parameter(value.detach())}
                self.tensors[id(kwargs[name])] = name
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        return self.writer._get(f"{self.path}.{self.tensors.get(id(a), 'constant')}", a)


class _NormProxy(fx.Proxy):
    tracer: _NormTracer

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.node.target == "float" else self.tracer.dtype

    @property
    def ndim(self) -> int:
        return self.tracer.ndim

    def dim(self) -> int:
        return self.tracer.ndim


def _runs(fixed: Iterable[tuple[int, int]]) -> list[tuple[list[int], tuple[int, ...]]]:
    """Dimensions that follow each other, with their sizes."""
    runs: list[tuple[list[int], tuple[int, ...]]] = []
    for dim, size in fixed:
        if runs and runs[-1][0][-1] == dim - 1:
            runs[-1] = ([*runs[-1][0], dim], (*runs[-1][1], size))
        else:
            runs.append(([dim], (size,)))
    return runs


def _after(graph: fx.Graph, last: fx.Node | None) -> list[fx.Node]:
    nodes = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        nodes.append(node)
    return nodes[::-1]


def _is_known(node: fx.Node, args: Any) -> bool:
    """Whether a number or a tuple of sizes follows from constants."""
    if not node.all_input_nodes or getattr(node.target, "__module__", "") not in _ARITHMETIC:
        return False
    if node.target in (operator.getitem, operator.add) and isinstance(args[0], (tuple, list)):
        return all(not isinstance(a, fx.Node) for a in args[1:])
    found: list[fx.Node] = []
    fx.node.map_arg(args, found.append)
    return not found


def _only_reads(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target in (getattr, operator.getitem, "size", "dim")
