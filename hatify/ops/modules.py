"""Modules with parameters that are no weighted layers, by their policy."""

from __future__ import annotations

from torch import nn

from hatify.nn.layers import family_of
from hatify.ops.normalization import normalised
from hatify.ops.registry import Call, Labels, like_input
from hatify.policy import Policy

#: Modules that mix the features of their input.
MIXERS = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.Transformer, nn.TransformerEncoder,
          nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # fmt: skip


def module_labels(call: Call, policy: Policy) -> Labels:
    """Labels of the output of a module with parameters or buffers."""
    assert call.module is not None
    if policy is Policy.HEAD or isinstance(call.module, MIXERS) or family_of(call.module) is not None:
        return call.all_on()
    return normalised(call, call.module) if policy is Policy.NORM else like_input(call)
