"""The state of the tasks: embeddings, masks, which task answers, which one learns."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from hatify.choosing import Course
from hatify.errors import TaskError
from hatify.gate import gate
from hatify.nn.choice import Choice
from hatify.nn.folding import can_be_remembered

if TYPE_CHECKING:
    from hatify.slots import Layout


#: The one name in the converted network that is hatify's own.
STATE = "_hat"


class TaskState(nn.Module):
    """Holds one embedding per feature and task, and yields the masks of the task that is set.

    Calling it returns ``{name: mask}`` with masks of shape (features,) in [0, 1]: soft ones, Equation 1, for the task
    whose masks are being learned in training mode, binary ones otherwise.

    Attributes:
        embeddings: e of each task, shape (slots,).
        finished_masks: the binary masks of finished tasks, bool, shape (tasks, slots).
        finished: whether each task is finished.
        base: features of a locked base, bool, shape (slots,): on in every task, and changed by none.
        scale: s, a scalar.
        choice: which task answers.
        learning: the task that is open for training, or None.
        task_before: the task that was set when it was opened.
        course: how it comes to its masks.
        probe: zeros that are added to its gates, shape (slots,), whose gradient says how much each gate matters.
        tensor_names: of every parameter and buffer of the model.
        layer_types: of the layers that conversion has replaced, by path.
    """

    finished_masks: Tensor
    scale: Tensor
    layer: Tensor
    base: Tensor

    def __init__(
        self,
        layout: Layout,
        num_tasks: int,
        mask_init: str | float,
        s_max: float,
        clamp: float | None,
        like: Tensor,
        base: bool = False,
    ) -> None:
        super().__init__()
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        self.num_slots = layout.num_slots
        self.mask_init, self.s_max, self.clamp = mask_init, s_max, clamp
        self.embeddings = nn.ParameterList(
            initial_embedding(self.num_slots, mask_init, like.device, dtype) for _ in range(num_tasks)
        )
        self.register_buffer(
            "finished_masks", torch.zeros(num_tasks, self.num_slots, dtype=torch.bool, device=like.device)
        )
        self.finished = [False] * num_tasks
        self.register_buffer("scale", torch.tensor(s_max, device=like.device, dtype=dtype))
        self.register_buffer("base", torch.full((self.num_slots,), base, device=like.device), persistent=False)
        self._lay_out(layout)
        #: Whether any feature belongs to a locked base; as an attribute, so that no value need be looked at.
        self.has_base = base
        self.choice = Choice()
        self.learning: int | None = None
        self.task_before = 0
        self.course = Course()
        self.probe = torch.empty(0)
        self.tensor_names: frozenset[str] = frozenset()
        self.layer_types: dict[str, type] = {}
        #: The masks of tasks that do not change, and what they were made of.
        self._constant_masks: dict[int, tuple[Tensor, int, dict[str, Tensor]]] = {}

    def _lay_out(self, layout: Layout) -> None:
        self.num_slots, self.groups = layout.num_slots, dict(layout.groups)
        layers = [torch.full((stop - start,), i) for i, (start, stop) in enumerate(layout.groups.values())]
        layer = torch.cat(layers) if layers else torch.empty(0, dtype=torch.int64)
        device = self.scale.device
        self.register_buffer("layer", layer.to(device), persistent=False)
        self.index_names = tuple(layout.indices)
        for i, index in enumerate(layout.indices.values()):
            self.register_buffer(f"index_{i}", index.to(device), persistent=False)

    @torch.no_grad()
    def rearrange(self, layout: Layout, before: Tensor) -> None:
        """Take over a layout with more slots; those there were have gone to `before`, the others are free.

        Finished tasks have them off, and a locked base has no part in them.
        """
        before = before.to(self.scale.device)
        for e, done in zip(self.embeddings, self.finished, strict=True):
            fresh = initial_embedding(layout.num_slots, -1.0 if done else self.mask_init, e.device, e.dtype)
            e.data = fresh.detach().index_copy(0, before, e)
        masks = self.finished_masks.new_zeros(len(self.finished), layout.num_slots)
        self.finished_masks = masks.index_copy(1, before, self.finished_masks)
        self.base = self.base.new_zeros(layout.num_slots).index_copy(0, before, self.base)
        self._lay_out(layout)
        self._constant_masks.clear()

    def set_base(self, slots: Tensor) -> None:
        """Let a locked base have these slots alone, int64."""
        self.base = torch.zeros_like(self.base).index_fill(0, slots.to(self.base.device), True)

    def take_layout(self, other: TaskState) -> None:
        """Have the slots that another state has, and what that knows of them."""
        self._buffers.update(other._buffers)
        self._non_persistent_buffers_set |= other._non_persistent_buffers_set
        self.num_slots, self.groups, self.index_names = other.num_slots, other.groups, other.index_names
        self._constant_masks.clear()

    @property
    def has_spare(self) -> bool:
        """Whether there are features beside a locked base."""
        return self.has_base and not bool(self.base.all())

    @property
    def task(self) -> int:
        """The task that answers."""
        return self.choice.task

    def forward(self) -> dict[str, Tensor]:
        fixed, masks = self._fixed_by(), None
        if fixed is None or not can_be_remembered() or fixed.is_inference():
            return self.masks_from(self.gates())
        if self.task in self._constant_masks:
            # Another state of the module may be at work for this call: `torch.func.functional_call`.
            source, version, masks = self._constant_masks[self.task]
            masks = masks if source is fixed and version == fixed._version else None
        if masks is None:
            # Not as inference tensors: the same masks may be needed for gradients later.
            with torch.inference_mode(False), torch.no_grad():
                masks = self.masks_from(self.gates())
            if all(type(mask) is Tensor for mask in masks.values()):
                self._constant_masks[self.task] = fixed, fixed._version, masks
        return masks

    def _fixed_by(self) -> Tensor | None:
        """What the masks are made of and do not change without, if they take no gradient."""
        if self.learning == self.task:
            return self.embeddings[self.task] if self.course.chosen and not self.course.learned else None
        return self.finished_masks if self.finished[self.task] and not self.training else None

    def gates(self) -> Tensor:
        """The flat vector of all gates of the task that is set, shape (slots,).

        Those of the open task in training mode are the soft ones of Equation 1 if its masks are learned.
        """
        embedding = self.embeddings[self.task]
        if self.training:
            if self.learning is None:
                raise TaskError("a forward pass in training mode, but no task is open: call begin_task() or eval()")
            if self.learning != self.task:
                raise TaskError(
                    f"task {self.learning} is learning, but task {self.task} is set: call eval() before asking another "
                    "task, or set_task() to return"
                )
            if self.course.learned:
                learned = gate(embedding, self.scale, self.s_max, self.clamp)
                return torch.where(self.base, 1.0, learned) if self.has_base else learned
            return self.binary(self.task).to(embedding.dtype) + self.probe
        return self.binary(self.task).to(embedding.dtype)

    def binary(self, task: int) -> Tensor:
        """The binary mask of a task, bool, shape (slots,): fixed once it is finished, 1[e > 0] before.

        A locked base is on. Where a whole layer would be off, its feature with the largest embedding stays on.
        """
        if self.finished[task] and self.learning != task:
            return self.finished_masks[task]
        embedding = self.embeddings[task].detach()
        on = (embedding > 0) | self.base
        layers = len(self.groups)
        largest = embedding.new_full((layers,), -torch.inf).scatter_reduce(0, self.layer, embedding, "amax")
        any_on = embedding.new_zeros(layers).scatter_reduce(0, self.layer, on.to(embedding.dtype), "amax")
        empty = any_on == 0
        return on | (empty[self.layer] & (embedding == largest[self.layer]))

    def masks_from(self, gates: Tensor) -> dict[str, Tensor]:
        """Every mask, by name, from the flat vector of gates."""
        pieces = torch.split(gates, [stop - start for start, stop in self.groups.values()]) if self.groups else ()
        masks = dict(zip(self.groups, pieces, strict=True))
        if self.index_names:
            extended = torch.cat((gates, gates.new_ones(1)))
            for i, name in enumerate(self.index_names):
                chosen = extended[getattr(self, f"index_{i}")]
                masks[name] = chosen.squeeze(1) if chosen.shape[1] == 1 else chosen.amax(1)
        return masks

    def used(self, besides: int | None = None) -> Tensor:
        """Slots that have an owner, a finished task or a locked base, bool, shape (slots,); `besides` is left out."""
        counted = [task for task, done in enumerate(self.finished) if done and task != besides]
        return self.finished_masks[counted].any(0) | self.base

    def finish(self, task: int, mask: Tensor) -> None:
        """Fix the masks of a task."""
        self.finished_masks[task] = mask
        self.finished[task] = True
        self._constant_masks.pop(task, None)

    def forget(self, task: int) -> None:
        """Let a finished task be one that has not been learned."""
        self.finished_masks[task] = False
        self.finished[task] = False
        self._constant_masks.pop(task, None)

    def _apply(self, fn: Any, recurse: bool = True) -> TaskState:
        self._constant_masks.clear()
        return super()._apply(fn, recurse)

    def progress(self) -> dict[str, Any]:
        """Where the tasks stand."""
        return {
            "task": self.task,
            "learning": self.learning,
            "task_before": self.task_before,
            "finished": list(self.finished),
            "course": asdict(self.course),
        }

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        """Let the tasks stand where they stood when `progress` was asked for."""
        self.choice.set(progress["task"])
        self.learning, self.task_before = progress["learning"], progress["task_before"]
        self.finished = list(progress["finished"])
        # Before there was a choice, masks were learned.
        self.course = Course(**progress.get("course", {"learned": True}))
        self._constant_masks.clear()

    def get_extra_state(self) -> Tensor:
        """`progress` as what a state dictionary may hold anywhere: bool, shape (4, tasks).

        Row by row: which tasks are finished, which one is learning, is set, and was set when that one was opened.
        """
        flags = torch.zeros(4, len(self.finished), dtype=torch.bool)
        flags[0] = torch.tensor(self.finished, dtype=torch.bool)
        for row, task in enumerate((self.learning, self.task, self.task_before), 1):
            if task is not None:
                flags[row, task] = True
        return flags

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take over what `get_extra_state` returned, now or in version 0.1, where it was a dictionary."""
        if not isinstance(state, Tensor):
            return self.set_progress(state)
        learning, task, before = (row.nonzero()[:1].sum().item() if row.any() else None for row in state[1:])
        finished = state[0].tolist()
        course = asdict(self.course) if learning == self.learning else {"learned": learning is not None}
        self.set_progress(
            {
                "task": task or 0,
                "learning": learning,
                "task_before": before or 0,
                "finished": finished,
                "course": course,
            }
        )


def initial_embedding(slots: int, init: str | float, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """A task's embedding before training.

    Raises:
        ValueError: `init` is neither ``"dense"``, ``"normal"`` nor a number.
    """
    if init == "normal":
        return nn.Parameter(torch.randn(slots, device=device, dtype=dtype))
    if init == "dense":
        init = 1.0
    if isinstance(init, bool) or not isinstance(init, (int, float)):
        raise ValueError(f"mask_init must be 'dense', 'normal' or a number, not {init!r}")
    return nn.Parameter(torch.full((slots,), float(init), device=device, dtype=dtype))


def looks_up_mask(node: fx.Node) -> bool:
    """Whether a node of a converted model's flat graph looks a mask up."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op == "call_module" and source.target == STATE
