"""Over which features normalisations take their statistics where there are others beside a locked base."""

from __future__ import annotations

from torch import Tensor, fx

from hatify.converted import Converted
from hatify.nn.norms import mixes_features
from hatify.nn.per_task import PerTaskNorm


def normalise_over_base(model: Converted) -> None:
    """Let normalisations that mix features look at a locked base alone, if there is more."""
    normalise_over(model, model.task_state.base if model.task_state.has_spare else None)


def normalise_over(model: Converted, slots: Tensor | None) -> None:
    """Let normalisations that mix features look at those of some slots, bool, shape (slots,); None: the active ones."""
    state = model.task_state
    masks = {} if slots is None else state.masks_from(slots.to(state.scale.dtype))
    modules = dict(model.named_modules())
    for node in (node for graph in model.flat_graphs.values() for node in graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        mask = node.kwargs.get("mask")
        if isinstance(module, PerTaskNorm) and isinstance(mask, fx.Node) and mixes_features(module[0]):
            module.over = None if slots is None else masks[str(mask.args[1])] > 0
