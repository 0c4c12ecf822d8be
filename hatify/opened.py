"""The task that is open: what it has to keep to while it learns."""

from __future__ import annotations

from collections.abc import Container

import torch

from hatify.gate import EMBEDDING_LIMIT
from hatify.lock.watch import unwatch, watch
from hatify.nn.state import TaskState
from hatify.regularization import Capacity


class OpenTask:
    """Knows what capacity earlier tasks have left, and keeps the embeddings within reach of their gradient.

    Args:
        state: the state of the tasks.
        task: the one that is open.
    """

    def __init__(self, state: TaskState, task: int) -> None:
        self.task = task
        #: Whether it had been finished before.
        self.was_finished = state.finished[task]
        #: Whether it is still to be called for the first time.
        self.unseen = True
        self.embedding = state.embeddings[task]
        used = state.used(besides=task).to(self.embedding.dtype)
        #: Layer by layer, and of the network as a whole.
        self.capacity = Capacity.beside(used, state.layer, len(state.groups))
        self.capacity_of_all = Capacity.beside(used, torch.zeros_like(state.layer), 1)
        self.arm()

    def arm(self) -> None:
        """Watch the steps of optimizers."""
        watch(self)

    def disarm(self) -> None:
        """Watch no more."""
        unwatch(self)

    def before_step(self, held: Container[int]) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, held: Container[int]) -> None:
        """Keep embeddings within ± `EMBEDDING_LIMIT` (Serrà et al. 2018, section 2.4)."""
        if id(self.embedding) in held:
            self.embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
