"""Weighted layers that carry a mask over their output features.

Each class below is one layer family in full: which input and output features the entries of its weight connect (what
Equation 2 locks), how to make one with another number of outputs (a task's head), and the masked forward pass. To add a
family, add a class.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hatify.nn.connection import Connection
from hatify.nn.folding import remembered
from hatify.nn.functional import masked

#: For each parameter of a layer: the features its entries write, and those they read (None: always on).
#: Both are label or slot tensors, broadcastable to the parameter's shape with one more trailing dimension.
Entries = dict[str, tuple[Tensor, Tensor | None]]


class HatLayer:
    """Mixin: a weighted layer whose ``forward`` takes a mask of shape (output features,)."""

    base: ClassVar[Any]
    #: Multiply the weight by the mask rather than the output; cheaper where the output is the larger of the two.
    fold: bool = False

    @classmethod
    def adopt(cls, layer: nn.Module, fold: bool) -> None:
        """Turn `layer` (of exactly type ``base``) into one of this class, in place: same parameters, same names."""
        layer.__class__ = cls  # type: ignore[assignment]
        layer.fold = fold  # type: ignore[assignment]

    @staticmethod
    @abstractmethod
    def shape(layer: Any) -> tuple[int, ...]:
        """The shape of the weight, which is told by the layer's settings: a weight that is computed stays untouched."""

    @staticmethod
    @abstractmethod
    def connection(layer: Any) -> Connection:
        """Which features the entries of the weight connect, and where they lie in input and output."""

    @classmethod
    def features(cls, layer: Any) -> int:
        """How many output features `layer` has."""
        connection = cls.connection(layer)
        return connection.count(connection.written, cls.shape(layer))

    @classmethod
    def dims(cls, layer: Any) -> tuple[int | None, int]:
        """The dimension of the input that `layer` contracts (None: it looks up), and that of its output features."""
        connection = cls.connection(layer)
        return next(iter(connection.input), None), connection.out[0]

    @classmethod
    def entries(cls, layer: Any, written: Tensor, read: Tensor | None) -> Entries:
        """What each parameter's entries connect, given the output (O, …) and input (I, …) features."""
        found: Entries = {"weight": cls.connection(layer).entries(cls.shape(layer), written, read)}
        return found | {"bias": (written, None)} if hasattr(layer, "bias") else found

    @staticmethod
    @abstractmethod
    def resized(layer: Any, features: int) -> nn.Module:
        """A freshly initialised layer like `layer` with `features` outputs."""

    @staticmethod
    @abstractmethod
    def example_input(layer: Any) -> Tensor:
        """A small input, for trying the layer out on its own."""


