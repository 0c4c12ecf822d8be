"""Modules with parameters, by their policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hatify.labels import varying_dims
from hatify.nn.layers import family_of
from hatify.nn.norms import FEATURE_DIMS
from hatify.ops.reduction import read_along
from hatify.ops.registry import Call, Labels, like_input
from hatify.policy import Policy

#: Modules that mix the features of their input.
MIXERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.Transformer, nn.TransformerEncoder,
          nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # fmt: skip

#: The batch size for which to decide whether masking a layer's weight is cheaper than masking its output.
USUAL_BATCH = 8


def module_labels(call: Call, policy: Policy) -> Labels:
    """Labels of the output of a module with parameters or buffers."""
    assert call.module is not None
    if policy in (Policy.SHARED, Policy.ROW, Policy.UNMASKED):
        return weighted(call, policy)
    if policy is Policy.HEAD or isinstance(call.module, MIXERS) or family_of(call.module) is not None:
        return call.all_on()
    return normalised(call) if policy is Policy.NORM else like_input(call)


def normalised(call: Call) -> Labels:
    """The mask is applied inside. What meets in one feature from several positions, such as a class token and patches,
    is coupled, since a normalisation has one mask for all positions."""
    labels = call.label(0, next(iter(call.node.kwargs), "input"))
    if not isinstance(labels, Tensor) or len(varying_dims(labels)) < 2:
        return like_input(call)
    assert call.module is not None
    kept = FEATURE_DIMS[type(call.module)](call.module, labels.ndim)
    merged = call.space.merge(labels, [d for d in range(labels.ndim) if d not in kept])
    return call.mask(merged.expand(labels.shape))


def weighted(call: Call, policy: Policy) -> Labels:
    """A mask-carrying layer reads the labels of its input features and writes leaves of its own."""
    layer: Any = call.module
    path, family = str(call.node.target), family_of(layer)
    assert family is not None
    read_dim, written_dim = family.dims(layer)
    read = None
    if read_dim is not None:
        name = "x" if "x" in call.node.kwargs else "input"
        read = None if call.is_empty else read_along(call, call.label(0, name), read_dim)
        call.reads(path, call.argument(0, name).shape[read_dim], read)
    if policy is Policy.UNMASKED:
        return call.all_on()
    features = family.features(layer)
    written = call.space.feature_leaves(path, features)
    groups = getattr(layer, "groups", 1)
    if call.space.couple and read is not None and 1 < groups == read.shape[0]:
        # A depthwise convolution filters each channel on its own: what comes out is the same feature.
        call.space.meet(written, read.repeat_interleave(features // groups))
    call.findings.fold.setdefault(path, layer.weight.numel() < USUAL_BATCH * call.out[:1].numel())
    return call.mask_own(written, written_dim)
