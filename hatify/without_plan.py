"""Format 1 of saved models, that of version 0.1: without a plan, so that the network is analysed again."""

from __future__ import annotations

import hashlib
from typing import Any

from hatify.errors import CheckpointError
from hatify.model import HatModel

#: The number of the format.
WITHOUT_PLAN = 1


def check_layout(model: HatModel, description: dict[str, Any]) -> None:
    """Raise a `CheckpointError` unless the analysis has led to the layout that was saved."""
    if _digest(model) != description["layout"]:
        versions = ", ".join(f"{package} {number}" for package, number in description["versions"].items())
        raise CheckpointError(
            "the network is another one than was saved, or this version converts it differently "
            f"(it was saved with {versions})"
        )


def _digest(model: HatModel) -> str:
    """What the format has in the place of a plan: a digest of policies, masks, and how entries connect features."""
    digest = hashlib.sha256()
    state = model.task_state
    policies = [(e.name, e.kind, str(e.policy), e.shape) for e in model.census]
    digest.update(repr((policies, state.groups, state.index_names, model.plan.owners)).encode())
    tensors = [getattr(state, f"index_{i}") for i in range(len(state.index_names))]
    for name, uses in model.uses.items():
        digest.update(name.encode())
        tensors += [t for use in uses for t in (use.written, use.read) if t is not None]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
