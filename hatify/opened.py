"""The task that is open: what it has to keep to while it learns."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hatify.choosing import TRIAL, Chooser
from hatify.gate import EMBEDDING_LIMIT
from hatify.lock.watch import unwatch, watch
from hatify.nn.state import TaskState
from hatify.regularization import Capacity

#: Gates that are this far from both 0 and 1 at the largest mask scale count as undecided; so do as many masks.
UNDECIDED = 0.02


class Trained(Protocol):
    """The model, as far as its open task needs it."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those by whose steps the task's are counted."""

    def over_ranks(self, values: Tensor) -> Tensor:
        """The mean of `values` over all processes that train the task, in place."""

    def take(self, features: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """What is to be done when the task, trained by `optimizer`, has chosen its `features`."""


class OpenTask:
    """Knows what capacity earlier tasks have left, and looks after the embeddings at every step of an optimizer.

    Args:
        model: the model.
        state: the state of its tasks.
        task: the one that is open.
    """

    def __init__(self, model: Trained, state: TaskState, task: int) -> None:
        self.task, self.state, self._reference = task, state, weakref.ref(model)
        #: Whether it had been finished before.
        self.was_finished = state.finished[task]
        #: Whether it is still to be called for the first time.
        self.unseen = True
        #: How many steps optimizers have taken, and how often a `MaskScale` has set the scale.
        self.steps = self.schedule_steps = 0
        self.embedding = state.embeddings[task]
        self.parameters = frozenset(id(parameter) for parameter in model.parameters())
        used = state.used(besides=task)
        left = used.to(self.embedding.dtype)
        #: Layer by layer, and of the network as a whole.
        self.capacity = Capacity.beside(left, state.layer, len(state.groups))
        self.capacity_of_all = Capacity.beside(left, torch.zeros_like(state.layer), 1)
        share = 1 / max(1, sum(not done or t == task for t, done in enumerate(state.finished)))
        self.chooser = Chooser(self.embedding, state.course, state.layer, tuple(state.groups), used, share)
        state.probe = torch.zeros_like(self.embedding, requires_grad=not state.course.chosen)
        self._remember()
        self._handle: Any = None
        #: Whether masks were set by hand.
        self.given = False
        #: What the embeddings were when the task began.
        self.before = self.embedding.detach().clone()
        self.arm()

    @property
    def _model(self) -> Trained:
        model = self._reference()
        assert model is not None
        return model

    def arm(self) -> None:
        """Watch the steps of optimizers."""
        watch(self)
        self.learn()

    def disarm(self) -> None:
        """Watch no more."""
        unwatch(self)
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def learn(self) -> None:
        """If masks are learned: have all processes that train the task learn the same ones.

        A wrapper that was made before this was decided does not know that embeddings take gradients.
        """
        if self.state.course.learned and self.embedding.requires_grad and self._handle is None:
            self._handle = self.embedding.register_post_accumulate_grad_hook(partial(_reduce, self._reference))

    def accept(self) -> None:
        """Take the embeddings for what they are, also where they were set by hand."""
        self.given = self.is_by_hand
        self._remember()

    def _remember(self) -> None:
        self._known = self.embedding._version, self.embedding.detach().clone()

    def surplus(self) -> Tensor:
        """The features that the task has on beyond its budget, bool, shape (slots,).

        A task that has learned nothing keeps everything: it makes a base for the others of what is there.
        """
        course = self.state.course
        if course.steps == 0:
            self._observe()
        if course.learned or course.chosen or self.is_by_hand or course.steps == 0:
            return torch.zeros_like(self.state.base)
        return self.chooser.surplus()

    def doubts(self, surplus: Tensor) -> Iterator[str]:
        """What speaks against ending the task with its masks as they are, each with its cure."""
        course, e = self.state.course, self.embedding.detach()
        if not self.steps:
            if surplus.any():
                yield "no step of an optimizer of torch.optim was seen, so that features were chosen by one gradient"
            return
        if not (course.learned or course.chosen or course.steps):
            yield "it keeps every feature, since the model was in evaluation mode at every step: call train() first"
        elif surplus.any():
            yield (
                f"it ended after {course.steps} of the {TRIAL} steps for which all features are tried, and "
                f"{int(surplus.sum())} beyond its budget are dropped only now: train for more steps"
            )
        if not course.learned or self.given:
            return
        cure = "leave out MaskScale and regularization(), and masks are chosen"
        if torch.equal(e, self.before):
            yield f"its masks never moved: give the optimizer model.parameters(), train in training mode, or {cure}"
        elif self.schedule_steps == 1 and self.steps > 1:
            yield "the mask scale was set only once: call step() on the MaskScale after every batch"
        gates = torch.sigmoid(self.state.s_max * e)
        undecided = ((gates > UNDECIDED) & (gates < 1 - UNDECIDED) & ~self.state.base).float().mean()
        if undecided > UNDECIDED:
            yield (
                f"{float(undecided):.0%} of its masks are undecided, neither on nor off: give "
                f"model.task_state.embeddings a larger rate, or {cure}"
            )

    @property
    def is_by_hand(self) -> bool:
        """Whether something else than this has set the embeddings, to other values."""
        version, values = self._known
        if self.state.course.learned or self.embedding._version == version:
            return False
        # A wrapper for several processes writes what is there already.
        if not torch.equal(self.embedding, values):
            return True
        self._known = self.embedding._version, values
        return False

    def before_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, held: AbstractSet[int]) -> None:
        """Count the step; keep embeddings within ± `EMBEDDING_LIMIT` (Serrà et al. 2018, section 2.4), or choose."""
        course = self.state.course
        if self.parameters.isdisjoint(held):
            return
        self.steps += 1
        if course.learned:
            if id(self.embedding) in held:
                self.embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
            return
        # Several optimizers may share one backward pass.
        if self._observe() and course.steps >= TRIAL:
            self.chooser.drop(self.chooser.surplus())
            course.chosen = True
            self.state.probe.requires_grad_(False)
            self._remember()
            self._model.take((self.embedding > 0) & ~self.chooser.used, optimizer)

    def _observe(self) -> bool:
        """Note how much each gate matters, if there has been a backward pass since this was asked last."""
        probe = self.state.probe
        if self.state.course.learned or self.is_by_hand or probe.grad is None:
            return False
        change, probe.grad = self._model.over_ranks(probe.grad.abs()), None
        self.chooser.observe(change)
        self._remember()
        return True


def _reduce(model: weakref.ref[Trained], embedding: Tensor) -> None:
    trained = model()
    if trained is not None and embedding.grad is not None:
        trained.over_ranks(embedding.grad)
