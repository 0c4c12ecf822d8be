"""The converted network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from hatify.census import Census
from hatify.classify import computed_tensors
from hatify.errors import HatError, TaskError
from hatify.gate import gate
from hatify.growth import grow
from hatify.known import KnownAnswers
from hatify.lifecycle import Learner, abort, after_loading, begin, end, require_open
from hatify.mixed import answer_each, check_tasks
from hatify.nesting import nest
from hatify.nn.folding import release
from hatify.nn.per_task import PER_TASK
from hatify.origin import Origin
from hatify.part import Part, copy_graphs
from hatify.plan import Plan
from hatify.ranks import ignore, ignored, notice
from hatify.regularization import capacity_regularization
from hatify.structure import check_leaves, check_structure, layer_types, tensor_names
from hatify.trace import reads_training_flag
from hatify.trainable import Trainable
from hatify.weights import refuse_parts, refuse_plain_weights
from hatify.widening.optimizers import Followed
from hatify.widening.widen import widen

#: Attributes that are built anew in a copy rather than copied.
_NOT_COPIED = ("_graph", "_graphs", "flat_graphs", "guard", "opened", "known_answers", "wrapper_note", "followed")
#: Hooks of the original that its conversion keeps.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class HatModel(Learner, Part):
    """A network that learns one task after another and forgets none; made by `hatify.hatify`.

    It is called like the original. Between `begin_task` and `end_task` it learns one task; `set_task` chooses which
    task answers. `code` and `graph` show the original's structure with the mask operations in it, parameters that
    tasks share keep their names, and so do blocks (``model.layer1[0]``), which are `torch.fx.GraphModule`s with code of
    their own.

    Attributes:
        plan: what its conversion decided, as data.
        census: what happens to every parameter and buffer of the original (a tuple of `Entry`; prints as a table).
        s_max: the upper bound of the mask scale.
        example_inputs: what the original was converted with.
        interface: what it offers of the original's methods.
    """

    interface: Any
    _mode_readers: tuple[str, ...]
    _ddp_params_and_buffers_to_ignore = property(ignored, ignore)

    def __init__(
        self,
        root: nn.Module,
        training: fx.Graph,
        evaluation: fx.Graph,
        plan: Plan,
        s_max: float,
        example_inputs: tuple[Any, ...] | dict[str, Any],
        origin: Origin,
    ) -> None:
        super().__init__(root, "HatModel")
        self.__dict__.update({name: hooks for name, hooks in vars(root).items() if name.startswith(_HOOKS)})
        self.__dict__.update(
            plan=plan,
            census=Census(replace(entry, shape=plan.widened.shape(entry.name, entry.shape)) for entry in plan.census),
            followed=Followed(),
            s_max=s_max,
            example_inputs=example_inputs,
            uses=plan.uses,
            constants=tuple(e.name for e in plan.census if e.policy == "constant"),
            origin=origin,
            guard=None,
            opened=None,
            known_answers=KnownAnswers(),
            trainable=Trainable({name for name, p in self.named_parameters() if p.requires_grad}),
            flat_graphs={True: training, False: evaluation},
        )
        for module in self.modules():
            if isinstance(module, PER_TASK):
                module.choice = self.task_state.choice
        self.task_state.tensor_names, self.task_state.layer_types = tensor_names(self), layer_types(self)
        if training is not evaluation:
            self.__dict__["_mode_readers"] = _mode_readers(root, (training, evaluation))
            self.register_forward_pre_hook(_check_modes)
        nested, self.census.flat = nest(self, self.flat_graphs)
        self.install(nested, self.training)
        self.register_load_state_dict_post_hook(after_loading)
        self.settle()

    # The graph -------------------------------------------------------------------------------------------------------

    @property
    def flat_graph(self) -> fx.Graph:
        """The whole network as one graph, of the current mode."""
        return self.flat_graphs[self.training]

    def offer(self, interface: Any) -> None:
        """Give the model the ``methods`` of `interface`, {name: function}; copies and pickles take them along."""
        self.__dict__["interface"] = interface
        for name, method in interface.methods.items():
            setattr(type(self), name, method)

    def select_graph(self, anew: bool = False) -> None:
        """Let all parts use the graph of the model's mode; `anew`: write their code in any case."""
        if anew or self.flat_graphs[True] is not self.flat_graphs[False]:
            for part in self.modules():
                if isinstance(part, Part):
                    part.use_graph(self.training, anew)

    def __setattr__(self, name: str, value: Any) -> None:
        # A child may have the name of a property; nn.Module would look at the children first.
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> HatModel:
        super().train(mode)
        if mode:
            release(self)
        if "flat_graphs" in self.__dict__:
            self.select_graph()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *args: Any
    ) -> None:
        refuse_plain_weights(self, state_dict, prefix)
        refuse_parts(self, state_dict, prefix, strict)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.put_right()
        return super().state_dict(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> HatModel:
        self.put_right()
        memo.update(computed_tensors(self))
        graphs, flat = copy_graphs(self._graphs, memo), copy_graphs(self.flat_graphs, memo)
        before = self.values_before
        saved = None if before is None else {name: tensor.clone() for name, tensor in before.items()}
        built = self.guard is not None and self.guard.is_built
        return _rebuild(copy.deepcopy(self._state(), memo), graphs, flat, saved, type(self).__name__, built)

    def __copy__(self) -> HatModel:
        raise HatError("a shallow copy would share the state of the tasks: use copy.deepcopy")

    def __reduce__(self) -> tuple[Any, ...]:
        self.put_right()
        graphs, flat = copy_graphs(self._graphs, {}), copy_graphs(self.flat_graphs, {})
        return _rebuild, (self._state(), graphs, flat, self.values_before, type(self).__name__)

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED}

    def _apply(self, fn: Any, recurse: bool = True) -> HatModel:
        self.put_right()
        before = self.values_before
        super()._apply(fn, recurse)
        self.known_answers.clear()
        if self.guard is not None:
            self.guard_anew(None if before is None else {name: fn(tensor) for name, tensor in before.items()})
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (wrapper := DistributedDataParallel._active_ddp_module) is not None:
            note = notice(self, wrapper, self.wrapper_note)
            if note is not self.wrapper_note:
                self.__dict__["wrapper_note"] = note
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        self.look_after(self.training)
        if self.opened is not None and self.opened.is_by_hand:
            self.learn_masks()
        tasks = self.task_state.choice.of_samples
        if tasks is not None:
            return answer_each(self, tasks, args, kwargs)
        outputs = super().__call__(*args, **kwargs)
        if self.opened is not None and self.opened.unseen and torch.is_grad_enabled():
            check_structure(self)
            check_leaves(self, (args, kwargs), outputs)
            self.opened.unseen = False
        return outputs

    # Tasks -----------------------------------------------------------------------------------------------------------

    def begin_task(
        self,
        task: int,
        budget: float | Mapping[str, float] | None = None,
        like: int | None = None,
    ) -> None:
        """Open a task for training, and lock what the finished tasks own.

        The task reads all that others own. Of what is free it tries everything for a few steps of the optimizer, and
        then keeps the features that matter most, as many as its budget allows. To make a `MaskScale`, to call
        `regularization`, or to set embeddings by hand while it is open has its masks learned by their gradient
        instead, as in the paper. Switches to training mode. A finished task is reopened: it may change, but for its
        masks, unless `budget` or `like` are given; the others may not. What is frozen stays frozen. Warns with
        `CapacityWarning`, naming the layers in which finished tasks use every feature.

        Args:
            task: 0 … num_tasks − 1.
            budget: the share of what is free in each layer that the task may keep, from 0 to 1: one number, or
                {name of a layer in `masks`: share}. At least one feature is kept. None, and for layers not named: 1
                over the number of tasks that are not finished, this one included.
            like: a finished task whose normalisations and, if it has as many classes, head this one begins with copies
                of; of what finished tasks own it reads what that one reads. None: as at the conversion, and it reads
                everything.

        Raises:
            TaskError: another task is open, there is no such task, or `like` is not finished.
            ValueError: another argument is out of range, or names no layer.
            HatError: parameters have been wrapped, removed or added since the conversion.
        """
        begin(self, task, budget, like)

    def end_task(self) -> None:
        """Close the open task: its masks become binary and fixed. Switches to evaluation mode.

        Finished tasks are asked before: nothing that training has done to the weights may change what they answer to
        the example inputs.

        Warns with `HatWarning` if a layer's mask is off altogether (its strongest feature is kept on), and if weights
        that finished tasks own were changed behind the guard's back (they are put back).

        Raises:
            TaskError: no task is open.
            HatError: a parameter or buffer of the network is not finite, or not the same on all ranks of a
                `DistributedDataParallel` wrapper; a finished task does not answer as before; or parameters have been
                wrapped, removed or added. The task is still open; `abort_task` undoes it.
        """
        end(self)

    def abort_task(self) -> None:
        """Abandon the open task: everything is as it was at `begin_task`, bit for bit. Switches to evaluation mode.

        Make a new optimizer afterwards; the old one still holds the abandoned task's momentum. Parameters that have
        been wrapped or added meanwhile stay so: undo that before the next `begin_task`.

        Raises:
            TaskError: no task is open.
        """
        abort(self)

    def set_task(self, task: int | Tensor) -> None:
        """Choose the task that answers, or one for each sample: for everybody, threads included; compare `task`.

        Args:
            task: its number; or the numbers of finished tasks, int64, shape (batch,): each sample of the next calls,
                which are in evaluation mode and have batches of this length, is answered by its own task. All tensors
                that go in and come out must have the batch as their first dimension.

        Raises:
            TaskError: there is no such task, or, of several, one is not finished.
        """
        self.task_state.choice.set(*self._chosen(task))

    @contextmanager
    def task(self, task: int | Tensor) -> Iterator[HatModel]:
        """Within the context, `task` answers: in this thread or asyncio task alone."""
        with self.task_state.choice.within(*self._chosen(task)):
            yield self

    def add_tasks(self, n: int, num_classes: int | Iterable[int] | None = None) -> None:
        """Make room for `n` more tasks than were foreseen; what finished tasks answer does not change.

        Every parameter and buffer there is stays the same object, so optimizers, hooks and wrappers that hold some
        keep them; the new tasks' own are new objects, which an optimizer made before does not hold. They start as
        copies of those of a task that has learned nothing yet, or else of the last task. Compile, export or
        distribute the model afterwards.

        Args:
            n: how many, at least 1.
            num_classes: outputs of each new head, one number or one per new task; these are freshly initialised.
                None: as at the conversion.

        Raises:
            TaskError: a task is open.
            ValueError: an argument is out of range, or `num_classes` is needed.
        """
        grow(self, n, num_classes)

    def widen(self, share: float) -> None:
        """Make room in every layer: more features, free for tasks to come. What finished tasks answer does not change.

        Their outputs are what they were but for rounding, since matrices have other sizes, and stay the same, bit for
        bit, from then on. Heads of attention and groups of convolutions are added in whole units; where nothing can be
        added, a `HatWarning` says so, with the reason. Every parameter stays the same object. Optimizers made before
        go on: what they remember of new entries is zero. Compile, export or distribute the model afterwards.

        Args:
            share: how many, as a share of those there are: 0.25 for a quarter more, at least one for each layer.

        Raises:
            TaskError: a task is open.
            ValueError: the share is no positive number.
            HatError: nothing can be added anywhere, or a finished task would answer otherwise. Nothing has changed
                then.
        """
        widen(self, share)

    def masks(self, task: int) -> dict[str, Tensor]:
        """The binary masks of a task: {name of layer or parameter: bool, shape (features,)}.

        Layers whose features meet (a residual stream) have the same mask.
        """
        self.check_task(task)
        state = self.task_state
        masks = state.masks_from(state.binary(task).to(state.scale.dtype))
        return {owner: masks[name] > 0 for owner, name in self.plan.owners.items()}

    def regularization(self, per_layer: bool = True, quota: bool = True) -> Tensor:
        """Equation 5 for the open task, a scalar to be added to the loss; see `capacity_regularization`.

        From here on masks are learned by their gradient.

        Args:
            per_layer: False counts all features as one layer, the form of Serrà et al. 2018 (their Equation 6).
            quota: subtract 1/T and clamp at zero.

        Raises:
            TaskError: no task is open.
        """
        _, opened = require_open(self, "regularization")
        self.learn_masks()
        state = self.task_state
        gates = gate(state.embeddings[opened.task], state.scale, state.s_max, state.clamp)
        capacity = opened.capacity if per_layer else opened.capacity_of_all
        return capacity_regularization(gates, capacity, self.num_tasks, quota)

    def _chosen(self, task: int | Tensor) -> tuple[int, Tensor | None]:
        if isinstance(task, Tensor):
            check_tasks(self, task)
            return self.task_state.task, task.clone()
        self.check_task(task)
        return task, None


