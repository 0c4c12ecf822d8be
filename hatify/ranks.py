"""One model in several processes, under torch's `DistributedDataParallel`.

The wrapper averages the gradients of those parameters that were trainable when it was made, and at every forward pass,
also in evaluation, copies rank 0's buffers to the other ranks. Two things follow for tasks:

- Ranks that end a task with running statistics of their own, each from its own data, would have them overwritten later,
  and finished tasks would change. So before a task ends the ranks are made to agree: `agree`.
- A wrapper made before the task was opened may not know the task's own parameters, and each rank would then train them
  alone, or may wait for gradients of another task's, which never come: `notice` tells at the first forward pass.

A model that was not trained through a wrapper since `begin_task` never communicates.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from hatify.converted import Converted
from hatify.errors import HatError, TaskError, listed
from hatify.lock import Guard, named_tensors, owned_by_tasks
from hatify.nn.state import STATE

#: Bytes of a digest.
SIZE = 16
#: Where a model keeps names that the user wants a wrapper to ignore.
IGNORED = "ddp_ignored"


@dataclass
class Note:
    """What is remembered of the wrapper a task is trained through.

    Not the wrapper itself, which its owner may have dropped by the time the task ends.
    """

    group: distributed.ProcessGroup
    device: torch.device
    wrapper: weakref.ref[DistributedDataParallel] | None


# The wrapper ---------------------------------------------------------------------------------------------------------


def ignored(model: Converted) -> list[str]:
    """Names that a wrapper made now is to leave alone: the buffers of finished tasks, and what the user has set."""
    state = model.task_state
    fixed = [t for t in model.finished_tasks if t != state.learning]
    owned = {id(t) for t in owned_by_tasks(model, fixed)}
    finished = [name for name, buffer in model.named_buffers() if id(buffer) in owned]
    return [*model.__dict__.get(IGNORED, ()), *finished]


def ignore(model: Converted, names: Iterable[str]) -> None:
    """What torch's `_set_params_and_buffers_to_ignore_for_model` calls."""
    model.__dict__[IGNORED] = tuple(names)


def notice(model: Converted, wrapper: DistributedDataParallel, note: Note | None) -> Note | None:
    """`model` is called within a forward pass of `wrapper`; what is to be noted of that, `note` being what was.

    Raises:
        TaskError: `wrapper` cannot train the open task, since it was made for another.
    """
    task = model.task_state.learning
    if task is None or not (model.training or torch.is_grad_enabled()):
        return note
    if torch.compiler.is_compiling():
        # Nothing here may break the graph; ranks that drift apart are found when the task ends.
        return Note(wrapper.process_group, wrapper.device, None)
    if note is not None and note.wrapper is not None and note.wrapper() is wrapper:
        return note
    # Called by a module in the wrapper, but not of it: another one's teacher, for example.
    if wrapper.process_group.size() == 1 or all(module is not model for module in wrapper.module.modules()):
        return note
    _check_wrapper(model, wrapper, task)
    return Note(wrapper.process_group, wrapper.device, weakref.ref(wrapper))


