"""Normalisations: one copy per task, over the active features, whether they are modules or written as functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hatify.labels import varying_dims
from hatify.nn.norms import AsModule, feature_dims, takes_inside
from hatify.ops.registry import Call, Labels, like_input, op, sources
from hatify.ops.weighted import read_as_it_is

_AFFINE, _BUFFERS = ("weight", "bias"), ("running_mean", "running_var")
_BATCH = ("training", "momentum", "eps")
_SAMPLE = ("use_input_stats", "momentum", "eps")
#: The module that does the same as each function, and the names of the function's arguments.
_FUNCTIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    F.batch_norm: ("BatchNorm1d", ("input", *_BUFFERS, *_AFFINE, *_BATCH)),
    F.instance_norm: ("InstanceNorm1d", ("input", *_BUFFERS, *_AFFINE, *_SAMPLE)),
    F.layer_norm: ("LayerNorm", ("input", "normalized_shape", *_AFFINE, "eps")),
    F.group_norm: ("GroupNorm", ("input", "num_groups", *_AFFINE, "eps")),
    F.rms_norm: ("RMSNorm", ("input", "normalized_shape", "weight", "eps")),
    torch.batch_norm: ("BatchNorm1d", ("input", *_AFFINE, *_BUFFERS, *_BATCH)),
    torch.instance_norm: ("InstanceNorm1d", ("input", *_AFFINE, *_BUFFERS, *_SAMPLE)),
    torch.layer_norm: ("LayerNorm", ("input", "normalized_shape", *_AFFINE, "eps")),
    torch.group_norm: ("GroupNorm", ("input", "num_groups", *_AFFINE, "eps")),
    torch.rms_norm: ("RMSNorm", ("input", "normalized_shape", "weight", "eps")),
}


def as_module(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The module that does what the function at `node` does, and its arguments by name; None if that is no norm."""
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    kind, names = _FUNCTIONS[node.target]
    return kind, dict(zip(names, args, strict=False)) | {n: value for n, value in kwargs.items() if n in names}


def own_tensors(node: fx.Node, net: nn.Module) -> Iterator[str]:
    """The parameters and buffers that a normalisation written as a function has, as the module would."""
    found = as_module(node, node.args, node.kwargs)
    for name in (*_AFFINE, *_BUFFERS) if found is not None else ():
        read = read_as_it_is(found[1].get(name), net)  # type: ignore[index]
        if read is not None and read.dims == tuple(range(read.value.ndim)):
            yield read.name


@op(*_FUNCTIONS)
def functional_norm(call: Call) -> Labels:
    """Weight and bias that are computed share the masks of the features; running statistics move in training."""
    found = as_module(call.node, call.args, call.kwargs)
    nodes = as_module(call.node, call.node.args, call.node.kwargs)
    assert found is not None and nodes is not None
    labels: Tensor = call.label(0)
    for name in _AFFINE:
        affine = call.labels_of(nodes[1].get(name))
        if isinstance(affine, Tensor):
            last = found[0] in ("LayerNorm", "RMSNorm")
            call.space.meet(labels, affine.reshape(affine.shape if last else (-1,) + (1,) * (labels.ndim - 2)))
    for name in _BUFFERS:
        call.findings.moving.update(sources(nodes[1].get(name)))
    norm = AsModule(*found)
    result = normalised(call, norm)
    asked = call.findings.asked.get(call.node)
    if asked and takes_inside(norm, asked[0].dim, labels.ndim):
        call.findings.inside.add(call.node)
    return result


def normalised(call: Call, norm: Any) -> Labels:
    """The mask is applied inside. What meets in one feature from several positions, such as a class token and patches,
    is coupled, since a normalisation has one mask for all positions."""
    labels = call.label(0, next(iter(call.node.kwargs), "input"))
    if not isinstance(labels, Tensor) or len(varying_dims(labels)) < 2:
        return like_input(call)
    kept = feature_dims(norm, labels.ndim)
    merged = call.space.merge(labels, [d for d in range(labels.ndim) if d not in kept])
    return call.mask(merged.expand(labels.shape))