def masked_parameters(layer: Any, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of `layer` with the rows of the output features multiplied by `mask`."""

    def multiply() -> tuple[Tensor, Tensor | None]:
        a = mask.to(layer.weight.dtype)
        weight = layer.weight * a.view(-1, *(1,) * (layer.weight.ndim - 1))
        return weight, None if layer.bias is None else layer.bias * a

    return remembered(layer, mask, multiply)


def _placement(layer: nn.Module) -> dict[str, Any]:
    weight = next(layer.parameters())
    return {"device": weight.device, "dtype": weight.dtype}


class HatLinear(HatLayer, nn.Linear):
    """`torch.nn.Linear` whose output features are masked."""

    base = nn.Linear

    @staticmethod
    def shape(layer: nn.Linear) -> tuple[int, ...]:
        return layer.out_features, layer.in_features

    @staticmethod
    def connection(layer: nn.Linear) -> Connection:
        return Connection((0,), (1,), (-1,), (-1,))

    @staticmethod
    def resized(layer: nn.Linear, features: int) -> nn.Linear:
        return nn.Linear(layer.in_features, features, layer.bias is not None, **_placement(layer))

    @staticmethod
    def example_input(layer: nn.Linear) -> Tensor:
        return torch.randn(2, layer.in_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return F.linear(x, self.weight, self.bias)
        if self.fold:
            return F.linear(x, *masked_parameters(self, mask))
        return masked(F.linear(x, self.weight, self.bias), mask, -1)


class _HatConv(HatLayer):
    """What the convolutions share."""

    @staticmethod
    def shape(layer: nn.modules.conv._ConvNd) -> tuple[int, ...]:
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size

    @staticmethod
    def connection(layer: nn.modules.conv._ConvNd) -> Connection:
        channel = (-1 - len(layer.kernel_size),)
        return Connection((0,), (1,), channel, channel, layer.groups)

    @staticmethod
    def resized(layer: Any, features: int) -> nn.Module:
        fresh: nn.Module = type(layer)(
            layer.in_channels,
            features,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups if features % layer.groups == 0 else 1,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            **_placement(layer),
        )
        return fresh

    @staticmethod
    def example_input(layer: nn.modules.conv._ConvNd) -> Tensor:
        edges = [d * (k - 1) + 2 + s for k, d, s in zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)]
        return torch.randn(2, layer.in_channels, *edges)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self._conv_forward(x, self.weight, self.bias)  # type: ignore[attr-defined]
        if self.fold:
            return self._conv_forward(x, *masked_parameters(self, mask))  # type: ignore[attr-defined]
        return masked(self._conv_forward(x, self.weight, self.bias), mask, self.dims(self)[1])  # type: ignore[attr-defined]


class HatConv1d(_HatConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose output channels are masked."""

    base = nn.Conv1d


class HatConv2d(_HatConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose output channels are masked."""

    base = nn.Conv2d


class HatConv3d(_HatConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose output channels are masked."""

    base = nn.Conv3d


class _HatConvTranspose(_HatConv):
    """What the transposed convolutions share: the weight has shape (I, O / groups, *kernel)."""

    @staticmethod
    def shape(layer: nn.modules.conv._ConvNd) -> tuple[int, ...]:
        return layer.in_channels, layer.out_channels // layer.groups, *layer.kernel_size

    @staticmethod
    def connection(layer: nn.modules.conv._ConvNd) -> Connection:
        channel = (-1 - len(layer.kernel_size),)
        return Connection((1,), (0,), channel, channel, layer.groups)

    @staticmethod
    def resized(layer: Any, features: int) -> nn.Module:
        fresh = _HatConv.resized(layer, features)
        fresh.output_padding = layer.output_padding
        return fresh

    def forward(self, x: Tensor, mask: Tensor | None = None, output_size: Any = None) -> Tensor:
        y: Tensor = self.base.forward(self, x, output_size)
        return y if mask is None else masked(y, mask, self.dims(self)[1])


class HatConvTranspose1d(_HatConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose1d` whose output channels are masked."""

    base = nn.ConvTranspose1d


class HatConvTranspose2d(_HatConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose2d` whose output channels are masked."""

    base = nn.ConvTranspose2d


class HatConvTranspose3d(_HatConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """`torch.nn.ConvTranspose3d` whose output channels are masked."""

    base = nn.ConvTranspose3d


class HatEmbedding(HatLayer, nn.Embedding):
    """`torch.nn.Embedding` whose embedding dimensions are masked."""

    base = nn.Embedding

    @staticmethod
    def shape(layer: nn.Embedding) -> tuple[int, ...]:
        return layer.num_embeddings, layer.embedding_dim

    @staticmethod
    def connection(layer: nn.Embedding) -> Connection:
        return Connection((1,), (), (-1,), ())

    @staticmethod
    def resized(layer: nn.Embedding, features: int) -> nn.Embedding:
        return nn.Embedding(layer.num_embeddings, features, layer.padding_idx, **_placement(layer))

    @staticmethod
    def example_input(layer: nn.Embedding) -> Tensor:
        return torch.arange(min(layer.num_embeddings, 4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = nn.Embedding.forward(self, x)
        return y if mask is None else masked(y, mask, -1)


#: Mask-carrying class of each exact layer type.
LAYERS: dict[type[nn.Module], type[HatLayer]] = {
    layer.base: layer
    for layer in (
        HatLinear,
        HatConv1d,
        HatConv2d,
        HatConv3d,
        HatConvTranspose1d,
        HatConvTranspose2d,
        HatConvTranspose3d,
        HatEmbedding,
    )
}


def family_of(module: nn.Module) -> type[HatLayer] | None:
    """The layer family `module` belongs to, as an instance of its base or of a subclass; None if it has no weights."""
    return next((LAYERS[base] for base in type(module).__mro__ if base in LAYERS), None)
