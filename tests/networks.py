"""Generated networks: random architectures as ordinary modules with ordinary ``forward`` methods.

A network is a front end, some blocks, and an output layer. A *block* is a function that is given a source of choices
and the signal that comes in, and returns a module and the signal that goes out; the decorator `block` names the kinds
of signal it takes. To have a new construction generated, write the module and its block.

Conversion sees one example, of one size; sequences and images of other sizes may come later. Signals have the example's
sizes. Which others a network takes is found out by asking it, and `Generated` makes inputs of those, too.

Every choice is drawn from a ``random.Random``, so the same code serves hypothesis (`networks`), which can shrink what
it finds, and long runs of seeds (`generate`).
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

CHANNELS = (4, 8, 12)
VOCABULARY = 11
CLASSES = 3
#: Of sequences other than the example.
LENGTHS = (1, 2, 3, 4, 6, 7, 8, 9, 12, 16)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_AVG = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}
INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}
FUNCTIONAL_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Signal:
    """What flows between blocks: one sample of an ``image`` (C, *spatial), of ``tokens`` (L, C), or a ``vector`` (C,)."""

    kind: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.kind == "tokens" else self.shape[0]

    @property
    def spatial(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.kind == "tokens" else self.shape[1:]

    @property
    def channel_dim(self) -> int:
        """Of a batch; negative."""
        return -1 if self.kind == "tokens" else -len(self.shape)

    def wide(self, channels: int) -> Signal:
        """The same with another number of channels."""
        return (
            image(channels, *self.spatial) if self.kind == "image" else replace(self, shape=(*self.spatial, channels))
        )


def image(*shape: int) -> Signal:
    return Signal("image", shape)


def tokens(length: int, channels: int) -> Signal:
    return Signal("tokens", (length, channels))


def vector(channels: int) -> Signal:
    return Signal("vector", (channels,))


@dataclass
class Draw:
    """A source of choices, and a record of them."""

    random: random.Random
    blocks: list[str] = field(default_factory=list)
    depth: int = 0
    #: Statistics over a batch need two samples.
    smallest_batch: int = 1
    #: Whether what is drawn must take other numbers of positions than the example's.
    free: bool = False

    def open(self, signal: Signal) -> bool:
        """Whether the positions of `signal` must be left free."""
        return self.free and signal.kind != "vector"

    def one_of(self, *options: T) -> T:
        return self.random.choice(options)

    def flag(self) -> bool:
        return self.random.choice((False, True))

    def between(self, low: int, high: int) -> int:
        return self.random.choice(range(low, high + 1))

    def channels(self) -> int:
        return self.one_of(*CHANNELS)

    def divisor(self, most: int, *sizes: int) -> int:
        """A number of groups up to `most` that divides every size."""
        return self.one_of(*(n for n in range(1, most + 1) if not any(size % n for size in sizes)))

    def note(self, name: str) -> None:
        self.blocks.append(name)


Made = tuple[nn.Module, Signal]
Block = Callable[[Draw, Signal], Made]
BLOCKS: dict[str, tuple[frozenset[str], Block]] = {}


def block(*kinds: str) -> Callable[[Block], Block]:
    """Register a block for some kinds of signal."""

    def register(function: Block) -> Block:
        BLOCKS[function.__name__] = frozenset(kinds), function
        return function

    return register


def any_block(draw: Draw, signal: Signal, among: Sequence[str] | None = None) -> Made:
    """A random block that takes `signal`."""
    names = [n for n, (kinds, _) in BLOCKS.items() if signal.kind in kinds and (among is None or n in among)]
    if draw.open(signal):
        names = [n for n in names if n not in FIXED_SIZE]
        if draw.flag():
            names = [n for n in OTHER_SIZES if n in names] or names
    name = draw.one_of(*names)
    draw.note(name)
    return BLOCKS[name][1](draw, signal)


# Layers --------------------------------------------------------------------------------------------------------------


class FunctionalLinear(nn.Module):
    """A linear layer written as a function of raw parameters."""

    def __init__(self, features_in: int, features_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_out, features_in) / math.sqrt(features_in))
        self.bias = nn.Parameter(torch.randn(features_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MatrixProduct(nn.Module):
    """A linear layer written as a matrix product, ``x @ weight``, or with einsum."""

    def __init__(self, features_in: int, features_out: int, einsum: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_in, features_out) / math.sqrt(features_in))
        self.einsum = einsum

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bli,io->blo", x, self.weight) if self.einsum else x @ self.weight


class FunctionalConv(nn.Module):
    """A convolution written as a function of raw parameters."""

    def __init__(self, channels_in: int, channels_out: int, spatial: int, groups: int, bias: bool) -> None:
        super().__init__()
        weight = torch.randn(channels_out, channels_in // groups, *(3,) * spatial)
        self.weight = nn.Parameter(weight / math.sqrt(weight[0].numel()))
        self.bias = nn.Parameter(torch.randn(channels_out)) if bias else None
        self.conv = FUNCTIONAL_CONV[spatial]
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.weight, self.bias, padding=1, groups=self.groups)


class StandardizedConv2d(nn.Conv2d):
    """A convolution that standardises each row of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (weight - mean) / (std + 1e-4), self.bias, self.stride, self.padding)


class ChannelsLast(nn.Module):
    """Applies a module with the channels moved behind the positions."""

    def __init__(self, inner: nn.Module, spatial: int) -> None:
        super().__init__()
        self.inner = inner
        self.there = (0, *range(2, 2 + spatial), 1)
        self.back = (0, 1 + spatial, *range(1, 1 + spatial))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(self.there)).permute(self.back)


class Transposed(nn.Module):
    """Applies a module with tokens and channels transposed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def layer(draw: Draw, signal: Signal, channels: int | None = None) -> Made:
    """A weighted layer that maps the channels of `signal` to `channels` and keeps its positions."""
    out = draw.channels() if channels is None else channels
    result = signal.wide(out)
    bias = draw.flag()
    kind = draw.one_of(*(_IMAGE_LAYERS if signal.kind == "image" else _DENSE_LAYERS))
    draw.note(f"layer:{kind}")
    if signal.kind != "image":
        return _dense_layer(draw, kind, signal, out, bias), result
    spatial = len(signal.spatial)
    if kind == "channels_last":
        return ChannelsLast(nn.Linear(signal.channels, out, bias), spatial), result
    if kind == "functional":
        groups = draw.divisor(2, signal.channels, out)
        return FunctionalConv(signal.channels, out, spatial, groups, bias), result
    if kind == "standardized" and spatial == 2:
        return StandardizedConv2d(signal.channels, out, 3, padding=1, bias=bias), result
    common = math.gcd(signal.channels, out)
    groups = {"grouped": draw.divisor(4, common), "depthwise": common}.get(kind, 1)
    size, dilation = draw.one_of((3, 1), (1, 1), (3, 2))
    options: dict[str, Any] = {"padding": dilation * (size // 2), "dilation": dilation, "groups": groups, "bias": bias}
    if kind == "transposed":
        options["groups"] = draw.divisor(4, common)
        return CONV_TRANSPOSE[spatial](signal.channels, out, size, **options), result
    if kind == "plain" and dilation == 1:
        options["padding_mode"] = draw.one_of("zeros", "circular", "replicate")
    conv = CONV[spatial](signal.channels, out, size, **options)
    return _reparametrized(draw, conv) if kind == "reparametrized" else conv, result


_IMAGE_LAYERS = (
    "plain", "plain", "grouped", "depthwise", "transposed", "functional", "channels_last", "reparametrized",
    "standardized",
)  # fmt: skip
_DENSE_LAYERS = ("plain", "plain", "functional", "product", "convolution", "reparametrized")


def _dense_layer(draw: Draw, kind: str, signal: Signal, out: int, bias: bool) -> nn.Module:
    if kind == "functional":
        return FunctionalLinear(signal.channels, out, bias)
    if kind == "product":
        return MatrixProduct(signal.channels, out, einsum=signal.kind == "tokens" and draw.flag())
    if kind == "convolution" and signal.kind == "tokens":
        return Transposed(nn.Conv1d(signal.channels, out, 3, padding=1, bias=bias))
    linear = nn.Linear(signal.channels, out, bias)
    return _reparametrized(draw, linear) if kind == "reparametrized" else linear


def _reparametrized(draw: Draw, module: nn.Module) -> nn.Module:
    how = draw.one_of("weight_norm", "legacy_weight_norm", "spectral_norm")
    draw.note(how)
    if how == "weight_norm":
        return parametrizations.weight_norm(module)
    if how == "spectral_norm":
        return parametrizations.spectral_norm(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


# Normalisations ------------------------------------------------------------------------------------------------------


class HandwrittenRMSNorm(nn.Module):
    """Root mean square normalisation in elementary operations."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(channels, *(1,) * (-1 - dim)))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-3)


class FunctionalNorm(nn.Module):
    """Layer or group norm written as a function of raw parameters."""

    def __init__(self, channels: int, groups: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(channels))
        self.bias = nn.Parameter(0.3 * torch.randn(channels))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-3)
        return F.group_norm(x, self.groups, self.weight, self.bias, eps=1e-3)


class UnitLength(nn.Module):
    """Normalises the channels at each position to unit length."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=self.dim, eps=1e-2)


class Standardized(nn.Module):
    """Layer norm in elementary operations, without parameters."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(self.dim, keepdim=True), x.var(self.dim, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(variance + 1e-2)


@block("image", "tokens", "vector")
def norm(draw: Draw, signal: Signal) -> Made:
    """Any normalisation. The eps are large: statistics over a few numbers must not amplify rounding."""
    spatial = len(signal.spatial)
    if signal.kind == "tokens":
        if draw.flag():
            inner, _ = norm(draw, image(signal.channels, *signal.spatial))
            return Transposed(inner), signal
        whole = () if draw.free else ("whole",)
        kind = draw.one_of("layer", "rms", *whole, "functional", "handwritten", "unit", "standardized")
    else:
        kind = draw.one_of("batch", "group", "layer", "rms", "functional", "handwritten", "unit", "standardized")
        if signal.kind == "image":
            instance = ("instance",) if math.prod(signal.spatial) > 1 else ()
            kind = draw.one_of(kind, *(() if draw.free else ("whole",)), *instance)
    draw.note(f"norm:{kind}")
    module = _norm(draw, kind, signal)
    if kind in ("layer", "rms") and signal.kind == "image":
        module = ChannelsLast(module, spatial)
    return _with_random_statistics(module), signal


