"""Capacity regularisation: Equation 5."""

from __future__ import annotations

import torch
from torch import Tensor


def capacity_regularization(
    gates: Tensor,
    used: Tensor,
    layer: Tensor,
    num_layers: int,
    num_tasks: int,
    per_layer: bool = True,
    quota: bool = True,
) -> Tensor:
    """Equation 5: how much of the capacity that earlier tasks left over the current task uses, above its share.

    R = Σ_l max(Σ_i a_li (1 − u_li) / Σ_i (1 − u_li) − 1/T, 0), where u marks the features earlier tasks have on.
    A layer with no capacity left contributes nothing.

    Args:
        gates: a, shape (features,), the current task's gates of all layers.
        used: u, shape (features,), 0 or 1.
        layer: the index of each feature's layer, shape (features,), int64.
        num_layers: L.
        num_tasks: T.
        per_layer: False sums over the whole network before dividing, the form of Serrà et al. 2018 (their Eq. 6).
        quota: subtract 1/T and clamp at zero.

    Returns:
        R, a scalar, differentiable in `gates`.
    """
    free = 1 - used
    if per_layer:
        taken = gates.new_zeros(num_layers).index_add(0, layer, gates * free)
        available = gates.new_zeros(num_layers).index_add(0, layer, free)
    else:
        taken, available = (gates * free).sum(), free.sum()
    share = taken / available.clamp_min(1)
    if quota:
        share = torch.relu(share - 1 / num_tasks)
    return share.sum()
