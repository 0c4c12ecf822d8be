"""Normalisations: modules (one copy per task, masked inside) and functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hatify.ops.registry import Call, Labels, op, sources

#: Positions of (weight, bias, running buffers) in each function's signature, and whether features lie along dim 1.
_SIGNATURES = {
    F.batch_norm: (3, 4, (1, 2), True),
    F.instance_norm: (3, 4, (1, 2), True),
    F.layer_norm: (2, 3, (), False),
    F.group_norm: (2, 3, (), True),
    F.rms_norm: (2, None, (), False),
    torch.batch_norm: (1, 2, (3, 4), True),
    torch.instance_norm: (1, 2, (3, 4), True),
    torch.layer_norm: (2, 3, (), False),
    torch.group_norm: (2, 3, (), True),
    torch.rms_norm: (2, None, (), False),
}


@op(*_SIGNATURES)
def functional_norm(call: Call) -> Labels:
    """The features stay where they are; weight and bias share their masks; running statistics move in training."""
    weight, bias, buffers, channels_first = _SIGNATURES[call.node.target]  # type: ignore[index]
    labels: Tensor = call.label(0)
    for position, keyword in ((weight, "weight"), (bias, "bias")):
        affine = None if position is None else call.labels_of(call.given(position, keyword))
        if isinstance(affine, Tensor):
            shape = (-1,) + (1,) * (labels.ndim - 2) if channels_first else affine.shape
            call.space.meet(labels, affine.reshape(shape))
    for position, keyword in zip(buffers, ("running_mean", "running_var"), strict=False):
        call.findings.moving.update(sources(call.given(position, keyword)))
    return call.mask(labels)
