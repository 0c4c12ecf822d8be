"""Take features out of layers, normalisations and tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hatify.axes import Name
from hatify.extract.baking import MaskedNorm, layer_family
from hatify.extract.plain import Plain
from hatify.nn.norms import FEATURE_DIMS, is_known


def cut_layer(layer: Any, read: Tensor | None, written: Tensor) -> None:
    """Take features out of a weighted layer, in place.

    Args:
        layer: of one of torch's own types.
        read: which input features stay, bool, shape (input features,); None for a lookup.
        written: which output features stay, bool, shape (output features,).
    """
    weight = layer.weight.detach()
    if read is None:
        weight, layer.embedding_dim = weight[:, written], int(written.sum())
    else:
        groups = getattr(layer, "groups", 1)
        rows, columns = written.view(groups, -1), read.view(groups, -1)
        alive = [g for g in range(groups) if rows[g].any()]
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            rows, columns = columns, rows
        parts = weight.view(groups, -1, *weight.shape[1:])
        weight = torch.cat([parts[g][rows[g]][:, columns[g]] for g in alive])
        kind = "features" if isinstance(layer, nn.Linear) else "channels"
        setattr(layer, f"in_{kind}", int(read.sum()))
        setattr(layer, f"out_{kind}", int(written.sum()))
        if kind == "channels":
            layer.groups = len(alive)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[written], layer.bias.requires_grad)
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)


def cut_norm(norm: Any, dims: Sequence[Tensor]) -> None:
    """Take features out of a normalisation, in place; `dims` says what stays along each normalised dimension."""
    shape = torch.Size(len(kept) for kept in dims)
    for table in (norm._parameters, norm._buffers):
        for name, value in table.items():
            if value is not None and value.shape == shape:
                cut = cut_along(value.detach(), dims)
                table[name] = nn.Parameter(cut, value.requires_grad) if isinstance(value, nn.Parameter) else cut
    counts = tuple(int(kept.sum()) for kept in dims)
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(norm, name):
            setattr(norm, name, counts[0])
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = counts
    if hasattr(norm, "num_groups"):
        norm.num_groups = int(dims[0].view(norm.num_groups, -1).any(1).sum())


def cut_along(value: Tensor, dims: Sequence[Tensor]) -> Tensor:
    """The kept part of `value`, whose dimensions of size 1 stay."""
    for d in range(1, min(value.ndim, len(dims)) + 1):
        if value.shape[-d] > 1 and not dims[-d].all():
            value = value.index_select(-d, dims[-d].nonzero().squeeze(1).to(value.device))
    return value


def sliced(module: Any, found: Mapping[Name, Tensor], ndim: int, plain: Plain) -> nn.Module:
    """A copy of a module without the features that go.

    Args:
        module: a layer or normalisation; any other is returned as it is.
        found: what stays along each name of its axes, bool, shape (size,).
        ndim: how many dimensions its output has.
        plain: the network that it is for, where equal parts of one parameter stay one.
    """
    one = torch.ones(1, dtype=torch.bool)
    result = module
    if layer_family(module) is not None:
        result = copy.deepcopy(module)
        read = None if isinstance(module, nn.Embedding) else found.get("read", one)
        cut_layer(result, read, found.get("written", one))
    elif isinstance(module, MaskedNorm):
        norm = sliced(module.norm, found, ndim, plain)
        dims = FEATURE_DIMS[type(norm)](norm, ndim)
        feature = next(d for d in dims if len(found.get(d, one)) == len(module.mask))
        left = [of[found.get(feature, one)] for of in module.features]
        return norm if all(of.all() for of in left) else MaskedNorm(norm, *left)
    elif is_known(module) or isinstance(module, nn.PReLU):
        result = copy.deepcopy(module)
        dims = range(1, 2) if isinstance(module, nn.PReLU) else FEATURE_DIMS[type(module)](module, ndim)
        cut_norm(result, [found.get(d, one) for d in dims])
    for name, parameter in result._parameters.items():
        before = module._parameters[name]
        if parameter is not None and before is not None and parameter is not before:
            result._parameters[name] = plain.parameter(before, parameter)
    return result
