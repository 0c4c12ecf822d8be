"""Weighted layers that carry a mask over their output features.

Each class below is one layer family in full: where its features lie in input and output, which entries of its
parameters connect which input to which output feature (what Equation 2 locks), how to make one with another number
of outputs (a task's head), and the masked forward pass. To add a family, add a class.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    def features(layer: Any) -> int:
        """How many output features `layer` has."""

    @staticmethod
    @abstractmethod
    def dims(layer: Any) -> tuple[int | None, int]:
        """The dimension of the input that `layer` contracts (None: it looks up), and that of its output features."""

    @staticmethod
    @abstractmethod
    def entries(layer: Any, written: Tensor, read: Tensor | None) -> Entries:
        """What each parameter's entries connect, given the output (O, …) and input (I, …) features."""

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
    def features(layer: nn.Linear) -> int:
        return layer.out_features

    @staticmethod
    def dims(layer: nn.Linear) -> tuple[int, int]:
        return -1, -1

    @staticmethod
    def entries(layer: nn.Linear, written: Tensor, read: Tensor | None) -> Entries:
        return {
            "weight": (written.unsqueeze(1), None if read is None else read.unsqueeze(0)),
            "bias": (written, None),
        }

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
    def features(layer: nn.modules.conv._ConvNd) -> int:
        return layer.out_channels

    @staticmethod
    def dims(layer: nn.modules.conv._ConvNd) -> tuple[int, int]:
        channel = -1 - len(layer.kernel_size)
        return channel, channel

    @staticmethod
    def entries(layer: nn.modules.conv._ConvNd, written: Tensor, read: Tensor | None) -> Entries:
        spatial = (1,) * len(layer.kernel_size)
        extra = written.shape[1:]
        groups, per_group = layer.groups, layer.out_channels // layer.groups
        if read is not None:
            # Row o of the weight reads the input channels of o's group only.
            read = read.view(groups, -1, *read.shape[1:])
            if groups > 1:
                read = read.repeat_interleave(per_group, 0)
            read = read.reshape(read.shape[0], read.shape[1], *spatial, *read.shape[2:])
        return {"weight": (written.view(-1, 1, *spatial, *extra), read), "bias": (written, None)}

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
        return masked(self._conv_forward(x, self.weight, self.bias), mask, self.dims(self)[1])  # type: ignore[arg-type,attr-defined]


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
    def entries(layer: nn.modules.conv._ConvNd, written: Tensor, read: Tensor | None) -> Entries:
        spatial = (1,) * len(layer.kernel_size)
        extra = written.shape[1:]
        rows_per_group = layer.in_channels // layer.groups
        writes = written.view(layer.groups, -1, *extra)
        if layer.groups > 1:
            writes = writes.repeat_interleave(rows_per_group, 0)
        writes = writes.reshape(writes.shape[0], writes.shape[1], *spatial, *extra)
        if read is not None:
            read = read.view(-1, 1, *spatial, *read.shape[1:])
        return {"weight": (writes, read), "bias": (written, None)}

    @staticmethod
    def resized(layer: Any, features: int) -> nn.Module:
        fresh = _HatConv.resized(layer, features)
        fresh.output_padding = layer.output_padding
        return fresh

    def forward(self, x: Tensor, mask: Tensor | None = None, output_size: Any = None) -> Tensor:
        y: Tensor = self.base.forward(self, x, output_size)
        return y if mask is None else masked(y, mask, self.dims(self)[1])  # type: ignore[arg-type]


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
    def features(layer: nn.Embedding) -> int:
        return layer.embedding_dim

    @staticmethod
    def dims(layer: nn.Embedding) -> tuple[None, int]:
        return None, -1

    @staticmethod
    def entries(layer: nn.Embedding, written: Tensor, read: Tensor | None) -> Entries:
        return {"weight": (written.unsqueeze(0), None)}

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
