"""Capacity regularisation: Equation 5."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Capacity(NamedTuple):
    """What earlier tasks left over."""

    free: Tensor  #: 1 − u, shape (features,), where u marks the features earlier tasks have on
    available: Tensor  #: Σ_i (1 − u_li), at least 1, shape (layers,)
    layer: Tensor  #: the index of each feature's layer, int64, shape (features,)

    @classmethod
    def beside(cls, used: Tensor, layer: Tensor, num_layers: int) -> Capacity:
        """The capacity beside the features that are `used`, 0 or 1, shape (features,)."""
        free = 1 - used
        return cls(free, free.new_zeros(num_layers).index_add(0, layer, free).clamp_min(1), layer)


def capacity_regularization(gates: Tensor, capacity: Capacity, num_tasks: int, quota: bool = True) -> Tensor:
    """Equation 5: how much of the capacity that earlier tasks left over the current task uses, above its share.

    R = Σ_l max(Σ_i a_li (1 − u_li) / Σ_i (1 − u_li) − 1/T, 0), where u marks the features earlier tasks have on.
    A layer with no capacity left contributes nothing. With all features counted as one layer it is the form of Serrà
    et al. 2018 (their Equation 6).

    Args:
        gates: a, shape (features,), the current task's gates of all layers.
        capacity: what earlier tasks left over of each layer.
        num_tasks: T.
        quota: subtract 1/T and clamp at zero.

    Returns:
        R, a scalar, differentiable in `gates`.
    """
    taken = torch.zeros_like(capacity.available).index_add(0, capacity.layer, gates * capacity.free)
    share = taken / capacity.available
    return torch.relu(share - 1 / num_tasks).sum() if quota else share.sum()
