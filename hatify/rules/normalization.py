"""Normalisations: modules (one copy per task, masked inside) and functions."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from hatify.rules.registry import Call, Labels, rule

# Positions of (weight, bias, running buffers) in each function's signature, and whether features lie along dim 1.
_SIGNATURES = {
    "batch_norm": (3, 4, (1, 2), True),
    "instance_norm": (3, 4, (1, 2), True),
    "layer_norm": (2, 3, (), False),
    "group_norm": (2, 3, (), True),
    "rms_norm": (2, None, (), False),
}


@rule(
    F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm, F.rms_norm,
    torch.batch_norm, torch.instance_norm, torch.layer_norm, torch.group_norm, torch.rms_norm,
)  # fmt: skip
def functional_norm(call: Call) -> Labels:
    """The features stay where they are; weight and bias share their masks; running statistics move in training."""
    name = call.node.target.__name__  # type: ignore[union-attr]
    weight, bias, buffers, channels_first = _SIGNATURES[name]
    labels: Tensor = call.label(0)
    for position, keyword in ((weight, "weight"), (bias, "bias")):
        affine = None if position is None else call.labels_of(call.given(position, keyword))
        if isinstance(affine, Tensor):
            shape = (-1,) + (1,) * (labels.ndim - 2) if channels_first else affine.shape
            call.space.meet(labels, affine.reshape(shape))
    for position, keyword in zip(buffers, ("running_mean", "running_var"), strict=False):
        node = call.given(position, keyword)
        if isinstance(node, fx.Node) and node.op == "get_attr":
            call.findings.moving.add(str(node.target))
    return call.mask(labels)