def _check_modes(model: HatModel, inputs: Any) -> None:
    """Where the two modes have graphs of their own, the parts whose code looks at the mode must be in the same one."""
    modules = dict(model.named_modules())
    for name in model._mode_readers:
        if modules[name].training != model.training:
            mode = "training" if model.training else "evaluation"
            raise TaskError(
                f"{name} is not in {mode} mode, but the model is: this network takes different paths in the two modes, "
                f"and its parts must take the same one; call {'train' if model.training else 'eval'}() on the model"
            )


def _mode_readers(root: nn.Module, graphs: Iterable[fx.Graph]) -> tuple[str, ...]:
    """Modules that tracing went through and whose code looks at the mode."""
    called = {str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_module"}
    inside = tuple(f"{path}." for path in called)
    return tuple(
        name
        for name, module in root.named_modules()
        if name and name not in called and not name.startswith(inside) and reads_training_flag(module)
    )


def _rebuild(
    state: dict[str, Any],
    graphs: dict[bool, fx.Graph],
    flat: dict[bool, fx.Graph],
    saved: dict[str, Tensor] | None,
    name: str,
    built: bool = False,
) -> HatModel:
    """A model from what `copy.deepcopy` or `pickle` kept of it."""
    model = HatModel.__new__(HatModel)
    type(model).__name__ = name
    model.__dict__.update(
        state, guard=None, opened=None, known_answers=KnownAnswers(), followed=Followed(), flat_graphs=flat
    )
    model.offer(model.interface)
    model.install(graphs, model.training)
    model.select_graph()
    model.guard_anew(saved, built=built)
    return model
