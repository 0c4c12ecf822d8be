"""Elementwise operations: those that keep zero, those that do not, sums and products."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hatify.axes import Axes
from hatify.labels import ON, is_leaf, unexpanded, unexpanded_pair, varying_dims
from hatify.ops.registry import Call, Labels, Trait, aligned, alike, like_input, op

_PLAIN = {Trait.ELEMENTWISE}
_AFTER_HEADS = {Trait.ELEMENTWISE, Trait.AFTER_HEADS}


def first(node: fx.Node) -> tuple[Any, ...]:
    """The first operand."""
    return node.args[:1] or (node.kwargs.get("input"),)


def second(node: fx.Node) -> tuple[Any, ...]:
    """The second operand, a divisor."""
    return node.args[1:2] or (node.kwargs.get("other"),)


def both(node: fx.Node) -> tuple[Any, ...]:
    """Either operand."""
    return tuple(node.all_input_nodes)


def base(node: fx.Node) -> tuple[Any, ...]:
    """What is raised to a power, unless that is a number above one, or zero."""
    exponent = node.args[1] if len(node.args) > 1 else 1
    harmless = isinstance(exponent, (int, float)) and (exponent >= 1 or exponent == 0)
    return () if harmless else node.args[:1]


def of_unit_length(call: Call) -> Axes | None:
    """Everything along a dimension is needed for its length."""
    dim, names = call.argument(2, "dim", 1), aligned(call.out)
    if not isinstance(dim, int):
        return None
    return call.axes([(call.given(0, "input"), names)], names, filled=(dim % call.out.ndim - call.out.ndim,))


@op(
    torch.relu, torch.relu_, torch.tanh, torch.dropout, F.relu, F.tanh, F.dropout, "relu", "relu_", "tanh",
    "tanh_",
    traits=_AFTER_HEADS, cut=alike,
)  # fmt: skip
@op(
    torch.sin, torch.tan, torch.asin, torch.atan, torch.sinh, torch.neg, torch.abs, torch.sign, torch.square, torch.erf,
    torch.expm1, torch.log1p, torch.round, torch.trunc, torch.real, torch.nan_to_num, torch.hardshrink,
    F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardswish,
    F.tanhshrink, F.softshrink, F.softsign, F.rrelu, F.dropout1d, F.dropout2d, F.dropout3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Softsign, nn.RReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
    nn.Dropout3d, operator.neg, operator.abs, operator.pos,
    "sin", "neg", "abs", "sign", "square", "erf", "expm1", "log1p", "round", "trunc", "nan_to_num", "requires_grad_",
    traits=_PLAIN, cut=alike,
)  # fmt: skip
@op(torch.sqrt, "sqrt", traits=_PLAIN, cut=alike, singular=first)
@op(F.normalize, traits=_AFTER_HEADS, cut=of_unit_length)
@op(F.local_response_norm, nn.LocalResponseNorm, traits=_PLAIN)
def zero_preserving(call: Call) -> Labels:
    """f(0) = 0 elementwise: the support stays as it is. (Normalising to unit length is of this kind too.)"""
    return call.label(0)


@op(torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_", traits=_AFTER_HEADS, cut=alike)
@op(
    torch.exp, torch.cos, torch.cosh, torch.acos, torch.exp2, torch.erfc, F.alpha_dropout, F.feature_alpha_dropout,
    F.hardsigmoid, F.softplus, F.logsigmoid, F.threshold, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid,
    nn.Threshold, nn.AlphaDropout, nn.FeatureAlphaDropout, "exp", "cos", "cosh",
    traits=_PLAIN, cut=alike,
)  # fmt: skip
def bounded_at_zero(call: Call) -> Labels:
    """f(0) is finite but not zero: a mask behind it makes an off feature zero again."""
    return call.mask(call.label(0))


@op(torch.clamp, "clamp", "clamp_", traits=_AFTER_HEADS, cut=alike)
@op(torch.clip, "clip", nn.Hardtanh, F.hardtanh, F.hardtanh_, traits=_PLAIN, cut=alike)
def clamp(call: Call) -> Labels:
    """Clamping keeps zero if zero lies within the bounds."""
    if call.module is not None:
        low, high = (getattr(call.module, bound) for bound in ("min_val", "max_val"))
    else:
        # As the graph has them: a bound that a size or a value gives is another one for other inputs.
        low, high = call.given(1, "min"), call.given(2, "max")
        low, high = call.node.kwargs.get("min_val", low), call.node.kwargs.get("max_val", high)
    numbers = all(bound is None or isinstance(bound, (int, float)) for bound in (low, high))
    within = numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return call.label(0) if within else call.mask(call.label(0))


@op(operator.pow, torch.pow, "pow", "pow_", traits=_PLAIN, cut=alike, singular=base)
def power(call: Call) -> Labels:
    """x ** p keeps zero for constant p > 0; a mask behind other powers keeps 1 or ∞ from features that are off."""
    exponent = call.given(1, "exponent")
    labels = call.label(0)
    if isinstance(exponent, (int, float)) and exponent > 0:
        return labels
    return call.mask(labels) if isinstance(labels, Tensor) and isinstance(call.out, Tensor) else call.all_on()


@op(operator.truediv, torch.div, "div", "div_", traits=_AFTER_HEADS, cut=alike, singular=second)
@op(torch.true_divide, "true_divide", operator.floordiv, traits=_PLAIN, cut=alike, singular=second)
def divide(call: Call) -> Labels:
    """x / y is zero where x is. The result of number / tensor is on.

    Where the divisor is zero too, for a feature that is off (a statistic of it), a mask makes the result zero.
    """
    labels, divisor = call.label(0), call.label(1, "other")
    if not isinstance(labels, Tensor) or not isinstance(call.out, Tensor):
        return call.all_on()
    labels = labels.expand(call.out.shape)
    quotient = isinstance(divisor, Tensor) and _features(divisor)
    return call.mask(labels, zero_stays=True, needed=True) if quotient else labels


@op(operator.add, torch.add, "add", "add_", traits=_AFTER_HEADS, cut=alike)
@op(
    operator.iadd, operator.sub, operator.isub, torch.sub, torch.subtract, torch.rsub, torch.maximum, torch.minimum,
    "sub", "sub_",
    traits=_PLAIN, cut=alike,
)  # fmt: skip
def add(call: Call) -> Labels:
    """A sum may be non-zero where either term may. Features that are added share a mask.

    A constant, an unmasked input or the output of a mixer over positions is ON everywhere; a mask behind the sum keeps
    such a term from filling features that are off.
    """
    if not isinstance(call.out, Tensor):
        return call.all_on()
    terms = call.given(0, "input"), call.given(1, "other")
    shape = call.out.shape
    a, b = unexpanded_pair(*(_expanded(call.labels_of(term), call.out) for term in terms))
    dims_a, dims_b = varying_dims(a), varying_dims(b)
    if _features(a) and _features(b) and not set(dims_a) & set(dims_b) and (dims_a or dims_b):
        # Features of one term lie across those of the other: they do not meet one to one.
        full = call.labels_of(terms[0])
        first = isinstance(full, Tensor) and full.shape == shape and bool(dims_a)
        return call.mask((a if first or not dims_b else b).expand(shape))
    result = call.space.either(a, b)
    filled = ((a == ON) & is_leaf(b)) | ((b == ON) & is_leaf(a))
    if not filled.any():
        return result.expand(shape)
    featured, dims = (a, dims_a) if _features(a) else (b, dims_b)
    if not dims:
        return call.all_on()
    return call.mask(torch.where(filled & is_leaf(featured), featured, result).expand(shape), zero_stays=True)


@op(operator.mul, torch.mul, "mul", "mul_", traits=_AFTER_HEADS, cut=alike)
@op(operator.imul, torch.multiply, "multiply", traits=_PLAIN, cut=alike)
def multiply(call: Call) -> Labels:
    """A product may be non-zero only where both factors may. Features that are multiplied share a mask."""
    if not isinstance(call.out, Tensor):
        return call.all_on()
    a, b = (_expanded(call.label(i, name), call.out) for i, name in enumerate(("input", "other")))
    dims_a, dims_b = set(varying_dims(a)), set(varying_dims(b))
    if _features(a) and _features(b) and not dims_a & dims_b:
        wide, narrow = (a, b) if len(dims_a) >= len(dims_b) else (b, a)
        return torch.where(wide == ON, narrow, wide)
    return call.space.both(a, b)


@op(torch.where, "where", traits=_PLAIN, cut=alike)
def where(call: Call) -> Labels:
    """Either branch."""
    chosen = (0, "self") if call.node.op == "call_method" else (1, "input")
    a, b = (_expanded(call.label(i, name), call.out) for i, name in (chosen, (2, "other")))
    return call.space.either(a, b)


@op(torch.masked_fill, "masked_fill", "masked_fill_", traits=_PLAIN, cut=alike)
def masked_fill(call: Call) -> Labels:
    """Filling with zero keeps the support; with anything else, everything may be on."""
    value = call.given(2, "value")
    return call.label(0).expand(call.out.shape) if isinstance(value, (int, float)) and value == 0 else call.all_on()


@op(torch.lerp, torch.addcmul, "lerp", "addcmul", traits=_PLAIN, cut=alike)
@op(
    torch.addcdiv, "addcdiv",
    traits=_PLAIN, cut=alike, singular=lambda node: node.args[2:3] or (node.kwargs.get("tensor2"),),
)  # fmt: skip
def blend(call: Call) -> Labels:
    """Sums of products, taken as sums."""
    tensors = [n for n in call.node.all_input_nodes if isinstance(call.labels_of(n), Tensor)]
    return reduce(call.space.either, (_expanded(call.labels_of(n), call.out) for n in tensors))


op(
    torch.log, torch.log2, torch.log10, torch.rsqrt, torch.reciprocal, torch.logit, torch.lgamma, torch.digamma,
    torch.special.logit, torch.special.entr, torch.special.gammaln, torch.special.digamma, "log", "log2", "log10",
    "rsqrt", "reciprocal", "logit", "lgamma", "digamma",
    singular=first,
)(like_input)  # fmt: skip
op(torch.remainder, torch.fmod, "remainder", "fmod", singular=second)(like_input)
op(torch.hypot, torch.xlogy, torch.special.xlogy, F.kl_div, "hypot", "xlogy", singular=both)(like_input)
op(torch.float_power, "float_power", singular=base)(like_input)


def _expanded(labels: Labels, out: Tensor) -> Tensor:
    return labels.expand(out.shape)


def _features(labels: Tensor) -> bool:
    """Whether any element is a feature."""
    return bool(is_leaf(unexpanded(labels)).any())
