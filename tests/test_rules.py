"""Every rule against execution: where the labels say that a value is off, the masked computation must yield zero."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hatify.classify import classify
from hatify.labels import FIRST_RAW, ON, ZERO, LabelSpace
from hatify.ops import OPERATIONS, Findings
from hatify.support import SupportInterpreter

# Cases: one call of one operation ------------------------------------------------------------------------------------


#: How support labels pass through each operation.
RULES = {target: known.labels for target, known in OPERATIONS.items()}


@dataclass(frozen=True, eq=False)
class X:
    """A tensor argument whose support is drawn at random."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Given:
    """A tensor argument without features: an index, a condition."""

    value: Tensor


@dataclass(frozen=True)
class Case:
    """A call of `target` (a function, the name of a tensor method, or a module) with arguments that may be `X`."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Any:
        """What the rule is registered under."""
        return type(self.target) if isinstance(self.target, nn.Module) else self.target

    @property
    def name(self) -> str:
        if isinstance(self.target, (nn.Module, str)):
            called = repr(self.target)
        else:
            called = f"{getattr(self.target, '__module__', '')}.{self.target.__name__}"
        shown = [repr(a.shape) if isinstance(a, X) else "index" if isinstance(a, Given) else repr(a) for a in self.args]
        return f"{called}({', '.join([*shown, *self.kwargs])})"


def x(*shape: int) -> X:
    return X(shape)


def call(target: Any, *args: Any, **kwargs: Any) -> Case:
    return Case(target, args, kwargs)


def graph_of(case: Case) -> tuple[nn.Module, fx.Graph, list[tuple[int, ...]]]:
    """A graph that makes the call and returns the result and its tensor arguments, in case they were written to."""
    root, graph, shapes = nn.Module(), fx.Graph(), []
    places: list[fx.Node] = []
    constants: list[fx.Node] = []

    def placed(argument: Any) -> Any:
        if isinstance(argument, X):
            shapes.append(argument.shape)
            places.append(graph.placeholder(f"x{len(places)}"))
            return places[-1]
        if isinstance(argument, Given):
            root.register_buffer(f"given{len(constants)}", argument.value)
            constants.append(graph.get_attr(f"given{len(constants)}"))
            return constants[-1]
        if isinstance(argument, (tuple, list)):
            return type(argument)(placed(a) for a in argument)
        return argument

    args = tuple(placed(a) for a in case.args)
    kwargs = {key: placed(value) for key, value in case.kwargs.items()}
    if isinstance(case.target, nn.Module):
        root.add_module("operation", case.target.eval())
        node = graph.call_module("operation", args, kwargs)
    elif isinstance(case.target, str):
        node = graph.call_method(case.target, args, kwargs)
    else:
        node = graph.call_function(case.target, args, kwargs)
    graph.output((node, *places))
    return root, graph, shapes


def every_case() -> Iterator[Case]:
    yield from _pointwise()
    yield from _arithmetic()
    yield from _reductions()
    yield from _movement()
    yield from _contractions()
    yield from _normalisations()


def _pointwise() -> Iterator[Case]:
    for key, rule in RULES.items():
        if rule.__name__ not in ("zero_preserving", "bounded_at_zero"):
            continue
        if isinstance(key, str) and not hasattr(Tensor, key):
            continue
        special = {
            F.threshold: (0.1, 2.0), torch.dropout: (0.5, False), nn.Threshold: (0.1, 2.0), nn.LocalResponseNorm: (3,),
            F.local_response_norm: (3,),
        }  # fmt: skip
        name = getattr(key, "__name__", str(key))
        spatial = next((d for d in (1, 2, 3) if f"{d}d" in name), 1 if "response" in name.lower() else 0)
        shape = (2, 4, *(3,) * spatial)
        if isinstance(key, type):
            yield call(key(*special.get(key, ())), x(*shape))
        else:
            yield call(key, x(*shape), *special.get(key, ()))
    yield call(F.relu, x(2, 4), inplace=True)
    yield call(F.leaky_relu, x(2, 4), negative_slope=0.3)
    yield call(F.gelu, x(2, 4), approximate="tanh")
    yield call(nn.ReLU(inplace=True), x(2, 4))
    yield call(nn.ELU(inplace=True), x(2, 4))
    yield call(F.dropout, x(2, 4), p=0.5, training=True)
    yield call(F.dropout2d, x(2, 4, 3, 3), p=0.5, training=True)
    yield call(F.alpha_dropout, x(2, 4), p=0.5, training=True)
    yield call(F.feature_alpha_dropout, x(2, 4, 3), p=0.5, training=True)
    yield call(F.normalize, x(2, 4, 3), dim=1)
    yield call(F.normalize, x(2, 4, 3), dim=-1, p=1.0)
    yield call(nn.Hardtanh(0.2, 1.0), x(2, 4))
    yield call(F.hardtanh, x(2, 4), min_val=0.2)
    yield call(F.hardtanh, x(2, 4), -1.0, -0.2)
    yield call(F.hardtanh_, x(2, 4), 0.2, 1.0)
    yield call(F.hardtanh_, x(2, 4), max_val=-0.2)
    for low, high in ((-1.0, 1.0), (0.2, None), (None, -0.2), (None, 0.5), (-0.5, None), (0.2, 0.4)):
        yield call(torch.clamp, x(2, 4), low, high)
        yield call("clamp", x(2, 4), min=low, max=high)
        yield call(torch.clip, x(2, 4), min=low, max=high)
        yield call("clip", x(2, 4), low, high)
        yield call("clamp_", x(2, 4), low, high)
    for bound in (-0.3, 0.3):
        yield call(torch.clamp_min, x(2, 4), bound)
        yield call(torch.clamp_max, x(2, 4), bound)
        yield call(torch.clamp_max, x(2, 4), max=bound)
    yield call(torch.clamp, x(2, 4), x(2, 4))
    yield call(torch.clamp, x(2, 4), max=x(4))
    yield call(nn.Hardtanh(), x(2, 4))
    yield call(F.hardtanh, x(2, 4))
    yield call(torch.logsumexp, x(2, 4), 1)


def _arithmetic() -> Iterator[Case]:
    pairs = [((2, 4), (2, 4)), ((2, 4, 3), (4, 1)), ((2, 1, 4), (2, 3, 4)), ((2, 4, 3, 3), (1,))]
    for key, rule in RULES.items():
        family = rule.__name__
        if family in ("add", "multiply"):
            for a, b in pairs:
                if (
                    "_" not in str(key)[-2:] and not str(getattr(key, "__name__", "")).startswith("i")
                ) or torch.broadcast_shapes(a, b) == a:
                    yield call(key, x(*a), x(*b))
            yield call(key, x(2, 4), Given(torch.rand(4)))
            yield call(key, x(2, 4), Given(torch.zeros(4)))
            if getattr(key, "__name__", "") not in ("maximum", "minimum"):
                for number in (0, 0.5):
                    yield call(key, x(2, 4), number)
        elif family == "divide":
            yield call(key, x(2, 4), Given(torch.rand(4) + 0.5))
            if key != "div_":
                yield call(key, x(2, 1, 3), Given(torch.rand(4, 1) + 0.5))
            yield call(key, x(2, 4), 3.0)
        elif family == "power":
            for exponent in (2, 0.5, 1, 0):
                yield call(key, x(2, 4), exponent)
            yield call(key, x(2, 4), Given(torch.tensor([0.0, 1.0, 2.0, 3.0])))
    for target in (operator.add, operator.mul, operator.sub):
        yield call(target, 0.5, x(2, 4))
    yield call(operator.truediv, 2.0, Given(torch.rand(2, 4) + 0.5))
    yield call(operator.pow, 2.0, x(2, 4))
    yield call(torch.add, x(2, 4), x(2, 4), alpha=2)
    yield call(torch.add, input=x(2, 4), other=x(4))
    yield call(torch.mul, input=x(2, 4), other=x(4))
    yield call(torch.mul, x(2, 4), other=x(4))
    yield call(torch.div, x(2, 4), 3.0, rounding_mode="floor")
    condition = Given(torch.rand(2, 4) > 0.5)
    yield call(torch.where, condition, x(2, 4), x(2, 4))
    yield call(torch.where, condition, x(4), x(2, 1))
    yield call(torch.where, condition, x(2, 4), 0.0)
    yield call(torch.where, condition, x(2, 4), 1.0)
    yield call(torch.where, condition, input=x(2, 4), other=0.0)
    yield call("where", x(2, 4), condition, x(2, 4))
    for target in (torch.masked_fill, "masked_fill", "masked_fill_"):
        for value in (0, 0.0, 1.0, -math.inf):
            yield call(target, x(2, 4), condition, value)
        yield call(target, x(2, 4), condition, value=1.0)
        yield call(target, x(2, 4), mask=condition, value=0.0)
    for target in (torch.lerp, "lerp"):
        yield call(target, x(2, 4), x(2, 4), 0.3)
        yield call(target, x(2, 4), x(4), Given(torch.rand(4)))
    for target in (torch.addcmul, "addcmul"):
        yield call(target, x(2, 4), x(2, 4), x(4))
        yield call(target, x(2, 4), x(2, 4), x(4), value=0.5)
    for target in (torch.addcdiv, "addcdiv"):
        yield call(target, x(2, 4), x(2, 4), Given(torch.rand(4) + 0.5))


def _reductions() -> Iterator[Case]:
    by_dimension = {1: (2, 4, 6), 2: (2, 4, 4, 6), 3: (2, 4, 4, 4, 4)}
    for key, rule in RULES.items():
        name = getattr(key, "__name__", str(key))
        if rule.__name__ == "spatial":
            dimension = next((d for d in by_dimension if f"{d}d" in name), 2)
            shape = by_dimension[dimension]
            unbatched = shape[1:]
            if isinstance(key, type):
                if "Upsampl" in name:
                    yield call(key(scale_factor=2), x(*shape))
                    continue
                module = key(2.0, 2) if name.startswith("LP") else key(2)
                yield call(module, x(*shape))
                yield call(module, x(*unbatched))
                if "Adaptive" not in name and "Avg" in name:
                    yield call(key(3, stride=1, padding=1), x(*shape))
            elif name in ("interpolate", "upsample"):
                yield call(key, x(*shape), scale_factor=2)
                yield call(key, x(*shape), size=(3, 5), mode="bilinear")
            elif name.startswith("lp_"):
                yield call(key, x(*shape), 2.0, 2)
            else:
                yield call(key, x(*shape), 2)
                yield call(key, x(*unbatched), 2)
                if "max" in name and "adaptive" not in name:
                    yield call(key, x(*shape), kernel_size=3, stride=1, padding=1)
        elif rule.__name__ == "reduce":
            for shape in ((2, 4), (2, 3, 4), (2, 4, 3, 3)):
                for dim in dict.fromkeys((1, -1, len(shape) - 2)):
                    yield call(key, x(*shape), dim)
                    if name not in ("norm", "linalg_vector_norm"):
                        yield call(key, x(*shape), dim=dim, keepdim=True)
            if name not in ("max", "min", "median", "norm", "linalg_vector_norm"):
                yield call(key, x(2, 4, 3, 3), (2, 3))
                yield call(key, x(2, 3, 4), dim=(0, 1))
            if name not in ("logsumexp", "var_mean", "std_mean"):
                yield call(key, x(2, 4))
            if name in ("norm", "linalg_vector_norm"):
                yield call(key, x(2, 3, 4), 2, 1)
                yield call(key, x(2, 3, 4), 2, 1, True)
                yield call(key, x(2, 3, 4), dim=1, keepdim=True)
            if name in ("max", "min"):
                yield call(key, x(2, 4), x(4))
                yield call(key, x(2, 4), other=x(2, 4))
        elif rule.__name__ == "mixing":
            yield call(key(1) if isinstance(key, type) else key, x(2, 4, 3), *(() if isinstance(key, type) else (1,)))
            if not isinstance(key, type):
                yield call(key, x(2, 4, 3), dim=-1)


#: Arguments behind the tensor, by the name of the operation; several calls each.
MOVES: dict[str, list[tuple[tuple[int, ...], tuple[Any, ...]]]] = {
    "reshape": [((2, 4, 3), (2, 12)), ((2, 12), (2, 3, 4)), ((2, 4, 3), (-1, 3))],
    "view": [((2, 4, 3), (2, 12)), ((2, 12), (2, 3, 4)), ((6, 4), (2, -1, 4))],
    "view_as": [((2, 4, 3), (Given(torch.zeros(2, 12)),))],
    "reshape_as": [((2, 4, 3), (Given(torch.zeros(8, 3)),))],
    "flatten": [((2, 4, 3), (1,)), ((2, 4, 3), (0, 1)), ((2, 4, 3), ())],
    "permute": [((2, 4, 3), (0, 2, 1)), ((2, 4, 3, 5), (0, 2, 3, 1))],
    "transpose": [((2, 4, 3), (1, 2)), ((2, 4, 3), (-1, -2))],
    "swapaxes": [((2, 4, 3), (1, 2))],
    "swapdims": [((2, 4, 3), (1, 2))],
    "movedim": [((2, 4, 3), (1, -1))],
    "moveaxis": [((2, 4, 3), (1, 0))],
    "squeeze": [((2, 4, 1), (-1,)), ((1, 4, 3), ())],
    "unsqueeze": [((2, 4), (1,)), ((2, 4), (-1,))],
    "squeeze_": [((2, 4, 1), (-1,))],
    "unsqueeze_": [((2, 4), (1,))],
    "unflatten": [((2, 12), (1, (3, 4))), ((2, 12), (-1, (-1, 6)))],
    "t": [((2, 4), ())],
    "adjoint": [((2, 4, 3), ())],
    "ravel": [((2, 4), ())],
    "chunk": [((2, 4, 3), (2, 1)), ((2, 5), (2, -1))],
    "split_with_sizes": [((2, 5), ([2, 3], 1))],
    "split": [((2, 4, 3), (1, 1)), ((2, 5), ([2, 3], 1))],
    "tensor_split": [((2, 5), (2, 1)), ((2, 5), ((1, 3), 1))],
    "unbind": [((2, 4, 3), (1,)), ((2, 4), ())],
    "select": [((2, 4, 3), (1, 0)), ((2, 4, 3), (2, -1))],
    "narrow": [((2, 4, 3), (1, 1, 2))],
    "roll": [((2, 4, 3), (1, 1)), ((2, 4, 3), ((1, 2), (1, 2))), ((2, 4), (1,))],
    "flip": [((2, 4, 3), ([1],)), ((2, 4, 3), ((0, 2),))],
    "rot90": [((2, 4, 3), (1, [1, 2]))],
    "tile": [((2, 4), ((1, 3),)), ((2, 4), ((2, 1, 2),))],
    "repeat": [((2, 4), (1, 3)), ((2, 4), (2, 1, 2))],
    "repeat_interleave": [((2, 4), (2, 1)), ((2, 4), (3,))],
    "expand": [((2, 1, 4), (2, 3, 4)), ((1, 4), (5, -1))],
    "expand_as": [((2, 1, 4), (Given(torch.zeros(2, 3, 4)),))],
    "broadcast_to": [((1, 4), ((3, 4),))],
    "index_select": [((2, 4), (1, Given(torch.tensor([2, 0, 2])))), ((3, 4), (0, Given(torch.tensor([1]))))],
    "gather": [((2, 4), (1, Given(torch.tensor([[2, 0], [1, 1]]))))],
    "take_along_dim": [((2, 4), (Given(torch.tensor([[2, 0], [1, 1]])), 1))],
    "tril": [((3, 4), ()), ((2, 4, 4), (-1,))],
    "triu": [((3, 4), ()), ((2, 4, 4), (1,))],
    "diagonal": [((3, 4), ()), ((2, 4, 4), (0, 1, 2))],
    "as_strided": [((4, 6), ((3, 2), (6, 1)))],
    "channel_shuffle": [((2, 4, 3, 3), (2,))],
    "pixel_shuffle": [((2, 8, 3, 3), (2,))],
    "pixel_unshuffle": [((2, 2, 4, 4), (2,))],
    "clone": [((2, 4), ())],
    "detach": [((2, 4), ())],
    "contiguous": [((2, 4), ())],
    "atleast_2d": [((4,), ())],
    "unfold": [],
    "mT": [],
}


def _movement() -> Iterator[Case]:
    for key, rule in RULES.items():
        if rule.__name__ == "run_on_labels" and not isinstance(key, type):
            name = getattr(key, "__name__", str(key))
            for shape, rest in MOVES.get(name, []):
                if name in ("reshape", "permute") and not isinstance(key, str):
                    rest = (rest,)
                yield call(key, x(*shape), *rest)
    yield call(torch.flatten, input=x(2, 4, 3), start_dim=1)
    yield call("flatten", x(2, 4, 3), start_dim=1)
    yield call(torch.transpose, x(2, 4, 3), dim0=1, dim1=2)
    for target in (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack):
        dims: tuple[Any, ...] = () if target in (torch.hstack, torch.vstack) else (1,)
        yield call(target, [x(2, 4), x(2, 4)], *dims)
        yield call(target, (x(2, 4, 3), x(2, 4, 3), x(2, 4, 3)), *dims)
    yield call(torch.cat, [x(1, 1, 4), x(1, 3, 4)], dim=1)
    yield call(torch.cat, tensors=[x(2, 4), x(2, 2)], dim=-1)
    yield call(torch.cat, [x(2, 4), Given(torch.zeros(2, 2))], 1)
    yield call(torch.broadcast_tensors, x(2, 4), x(4))
    yield call(torch.meshgrid, x(2), x(3), indexing="ij")
    yield call(F.unfold, x(2, 4, 4, 4), 2)
    yield call(F.unfold, x(2, 4, 4, 4), kernel_size=2, padding=1, stride=2)
    yield call("unfold", x(2, 4, 6), 2, 2, 2)
    yield call(F.fold, x(2, 12, 9), 4, 2)
    yield call(F.fold, x(12, 4), output_size=(4, 4), kernel_size=2, stride=2)
    yield call("mT", x(2, 3)) if callable(getattr(Tensor, "mT", None)) else call(getattr, x(2, 3), "mT")
    for name in ("T", "mT", "data"):
        yield call(getattr, x(3, 4), name)
    for module, shape in (
        (nn.Flatten(), (2, 4, 3)), (nn.Flatten(0, 1), (2, 4, 3)), (nn.Unflatten(1, (2, 2)), (2, 4)),
        (nn.PixelShuffle(2), (2, 8, 2, 2)), (nn.PixelUnshuffle(2), (2, 2, 4, 4)), (nn.ChannelShuffle(2), (2, 4, 3, 3)),
        (nn.Unfold(2), (2, 3, 4, 4)), (nn.Identity(), (2, 4)),
        (nn.Fold(4, 3, padding=1, stride=2), (2, 18, 4)),
    ):  # fmt: skip
        yield call(module, x(*shape))
    for spatial, kinds in {
        1: (nn.ZeroPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d),
        2: (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
        3: (nn.ZeroPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d, nn.CircularPad3d),
    }.items():
        for kind in kinds:
            yield call(kind(1), x(2, 3, *(4,) * spatial))
    for index in (0, slice(1, None), (slice(None), 0), (slice(None), slice(None, None, 2)), (..., -1), (0, None, ...)):
        yield call(operator.getitem, x(2, 4, 3), index)
    yield call(operator.getitem, x(2, 4), (slice(None), [0, 2]))
    yield call(operator.getitem, x(3, 4), Given(torch.tensor([2, 0])))
    yield call(operator.getitem, x(3, 4), Given(torch.tensor([True, False, True])))
    for target in dict.fromkeys((F.pad, torch._C._nn.pad)):
        yield call(target, x(2, 4, 3), (1, 1))
        yield call(target, x(2, 4, 3), (0, 0, 1, 2))
        yield call(target, x(2, 4, 3), (0, 0, 1, 2), "constant", 0.0)
        yield call(target, x(2, 4, 3), (0, 0, 0, 2), "constant", 1.0)
        yield call(target, x(2, 4, 3), (0, 0, 0, 2), value=0.5)
        yield call(target, x(2, 4, 3), (1, 1), "reflect")
        yield call(target, x(2, 4, 3), pad=(1, 1), mode="circular")
        yield call(target, x(2, 4, 3), (1, -1, -1, 0))
    for key, rule in RULES.items():
        if rule.__name__ == "cast":
            rest = {"to": (torch.float64,), "type": (torch.float64,), "type_as": (Given(torch.ones(1).double()),)}
            if key != "cuda":
                yield call(key, x(2, 4), *rest.get(key, ()))
    for target in (torch.zeros, torch.empty, torch.ones, torch.rand, torch.randn):
        yield call(target, 2, 3)
    for target, sizes in ((torch.arange, (3,)), (torch.eye, (3,)), (torch.linspace, (0, 1, 3))):
        yield call(target, *sizes)
    yield call(torch.full, (2, 3), 1.0)
    for target in (torch.zeros_like, torch.empty_like, "zero_"):
        yield call(target, x(2, 4))
    for target in ("new_zeros", "new_empty"):
        yield call(target, x(2, 4), (3, 2))


def _contractions() -> Iterator[Case]:
    shapes = {"mm": [((3, 4), (4, 5))], "bmm": [((2, 3, 4), (2, 4, 5))]}
    default = [
        *shapes["mm"],
        *shapes["bmm"],
        ((2, 3, 4), (4, 5)),
        ((2, 2, 3, 4), (2, 4, 5)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
    ]
    for key, rule in RULES.items():
        if rule.__name__ == "matmul":
            for a, b in shapes.get(getattr(key, "__name__", str(key)), default):
                yield call(key, x(*a), x(*b))
                yield call(key, x(*a), Given(torch.randn(b)))
    yield call(torch.matmul, input=x(3, 4), other=x(4, 5))
    yield call(F.scaled_dot_product_attention, x(2, 3, 4), x(2, 5, 4), x(2, 5, 6))
    yield call(F.scaled_dot_product_attention, x(2, 2, 3, 4), x(2, 2, 3, 4), x(2, 2, 3, 4), is_causal=True)
    yield call(F.scaled_dot_product_attention, x(1, 2, 3, 4), key=x(1, 2, 3, 4), value=x(1, 2, 3, 4))
    for equation, a, b in (
        ("bij,bjk->bik", (2, 3, 4), (2, 4, 3)), ("bli,io->blo", (2, 3, 4), (4, 2)), ("bhid,bhjd->bhij", (2, 2, 3, 4), (2, 2, 3, 4)),
        ("bc,bc->bc", (2, 4), (2, 4)), ("bc,c->b", (2, 4), (4,)), ("bc,bd->bcd", (2, 4), (2, 3)), ("bnc,c->cbn", (2, 3, 4), (4,)),
    ):  # fmt: skip
        for target in dict.fromkeys((torch.einsum, torch.functional.einsum)):
            yield call(target, equation, x(*a), x(*b))
            yield call(target, equation, x(*a), Given(torch.randn(b)))
    yield call(torch.einsum, "bc->cb", x(2, 4))
    yield call(torch.einsum, "...c,cd->...d", x(2, 3, 4), x(4, 5))
    # A weight that is computed has no features of its own; one that is a parameter is tested with the networks.
    for key, rule in RULES.items():
        if rule.__name__ == "functional_layer":
            name = key.__name__
            spatial = next((d for d in (1, 2, 3) if f"{d}d" in name), 0)
            if "transpose" in name:
                yield call(key, x(2, 4, *(5,) * spatial), x(4, 6, *(3,) * spatial), x(6))
                yield call(key, x(2, 4, *(5,) * spatial), Given(torch.randn(4, 2, *(3,) * spatial)), groups=4)
                continue
            yield call(key, x(2, 4, *(5,) * spatial), Given(torch.randn(6, 4, *(3,) * spatial)), Given(torch.randn(6)))
            yield call(key, x(2, 4, *(5,) * spatial), x(6, 4, *(3,) * spatial))

    for target in (torch.addmm, "addmm"):
        for added in (x(3, 5), x(5), Given(torch.randn(5))):
            yield call(target, added, x(3, 4), x(4, 5))
            yield call(target, added, x(3, 4), Given(torch.randn(4, 5)), beta=0.5, alpha=2)
    for target in (torch.baddbmm, "baddbmm"):
        yield call(target, x(2, 3, 5), x(2, 3, 4), x(2, 4, 5))
        yield call(target, x(2, 1, 5), x(2, 3, 4), Given(torch.randn(2, 4, 5)))
    for target in (torch.mv, "mv"):
        yield call(target, x(3, 4), x(4))
    for target in (torch.addmv, "addmv"):
        yield call(target, x(3), x(3, 4), Given(torch.randn(4)))
    yield call(F.embedding, Given(torch.tensor([[0, 2], [1, 1]])), x(3, 4))


def _normalisations() -> Iterator[Case]:
    weight, bias = Given(torch.rand(4) + 0.5), Given(torch.randn(4))
    mean, variance = Given(torch.randn(4)), Given(torch.rand(4) + 0.5)
    for key, rule in RULES.items():
        if rule.__name__ != "functional_norm":
            continue
        functional = key.__module__.startswith("torch.nn")
        name = key.__name__
        if name in ("batch_norm", "instance_norm"):
            given = (mean, variance, weight, bias) if functional else (weight, bias, mean, variance)
            rest = (name == "instance_norm", 0.1, 1e-5, *(() if functional else (False,)))
            yield call(key, x(3, 4, 5), *given, *rest)
        elif name == "layer_norm":
            yield call(key, x(3, 5, 4), (4,), weight, bias)
            yield call(key, x(3, 4, 5), (4, 5))
        elif name == "rms_norm":
            yield call(key, x(3, 5, 4), (4,), weight)
        else:
            yield call(key, x(3, 4, 5), 2, weight, bias)


CASES = list(every_case())

# The oracle ----------------------------------------------------------------------------------------------------------


class Labelled(SupportInterpreter):
    """Starts from given labels of the inputs; keeps those of the outputs in `result`."""

    given: tuple[Tensor, ...] = ()
    result: Any = None

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            self.result = fx.node.map_arg(n.args[0], lambda node: self.labels[node])
        value = super().run_node(n)
        if n.op == "placeholder":
            self.labels[n] = self.given[int(str(n.target)[1:])]
        return value


class Masked(fx.Interpreter):
    """Executes a graph with the masks that the analysis asked for."""

    def __init__(self, root: nn.Module, graph: fx.Graph, findings: Findings, on: Callable[[Tensor], Tensor]) -> None:
        super().__init__(root, graph=graph)
        self.findings, self.on = findings, on

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.findings.asked:
            labels, dim, ndim, _ = self.findings.asked[n][-1]
            assert value.ndim == ndim
            shape = dim if isinstance(dim, tuple) else (-1, *(1,) * (ndim - 1 - dim))
            value = value * self.on(labels).view(shape)
        return value


def draw_labels(space: LabelSpace, shapes: list[tuple[int, ...]], source: random.Random) -> tuple[Tensor, ...]:
    """Labels for inputs: features along one dimension, some of them off for good or shared between inputs, or worse."""
    drawn: list[Tensor] = []
    for i, shape in enumerate(shapes):
        kind = source.choice(
            ("features", "features", "features", "shared", "mixed", "two kinds", "elements", "raw", "on")
        )
        wide = [d for d, n in enumerate(shape) if n > 1]
        if kind == "on" or not wide:
            drawn.append(torch.full((1,) * len(shape), ON).expand(shape))
            continue
        dim = source.choice(wide)
        view = [shape[d] if d == dim else 1 for d in range(len(shape))]
        own = space.feature_leaves(f"input {i}", shape[dim])
        if kind == "shared":
            own = space.feature_leaves(f"shared {shape[dim]}", shape[dim])
        if kind == "mixed":
            own = torch.tensor([source.choice((int(label), ON, ZERO)) for label in own])
        if kind == "elements":
            numel = torch.Size(shape).numel()
            drawn.append(space.feature_leaves(f"elements {i}", numel).view(shape))
        elif kind == "raw":
            drawn.append(space.raw_leaves(f"raw {i}", torch.Size(view)).expand(shape))
        elif kind == "two kinds" and len(wide) > 1:
            # The first position along another dimension holds other features, like a class token.
            labels = own.view(view).expand(shape).clone()
            across = source.choice([d for d in wide if d != dim])
            other = space.feature_leaves(f"first {i}", shape[dim]).view(view)
            labels.narrow(across, 0, 1).copy_(other)
            drawn.append(labels)
        else:
            drawn.append(own.view(view).expand(shape))
    return tuple(drawn)


def supports(space: LabelSpace, source: random.Random) -> Callable[[Tensor], Tensor]:
    """A random choice of features that are on, coupled ones alike, as a function from labels to booleans."""
    classes = space.classes()
    generator = torch.Generator().manual_seed(source.getrandbits(16))
    on = torch.rand(len(classes.root), generator=generator) < 0.5
    # A parameter that met no feature is not masked.
    on[classes.features :] = True
    # Of a leaf; labels of constants are leaves' numbers too, in front of the features.
    leaf = on[classes.root]
    leaf[ON], leaf[ZERO] = True, False

    def evaluate(labels: Tensor) -> Tensor:
        places = torch.where(labels >= FIRST_RAW, labels - FIRST_RAW + classes.features, labels)
        values = leaf[places.clamp(min=0)]
        for label in labels[labels < 0].unique().tolist():
            values = torch.where(labels == label, evaluate(torch.tensor(sorted(space.members(label)))).any(), values)
        return values

    return evaluate


def check(case: Case, couple: bool, source: random.Random) -> int:
    """Assert soundness on random labels and supports; returns how many zeros were promised."""
    return examine(*graph_of(case), couple, source)


def examine(
    root: nn.Module, graph: fx.Graph, shapes: list[tuple[int, ...]], couple: bool, source: random.Random
) -> int:
    """The same for a graph whose inputs have the given shapes."""
    space, findings = LabelSpace(couple), Findings()
    given_labels = draw_labels(space, shapes, source)
    values = [torch.randn(shape) for shape in shapes]
    interpreter = Labelled(root, graph, classify(root, (graph,), None, {}), space, findings)
    interpreter.given = tuple(labels.clone() for labels in given_labels)
    with torch.no_grad():
        interpreter.run(*(value.clone() for value in values))
        promised = 0
        for _ in range(3):
            on = supports(space, source)
            inputs = [value * on(labels) for value, labels in zip(values, given_labels, strict=True)]
            results = Masked(root, graph, findings, on).run(*(value.clone() for value in inputs))
            promised += _compare(results, interpreter.result, on)
    return promised


def _compare(value: Any, labels: Any, on: Callable[[Tensor], Tensor]) -> int:
    if isinstance(value, (tuple, list)):
        assert len(value) == len(labels)
        return sum(_compare(v, one, on) for v, one in zip(value, labels, strict=True))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0
    assert labels.shape == value.shape
    off = ~on(labels)
    assert value[off].eq(0).all(), f"{value}\nis not zero where\n{off.int()}\nis 1"
    return int(off.sum())


# Soundness -----------------------------------------------------------------------------------------------------------


def identity(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_what_a_rule_says_is_off_is_zero(case: Case) -> None:
    for seed in range(6):
        check(case, seed % 2 == 0, random.Random(seed))


def test_every_rule_has_a_case() -> None:
    # The first needs the device; of the others nothing is said but where they are infinite (tests/test_traps.py).
    untested = {"cuda", *(key for key, rule in RULES.items() if rule.__name__ == "like_input")}
    assert set(RULES) - {case.key for case in CASES} == untested


def test_every_method_that_has_a_rule_exists() -> None:
    assert [key for key in RULES if isinstance(key, str) and not hasattr(Tensor, key)] == []


# Compositions --------------------------------------------------------------------------------------------------------

#: Calls that take and yield tensors of one shape, and keep numbers small.
COMPOSABLE = [
    case
    for case in (*_pointwise(), *_arithmetic())
    if all(a.shape == (2, 4) for a in case.args if isinstance(a, X))
    and getattr(case.key, "__name__", case.key) not in (
        "exp", "exp2", "sinh", "cosh", "square", "tan", "sqrt", "log1p", "expm1", "asin", "acos", "power", "pow", "pow_", "erfc",
        "where", "nan_to_num",
    )
    and not any(value == -math.inf for value in case.args if isinstance(value, float))
    and case.key not in (F.alpha_dropout, F.feature_alpha_dropout, F.rrelu, nn.RReLU, nn.FeatureAlphaDropout)
]  # fmt: skip


def compose(source: random.Random) -> tuple[nn.Module, fx.Graph, list[tuple[int, ...]]]:
    """A graph of several calls, each on anything that came before: results are used twice and written to."""
    root, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder(f"x{i}") for i in range(3)]
    for step in range(source.randint(2, 5)):
        case = source.choice(COMPOSABLE)

        def placed(argument: Any, step: int = step) -> Any:
            if isinstance(argument, X):
                return source.choice(values)
            if isinstance(argument, Given):
                name = f"given{step}_{len(list(root.buffers()))}"
                root.register_buffer(name, argument.value)
                return graph.get_attr(name)
            return argument

        args = tuple(placed(a) for a in case.args)
        kwargs = {key: placed(value) for key, value in case.kwargs.items()}
        if isinstance(case.target, nn.Module):
            root.add_module(f"operation{step}", case.target.eval())
            values.append(graph.call_module(f"operation{step}", args, kwargs))
        elif isinstance(case.target, str):
            values.append(graph.call_method(case.target, args, kwargs))
        else:
            values.append(graph.call_function(case.target, args, kwargs))
        if source.random() < 0.3:
            # Moved there and back: a view, or a copy, of what came before.
            moved = graph.call_method("transpose", (source.choice(values), 0, 1))
            values.append(graph.call_method(source.choice(("transpose", "swapaxes")), (moved, 0, 1)))
    graph.output(tuple(values))
    return root, graph, [(2, 4)] * 3


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_what_rules_say_together_is_off_is_zero(first: int) -> None:
    for seed in range(first, first + 50):
        source = random.Random(seed)
        root, graph, shapes = compose(source)
        examine(root, graph, shapes, seed % 2 == 0, source)


#: Rules that make a promise at all: for these, a conservative answer would be a loss of tightness.
PROMISING = [
    call(torch.relu, x(2, 4)), call(torch.sigmoid, x(2, 4)), call(operator.add, x(2, 4), x(2, 4)),
    call(operator.mul, x(2, 4, 3, 3), x(4, 1, 1)), call(torch.flatten, x(2, 4, 3), 1), call(torch.cat, [x(2, 4), x(2, 4)], 1),
    call(nn.MaxPool2d(2), x(2, 4, 4, 4)), call(F.adaptive_avg_pool2d, x(2, 4, 4, 4), 1), call("mean", x(2, 4, 3, 3), (2, 3)),
    call(F.pad, x(2, 4, 3), (0, 0, 1, 2)), call(nn.PixelShuffle(2), x(2, 8, 2, 2)), call(torch.matmul, x(2, 3, 4), x(2, 4, 5)),
    call(F.scaled_dot_product_attention, x(2, 3, 4), x(2, 3, 4), x(2, 3, 4)), call("chunk", x(2, 4), 2, 1),
    call(F.layer_norm, x(3, 5, 4), (4,)), call("transpose", x(2, 4, 3), 1, 2), call(operator.getitem, x(2, 4, 3), (slice(None), 0)),
    call(F.interpolate, x(2, 4, 4, 4), scale_factor=2), call("clamp", x(2, 4), 0.2), call(torch.where, Given(torch.ones(4) > 0), x(2, 4), x(2, 4)),
    call(F.gelu, x(2, 4)), call(operator.truediv, x(2, 4), 3.0), call("pow", x(2, 4), 2), call(F.dropout, x(2, 4)),
]  # fmt: skip


@pytest.mark.parametrize("case", PROMISING, ids=identity)
def test_rules_do_promise_zeros(case: Case) -> None:
    assert sum(check(case, True, random.Random(seed)) for seed in range(20)) > 0
