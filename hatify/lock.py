"""Equation 2: which entries finished tasks own, and the guard that keeps them through any optimizer.

The guard stands from the first `end_task` on, whether a task is open or not.

Masked gradients alone do not protect a weight: weight decay, momentum from an earlier task and Adam's epsilon move
weights whose gradient is zero. The guard therefore puts locked entries back after every step of any optimizer that
holds parameters of the model. On a CPU, where copying is what a step notices, this is left out after steps that leave
locked entries alone: those of torch's `_STILL` optimizers without weight decay, whose gradient has not been written to
since it was masked, and whose momentum is zero at locked entries. What is written outside of steps (by an optimizer
that swaps averaged weights in, or another process that broadcasts its buffers) is put right at the next forward pass.

While no task is open, what finished tasks own takes no gradient at all. The copy that is needed to put it right is made
when a task ends, or else at the first sign of training, so that a model that was loaded and only answers holds nothing
twice. Until then, writing to what finished tasks own is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from hatify.errors import HatError, listed
from hatify.gate import EMBEDDING_LIMIT
from hatify.labels import compact
from hatify.nn.per_task import PER_TASK, owned_by
from hatify.nn.state import STATE
from hatify.regularization import Capacity
from hatify.stamps import Samples, Stamps, can_be_looked_at, entry

if TYPE_CHECKING:
    from hatify.model import HatModel
    from hatify.slots import Use


def locked_entries(uses: Iterable[Use], masks: Tensor, shape: torch.Size) -> Tensor:
    """Equation 2, exactly: an entry is locked where some task has both the feature it writes and the one it reads on.

    The printed form compares the cumulative maxima over tasks, and so also locks entries between a feature that only
    one task uses and a feature that only another one uses.

    Args:
        uses: how the parameter's entries connect features.
        masks: the finished tasks' binary masks, bool, shape (tasks, slots).
        shape: the parameter's shape.

    Returns:
        bool, of the parameter's shape.
    """
    locked = torch.zeros((1,) * len(shape), dtype=torch.bool, device=masks.device)
    for mask in masks:
        extended = torch.cat((mask, mask.new_ones(1)))
        for use in uses:
            entries = extended[use.written.to(mask.device)].any(-1)
            if use.read is not None:
                entries = entries & extended[use.read.to(mask.device)].any(-1)
            locked = locked | entries
    return locked.expand(shape)


#: From this share of locked runs on, it is faster to set the free ones aside.
MOST = 7 / 8


class _Partial:
    """A parameter some of whose entries are locked.

    Where locked entries come in runs, as the kernels of a convolution do, they are reached by the numbers of the runs,
    which moves far less memory than a mask over all entries; where nearly all are locked, by those of the free ones.
    No way can be fooled by values that are not finite.

    Args:
        name: the parameter's name.
        parameter: the parameter.
        saved: its values when the task was opened.
        lock: bool, of the parameter's shape; True for locked entries.
    """

    def __init__(self, name: str, parameter: nn.Parameter, saved: Tensor, lock: Tensor) -> None:
        self.name, self.parameter, self.saved = name, parameter, saved
        self.kernel = parameter.shape[2:].numel() if parameter.ndim > 2 else 1
        self.lock = lock
        per_kernel = self.kernel > 1 and all(stride == 0 for stride in lock.stride()[2:]) and parameter.is_contiguous()
        kernels = lock.reshape(-1, self.kernel)[:, 0] if per_kernel else None
        self.runs = None if kernels is None else kernels.nonzero().squeeze(1)
        #: The runs that are free, if these are few.
        self.free: Tensor | None = None
        if kernels is not None and self.runs is not None and len(self.runs) > MOST * len(kernels):
            self.free = (~kernels).nonzero().squeeze(1)
        self.sample = _some_of(lock)
        self.saved_sample = saved.take(self.sample)
        #: The gradient that was masked last, and its version then.
        self.masked: tuple[weakref.ref[Tensor], int] | None = None
        #: Optimizer states that are zero where the parameter is locked.
        self.clean: list[weakref.ref[Tensor]] = []

    def mask_gradient(self, parameter: Tensor) -> None:
        """Equation 2: zero the accumulated gradient of locked entries, in place."""
        grad = parameter.grad
        if grad is not None and not grad.is_sparse:
            self._zero(grad)
            self.masked = weakref.ref(grad), grad._version

    def restore(self) -> None:
        """Put the locked entries back."""
        if self.runs is None:
            torch.where(self.lock, self.saved, self.parameter, out=self.parameter)
        else:
            self._write(self.parameter, self.saved)

    def is_restored_in(self, tensor: Tensor) -> bool:
        """Whether the locked entries of `tensor` are what was saved."""
        if self.runs is None or not tensor.is_contiguous():
            return torch.equal(torch.where(self.lock, tensor, self.saved), self.saved)
        now, then = (t.view(-1, self.kernel)[self.runs] for t in (tensor, self.saved))
        return torch.equal(now, then)

    def unmoved_by(self, optimizer: torch.optim.Optimizer, decay: float) -> bool:
        """Whether a step of `optimizer` has left locked entries where they were.

        It has if their gradient was zero, the optimizer is of a kind that then moves nothing, and no momentum or
        weight decay does. What it remembers of locked entries is set to zero here, so that it holds for later steps.
        A gradient written to through ``data`` keeps its version: see `sampled`.
        """
        if type(optimizer) not in _STILL or decay != 0 or self.parameter.device.type != "cpu":
            return False
        held = optimizer.state.get(self.parameter, {})
        state = [t for t in held.values() if _is_like(t, self.parameter)]
        clean = len(state) == len(self.clean) and all(ref() is t for ref, t in zip(self.clean, state, strict=True))
        if not clean:
            for t in state:
                self._zero(t)
            self.clean = [weakref.ref(t) for t in state]
        grad = self.parameter.grad
        seen, version = self.masked or (None, 0)
        masked = grad is None or (seen is not None and seen() is grad and version == grad._version)
        return clean and masked

    def sampled(self) -> Iterator[Tensor]:
        """For some locked entries, the gradient and what the step has changed."""
        if self.parameter.grad is not None:
            yield self.parameter.grad.take(self.sample)
        yield self.parameter.take(self.sample).sub_(self.saved_sample)

    def _zero(self, tensor: Tensor) -> None:
        if self.runs is not None and tensor.is_contiguous():
            self._write(tensor, None)
        else:
            tensor.masked_fill_(self.lock, 0)

    def _write(self, tensor: Tensor, values: Tensor | None) -> None:
        """Write the locked runs of `values`, or zeros, into `tensor`."""
        assert self.runs is not None
        to, source = tensor.view(-1, self.kernel), None if values is None else values.view(-1, self.kernel)
        if self.free is not None:
            kept = to[self.free]
            (to.zero_() if source is None else to.copy_(source)).index_copy_(0, self.free, kept)
        elif source is None:
            to.index_fill_(0, self.runs, 0)
        else:
            to.index_copy_(0, self.runs, source[self.runs])


#: Optimizers that leave an entry where it is if its gradient and all they remember of it are zero.
_STILL = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)


def _some_of(lock: Tensor, count: int = 512) -> Tensor:
    """The flat indices of up to `count` entries that are locked, in different rows."""
    rows = lock.reshape(lock.shape[0], -1)
    chosen = rows.any(1).nonzero().squeeze(1)
    chosen = chosen[:: max(1, len(chosen) // count)]
    return chosen * rows.shape[1] + rows[chosen].to(torch.uint8).argmax(1)


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


@dataclass
class _Whole:
    """A tensor that belongs to finished tasks as a whole."""

    name: str
    parameter: Tensor
    saved: Tensor
    version: int

    def restore(self) -> None:
        """Put the values back."""
        self.parameter.copy_(self.saved)
        self.version = self.parameter._version

    def is_restored_in(self, tensor: Tensor) -> bool:
        """Whether `tensor` is what was saved."""
        return torch.equal(tensor, self.saved)


class Guard:
    """Protects finished tasks; while `task` is open, also remembers the state to return to if it is abandoned.

    Args:
        model: the model.
        task: the task that is open, or None.
        saved: the values to return to, by name; None: the current ones.
        tensors: the tensors to protect, by name; None: those of the model.
    """

    def __init__(
        self,
        model: HatModel,
        task: int | None = None,
        saved: dict[str, Tensor] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        state = model.task_state
        self.task = task
        self.tensors = dict(named_tensors(model)) if tensors is None else tensors
        others = [t for t, done in enumerate(state.finished) if done and t != task]
        self.finished = {t: state.finished_masks[t].clone() for t in others}
        self.masks = state.finished_masks[others]
        self.uses = {name: uses for name, uses in model.uses.items() if others and name in self.tensors}
        owned = {id(t) for t in owned_by_tasks(model, others)} if others else set()
        kept = {*model.constants, f"{STATE}.finished_masks"} if others else set()
        self.owned = [name for name, t in self.tensors.items() if id(t) in owned or name in kept]
        self.saved: dict[str, Tensor] | None = saved
        #: Whether an optimizer has been met that writes to weights when it is told to ``train()`` or ``eval()``.
        self.swapping = False
        self.partial: list[_Partial] = []
        self.whole: list[_Whole] = []
        self._stamps: Stamps | None = None
        #: Until there is a copy.
        self._samples: Samples | None = None
        self._handles: list[Any] = []
        if task is not None:
            if saved is None:
                self.saved = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
            self.was_finished = state.finished[task]
            used = state.used(besides=task).to(state.embeddings[task].dtype)
            #: Layer by layer, and of the network as a whole.
            self.capacity = Capacity.beside(used, state.layer, len(state.groups))
            self.capacity_of_all = Capacity.beside(used, torch.zeros_like(state.layer), 1)
            self.embedding = state.embeddings[task]
            self.build()
        weakref.finalize(self, _remove_all, self._handles)
        _watch_optimizers()
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
        saved = self.saved
        if saved is None:
            saved = {name: self.tensors[name].detach().clone() for name in (*self.uses, *self.owned)}
        partial: list[_Partial] = []
        whole = [_Whole(name, t, saved[name], t._version) for name in self.owned for t in [self.tensors[name]]]
        for name, parameter, lock in self._locks():
            if compact(lock).all():
                whole.append(_Whole(name, parameter, saved[name], parameter._version))
            elif compact(lock).any():
                assert isinstance(parameter, nn.Parameter)
                partial.append(_Partial(name, parameter, saved[name], lock))
        self.saved, self.partial, self.whole = saved, partial, whole
        self._stamps, self._samples = self._stamped(), None

    def _locks(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each parameter that tasks share, and which of its entries are locked."""
        for name, uses in self.uses.items():
            parameter = self.tensors[name]
            yield name, parameter, locked_entries(uses, self.masks, parameter.shape)

    @torch.no_grad()
    def watch(self) -> None:
        """Without a copy, notice at least if something writes to what finished tasks own."""
        if not self.is_built:
            places = [(name, self.tensors[name], 0) for name in self.owned]
            places += [(name, p, int(_some_of(lock)[0])) for name, p, lock in self._locks() if compact(lock).any()]
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
        probes = [entry(p.parameter, int(p.sample[0])) for p in self.partial]
        whole = [w.parameter for w in self.whole if w.parameter.is_floating_point()]
        probes += [entry(t, 0) for t in whole if t.numel() and not t.is_meta]
        held = [p.parameter for p in self.partial] + [w.parameter for w in self.whole]
        return Stamps(held, (p for p in probes if bool(torch.isfinite(p))))

    def arm(self) -> None:
        """Let gradients reach nothing that finished tasks own, and watch the steps of optimizers."""
        if self._handles:
            return
        hooks: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        if self.task is None:
            refuse = partial(_refuse_gradient, weakref.ref(self))
            hooks = [(self.tensors[name], refuse) for name in {*self.uses, *self.owned}]
        else:
            hooks = [(p.parameter, p.mask_gradient) for p in self.partial]
            hooks += [(w.parameter, _drop_gradient) for w in self.whole]
        self._handles += [
            tensor.register_post_accumulate_grad_hook(hook)
            for tensor, hook in hooks
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]
        _STANDING.add(self)

    def disarm(self) -> None:
        """Protect nothing any more."""
        _STANDING.discard(self)
        _remove_all(self._handles)

    @torch.no_grad()
    def before_step(self, held: Container[int]) -> None:
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
    def restore(self, optimizer: torch.optim.Optimizer, decay: Mapping[int, float]) -> None:
        """Put back the locked entries of what `optimizer` updates, and keep embeddings within reach of their gradient.

        Nothing else is touched: with one optimizer per parameter, stepped during the backward pass, that pass still
        needs the other parameters as they are. `decay` has the weight decay of each, by identity.
        """
        if self._stamps is None:
            return
        updated = [p for p in self.partial if id(p.parameter) in decay]
        moved = [p for p in updated if not p.unmoved_by(optimizer, decay[id(p.parameter)])]
        if len(moved) < len(updated) and torch.cat([t for p in updated for t in p.sampled()]).any():
            moved = updated
        for p in moved:
            p.restore()
        for w in self.whole:
            if id(w.parameter) in decay and w.parameter._version != w.version:
                w.restore()
        if self.task is not None and id(self.embedding) in decay:
            self.embedding.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
        self._stamps.renew(decay)
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
        every = torch.ones((), dtype=torch.bool)
        found = {}
        records: list[_Partial | _Whole] = [*self.partial, *self.whole]
        for record in records:
            if not record.parameter.is_meta and not record.is_restored_in(record.parameter):
                lock = record.lock if isinstance(record, _Partial) else every
                found[record.name] = int(((record.parameter != record.saved) & lock.to(record.saved.device)).sum())
                record.restore()
        self._stamps = self._stamped()
        return {name: count for name, count in found.items() if count}

    def is_of(self, model: HatModel) -> bool:
        """Whether the tensors of `model` still are the objects that are protected here."""
        return all(self.tensors.get(name, tensor) is tensor for name, tensor in named_tensors(model))

    def check_fit(self, model: HatModel) -> None:
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

    def is_for(self, model: HatModel) -> bool:
        """Whether this guards what `model` has finished and learns, which loading may have changed."""
        state = model.task_state
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


#: The guards of every model with finished tasks or an open one.
_STANDING: weakref.WeakSet[Guard] = weakref.WeakSet()


@cache
def _watch_optimizers() -> None:
    """Have every guard told of every step of every optimizer, from now on.

    The hooks stay: torch iterates over such hooks, and fails if one is removed meanwhile, as the garbage collector does
    with that of a guard it happens to find.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for guard in list(_STANDING):
        guard.before_step(held)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    decay = {id(p): group.get("weight_decay", 0) for group in optimizer.param_groups for p in group["params"]}
    for guard in list(_STANDING):
        guard.restore(optimizer, decay)


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def owned_by_tasks(model: HatModel, tasks: Iterable[int]) -> list[Tensor]:
    """Every tensor of which each of `tasks` has its own, the embeddings included."""
    modules = [m for m in model.modules() if isinstance(m, PER_TASK)]
    owned = {id(t): t for task in tasks for m in modules for t in owned_by(m, task)}
    owned |= {id(e): e for task in tasks for e in [model.task_state.embeddings[task]]}
    return list(owned.values())
