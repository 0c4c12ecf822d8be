"""The guard that keeps what finished tasks own.

It stands from the first `end_task` on, whether a task is open or not.

Masked gradients alone do not protect a weight: weight decay, momentum from an earlier task and Adam's epsilon move
weights whose gradient is zero. So locked entries are put back after every step of any optimizer that holds parameters
of the model, as the lock's policy says. What is written outside of steps (by an optimizer that swaps averaged weights
in, or another process that broadcasts its buffers) is put right at the next forward pass.

While no task is open, what finished tasks own takes no gradient at all. The copy that is needed to put it right is made
when a task ends, or else at the first sign of training, so that a model that was loaded and only answers holds nothing
twice. Until then, writing to what finished tasks own is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hatify.errors import HatError, listed
from hatify.labels import unexpanded
from hatify.lock.entries import PartlyOwned, WhollyOwned, first_of, locked_entries, named_tensors, owned_by_tasks
from hatify.lock.policy import Hard, LockPolicy
from hatify.lock.watch import unwatch, watch
from hatify.nn.state import STATE, TaskState
from hatify.slots import Use
from hatify.stamps import Samples, Stamps, can_be_looked_at, entry


class Guard:
    """Protects finished tasks; while `task` is open, also remembers the state to return to if it is abandoned.

    Args:
        model: the model.
        state: the state of its tasks.
        uses: how the entries of each parameter that tasks share connect features.
        constants: buffers that never change.
        task: the task that is open, or None.
        saved: the values to return to, by name; None: the current ones.
        tensors: the tensors to protect, by name; None: those of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TaskState,
        uses: Mapping[str, list[Use]],
        constants: Iterable[str],
        task: int | None = None,
        saved: Mapping[str, Tensor] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.task = task
        self.policy: LockPolicy = Hard()
        self.tensors = dict(named_tensors(model)) if tensors is None else tensors
        others = [t for t, done in enumerate(state.finished) if done and t != task]
        self.finished = {t: state.finished_masks[t].clone() for t in others}
        self.masks, self.base = state.finished_masks[others], state.base if state.has_base else None
        anything = bool(others) or state.has_base
        self.uses = {name: of for name, of in uses.items() if anything and name in self.tensors}
        owned = {id(t) for t in owned_by_tasks(model, others)} if others else set()
        kept = {*constants, f"{STATE}.finished_masks"} if anything else set()
        self.owned = [name for name, t in self.tensors.items() if id(t) in owned or name in kept]
        #: Until there is a copy: what it is to be made of.
        self._given = saved
        self._kept: dict[str, Tensor | PartlyOwned] = {}
        #: Whether an optimizer has been met that writes to weights when it is told to ``train()`` or ``eval()``.
        self.swapping = False
        self.partial: list[PartlyOwned] = []
        self.whole: list[WhollyOwned] = []
        self._stamps: Stamps | None = None
        #: Until there is a copy.
        self._samples: Samples | None = None
        self._handles: list[Any] = []
        if task is not None:
            self.build()
        weakref.finalize(self, _remove_all, self._handles)
        self.arm()

    @property
    def is_built(self) -> bool:
        """Whether there is a copy to put right from what finished tasks own."""
        return self._stamps is not None

    @torch.no_grad()
    def build(self) -> None:
        """Find the locked entries (Equation 2), and keep a copy of what they hold."""
        if self.is_built:
            return
        self._refuse_changes()
        given = self._given
        partial: list[PartlyOwned] = []
        whole: list[WhollyOwned] = []

        def value(name: str) -> Tensor:
            return self.tensors[name].detach().clone() if given is None else given[name]

        for name, parameter, lock in self._locks():
            if unexpanded(lock).all():
                whole.append(WhollyOwned(name, parameter, value(name)))
            elif unexpanded(lock).any():
                assert isinstance(parameter, nn.Parameter)
                partial.append(PartlyOwned(name, parameter, value(name), lock, with_free=self.task is not None))
        whole += [WhollyOwned(name, self.tensors[name], value(name)) for name in self.owned]
        kept: dict[str, Tensor | PartlyOwned] = {w.name: w.saved for w in whole}
        kept |= {p.name: p for p in partial}
        if self.task is not None:
            kept |= {name: value(name) for name in (self.tensors if given is None else given) if name not in kept}
        self._kept, self._given, self.partial, self.whole = kept, None, partial, whole
        self._stamps, self._samples = self._stamped(), None

    def saved(self, name: str) -> Tensor | None:
        """What a tensor held that is to stay, or to be returned to; None if nothing is kept of it."""
        kept = self._kept.get(name)
        return kept.saved if isinstance(kept, PartlyOwned) else kept

    def all_saved(self) -> dict[str, Tensor]:
        """`saved` of everything of which something is kept, by name."""
        return {name: kept.saved if isinstance(kept, PartlyOwned) else kept for name, kept in self._kept.items()}

    def _locks(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each parameter that tasks share, and which of its entries are locked."""
        for name, uses in self.uses.items():
            parameter = self.tensors[name]
            yield name, parameter, locked_entries(uses, self.masks, parameter.shape, self.base)

    @torch.no_grad()
    def sample(self) -> None:
        """Without a copy, notice at least if something writes to what finished tasks own."""
        if not self.is_built:
            places = [(name, self.tensors[name], 0) for name in self.owned]
            places += [(name, p, first_of(lock)) for name, p, lock in self._locks() if unexpanded(lock).any()]
            self._samples = Samples(
                (name, t, i) for name, t, i in places if t.numel() and not t.is_meta and not t.is_inference()
            )

    def _refuse_changes(self, look_inside: bool = True) -> None:
        names = self._samples.changed(look_inside) if self._samples is not None else []
        if names:
            tasks = ", ".join(map(str, self.finished))
            raise HatError(
                f"{listed(names)}: written to after the model was loaded, and with it what finished tasks {tasks} "
                "answer; there is no copy to put it right from before training begins: load the model again"
            )

    def _stamped(self) -> Stamps:
        probes = [entry(p.parameter, first_of(p.lock)) for p in self.partial]
        whole = [w.parameter for w in self.whole if w.parameter.is_floating_point()]
        probes += [entry(t, 0) for t in whole if t.numel() and not t.is_meta]
        held = [p.parameter for p in self.partial] + [w.parameter for w in self.whole]
        return Stamps(held, (p for p in probes if bool(torch.isfinite(p))))

    def arm(self) -> None:
        """Let gradients reach nothing that finished tasks own, and watch the steps of optimizers."""
        if self._handles:
            return
        hooks: list[tuple[Tensor, Callable[..., None]]] = []
        if self.task is None:
            refuse = partial(_refuse_gradient, weakref.ref(self))
            hooks = [(self.tensors[name], refuse) for name in {*self.uses, *self.owned}]
        else:
            hooks = [(p.parameter, partial(self.policy.limit_gradient, p)) for p in self.partial]
            hooks += [(w.parameter, _drop_gradient) for w in self.whole]
        self._handles += [
            tensor.register_post_accumulate_grad_hook(hook)
            for tensor, hook in hooks
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]
        watch(self)

    def disarm(self) -> None:
        """Protect nothing any more."""
        unwatch(self)
        _remove_all(self._handles)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer, held: Container[int]) -> None:
        """With no task open, a step finds no gradient of what tasks share, and what it moves nevertheless is put back.

        Some may be left over from before the last task ended. `held` are the identities of what is stepped.
        """
        if self.task is not None:
            return
        for tensor in (self.tensors[name] for name in {*self.uses, *self.owned}):
            if id(tensor) in held:
                self.build()
                tensor.grad = None

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, held: Container[int]) -> None:
        """Put back the locked entries of what `optimizer` updates.

        Nothing else is touched: with one optimizer per parameter, stepped during the backward pass, that pass still
        needs the other parameters as they are.
        """
        if self._stamps is None:
            return
        self.policy.after_step([p for p in self.partial if id(p.parameter) in held])
        whole = [w for w in self.whole if id(w.parameter) in held]
        if whole:
            torch._foreach_copy_([w.parameter for w in whole], [w.saved for w in whole])
        self._stamps.renew(held)
        self.swapping |= callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))

    def check(self, training: bool) -> None:
        """Before a forward pass: put right what was written to outside of a step, if anything seems to have been.

        Raises:
            HatError: there is no copy to put it right from.
        """
        if not can_be_looked_at():
            return
        if self._stamps is None:
            self._refuse_changes(look_inside=False)
        elif not self._stamps.are_valid(look_inside=not training):
            self.put_right()

    @torch.no_grad()
    def put_right(self) -> dict[str, int]:
        """Put back every locked entry that is not what it was: {name: how many}."""
        if self._stamps is None:
            self._refuse_changes()
            return {}
        found = {}
        records: list[PartlyOwned | WhollyOwned] = [*self.partial, *self.whole]
        for record in records:
            if not record.parameter.is_meta and (count := record.changed()):
                found[record.name] = count
                record.restore()
        self._stamps = self._stamped()
        return found

    def is_of(self, model: nn.Module) -> bool:
        """Whether the tensors of `model` still are the objects that are protected here."""
        return all(self.tensors.get(name, tensor) is tensor for name, tensor in named_tensors(model))

    def check_fit(self, model: nn.Module) -> None:
        """Raise a `HatError` unless objects that have taken the place of what is protected can be put right.

        Without a copy to put right from, they have to hold what the others held where that is looked at.
        """
        for name, tensor in named_tensors(model):
            kept = self.tensors.get(name, tensor)
            if tensor is not kept and name in {*self.uses, *self.owned} and tensor.shape != kept.shape:
                raise HatError(
                    f"{name}: has the shape {tuple(tensor.shape)} now, and had {tuple(kept.shape)} when finished tasks "
                    "were learned: put it back"
                )
        if self._samples is not None:
            self.tensors = {**self.tensors, **dict(named_tensors(model))}
            self._samples.look_at(self.tensors)

    def is_for(self, state: TaskState) -> bool:
        """Whether this guards what is finished and being learned by `state`, which loading may have changed."""
        finished = [t for t, done in enumerate(state.finished) if done and t != self.task]
        same = state.learning == self.task and finished == list(self.finished)
        return same and all(torch.equal(state.finished_masks[t], mask) for t, mask in self.finished.items())


def _refuse_gradient(guard: weakref.ref[Guard], parameter: Tensor) -> None:
    parameter.grad = None
    standing = guard()
    if standing is not None:
        standing.build()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