def _check_wrapper(model: Converted, wrapper: DistributedDataParallel, task: int) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    reduced = {id(p) for bucket in wrapper.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
    left_alone = {id(p) for name, p in wrapper.module.named_parameters() if name in wrapper.parameters_to_ignore}
    # Embeddings are made equal as they are learned (`OpenTask`).
    trainable = {id(p) for p in model.parameters() if p.requires_grad} - {id(e) for e in model.task_state.embeddings}
    own = {id(t) for t in owned_by_tasks(model, [task])}
    others = {id(t) for t in owned_by_tasks(model, range(model.num_tasks))} - own
    others |= {id(e) for t, e in enumerate(model.task_state.embeddings) if t != task or not e.requires_grad}
    made_before = f"this DistributedDataParallel wrapper was made before begin_task({task}): "
    if missing := [name for i, name in names.items() if i in trainable - reduced - left_alone]:
        raise TaskError(
            f"{made_before}the gradient of {listed(missing)} would never be reduced, and the ranks would drift apart; "
            f"wrap the model anew after begin_task({task}), for each task"
        )
    waits = not (wrapper.find_unused_parameters or wrapper.static_graph)
    if waits and (foreign := [name for i, name in names.items() if i in others & reduced]):
        raise TaskError(
            f"{made_before}it waits for gradients of {listed(foreign)}, which other tasks own and which get none; "
            f"wrap the model anew after begin_task({task}), for each task, or pass find_unused_parameters=True"
        )


def mean(values: Tensor, note: Note | None) -> Tensor:
    """The mean of `values`, floating point, over all ranks, in place; each of them has to ask."""
    if note is not None and distributed.is_initialized() and note.group.size() > 1:
        distributed.all_reduce(values, group=note.group)
        values /= note.group.size()
    return values


# The end of a task ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def agree(model: Converted, guard: Guard, note: Note) -> None:
    """Let every rank have the same parameters and buffers, the open task having been trained through the wrapper noted.

    Buffers become those of rank 0, as in a wrapper's forward pass; anything else is the same already, or an error on
    all ranks. Every rank has to call this. Nothing changes before the last communication.

    Raises:
        HatError: something is not the same on every rank that should be.
    """
    if not distributed.is_initialized() or note.group.size() == 1:
        return
    fixed, free = _fixed_and_free(model, guard)
    digests = {name: _digest(_bytes(tensor)) for name, tensor in fixed.items()}
    ours = (_layout(model), b"".join(digests.values()), b"".join(_digest(_bytes(t)) for t in free.values()))
    of_each_rank = _gathered(b"".join(map(_digest, ours)), note)
    layouts, values, buffers = zip(*(_split(found, SIZE) for found in of_each_rank), strict=True)
    if differing := _differing(layouts):
        raise HatError(
            f"the model on {differing} is not the one on rank 0: it has other tensors, or other tasks are open or "
            f"finished; call abort_task() on every rank, and load the same model on all of them"
        )
    if _differing(values):
        of_each = [_split(found, SIZE) for found in _gathered(ours[1], note)]
        where = {name: _differing(column) for name, *column in zip(digests, *of_each, strict=True)}
        wrong = [name for name, differing in where.items() if differing]
        raise HatError(
            f"{listed(wrong)}: not the same on {where[wrong[0]]} as on rank 0 after training task {guard.task}, so "
            "something has changed it on one rank alone, outside the gradients that DistributedDataParallel reduces; "
            "call abort_task() on every rank, or copy rank 0's values to the others and call end_task() again"
        )
    if _differing(buffers):
        _take_over(free, note)


def _fixed_and_free(model: Converted, guard: Guard) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What must be the same on every rank, and what may be taken from rank 0: buffers that no finished task has."""
    kept = {whole.name for whole in guard.whole} | {f"{STATE}.finished_masks"}
    free = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
    return {name: tensor for name, tensor in named_tensors(model) if name not in free}, free


def _layout(model: Converted) -> bytes:
    """What decides which bytes are whose."""
    state = model.task_state
    tensors = [(name, str(t.dtype), tuple(t.shape)) for name, t in named_tensors(model)]
    return repr((state.learning, state.finished, tensors)).encode()


def _take_over(buffers: Mapping[str, Tensor], note: Note) -> None:
    """Rank 0's values, in one message."""
    message = torch.cat([_bytes(buffer).to(note.device) for buffer in buffers.values()])
    distributed.broadcast(message, distributed.get_global_rank(note.group, 0), group=note.group)
    if note.group.rank() == 0:
        return
    pieces = message.split([buffer.numel() * buffer.element_size() for buffer in buffers.values()])
    for buffer, piece in zip(buffers.values(), pieces, strict=True):
        buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))


def _gathered(message: bytes, note: Note) -> list[bytes]:
    """The message, of the same length everywhere, of each rank."""
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(note.device)
    found = [torch.empty_like(own) for _ in range(note.group.size())]
    distributed.all_gather(found, own, group=note.group)
    return [bytes(each.cpu().numpy()) for each in found]


def _split(message: bytes, size: int) -> list[bytes]:
    return [message[i : i + size] for i in range(0, len(message), size)]


def _differing(of_each: Iterable[bytes]) -> str:
    """The ranks that differ from rank 0, in words; empty if none does."""
    first, *others = of_each
    ranks = [str(rank) for rank, value in enumerate(others, 1) if value != first]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" if ranks else ""


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _digest(content: bytes | Tensor) -> bytes:
    data = content.cpu().numpy().data if isinstance(content, Tensor) else content
    return blake2b(data, digest_size=SIZE).digest()