def _norm(draw: Draw, kind: str, signal: Signal) -> nn.Module:
    channels, spatial = signal.channels, len(signal.spatial)
    affine = draw.one_of(True, True, False)
    if kind == "batch":
        tracked = draw.one_of(True, True, False)
        draw.smallest_batch = max(draw.smallest_batch, 1 if tracked else 2)
        momentum = draw.one_of(0.1, None)
        return BATCH_NORM[spatial](channels, 1e-2, momentum, affine, tracked)
    if kind == "instance":
        return INSTANCE_NORM[spatial](channels, 1e-2, 0.1, affine, draw.flag())
    if kind == "group":
        return nn.GroupNorm(draw.divisor(max(1, channels // 2), channels), channels, 1e-2, affine)
    if kind == "rms":
        return nn.RMSNorm(channels, draw.one_of(1e-2, None), affine)
    if kind in ("layer", "whole"):
        shape = (channels,) if kind == "layer" else signal.shape
        return nn.LayerNorm(shape, 1e-2, affine, bias=draw.one_of(True, True, False))
    if kind == "standardized":
        return Standardized(signal.channel_dim)
    if kind == "functional":
        return FunctionalNorm(
            channels, None if signal.kind == "tokens" else draw.divisor(max(1, channels // 2), channels)
        )
    return HandwrittenRMSNorm(channels, signal.channel_dim) if kind == "handwritten" else UnitLength(signal.channel_dim)


def _with_random_statistics(module: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after some training: a normalised zero is not zero."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_floating_point():
            noise = 0.3 * torch.randn_like(value)
            value.data.copy_((1 + noise).abs() + 0.1 if name.endswith(("weight", "var")) else noise)
    return module


# Activations ---------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu method": lambda x: x.relu(),
    "tanh": lambda x: x.tanh(),
    "sigmoid": torch.sigmoid,
    "swish": lambda x: x * torch.sigmoid(x),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6,
    "softplus": F.softplus,
    "exp of tanh": lambda x: x.tanh().exp(),
    "cos": torch.cos,
    "clamp around zero": lambda x: x.clamp(-1.0, 1.0),
    "clamp from below": lambda x: x.clamp(min=0.1),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky relu in place": lambda x: F.leaky_relu_(x * 1.0, 0.2),
    "abs": abs,
    "minus": lambda x: -x,
    "plus one": lambda x: x + 1,
    "one minus": lambda x: 1 - x,
    "half": lambda x: x / 2,
    "square of tanh": lambda x: x.tanh() ** 2,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked fill": lambda x: x.masked_fill(x < 0, 0.0),
    "masked fill with one": lambda x: x.masked_fill(x < 0, 1.0),
    "cast": lambda x: x.float().to(x.dtype),
    "detached scale": lambda x: x * x.detach().sigmoid(),
    "maximum": lambda x: torch.maximum(x, 0.1 * x),
    "softplus quotient": lambda x: torch.addcdiv(x, x, F.softplus(x) + 0.1),
    "handwritten sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "handwritten swish": lambda x: x / (1 + (-x).exp()),
    "handwritten softplus": lambda x: torch.log(1 + x.exp()),
    "handwritten softsign": lambda x: torch.div(x, 1 + x.abs()),
    "handwritten mish": lambda x: x * torch.tanh((x.exp() + 1).log()),
    "inverse root": lambda x: x * torch.rsqrt(x * x + 1),
    "reciprocal": lambda x: torch.reciprocal(1 + x.square()),
    "negative power": lambda x: (1 + x.abs()) ** -0.5,
    "signed root": lambda x: x.sign() * (x.abs() + 1e-2).sqrt(),
    "logarithm": lambda x: torch.log(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "atan2": lambda x: torch.atan2(x, torch.ones_like(x)),
    "floor with gradient": lambda x: x + (x.floor() - x).detach(),
    "keywords": lambda x: torch.add(torch.mul(input=x, other=x.tanh()), other=x),
    "written in place": lambda x: (x * 2).sigmoid_(),
    "added in place": lambda x: x.mul(0.5).add_(0.1),
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.5),
}


@block("image", "tokens", "vector")
def activation(draw: Draw, signal: Signal) -> Made:
    kind = draw.one_of("module", "function", "inplace", "prelu", "softmax")
    if kind == "function":
        name = draw.one_of(*FUNCTIONS)
        draw.note(f"activation:{name}")
        return Function(name, FUNCTIONS[name]), signal
    draw.note(f"activation:{kind}")
    if kind == "prelu":
        return nn.PReLU(draw.one_of(1, signal.channels) if signal.kind != "tokens" else 1), signal
    if kind == "softmax":
        return nn.Softmax(signal.channel_dim), signal
    if kind == "inplace":
        # Behind a layer: what other activations save for backward must not be overwritten.
        first, _ = layer(draw, signal, signal.channels)
        second = norm(draw, signal)[0] if draw.flag() else nn.Identity()
        act = draw.one_of(nn.ReLU, nn.SiLU, nn.ELU, nn.Hardswish, nn.LeakyReLU)(inplace=True)
        return nn.Sequential(first, second, act), signal
    modules = (
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
        nn.Tanh,
        nn.Sigmoid,
        nn.Softplus,
        nn.ELU,
        nn.Mish,
        nn.Hardsigmoid,
        nn.LogSigmoid,
    )
    return draw.one_of(*modules)(), signal


# Noise in training ---------------------------------------------------------------------------------------------------


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.2, training=self.training)


class DropPath(nn.Module):
    """Drops whole samples while training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(0.8)
        return x * keep / 0.8


class ModeDependent(nn.Module):
    """Computes something else while training, by another layer."""

    def __init__(self, training: nn.Module, evaluation: nn.Module) -> None:
        super().__init__()
        self.in_training, self.in_evaluation = training, evaluation

    def forward(self, x: Tensor) -> Tensor:
        return self.in_evaluation(x) + self.in_training(x) if self.training else self.in_evaluation(x)


@block("image", "tokens", "vector")
def noise(draw: Draw, signal: Signal) -> Made:
    kind = draw.one_of("module", "function", "path", "mode", "alpha")
    draw.note(f"noise:{kind}")
    if kind == "mode":
        return ModeDependent(layer(draw, signal, signal.channels)[0], layer(draw, signal, signal.channels)[0]), signal
    modules = {"module": lambda: nn.Dropout(0.2), "function": FunctionalDropout, "path": DropPath}
    return modules.get(kind, lambda: nn.AlphaDropout(0.2))(), signal


# Compositions --------------------------------------------------------------------------------------------------------


def body(draw: Draw, signal: Signal, channels: int | None = None) -> nn.Module:
    """A chain that keeps positions and ends with a weighted layer of `channels` (default: those of `signal`) outputs."""
    parts: list[nn.Module] = []
    current = signal
    for _ in range(draw.between(0, 2)):
        if draw.depth < 2:
            draw.depth += 1
            part, after = any_block(draw, current, SAME_POSITIONS)
            draw.depth -= 1
            parts.append(part)
            current = after
    parts.append(layer(draw, current, channels or signal.channels)[0])
    return nn.Sequential(*parts)


@block("image", "tokens", "vector")
def stage(draw: Draw, signal: Signal) -> Made:
    """Layer, normalisation, activation."""
    first, signal = layer(draw, signal)
    parts = [first]
    for kind in draw.one_of((norm, activation), (activation, norm), (norm,), (activation,)):
        parts.append(kind(draw, signal)[0])
    return nn.Sequential(*parts), signal


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module, scale: Tensor | None, how: str) -> None:
        super().__init__()
        self.body, self.shortcut, self.how = body, shortcut, how
        self.scale = None if scale is None else nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.scale is not None:
            y = self.scale * y
        if self.how == "in place":
            y += self.shortcut(x)
            return y
        return torch.sub(self.shortcut(x), y) if self.how == "difference" else self.shortcut(x) + y


@block("image", "tokens", "vector")
def residual(draw: Draw, signal: Signal) -> Made:
    """x + f(x), with a projection or a learned scale per channel."""
    shortcut: nn.Module = nn.Identity()
    out = signal
    if draw.flag():
        shortcut, out = layer(draw, signal)
    scaled = draw.one_of("none", "channels", "scalar")
    scale = None
    if scaled != "none":
        draw.note(f"scale:{scaled}")
        scale = parameter_along(out) if scaled == "channels" else torch.tensor(0.5)
    how = draw.one_of("sum", "in place", "difference")
    return Residual(body(draw, signal, out.channels), shortcut, scale, how), out


def parameter_along(signal: Signal) -> Tensor:
    """Noise in the shape of a parameter with one value per channel."""
    return torch.randn(signal.channels, *(1,) * (-1 - signal.channel_dim))


class PaddedResidual(nn.Module):
    """A residual whose shortcut is padded with channels of zeros, as in ResNets for CIFAR, or of something else."""

    def __init__(self, body: nn.Module, padding: tuple[int, ...], value: float, act: nn.Module) -> None:
        super().__init__()
        self.body, self.padding, self.value, self.act = body, padding, value, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.pad(x, self.padding, value=self.value)) + self.body(x)


@block("image", "tokens", "vector")
def padded_residual(draw: Draw, signal: Signal) -> Made:
    before, after = draw.one_of((0, 4), (2, 2), (0, 0))
    padding = (0, 0) * (-1 - signal.channel_dim) + (before, after)
    out = signal.wide(signal.channels + before + after)
    value = draw.one_of(0.0, 0.0, 1.0)
    act = draw.one_of(nn.Identity, nn.Identity, nn.Sigmoid, nn.GELU)()
    return PaddedResidual(body(draw, signal, out.channels), padding, value, act), out


class Branches(nn.Module):
    """Concatenates what its branches make of the same input."""

    def __init__(self, branches: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.branches, self.dim = nn.ModuleList(branches), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], self.dim)


@block("image", "tokens", "vector")
def branches(draw: Draw, signal: Signal) -> Made:
    """Concatenation; one branch may be the input itself (dense connections) or zeros."""
    first = draw.one_of("body", "input")
    parts = [body(draw, signal, 4), nn.Identity() if first == "input" else body(draw, signal, 4)]
    width = 4 + (signal.channels if first == "input" else 4)
    if draw.flag():
        parts.reverse()
    return Branches(parts, signal.channel_dim), signal.wide(width)


class Split(nn.Module):
    """Sends a part of the channels through a body."""

    def __init__(self, body: nn.Module, sizes: tuple[int, int], dim: int, how: str) -> None:
        super().__init__()
        self.body, self.sizes, self.dim, self.how = body, sizes, dim, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "split":
            kept, sent = torch.split(x, self.sizes, self.dim)
        elif self.how == "chunk":
            kept, sent = x.chunk(2, self.dim)
        else:
            kept, sent = x.narrow(self.dim, 0, self.sizes[0]), x.narrow(self.dim, *self.sizes)
        return torch.cat((self.body(sent), kept), self.dim)


@block("image", "tokens", "vector")
def split(draw: Draw, signal: Signal) -> Made:
    if signal.channels < 4:
        return stage(draw, signal)
    half = signal.channels // 2
    how = draw.one_of("chunk", "split", "narrow") if signal.channels % 2 == 0 else "split"
    sizes = (half, signal.channels - half)
    part = signal.wide(sizes[1])
    return Split(body(draw, part), sizes, signal.channel_dim, how), signal


class Gate(nn.Module):
    def __init__(self, value: nn.Module, gate: nn.Module, squash: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value, self.gate, self.squash = value, gate, squash

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.squash(self.gate(x))


class GatedUnit(nn.Module):
    """Half of the channels gate the other half."""

    def __init__(self, inner: nn.Module, dim: int, how: str) -> None:
        super().__init__()
        self.inner, self.dim, self.how = inner, dim, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.how == "glu":
            return F.glu(y, self.dim)
        value, gate = y.chunk(2, self.dim)
        return value * (torch.sigmoid(gate) if self.how == "sigmoid" else gate)


@block("image", "tokens", "vector")
def gate(draw: Draw, signal: Signal) -> Made:
    out = signal.wide(draw.one_of(4, 8))
    kind = draw.one_of("two bodies", "one body")
    if kind == "one body":
        inner = body(draw, signal, 2 * out.channels)
        return GatedUnit(inner, signal.channel_dim, draw.one_of("sigmoid", "product", "glu")), out
    squash = draw.one_of(torch.sigmoid, F.silu, F.hardsigmoid, torch.tanh)
    return Gate(body(draw, signal, out.channels), body(draw, signal, out.channels), squash), out


class SqueezeExcite(nn.Module):
    def __init__(self, signal: Signal, convolutional: bool) -> None:
        super().__init__()
        channels, spatial = signal.channels, len(signal.spatial)
        self.dims = tuple(range(2, 2 + spatial))
        self.convolutional = convolutional
        if convolutional:
            self.reduce, self.expand = CONV[spatial](channels, 4, 1), CONV[spatial](4, channels, 1)
        else:
            self.reduce, self.expand = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean(self.dims, keepdim=self.convolutional)
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(squeezed))))
        return x * (gate if self.convolutional else gate.reshape(gate.shape[0], -1, *(1,) * len(self.dims)))


@block("image")
def squeeze_excite(draw: Draw, signal: Signal) -> Made:
    return SqueezeExcite(signal, draw.flag()), signal


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self, inner: nn.Module, between: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.between = first, inner, between

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.between(self.inner(self.first(x))))


@block("image", "tokens", "vector")
def twice(draw: Draw, signal: Signal) -> Made:
    """A shared layer reads its own features, and those of another layer or raw ones."""
    first = layer(draw, signal, signal.channels)[0] if draw.flag() else nn.Identity()
    between = any_block(draw, signal, ("norm", "activation"))[0]
    return Twice(layer(draw, signal, signal.channels)[0], between, first), signal


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Autoencoder(nn.Module):
    """A layer and its transpose."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(channels, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.gelu(self.encoder(x)), self.encoder.weight.t())


@block("image", "tokens", "vector")
def tied(draw: Draw, signal: Signal) -> Made:
    channels, spatial = signal.channels, len(signal.spatial)
    if signal.kind == "image":
        pair = (CONV[spatial](channels, channels, 3, padding=1) for _ in range(2))
    elif draw.flag():
        draw.note("tied:transpose")
        return Autoencoder(channels, draw.channels()), signal
    else:
        pair = (nn.Linear(channels, channels) for _ in range(2))
    return Tied(*pair), signal


class ScaleShift(nn.Module):
    """Multiplies by one raw parameter and adds another."""

    def __init__(self, scale: Tensor, shift: Tensor, order: str) -> None:
        super().__init__()
        self.scale, self.shift, self.order = nn.Parameter(scale), nn.Parameter(shift), order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "fused":
            return torch.addcmul(self.shift, x, self.scale)
        return x * self.scale + self.shift if self.order == "scale first" else self.scale * (x + self.shift)


@block("image", "tokens", "vector")
def scale_shift(draw: Draw, signal: Signal) -> Made:
    """Raw parameters: along the channels, over channels and positions, or a scalar."""

    def parameter() -> Tensor:
        everything = () if draw.open(signal) else ("everything",)
        shape = draw.one_of("channels", *everything, "scalar", "leading one")
        draw.note(f"parameter:{shape}")
        if shape == "scalar":
            return torch.randn(1)
        return (
            torch.randn(signal.shape)
            if shape == "everything"
            else (parameter_along(signal) if shape == "channels" else parameter_along(signal).unsqueeze(0))
        )

    return ScaleShift(parameter(), parameter(), draw.one_of("scale first", "shift first", "fused")), signal


class MaxOut(nn.Module):
    """The larger of each pair of channels, or their sum."""

    def __init__(self, inner: nn.Module, dim: int, outer: bool, total: bool) -> None:
        super().__init__()
        self.inner, self.dim, self.outer, self.total = inner, dim, outer, total

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.inner(x).unflatten(self.dim, (2, -1) if self.outer else (-1, 2))
        paired = self.dim - 1 if self.outer else self.dim
        return pairs.sum(paired) if self.total else pairs.amax(paired)


@block("image", "tokens", "vector")
def maxout(draw: Draw, signal: Signal) -> Made:
    out = signal.wide(draw.one_of(4, 8))
    return MaxOut(body(draw, signal, 2 * out.channels), signal.channel_dim, draw.flag(), draw.flag()), out


# Images --------------------------------------------------------------------------------------------------------------


@block("image")
def strided(draw: Draw, signal: Signal) -> Made:
    """A convolution with stride."""
    if min(signal.spatial) < 4:
        return stage(draw, signal)
    out, spatial = draw.channels(), len(signal.spatial)
    groups = draw.divisor(4, signal.channels, out)
    conv = CONV[spatial](signal.channels, out, 3, stride=2, padding=1, groups=groups, bias=draw.flag())
    return conv, image(out, *((n + 1) // 2 for n in signal.spatial))


@block("image")
def upsampled(draw: Draw, signal: Signal) -> Made:
    """A transposed convolution with stride, or interpolation."""
    if max(signal.spatial) > 4 or len(signal.spatial) == 3:
        return stage(draw, signal)
    spatial = len(signal.spatial)
    larger = tuple(2 * n for n in signal.spatial)
    if draw.flag():
        mode = draw.one_of("nearest", "linear" if spatial == 1 else "bilinear")
        return nn.Upsample(scale_factor=2, mode=mode), image(signal.channels, *larger)
    out = draw.channels()
    groups = draw.divisor(4, signal.channels, out)
    return CONV_TRANSPOSE[spatial](signal.channels, out, 2, stride=2, groups=groups), image(out, *larger)


@block("image")
def pooled(draw: Draw, signal: Signal) -> Made:
    spatial = len(signal.spatial)
    if min(signal.spatial) < 4:
        return stage(draw, signal)
    if draw.flag():
        kind = draw.one_of(ADAPTIVE_AVG, ADAPTIVE_MAX)
        draw.free = False
        return kind[spatial](3), image(signal.channels, *(3,) * spatial)
    kind = draw.one_of(MAX_POOL, AVG_POOL)
    return kind[spatial](2), image(signal.channels, *(n // 2 for n in signal.spatial))


@block("image")
def shuffled(draw: Draw, signal: Signal) -> Made:
    """Channels and positions change places."""
    channels, edges = signal.channels, signal.spatial
    kind = draw.one_of("channels", "down", "up", "roll", "flip")
    draw.note(f"shuffle:{kind}")
    if len(edges) == 2 and kind == "up" and channels % 4 == 0 and channels > 4 and max(edges) <= 4:
        return nn.PixelShuffle(2), image(channels // 4, 2 * edges[0], 2 * edges[1])
    if len(edges) == 2 and kind == "down" and channels <= 4 and edges[0] % 2 == edges[1] % 2 == 0 and min(edges) > 2:
        return nn.PixelUnshuffle(2), image(4 * channels, edges[0] // 2, edges[1] // 2)
    if kind == "channels" and channels % 2 == 0:
        return nn.ChannelShuffle(2), signal
    name = "roll" if kind == "roll" else "flip"
    move = (lambda x: torch.roll(x, 1, -1)) if kind == "roll" else (lambda x: x.flip(-1))
    return Function(name, move), signal


@block("image")
def padded(draw: Draw, signal: Signal) -> Made:
    """More channels, of zeros or of something else; or borders."""
    spatial = len(signal.spatial)
    value = draw.one_of(0.0, 0.0, 1.0)
    padding = (0, 0) * spatial + (draw.one_of(0, 2), 2)
    out = signal.wide(signal.channels + sum(padding))
    return Function(f"pad {padding} with {value}", lambda x: F.pad(x, padding, value=value)), out


class PositionMixer(nn.Module):
    """A linear layer over positions, the channels being left alone."""

    def __init__(self, positions: int, tokens: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(positions, positions)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens:
            return x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.mix(x.flatten(2)).view(x.shape)


@block("image", "tokens")
def position_mixer(draw: Draw, signal: Signal) -> Made:
    return PositionMixer(math.prod(signal.spatial), signal.kind == "tokens"), signal


class ToTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


@block("image")
def to_tokens(draw: Draw, signal: Signal) -> Made:
    length = math.prod(signal.spatial)
    if length > 32:
        return strided(draw, signal)
    return ToTokens(), tokens(length, signal.channels)


class ToImage(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


@block("vector")
def to_image(draw: Draw, signal: Signal) -> Made:
    """A layer, read as an image."""
    out = image(4, 2, 2)
    return nn.Sequential(layer(draw, signal, 16)[0], ToImage(out.shape)), out


class Pooling(nn.Module):
    def __init__(self, how: str, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.how, self.dims = how, dims

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "flatten":
            return x.flatten(1)
        if self.how == "view":
            return x.contiguous().view(x.size(0), -1)
        return x.mean(self.dims) if self.how == "mean" else x.amax(self.dims)


@block("image", "tokens")
def to_vector(draw: Draw, signal: Signal) -> Made:
    """Positions are averaged, or become channels."""
    how = draw.one_of(*(() if draw.free else ("flatten", "view")), "mean", "amax")
    draw.note(f"to_vector:{how}")
    draw.free = False
    dims = (1,) if signal.kind == "tokens" else tuple(range(2, 2 + len(signal.spatial)))
    size = signal.channels if how in ("mean", "amax") else math.prod(signal.shape)
    return Pooling(how, dims), vector(size)


# Tokens --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention written by hand."""

    def __init__(self, signal: Signal, heads: int, how: str, separate: bool, normed: bool, biased: bool) -> None:
        super().__init__()
        length, channels = signal.shape
        self.heads, self.how = heads, how
        self.separate = separate
        if separate:
            self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels, bias=False)
            self.value = nn.Linear(channels, channels)
        else:
            self.qkv = nn.Linear(channels, 3 * channels)
        self.normed = normed
        if normed:
            self.norm_q, self.norm_k = nn.LayerNorm(channels // heads), nn.LayerNorm(channels // heads)
        self.bias = nn.Parameter(torch.randn(heads, length, length)) if biased else None
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        if self.separate:
            q, k, v = (
                m(x).view(b, n, self.heads, c // self.heads).transpose(1, 2) for m in (self.query, self.key, self.value)
            )
        else:
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        if self.normed:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
            if self.bias is not None:
                scores = scores + self.bias
            y = scores.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class TorchAttention(nn.Module):
    """torch's own attention and recurrent modules, which return more than one thing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.MultiheadAttention):
            return self.inner(x, x, x, need_weights=False)[0]
        return self.inner(x)[0]


class PreNorm(nn.Module):
    """The residual block of transformers."""

    def __init__(self, signal: Signal, inner: nn.Module, normalization: nn.Module, scaled: bool) -> None:
        super().__init__()
        self.norm, self.inner = normalization, inner
        self.scale = nn.Parameter(torch.randn(signal.channels)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.norm(x))
        return x + (y if self.scale is None else y * self.scale)


@block("tokens")
def attention(draw: Draw, signal: Signal) -> Made:
    heads = draw.one_of(1, 2)
    kind = draw.one_of("handwritten", "handwritten", "handwritten", "torch")
    draw.note(f"attention:{kind}")
    if signal.channels % 2:
        return stage(draw, signal)
    if kind == "torch":
        inner: nn.Module = TorchAttention(nn.MultiheadAttention(signal.channels, heads, batch_first=True))
    else:
        how = draw.one_of("sdpa", "matmul")
        inner = Attention(
            signal, heads, how, separate=draw.flag(), normed=draw.flag(), biased=not draw.free and draw.flag()
        )
    normalization = draw.one_of(nn.LayerNorm, nn.RMSNorm)(signal.channels)
    return PreNorm(signal, inner, _with_random_statistics(normalization), draw.flag()), signal


@block("tokens")
def feed_forward(draw: Draw, signal: Signal) -> Made:
    hidden = draw.channels()
    act = draw.one_of(nn.GELU, nn.ReLU, nn.SiLU)()
    inner = nn.Sequential(nn.Linear(signal.channels, hidden), act, nn.Linear(hidden, signal.channels))
    normalization = _with_random_statistics(nn.LayerNorm(signal.channels))
    return PreNorm(signal, inner, normalization, draw.flag()), signal


@block("tokens")
def recurrent(draw: Draw, signal: Signal) -> Made:
    kind = draw.one_of(nn.LSTM, nn.GRU, nn.RNN)
    bidirectional = draw.flag()
    inner = kind(signal.channels, 4, batch_first=True, bidirectional=bidirectional)
    return TorchAttention(inner), signal.wide(8 if bidirectional else 4)


class ClassToken(nn.Module):
    """Puts a learned token before the others, and adds position embeddings."""

    def __init__(self, signal: Signal, position: str) -> None:
        super().__init__()
        length, channels = signal.shape
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.position = nn.Parameter(torch.randn(1, length + 1, channels)) if position == "parameter" else None
        self.table = nn.Embedding(length + 1, channels) if position == "table" else None
        self.register_buffer("places", torch.arange(length + 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.position is not None:
            x = x + self.position
        return x if self.table is None else x + self.table(self.places)


class Place(nn.Module):
    """One of the tokens."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.place]


@block("tokens")
def class_token(draw: Draw, signal: Signal) -> Made:
    length, channels = signal.shape
    position = "none" if draw.free else draw.one_of("parameter", "table", "none")
    return ClassToken(signal, position), tokens(length + 1, channels)


@block("tokens")
def one_token(draw: Draw, signal: Signal) -> Made:
    return Place(draw.one_of(0, -1)), vector(signal.channels)


@block("vector")
def bilinear(draw: Draw, signal: Signal) -> Made:
    class Squared(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.product = nn.Bilinear(channels, channels, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.product(x, x)

    return (Squared(signal.channels), vector(4)) if signal.channels <= 16 else stage(draw, signal)


# Unusual constructions -----------------------------------------------------------------------------------------------


class ComputedWeight(nn.Module):
    """A linear layer whose weight is computed from parameters."""

    def __init__(self, features_in: int, features_out: int, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features_out, features_in) / math.sqrt(features_in))
        self.gain = nn.Parameter(torch.rand(features_out, 1) + 0.5)
        self.left = nn.Parameter(torch.randn(features_out, 2))
        self.right = nn.Parameter(torch.randn(2, features_in))
        self.register_buffer("pattern", torch.arange(features_out * features_in).view(features_out, -1) % 3 > 0)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "low rank":
            return F.linear(x, self.left @ self.right)
        if self.how == "adapted":
            return F.linear(x, self.weight + 0.1 * self.left @ self.right)
        if self.how == "sparse":
            return F.linear(x, self.weight * self.pattern)
        if self.how == "transposed":
            return x @ self.weight.t()
        if self.how == "scaled":
            return F.linear(x, self.gain * self.weight)
        return F.linear(x, self.gain * F.normalize(self.weight, dim=1))


@block("tokens", "vector")
def computed_weight(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("low rank", "adapted", "sparse", "transposed", "scaled", "normalized")
    draw.note(f"computed_weight:{how}")
    out = draw.channels()
    return ComputedWeight(signal.channels, out, how), signal.wide(out)


class DynamicWeight(nn.Module):
    """A linear layer whose weight is made from the input by another layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.generate, self.channels = nn.Linear(channels, 4 * channels), channels

    def forward(self, x: Tensor) -> Tensor:
        weight = self.generate(x.mean(1)).view(-1, self.channels, 4)
        return torch.bmm(x, weight)


@block("tokens")
def dynamic_weight(draw: Draw, signal: Signal) -> Made:
    return DynamicWeight(signal.channels), signal.wide(4)


class Mixture(nn.Module):
    """A weighted sum of experts; the weights are learned, or computed from the input."""

    def __init__(self, experts: Sequence[nn.Module], router: nn.Module | None, signal: Signal) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList(experts), router
        self.ones = (1,) * len(signal.shape)
        self.dims = tuple(range(2, 1 + len(signal.shape))) if signal.kind == "image" else (1,)[: len(signal.spatial)]
        self.weights = nn.Parameter(torch.randn(len(experts))) if router is None else None

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], 0)
        if self.router is None:
            return (self.weights.softmax(0).view(-1, 1, *self.ones) * outputs).sum(0)
        squeezed = x.mean(self.dims) if self.dims else x
        weights = self.router(squeezed).softmax(-1).t().reshape(len(self.experts), -1, *self.ones)
        return (weights * outputs).sum(0)


@block("image", "tokens", "vector")
def mixture(draw: Draw, signal: Signal) -> Made:
    out = draw.channels()
    experts = [layer(draw, signal, out)[0] for _ in range(2)]
    router = nn.Linear(signal.channels, 2) if draw.flag() else None
    return Mixture(experts, router, signal), signal.wide(out)


class SharedStages(nn.Module):
    """One normalisation, one activation with a parameter, and perhaps one layer, behind different layers."""

    def __init__(self, first: nn.Module, second: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.shared = first, second, shared

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.second(self.shared(self.first(x))))


@block("image", "tokens", "vector")
def shared_stages(draw: Draw, signal: Signal) -> Made:
    first, second = layer(draw, signal, signal.channels)[0], layer(draw, signal, signal.channels)[0]
    shared = [norm(draw, signal)[0], nn.PReLU()]
    if draw.flag():
        shared.append(layer(draw, signal, signal.channels)[0])
    return SharedStages(first, second, nn.Sequential(*shared)), signal


class Unrolled(nn.Module):
    """A recurrent cell written by hand: its layers are called at every step."""

    def __init__(self, length: int, channels: int, gated: bool) -> None:
        super().__init__()
        self.length = length
        self.enter, self.repeat = nn.Linear(channels, 4), nn.Linear(4, 4)
        self.forget = nn.Linear(4, 4) if gated else None
        self.start = nn.Parameter(torch.randn(4)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4) if self.start is None else self.start.expand(x.shape[0], -1)
        for step in range(min(self.length, 3)):
            proposal = torch.tanh(self.enter(x[:, step]) + self.repeat(state))
            if self.forget is None:
                state = proposal
            else:
                keep = torch.sigmoid(self.forget(state))
                state = keep * state + (1 - keep) * proposal
        return state


@block("tokens")
def unrolled(draw: Draw, signal: Signal) -> Made:
    return Unrolled(*signal.shape, gated=draw.flag()), vector(4)


class CrossAttention(nn.Module):
    """Learned queries attend to the tokens."""

    def __init__(self, channels: int, queries: int, residual: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, channels))
        self.key, self.value = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        y = F.scaled_dot_product_attention(queries, self.key(x), self.value(x))
        return queries + y if self.residual else y


@block("tokens")
def cross_attention(draw: Draw, signal: Signal) -> Made:
    queries = draw.one_of(1, 3)
    draw.free = False
    return CrossAttention(signal.channels, queries, draw.flag()), tokens(queries, signal.channels)


class ChannelAttention(nn.Module):
    """Attention between channels: cross-covariance, or each channel's own pooling weights."""

    def __init__(self, channels: int, covariance: bool) -> None:
        super().__init__()
        self.qkv, self.covariance = nn.Linear(channels, 3 * channels), covariance
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.covariance:
            scores = F.normalize(q, dim=1).transpose(1, 2) @ F.normalize(k, dim=1) * self.temperature
            return v @ scores.softmax(-1).transpose(1, 2)
        return q * (k.softmax(1) * v).sum(1, keepdim=True)


@block("tokens")
def channel_attention(draw: Draw, signal: Signal) -> Made:
    return ChannelAttention(signal.channels, draw.flag()), signal


class OuterProduct(nn.Module):
    """Pools the products of all pairs of features."""

    def __init__(self, channels: int, einsum: bool) -> None:
        super().__init__()
        self.left, self.right, self.einsum = nn.Linear(channels, 3), nn.Linear(channels, 2), einsum

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        if self.einsum:
            return torch.einsum("bc,bd->bcd", left, right).flatten(1)
        return (left.unsqueeze(2) * right.unsqueeze(1)).reshape(x.shape[0], 6)


@block("vector")
def outer_product(draw: Draw, signal: Signal) -> Made:
    return OuterProduct(signal.channels, draw.flag()), vector(6)


class Prototypes(nn.Module):
    """Distances to, or similarities with, learned points."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__()
        self.points, self.how = nn.Parameter(torch.randn(5, channels)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "distance":
            return torch.exp(-torch.cdist(x, self.points) / 4)
        if self.how == "difference":
            return (x.unsqueeze(1) - self.points).square().mean(-1)
        return F.linear(F.normalize(x, dim=-1, eps=1e-2), F.normalize(self.points, dim=-1))


@block("vector")
def prototypes(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("distance", "difference", "cosine")
    draw.note(f"prototypes:{how}")
    return Prototypes(signal.channels, how), vector(5)


class Rearranged(nn.Module):
    """Picks channels by index, and mixes them in ways without a rule."""

    def __init__(self, channels: int, dim: int, how: str) -> None:
        super().__init__()
        self.dim, self.how = dim, how
        self.register_buffer("order", (torch.arange(channels) * 3 + 1) % channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "index":
            return x.index_select(self.dim, self.order)
        if self.how == "flip":
            return torch.flip(x, (self.dim,))
        if self.how == "roll":
            return x.roll(1, self.dim)
        if self.how == "sort":
            return x.sort(self.dim)[0]
        if self.how == "cumsum":
            return x.cumsum(self.dim) / 4
        if self.how == "repeat":
            return x.repeat_interleave(2, self.dim).narrow(self.dim, 0, self.order.shape[0])
        return torch.where(x > x.mean(self.dim, keepdim=True), x, torch.zeros_like(x))


@block("image", "tokens", "vector")
def rearranged(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("index", "flip", "roll", "sort", "cumsum", "repeat", "sparse")
    draw.note(f"rearranged:{how}")
    return Rearranged(signal.channels, signal.channel_dim, how), signal


class Constants(nn.Module):
    """Concatenates constant or learned channels (coordinates, a memory), or adds constants."""

    def __init__(self, signal: Signal, learned: bool, added: bool) -> None:
        super().__init__()
        shape = signal.shape if added else signal.wide(2).shape
        values = torch.randn(shape)
        self.dim, self.added, self.shape = signal.channel_dim, added, shape
        if learned:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.expand(x.shape[0], *self.shape)
        return x + values if self.added else torch.cat((x, values), self.dim)


@block("image", "tokens", "vector")
def constants(draw: Draw, signal: Signal) -> Made:
    added = draw.flag()
    return Constants(signal, draw.flag(), added), signal if added else signal.wide(signal.channels + 2)


class MovingCenter(nn.Module):
    """Subtracts a moving average that it keeps in a buffer."""

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.dims = tuple(d for d in range(1 + len(signal.shape)) if d != 1 + len(signal.shape) + signal.channel_dim)
        self.shape = (-1, *(1,) * (-1 - signal.channel_dim))
        self.register_buffer("mean", 0.3 * torch.randn(signal.channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(self.dims))
        return x - self.mean.view(self.shape)


@block("image", "tokens", "vector")
def moving_center(draw: Draw, signal: Signal) -> Made:
    return MovingCenter(signal), signal


class WrittenView(nn.Module):
    """Writes to a view of what a layer made."""

    def __init__(self, inner: nn.Module, dim: int, how: str) -> None:
        super().__init__()
        self.inner, self.dim, self.how = inner, dim, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * 1.0
        first, second = y.narrow(self.dim, 0, 4), y.narrow(self.dim, 4, 4)
        if self.how == "view":
            first.sigmoid_()
            return y
        if self.how == "earlier view":
            y.add_(0.5)
            return torch.cat((second, first), self.dim)
        first += second.tanh()
        return first


@block("image", "tokens", "vector")
def written_view(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("view", "earlier view", "halves")
    draw.note(f"written_view:{how}")
    out = signal.wide(8)
    return WrittenView(layer(draw, signal, 8)[0], signal.channel_dim, how), out.wide(4) if how == "halves" else out


class Auxiliary(nn.Module):
    """Scores that are features too."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.scores, self.dim = nn.Linear(channels, 2), dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.scores(x).softmax(-1)), self.dim)


@block("tokens", "vector")
def auxiliary(draw: Draw, signal: Signal) -> Made:
    return Auxiliary(signal.channels, signal.channel_dim), signal.wide(signal.channels + 2)


class OverPositions(nn.Module):
    """A softmax, or a normalisation, over positions in elementary operations; channels that are off are all zero."""

    def __init__(self, inner: nn.Module, dims: tuple[int, ...], how: str) -> None:
        super().__init__()
        self.inner, self.dims, self.how = inner, dims, how

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if self.how == "softmax":
            e = torch.exp(torch.tanh(x))
            return 4 * e / e.sum(self.dims, keepdim=True)
        if self.how == "length":
            return x / x.square().sum(self.dims, keepdim=True).sqrt()
        # A channel may be constant: where all that it reads is off.
        return (x - x.mean(self.dims, keepdim=True)) / (x.std(self.dims, keepdim=True) + 0.01)


@block("image", "tokens")
def over_positions(draw: Draw, signal: Signal) -> Made:
    if math.prod(signal.spatial) < 4:
        return stage(draw, signal)
    how = draw.one_of("softmax", "length", "standardized")
    draw.note(f"over_positions:{how}")
    dims = (1,) if signal.kind == "tokens" else tuple(range(2, 2 + len(signal.spatial)))
    inner = nn.Linear(signal.channels, 8) if signal.kind == "tokens" else CONV[len(dims)](signal.channels, 8, 1)
    return OverPositions(inner, dims, how), signal.wide(8)


class Quotient(nn.Module):
    def __init__(self, top: nn.Module, bottom: nn.Module) -> None:
        super().__init__()
        self.top, self.bottom = top, bottom

    def forward(self, x: Tensor) -> Tensor:
        return self.top(x) / (F.softplus(self.bottom(x)) + 0.5)


@block("image", "tokens", "vector")
def quotient(draw: Draw, signal: Signal) -> Made:
    """Features divided by features that are never zero."""
    out = draw.channels()
    return Quotient(layer(draw, signal, out)[0], layer(draw, signal, out)[0]), signal.wide(out)


@block("tokens")
def encoder_layer(draw: Draw, signal: Signal) -> Made:
    if signal.channels % 2:
        return stage(draw, signal)
    inner = nn.TransformerEncoderLayer(signal.channels, 2, 8, dropout=0.1, batch_first=True, norm_first=draw.flag())
    return inner, signal


class WindowAttention(nn.Module):
    """Attention with relative positions looked up in a table, after a cyclic shift."""

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        length, channels = signal.shape
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.table = nn.Parameter(torch.randn(2 * length - 1, 2))
        places = torch.arange(length)
        self.register_buffer("index", places[:, None] - places[None, :] + length - 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(x, 1, 1)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].permute(2, 0, 1)
        scores = torch.matmul(q, k.transpose(-2, -1)) / 2 + bias.unsqueeze(0)
        y = torch.matmul(F.softmax(scores, dim=-1), v).transpose(1, 2).flatten(2)
        return x + torch.roll(y, -1, 1)


@block("tokens")
def window_attention(draw: Draw, signal: Signal) -> Made:
    return (WindowAttention(signal), signal) if signal.channels % 2 == 0 else stage(draw, signal)


# Other sizes than the example's --------------------------------------------------------------------------------------

Read = Callable[[Tensor, Tensor], Tensor]

#: Tables of positions: their shape for so many rows and channels, and what tokens (N, L, C) read of them.
TABLES: dict[str, tuple[Callable[[int, int], tuple[int, ...]], Read]] = {
    "rows": (lambda r, c: (r, c), lambda t, x: t[: x.shape[1]]),
    "rows by method": (lambda r, c: (r, c), lambda t, x: t[: x.size(1), :]),
    "leading one": (lambda r, c: (1, r, c), lambda t, x: t[:, : x.shape[1]]),
    "expanded": (lambda r, c: (1, r, c), lambda t, x: t[:, : x.shape[1]].expand(x.shape[0], -1, -1)),
    "flat": (lambda r, c: (r * c,), lambda t, x: t.view(-1, x.shape[2])[: x.shape[1]]),
    "part of flat": (
        lambda r, c: (r * c,),
        lambda t, x: t[: x.shape[1] * x.shape[2]].view(x.shape[1], x.shape[2]),
    ),
    "channels first": (lambda r, c: (c, r), lambda t, x: t[:, : x.shape[1]].t()),
    "indexed": (lambda r, c: (r, c), lambda t, x: t[torch.arange(x.shape[1])]),
    "selected": (lambda r, c: (r, c), lambda t, x: t.index_select(0, torch.arange(x.shape[1]))),
    "looked up": (lambda r, c: (r, c), lambda t, x: F.embedding(torch.arange(x.shape[1]), t)),
    "narrow": (lambda r, c: (r, c), lambda t, x: t.narrow(0, 0, x.shape[1])),
    "last rows": (lambda r, c: (r, c), lambda t, x: t[-x.shape[1] :]),
    "one row": (lambda r, c: (r, c), lambda t, x: t[x.shape[1] - 1]),
    "middle": (lambda r, c: (r, c), lambda t, x: t[x.shape[1] // 2 :][: x.shape[1]]),
    "every second row": (lambda r, c: (2 * r, c), lambda t, x: t[: 2 * x.shape[1] : 2]),
    "running sum": (lambda r, c: (r, c), lambda t, x: t.cumsum(0)[: x.shape[1]] / 4),
    "mean of rows": (lambda r, c: (r, c), lambda t, x: t[: x.shape[1]].mean(0)),
    "short and padded": (lambda r, c: (3, c), lambda t, x: F.pad(t, (0, 0, 0, x.shape[1] - 3))),
    "interpolated": (
        lambda r, c: (1, c, 3),
        lambda t, x: F.interpolate(t, size=x.shape[1], mode="linear").transpose(1, 2),
    ),
    "ramp": (lambda r, c: (c,), lambda t, x: torch.arange(x.shape[1]).unsqueeze(1) * t / 4),
}

#: What becomes of features and what was read.
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda x, t: x + t,
    "subtracted from": lambda x, t: t - x,
    "multiplied": lambda x, t: x * t,
    "gate": lambda x, t: x * torch.sigmoid(t),
    "fused": lambda x, t: torch.addcmul(t, x, t),
}


def table_rows(length: int) -> int:
    """Rows of a table that has some to spare."""
    return max(16, 2 * length + 4)


class PositionTable(nn.Module):
    """Positions meet rows of a table that has more of them than the example has positions."""

    def __init__(self, signal: Signal, how: str, use: str) -> None:
        super().__init__()
        shape, self.read = TABLES[how]
        self.table = nn.Parameter(torch.randn(shape(table_rows(signal.shape[0]), signal.channels)))
        self.use = USES[use]
        self.how = f"{how}, {use}"

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.read(self.table, x))

    def extra_repr(self) -> str:
        return self.how


class HeadTable(nn.Module):
    """The features are in two dimensions when they meet the table, with the positions between them or in front."""

    def __init__(self, signal: Signal, between: bool, use: str) -> None:
        super().__init__()
        rows = table_rows(signal.shape[0])
        shape = (2, rows) if between else (rows, 2)
        self.table = nn.Parameter(torch.randn(*shape, signal.channels // 2))
        self.between, self.use = between, USES[use]
        self.how = use

    def forward(self, x: Tensor) -> Tensor:
        n, length, channels = x.shape
        x = x.view(n, length, 2, channels // 2)
        if self.between:
            return self.use(x.transpose(1, 2), self.table[:, :length]).transpose(1, 2).reshape(n, length, channels)
        return self.use(x, self.table[:length]).flatten(2)

    def extra_repr(self) -> str:
        return self.how


@block("tokens")
def position_table(draw: Draw, signal: Signal) -> Made:
    use = draw.one_of("added", "added", *USES)
    how = draw.one_of(*TABLES, *(("heads", "heads", "heads inside") if signal.channels % 2 == 0 else ()))
    draw.note(f"position_table:{how}")
    inner, _ = layer(draw, signal, signal.channels)
    if how.startswith("heads"):
        return nn.Sequential(inner, HeadTable(signal, how == "heads", use)), signal
    return nn.Sequential(inner, PositionTable(signal, how, use)), signal


class SpatialTable(nn.Module):
    """A table of positions in an image, of which smaller images read a corner."""

    def __init__(self, signal: Signal, how: str, use: str) -> None:
        super().__init__()
        channels, edges = signal.channels, tuple(e + 4 for e in signal.spatial)
        self.spatial, self.how, self.use = len(edges), how, USES[use]
        self.uses = use
        shapes = {
            "channels last": (*edges, channels),
            "leading one": (1, channels, *edges),
            "first edge": (channels, edges[0]),
            "flat positions": (channels, math.prod(edges)),
            "interpolated": (1, channels, *(3,) * len(edges)),
        }
        self.table = nn.Parameter(torch.randn(shapes.get(how, (channels, *edges))))

    def forward(self, x: Tensor) -> Tensor:
        sizes = [x.shape[2 + d] for d in range(self.spatial)]
        corner = tuple(slice(size) for size in sizes)
        if self.how == "channels last":
            return self.use(x, self.table[corner].movedim(-1, 0))
        if self.how == "leading one":
            return self.use(x, self.table[(slice(None), slice(None), *corner)])
        if self.how == "first edge":
            return self.use(x, self.table[:, : sizes[0]].view(-1, sizes[0], *(1,) * (self.spatial - 1)))
        if self.how == "flat positions":
            flat = x.flatten(2)
            return self.use(flat, self.table[:, : flat.shape[2]]).view(x.shape)
        if self.how == "interpolated":
            return self.use(x, F.interpolate(self.table, size=x.shape[2:], mode=INTERPOLATION[self.spatial]))
        if self.how == "narrow":
            table = self.table
            for d, size in enumerate(sizes):
                table = table.narrow(1 + d, 0, size)
            return self.use(x, table)
        return self.use(x, self.table[(slice(None), *corner)])

    def extra_repr(self) -> str:
        return f"{self.how}, {self.uses}"


@block("image")
def spatial_table(draw: Draw, signal: Signal) -> Made:
    hows = "channels first", "channels last", "leading one", "first edge", "flat positions", "interpolated", "narrow"
    how = draw.one_of(*hows)
    draw.note(f"spatial_table:{how}")
    table = SpatialTable(signal, how, draw.one_of("added", "added", *USES))
    return nn.Sequential(layer(draw, signal, signal.channels)[0], table), signal


class TableInFront(nn.Module):
    """As many learned tokens before the others as there are others."""

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(table_rows(signal.shape[0]), signal.channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.table[: x.shape[1]].expand(x.shape[0], -1, -1), x), 1)


@block("tokens")
def table_in_front(draw: Draw, signal: Signal) -> Made:
    length, channels = signal.shape
    return (TableInFront(signal), tokens(2 * length, channels)) if length <= 8 else stage(draw, signal)


class SpareRow(nn.Module):
    """Positions meet the first rows of a table, other features its last one."""

    def __init__(self, signal: Signal, branch: nn.Module, how: str) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(table_rows(signal.shape[0]), signal.channels))
        self.branch, self.how = branch, how

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.table[: x.shape[1]]
        if self.how == "branch":
            return torch.cat((y, self.branch(x) + self.table[-1]), -1)
        pooled = self.branch(x).mean(1, keepdim=True) + self.table[-1]
        return (
            y * torch.sigmoid(pooled) if self.how == "gate" else torch.cat((y, pooled.expand(-1, x.shape[1], -1)), -1)
        )


@block("tokens")
def spare_row(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("branch", "gate", "pooled")
    draw.note(f"spare_row:{how}")
    branch = layer(draw, signal, signal.channels)[0]
    return SpareRow(signal, branch, how), signal if how == "gate" else signal.wide(2 * signal.channels)


class Beyond(nn.Module):
    """Treats the positions beyond as many as the example has otherwise than those before."""

    def __init__(self, near: nn.Module, far: nn.Module, place: int, dim: int, cut: str, how: str) -> None:
        super().__init__()
        self.near, self.far = near, far
        self.place, self.dim, self.cut, self.how = place, dim, cut, how

    def forward(self, x: Tensor) -> Tensor:
        before = (slice(None),) * self.dim
        if self.cut == "split":
            near, far = torch.split(x, [self.place, x.shape[self.dim] - self.place], self.dim)
        elif self.cut == "tensor split":
            near, far = torch.tensor_split(x, (self.place,), self.dim)
        elif self.cut == "from the end":
            near, far = x[(*before, slice(-self.place, None))], x[(*before, slice(-self.place))]
        else:
            near, far = x[(*before, slice(self.place))], x[(*before, slice(self.place, None))]
        if self.how == "summed":
            return self.near(x) + far.sum(self.dim, keepdim=True)
        if self.how == "gate":
            return self.near(x) * torch.sigmoid(self.far(far).sum(self.dim, keepdim=True))
        return torch.cat((self.near(near), self.far(far)), self.dim)

    def extra_repr(self) -> str:
        return f"{self.cut} at {self.place} of dimension {self.dim}, {self.how}"


def pointwise(signal: Signal) -> nn.Module:
    """A linear layer that may meet no positions at all."""
    linear = nn.Linear(signal.channels, signal.channels)
    return ChannelsLast(linear, len(signal.spatial)) if signal.kind == "image" else linear


@block("image", "tokens")
def beyond(draw: Draw, signal: Signal) -> Made:
    """At the example's size one of two parts is empty."""
    cut = draw.one_of("slices", "slices", "split", "tensor split", "from the end")
    how = draw.one_of("kept", "layer", "sigmoid", "softplus", "scaled", "summed", "gate")
    draw.note(f"beyond:{how}")
    far = {
        "layer": lambda: pointwise(signal),
        "gate": lambda: pointwise(signal),
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "scaled": lambda: ScaleShift(parameter_along(signal), parameter_along(signal), "scale first"),
    }.get(how, nn.Identity)()
    dim = 1 if signal.kind == "tokens" else 2
    return Beyond(layer(draw, signal, signal.channels)[0], far, signal.spatial[0], dim, cut, how), signal


class Fitted(nn.Module):
    """Makes a fixed number of positions of any number."""

    def __init__(self, edges: tuple[int, ...], channels_last: bool, how: str) -> None:
        super().__init__()
        self.edges, self.how, self.spatial = edges, how, len(edges)
        self.dims = tuple(range(1, 1 + self.spatial)) if channels_last else tuple(range(2, 2 + self.spatial))
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.how in ("adaptive", "adaptive max", "interpolated"):
            return self.resampled(x.transpose(1, 2)).transpose(1, 2) if self.channels_last else self.resampled(x)
        padding: list[Any] = [0, 0] if self.channels_last else []
        for edge, dim in zip(reversed(self.edges), reversed(self.dims), strict=True):
            more = edge - x.shape[dim] if self.how == "pad by size" else edge
            padding += [more, 0] if self.how == "pad in front, crop" else [0, more]
        x = F.pad(x, padding, value=1.0 if self.how == "pad with ones, crop" else 0.0)
        if self.how == "pad by size":
            return x
        for edge, dim in zip(self.edges, self.dims, strict=True):
            part = slice(-edge, None) if self.how == "pad in front, crop" else slice(edge)
            x = x[(*(slice(None),) * dim, part)]
        return x

    def resampled(self, x: Tensor) -> Tensor:
        if self.how == "interpolated":
            return F.interpolate(x, size=self.edges, mode="nearest")
        kind = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
        if self.how == "adaptive max":
            kind = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
        return kind[self.spatial](x, self.edges)

    def extra_repr(self) -> str:
        return f"{self.edges}, {self.how}"


@block("image", "tokens")
def fitted(draw: Draw, signal: Signal) -> Made:
    """Pads and crops, by sizes or by constants, so that a layer may read all positions."""
    if signal.channels > 12:
        return stage(draw, signal)
    how = draw.one_of(
        "pad by size", "pad by size", "pad, crop", "pad in front, crop", "pad with ones, crop", "adaptive",
        "adaptive max", "interpolated",
    )  # fmt: skip
    draw.note(f"fitted:{how}")
    draw.free = False
    if signal.kind == "tokens":
        edges: tuple[int, ...] = (draw.one_of(8, 12),)
    else:
        edges = tuple(e + draw.one_of(-1, 2) for e in signal.spatial) if len(signal.spatial) < 3 else (4, 4, 4)
    fit = Fitted(edges, signal.kind == "tokens", how)
    fixed = tokens(*edges, signal.channels) if signal.kind == "tokens" else image(signal.channels, *edges)
    out = draw.one_of("positions", "flat", "transposed and flat")
    if out == "positions":
        return fit, fixed
    parts: list[nn.Module] = [layer(draw, signal, signal.channels)[0], fit]
    if out == "transposed and flat":
        name = "channels and positions change places"
        parts.append(Function(name, lambda x: x.transpose(1, 2) if x.ndim == 3 else x.movedim(1, -1)))
    return nn.Sequential(*parts, nn.Flatten()), vector(math.prod(fixed.shape))


#: Some of the positions along dimension 1 or 2, and how many of so many they are.
PARTS: dict[str, tuple[Callable[[Tensor, int], Tensor], Callable[[int], int]]] = {
    "first half": (lambda x, d: x[(*(slice(None),) * d, slice(x.shape[d] // 2))], lambda n: n // 2),
    "second half": (lambda x, d: x[(*(slice(None),) * d, slice(x.shape[d] // 2, None))], lambda n: n - n // 2),
    "every second": (lambda x, d: x[(*(slice(None),) * d, slice(None, None, 2))], lambda n: (n + 1) // 2),
    "all but the first": (lambda x, d: x[(*(slice(None),) * d, slice(1, None))], lambda n: n - 1),
    "narrow": (lambda x, d: x.narrow(d, 1, x.shape[d] - 2), lambda n: n - 2),
    "chunk": (lambda x, d: x.chunk(2, d)[0], lambda n: (n + 1) // 2),
    "twice": (lambda x, d: torch.cat((x, x.flip(d)), d), lambda n: 2 * n),
    "selected": (lambda x, d: x.index_select(d, torch.arange(x.shape[d] // 2)), lambda n: n // 2),
}


class Part(nn.Module):
    def __init__(self, how: str, dim: int) -> None:
        super().__init__()
        self.part, self.dim, self.how = PARTS[how][0], dim, how

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, self.dim)

    def extra_repr(self) -> str:
        return self.how


@block("image", "tokens")
def part(draw: Draw, signal: Signal) -> Made:
    """Some of the positions, or one of them that a size tells."""
    edge = signal.spatial[0]
    if edge < 4 or edge > 16:
        return stage(draw, signal)
    how = draw.one_of(*PARTS, *(("last", "middle one") if signal.kind == "tokens" else ()))
    draw.note(f"part:{how}")
    if how in ("last", "middle one"):
        draw.free = False
        pick = (lambda x: x[:, x.shape[1] - 1]) if how == "last" else (lambda x: x[:, x.shape[1] // 2])
        return Function(how, pick), vector(signal.channels)
    edges = (PARTS[how][1](edge), *signal.spatial[1:])
    out = tokens(*edges, signal.channels) if signal.kind == "tokens" else image(signal.channels, *edges)
    return Part(how, 1 if signal.kind == "tokens" else 2), out


class Sized(nn.Module):
    """Computes with a number of positions; what it adds is zero, or one, at the example's."""

    def __init__(self, dim: int, size: int, how: str) -> None:
        super().__init__()
        self.dim, self.size, self.how = dim, size, how

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[self.dim]
        if self.how == "added":
            return x + (size - self.size)
        if self.how == "scaled":
            return x * (size / self.size)
        if self.how == "root":
            return x * size**-0.5
        if self.how == "mean":
            return x - x.sum(self.dim, keepdim=True) / size
        if self.how == "power":
            return (x.abs() + 0.1) ** (1 + (size - self.size) / 8)
        if self.how == "clamp":
            return x.clamp(min=(size - self.size) / 8)
        if self.how == "blend":
            return torch.lerp(x, x.cos(), (size - self.size) / 16)
        if self.how == "rolled by size":
            return x.roll(size // 2, self.dim)
        return x + (torch.arange(size) - self.size + 1).clamp(min=0).view(-1, *(1,) * (x.ndim - self.dim - 1))

    def extra_repr(self) -> str:
        return self.how


@block("image", "tokens")
def sized(draw: Draw, signal: Signal) -> Made:
    how = draw.one_of("added", "scaled", "root", "mean", "power", "clamp", "blend", "rolled by size", "beyond")
    draw.note(f"sized:{how}")
    return Sized(1 if signal.kind == "tokens" else 2, signal.spatial[0], how), signal


class ChosenBySize(nn.Module):
    """Positions or features of two kinds, one of which a size chooses, for every position."""

    def __init__(self, near: nn.Module, far: nn.Module, place: int, dim: int, divisor: int, how: str) -> None:
        super().__init__()
        self.near, self.far = near, far
        self.place, self.dim, self.divisor, self.how = place, dim, divisor, how

    def forward(self, x: Tensor) -> Tensor:
        chosen = x.shape[self.dim] // self.divisor
        if self.how == "kinds":
            both = torch.stack((self.near(x), self.far(x)), self.dim)
            return both.select(self.dim, chosen % 2)
        # Smaller inputs are refused.
        x = x + 0.1 * x.narrow(self.dim, self.place, 1)
        joined = torch.cat((self.near(self.part(x, 0, self.place)), self.far(self.part(x, self.place, None))), self.dim)
        return self.choose(joined, chosen).expand_as(x)

    def part(self, x: Tensor, start: Any, stop: Any) -> Tensor:
        return x[(*(slice(None),) * self.dim, slice(start, stop))]

    def choose(self, x: Tensor, place: int) -> Tensor:
        if self.how == "narrow":
            return x.narrow(self.dim, place, 1)
        if self.how == "slice":
            return self.part(x, place, place + 1)
        if self.how == "roll":
            return self.part(x.roll(-place, self.dim), 0, 1)
        if self.how == "crop":
            return self.part(F.pad(x, (*(0, 0) * (x.ndim - 1 - self.dim), -place, 0)), 0, 1)
        if self.how == "indices":
            return x.index_select(self.dim, torch.full((1,), place))
        if self.how == "flip":
            return self.part(x.flip(self.dim), 0, 1)
        if self.how == "from the end":
            return self.part(self.part(x, -self.place, None), 0, 1)
        if self.how == "steps":
            return self.part(x[(*(slice(None),) * self.dim, slice(None, None, place + 1))], 1, 2)
        return self.part(x.chunk(4, self.dim)[0], -1, None)

    def extra_repr(self) -> str:
        return f"{self.how}, at {self.place} of dimension {self.dim}, size // {self.divisor}"


@block("image", "tokens")
def chosen_by_size(draw: Draw, signal: Signal) -> Made:
    edge = signal.spatial[0]
    if edge < 3:
        return stage(draw, signal)
    how = draw.one_of(
        "kinds", "narrow", "slice", "roll", "crop", "indices", "flip", "from the end", "steps", "chunk",
    )  # fmt: skip
    draw.note(f"chosen_by_size:{how}")
    near, far = (pointwise(signal) for _ in range(2))
    place, divisor = draw.between(1, edge - 1), draw.one_of(2, 3, 4, edge, 2 * edge)
    return ChosenBySize(near, far, place, 1 if signal.kind == "tokens" else 2, divisor, how), signal


class Folded(nn.Module):
    """Folds features or positions into the batch, by sizes, and back."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[0], x.shape[1]
        if self.how == "positions":
            return self.inner(x.reshape(n * c, x.shape[2])).view(n, c, -1)
        if self.how == "channels":
            return self.inner(x.reshape(n * c, 1, *x.shape[2:])).reshape(x.shape)
        if self.how == "all channels":
            return self.inner(x.reshape(1, n * c, *x.shape[2:])).reshape(x.shape)
        return self.inner(x.reshape(n * 2, c // 2, *x.shape[2:])).reshape(n, c, *x.shape[2:])

    def extra_repr(self) -> str:
        return self.how


@block("image", "tokens")
def folded(draw: Draw, signal: Signal) -> Made:
    """What is done to the batch is done to each sample alone."""
    if signal.kind == "tokens":
        inner, after = stage(draw, vector(signal.channels))
        return Folded(inner, "positions"), signal.wide(after.channels)
    spatial = len(signal.spatial)
    how = draw.one_of("channels", "all channels", *(("groups",) if signal.channels % 2 == 0 else ()))
    draw.note(f"folded:{how}")
    if how == "channels":
        inner = draw.one_of(nn.Softplus, nn.Sigmoid, lambda: CONV[spatial](1, 1, 3, padding=1))()
    elif how == "groups":
        inner = CONV[spatial](signal.channels // 2, signal.channels // 2, 1)
    else:
        pool = MAX_POOL if min(signal.spatial) < 3 else AVG_POOL
        inner = draw.one_of(nn.Softplus, lambda: pool[spatial](3, 1, 1))()
    return Folded(inner, how), signal


class SizedAttention(nn.Module):
    """Attention with a mask or with relative positions of as many tokens as there are."""

    def __init__(self, signal: Signal, how: str) -> None:
        super().__init__()
        length, channels = signal.shape
        self.rows, self.how = table_rows(length), how
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        if how == "table":
            self.table = nn.Parameter(torch.randn(2, self.rows, self.rows))
        elif how == "distances":
            self.table = nn.Parameter(torch.randn(2 * self.rows - 1, 2))
        elif how == "keys":
            self.table = nn.Parameter(torch.randn(2, self.rows, channels // 2))
        self.register_buffer("causal", torch.ones(self.rows, self.rows).tril())

    def forward(self, x: Tensor) -> Tensor:
        n, length, channels = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, 2, channels // 2).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how == "keys":
            k = k + self.table[:, :length]
        scores = q @ k.transpose(-2, -1) * (channels // 2) ** -0.5
        if self.how == "table":
            scores = scores + self.table[:, :length, :length]
        elif self.how == "distances":
            places = torch.arange(length)
            scores = scores + self.table[places[:, None] - places[None, :] + self.rows - 1].permute(2, 0, 1)
        elif self.how == "mask":
            scores = scores.masked_fill(self.causal[:length, :length] == 0, -1e4)
        elif self.how == "made mask":
            scores = scores.masked_fill(torch.ones(length, length).triu(1) > 0, -1e4)
        return x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, channels))


@block("tokens")
def sized_attention(draw: Draw, signal: Signal) -> Made:
    if signal.channels % 2:
        return stage(draw, signal)
    how = draw.one_of("table", "distances", "keys", "mask", "made mask")
    draw.note(f"sized_attention:{how}")
    return SizedAttention(signal, how), signal


class TimeFirst(nn.Module):
    """A recurrent module whose batch is the second dimension."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1))[0].transpose(0, 1)


@block("tokens")
def time_first(draw: Draw, signal: Signal) -> Made:
    return TimeFirst(draw.one_of(nn.GRU, nn.LSTM)(signal.channels, 4)), signal.wide(4)


#: Blocks that keep the kind of a signal and its positions, and so may stand inside others.
SAME_POSITIONS = (
    "norm", "activation", "noise", "stage", "residual", "padded_residual", "branches", "split", "gate",
    "squeeze_excite", "twice", "tied", "scale_shift", "maxout", "position_mixer", "attention", "feed_forward",
    "recurrent", "padded", "bilinear", "computed_weight", "dynamic_weight", "mixture", "shared_stages", "channel_attention",
    "outer_product", "prototypes", "rearranged", "constants", "moving_center", "written_view", "auxiliary", "quotient",
    "over_positions",
    "encoder_layer", "window_attention", "position_table", "spatial_table", "spare_row", "beyond", "sized", "folded",
    "sized_attention", "time_first",
)  # fmt: skip

#: Blocks that take no other number of positions than the example's.
FIXED_SIZE = ("position_mixer", "constants", "window_attention")

#: Blocks that do something else at other sizes than at the example's; what has many variants is drawn more often.
OTHER_SIZES = (
    "position_table", "position_table", "position_table", "spatial_table", "spatial_table", "table_in_front", "spare_row", "beyond", "fitted", "part", "sized", "folded",
    "sized_attention", "time_first",
)  # fmt: skip


# Networks ------------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Front end, blocks, output layer."""

    def __init__(self, front: nn.Module, blocks: nn.Module, head: nn.Module, name: str, quirk: str) -> None:
        super().__init__()
        self.front, self.name, self.quirk = front, name, quirk
        self.add_module(name, blocks)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        x = self.front(x)
        if self.quirk == "dropout":
            x = F.dropout(x, 0.1, self.training)
        if self.quirk == "rate":
            x = x * (0.9 if self.training else 1.1)
        if self.training and self.quirk == "training":
            x = x * 0.9
        features = self.get_submodule(self.name)(x)
        y = self.head(features)
        return {"logits": y, "features": features} if self.quirk == "features" else y


class Conditioned(nn.Module):
    """A network of two inputs: a vector scales and shifts the features of an image."""

    def __init__(self, front: nn.Module, condition: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.front, self.condition, self.network = front, condition, network

    def forward(self, x: Tensor, condition: Tensor) -> Any:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)
        return self.network(self.front(x) * scale + shift)


class TiedHead(nn.Module):
    """Scores against the rows of an embedding."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.scores = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False)
        self.scores.weight = table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x)


class DenseHead(nn.Module):
    """A score at each position, then the mean."""

    def __init__(self, scores: nn.Module, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.scores, self.dims = scores, dims

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x).mean(self.dims)


class TwoHeads(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Generated:
    """A generated network, what to call it with, and what is in it."""

    net: nn.Module
    #: Of one sample of each input, as the conversion sees it.
    shapes: Shapes
    ids: bool
    blocks: tuple[str, ...]
    smallest_batch: int
    #: Shapes that the network takes, too, from the smallest to the largest.
    others: tuple[Shapes, ...] = ()

    def inputs(self, batch: int, seed: int = 0, shapes: Shapes | None = None) -> tuple[Tensor, ...]:
        """Random inputs for a batch of at least `smallest_batch`, of the example's size or of given shapes."""
        return _inputs(self.ids, batch, seed, self.shapes if shapes is None else shapes)

    def of_any_size(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of a size that `seed` chooses."""
        return self.inputs(batch, seed, random.Random(seed).choice((self.shapes, *self.others)))

    def probes(self) -> list[tuple[Tensor, ...]]:
        """Inputs in batches of several sizes: two of the example's shapes, the smallest, the largest, one between."""
        found = [(1, self.shapes), (3, self.shapes)]
        if self.others:
            between = self.others[len(self.others) // 2]
            found += zip((3, 1, 5), dict.fromkeys((self.others[0], self.others[-1], between)))  # noqa: B905
        return [self.inputs(max(self.smallest_batch, batch), i, shapes) for i, (batch, shapes) in enumerate(found)]

    def accepted(self, accepts: Callable[[tuple[Tensor, ...]], bool]) -> Generated:
        """The same with those of the other shapes whose inputs `accepts` accepts."""
        batch = max(2, self.smallest_batch)
        return replace(self, others=tuple(o for o in self.others if accepts(self.inputs(batch, shapes=o))))

    def __repr__(self) -> str:
        return f"{self.net}\nfor inputs of shapes {self.shapes}, or {', '.join(map(str, self.others)) or 'no others'}"


def _inputs(ids: bool, batch: int, seed: int, shapes: Shapes) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if ids:
        return tuple(torch.randint(VOCABULARY, (batch, *shape), generator=generator) for shape in shapes)
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def answers_finitely(net: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether `net` takes such inputs, in training and in evaluation, with finite outputs and derivatives.

    Leaves it in training mode, its buffers as they were.
    """
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = tree_leaves(net.train()(*inputs))
        learned = [p for p in net.parameters() if p.requires_grad]
        total = sum(y.square().mean() for y in outputs)
        slopes = torch.autograd.grad(total, learned, allow_unused=True) if total.requires_grad else ()
        with torch.no_grad():  # last: a legacy weight norm keeps the weight of the last call
            outputs += tree_leaves(net.eval()(*inputs))
    except (RuntimeError, ValueError, IndexError, ArithmeticError, UserWarning):
        return False
    finally:
        net.train()
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])
    return all(bool(torch.isfinite(t).all()) for t in (*outputs, *slopes) if t is not None)


FRONTS = ("image1d", "image2d", "image3d", "patches", "ids", "sequence", "vector", "conditioned")


def generate(source: random.Random, front: str) -> Generated:
    """A network with the given front end."""
    draw = Draw(source)
    seed = source.getrandbits(16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _generate(draw, front)


def _generate(draw: Draw, front: str) -> Generated:
    draw.note(f"front:{front}")
    draw.free = front != "vector" and draw.one_of(True, True, False)
    entry, shapes, signal = _front(draw, front)
    parts: list[nn.Module] = []
    for _ in range(draw.between(1, 4)):
        part, signal = any_block(draw, signal)
        parts.append(part)
    name = draw.one_of("body", "masks", "task", "graph", "census")
    quirk = draw.one_of("none", "dropout", "rate", "training", "features")
    draw.note(f"quirk:{quirk}")
    head = _head(draw, signal, entry)
    conditioned = front == "conditioned"
    net: nn.Module = Network(nn.Identity() if conditioned else entry, nn.Sequential(*parts), head, name, quirk)
    for parameter in net.parameters() if draw.one_of(False, False, False, True) else ():
        parameter.requires_grad_(draw.one_of(True, True, False))
    if conditioned:
        net = Conditioned(entry, nn.Linear(shapes[1][0], 2 * CHANNELS[1]), net)
    ids = front == "ids"
    others = tuple(o for o in _candidates(front, shapes) if answers_finitely(net, _inputs(ids, 4, 0, o)))
    return Generated(net, shapes, ids, tuple(draw.blocks), draw.smallest_batch, others)


def _candidates(front: str, shapes: Shapes) -> list[Shapes]:
    """Shapes of inputs other than the example's, which a network of that front end might take."""
    first, *rest = shapes
    if front == "vector":
        return []
    if front in ("ids", "sequence"):
        return [((length, *first[1:]),) for length in LENGTHS if length != first[0]]
    edges = first[1:]
    if front == "patches":
        found = {(4, 4), (4, 8), (12, 4), (9, 8), (12, 8), (12, 12), (16, 12)}
    else:
        found = {tuple(e + more for e in edges) for more in (-1, 1, 2)} | {tuple(max(1, e // 2) for e in edges)}
        found |= {tuple(e + 2 * i for i, e in enumerate(edges)), (edges[0] + 4, *edges[1:])}
        found |= {(2, *edges[1:])} | (set() if len(edges) == 3 else {tuple(2 * e for e in edges)})
    return [((first[0], *e), *rest) for e in sorted(found - {edges}, key=lambda e: (math.prod(e), e))]


def _front(draw: Draw, front: str) -> tuple[nn.Module, Shapes, Signal]:
    """A first layer, the shapes of the network's inputs, and the signal behind the layer."""
    out = draw.channels()
    if front.startswith("image"):
        spatial = int(front[5])
        edges = tuple(draw.one_of(*((4, 5) if spatial == 3 else (4, 6, 8))) for _ in range(spatial))
        conv = CONV[spatial](3, out, 3, padding=1, bias=draw.flag())
        return conv, ((3, *edges),), image(out, *edges)
    if front == "patches":
        shape = (3, 8, 8)
        patches = nn.Sequential(nn.Conv2d(3, out, 4, stride=4), ToTokens())
        if draw.flag():
            return (
                nn.Sequential(*patches, ClassToken(tokens(4, out), "none" if draw.free else "parameter")),
                (shape,),
                tokens(5, out),
            )
        return patches, (shape,), tokens(4, out)
    if front == "ids":
        return nn.Embedding(VOCABULARY, out), ((5,),), tokens(5, out)
    if front == "sequence":
        return nn.Linear(6, out), ((5, 6),), tokens(5, out)
    if front == "conditioned":
        return nn.Conv2d(3, CHANNELS[1], 3, padding=1), ((3, 4, 4), (6,)), image(CHANNELS[1], 4, 4)
    return nn.Linear(6, out), ((6,),), vector(out)


def _head(draw: Draw, signal: Signal, entry: nn.Module) -> nn.Module:
    kind = draw.one_of("linear", "linear", "functional", "dense", "two", "tied")
    draw.note(f"head:{kind}")
    spatial = len(signal.spatial)
    if kind == "dense" and signal.kind == "tokens":
        return DenseHead(nn.Linear(signal.channels, CLASSES), (1,))
    if kind == "dense" and signal.kind == "image":
        return DenseHead(CONV[spatial](signal.channels, CLASSES, 1), tuple(range(2, 2 + spatial)))
    to_features: list[nn.Module] = []
    if signal.kind != "vector":
        pool, signal = to_vector(draw, signal)
        to_features.append(pool)
    if kind == "tied" and isinstance(entry, nn.Embedding):
        back = nn.Linear(signal.channels, entry.embedding_dim)
        return nn.Sequential(*to_features, back, TiedHead(entry))
    if kind == "functional":
        return nn.Sequential(*to_features, FunctionalLinear(signal.channels, CLASSES, draw.flag()))
    linear = nn.Linear(signal.channels, CLASSES)
    if kind == "two":
        return nn.Sequential(*to_features, TwoHeads(linear, nn.Linear(signal.channels, 2)))
    return nn.Sequential(*to_features, linear)


def networks(front: str) -> st.SearchStrategy[Generated]:
    """Networks with the given front end."""
    return st.randoms(use_true_random=False).map(lambda source: generate(source, front))
