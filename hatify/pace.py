"""Features that a task has taken turn as fast as those of a network of its own.

Under Adam, and whatever else makes steps whose size does not depend on that of the gradient, an entry moves by the
rate, and what a feature computes by as much as there are entries that move together. Of n entries it takes their number
to move it, but only √n to be as large as it is; so a task that learns a share p of the features learns √p times as fast
as one that learns all of them. Where each feature is normalised by statistics of its own (batch and instance norm),
weights √p times as large compute the same, and turn faster by what is missing. Plain gradient descent needs nothing of
the kind: there gradients grow as weights shrink.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hatify.converted import Converted
from hatify.nn.norms import keeps_features_apart
from hatify.nn.per_task import PerTaskNorm

#: Weights become no smaller than this part of themselves.
SMALLEST = 0.25


def depends_on_width(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a narrow network learns more slowly by it: whether its steps do not grow with the gradient."""
    return not isinstance(optimizer, torch.optim.SGD)


@torch.no_grad()
def quicken(model: Converted, taken: Tensor) -> None:
    """Shrink the weights of features that are normalised one by one; the model computes what it computed.

    Args:
        model: the model, whose task is open.
        taken: features that the task has just taken, of which no entry is locked, bool, shape (slots,).
    """
    layer, count = model.task_state.layer, len(model.task_state.groups)
    new, all_of_it = (
        torch.zeros(count, device=layer.device).index_add(0, layer, of.float())
        for of in (taken, torch.ones_like(taken))
    )
    factor = torch.where(taken, (new / all_of_it).sqrt().clamp(SMALLEST, 1)[layer], 1)
    factor = torch.cat((factor, factor.new_ones(1)))
    for name in _normalised(model):
        (use,) = model.uses[name]
        weight = model.get_parameter(name)
        weight.mul_(factor[use.written.to(layer.device)].squeeze(-1).to(weight.dtype))


def _normalised(model: Converted) -> Iterator[str]:
    """Weights of layers whose output goes nowhere but into a normalisation that keeps features apart."""
    modules = dict(model.named_modules())
    for node in model.flat_graph.nodes:
        name = f"{node.target}.weight"
        if node.op != "call_module" or len(model.uses.get(name, ())) != 1:
            continue
        behind: list[nn.Module | None] = [
            modules.get(str(user.target)) if user.op == "call_module" else None for user in node.users
        ]
        apart = [isinstance(m, PerTaskNorm) and keeps_features_apart(m[0]) for m in behind]
        if apart == [True] and model.uses[name][0].written.shape[-1] == 1:
            yield name
