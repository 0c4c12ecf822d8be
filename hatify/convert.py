"""Conversion: trace → classify → analyse → plan → rewrite → nest; by a saved plan: trace → check → rewrite → nest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from hatify.classify import classify, detached_copy
from hatify.errors import ConversionError
from hatify.examples import infer_example_inputs, refusals_named
from hatify.model import HatModel
from hatify.nn.state import STATE, TaskState
from hatify.origin import Origin
from hatify.plan import Plan
from hatify.planner import make_plan
from hatify.policy import Policy
from hatify.rewrite import class_counts, rewrite_graph, rewrite_modules
from hatify.support import accepted_sizes, analyse, only_weighing
from hatify.timm_methods import Interface
from hatify.trace import Traced, bound_arguments, trace
from hatify.widening.statistics import normalise_over_base
from hatify.widening.widened import enlarge, indices_of

#: Of 25 to 800 the best in benchmarks/mask_scale.py, with the cosine schedule and dense initialisation.
S_MAX = 100.0
#: What may become of what the network has learned.
BASES = (None, "locked")


def hatify(
    net: nn.Module,
    num_tasks: int,
    example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None = None,
    num_classes: int | Iterable[int] | None = None,
    heads: str | Iterable[str] | None = "auto",
    mask_init: str | float = "dense",
    couple: bool = True,
    s_max: float = S_MAX,
    policies: Mapping[str, str] | None = None,
    clamp: float | None = None,
    mask_inputs: bool = False,
    base: str | None = None,
    spare: float = 0.0,
) -> HatModel:
    """Convert a network into one that learns task after task without forgetting.

    Args:
        net: any network that torch.fx can trace; it is left untouched.
        num_tasks: how many tasks there will be, at least 1.
        example_inputs: what ``net.forward`` is called with: a tuple of positional or a dict of named inputs. None:
            timm's input size, else one that the first layer accepts.
        num_classes: outputs of each task's head: one number, or one per task; such heads are freshly initialised.
            None: each task starts from a copy of the original head.
        heads: the output layers, of which each task has its own: ``"auto"`` finds them, names choose them, None
            makes ordinary mask-carrying layers of them.
        mask_init: initial embeddings: ``"dense"`` (1 everywhere, HAT-CL section 4.1), ``"normal"`` (N(0, 1), the
            original HAT), or a number.
        couple: features that are added, multiplied or read by one input of a layer share a mask. False: one mask per
            layer, as in the paper.
        s_max: upper bound of the mask scale, above 1.
        policies: {module name: ``"shared"``, ``"row"``, ``"unmasked"``, ``"per_task"`` or ``"head"``} overrides what
            is planned; a module named ``"per_task"`` is not traced into.
        clamp: masks with |s·e| above it hold still, by Equation 3 as published, with 50. None: the exact form, with
            which masks of wide layers move far enough, and move without a schedule, too (docs/experiments.md).
        mask_inputs: give every floating-point input of two or more dimensions a mask of its own, so that a task also
            chooses the input features it reads: those along the dimension that the first weighted layer contracts,
            else dimension 1 of an (N, C, H, W, …) and the last dimension of an (N, F) or (N, tokens, F) input.
            An input gets none if the network takes it with other numbers of features, too.
            `HatModel.masks` names it after the argument of ``net.forward``; Equation 5 counts it as a layer.
        base: ``"locked"``: what `net` has learned is a base for every task. From the first ``begin_task`` on its
            features are on in all tasks and changed by none, as if a task had ended that has every feature; tasks
            learn normalisations, which start as the network's, and heads (new ones start at zero). The best start
            from pretrained weights, and the default where these are known to be (``hatify-convert``, timm's
            ``pretrained=True``). None: tasks share the features out among themselves, and the first may change all.
        spare: features to add to every layer beside a locked base (``base`` is ``"locked"`` then), as a share of those
            there are: 0.25 for a quarter more. Tasks may take and change these; they read the base, and the base does
            not read them, so that it stays what it is. See `HatModel.widen`, which adds more at any time.

    Returns:
        A `HatModel`. With every mask on, it computes what `net` computes.

    Raises:
        ConversionError: the network cannot be traced, or an argument does not fit it.
        HatError: no layer can be given spare features.
        ValueError: an argument is out of range.
    """
    num_classes, heads, policies = _reusable(num_classes), _reusable(heads), dict(policies or {})
    base = "locked" if spare else base
    options = {name: value for name, value in locals().items() if name not in ("net", "example_inputs")}
    original, net, origin = net, _own_copy(net, options), Origin.of(net, options)
    inputs = _example_inputs(net, example_inputs)
    arguments = bound_arguments(net, inputs)
    with refusals_named(net, inputs):
        traced = trace(net, arguments, frozenset(policies))
        plan = _planned(net, traced.graphs, inputs, heads, policies, couple, mask_inputs)
    _put_back(net, original)
    model = _carried_out(plan, net, traced, inputs, origin)
    if spare:
        model.widen(spare)
    return model


def convert_by(
    plan: Plan, net: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any], options: dict[str, Any]
) -> HatModel:
    """Convert `net` by a plan that was made for it; nothing is derived again.

    Args:
        plan: the plan.
        net: the network, which is left as it is.
        example_inputs: those of the conversion for which the plan was made.
        options: the other arguments of that conversion.

    Raises:
        CheckpointError: the plan is one for another network; names the first difference.
    """
    net, origin = _own_copy(net, options), Origin.of(net, options)
    arguments = bound_arguments(net, example_inputs)
    with refusals_named(net, example_inputs):
        traced = trace(net, arguments, frozenset(options["policies"]))
    plan.check(net, traced.graphs)
    enlarge(net, traced.graphs, plan.widened)
    return _carried_out(plan, net, traced, example_inputs, origin)


def _own_copy(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    """A copy to be rewritten, once it is clear that `net` can be converted with these `options`."""
    _check_arguments(net, options["num_tasks"], options["num_classes"], options["s_max"])
    if options.get("base") not in BASES:
        raise ValueError(f"base must be 'locked' or None, not {options['base']!r}")
    spare = options.get("spare", 0.0)
    if isinstance(spare, bool) or not isinstance(spare, (int, float)) or not 0 <= spare < math.inf:
        raise ValueError(f"spare must be a share of features, 0 or more, not {spare!r}")
    if options.get("base") and options["mask_inputs"]:
        raise ValueError("a locked base reads every input, so that mask_inputs=True leaves nothing to choose")
    return detached_copy(net)


def _planned(
    net: nn.Module,
    graphs: tuple[fx.Graph, ...],
    inputs: tuple[Any, ...] | dict[str, Any],
    heads: str | Iterable[str] | None,
    policies: Mapping[str, str],
    couple: bool,
    mask_inputs: bool,
) -> Plan:
    """Classify the parts of `net`, analyse its graphs, and plan what becomes of them."""
    classification = classify(net, graphs, heads, policies)
    sizes, free = accepted_sizes(net, graphs, inputs)
    space, findings = analyse(net, graphs, sizes, free, classification, couple, mask_inputs)
    if weighing := only_weighing(space, findings, classification):
        classification = classification.per_task(weighing, "its features only weigh others, as attention's heads do")
        space, findings = analyse(net, graphs, sizes, free, classification, couple, mask_inputs)
    return make_plan(net, graphs, classification, space, findings)


def _carried_out(
    plan: Plan, net: nn.Module, traced: Traced, inputs: tuple[Any, ...] | dict[str, Any], origin: Origin
) -> HatModel:
    """Rewrite `net` and its graphs, in place, and make a model of them."""
    given = origin.arguments
    num_tasks, s_max, classes = (
        given["num_tasks"],
        given["s_max"],
        class_counts(given["num_tasks"], given["num_classes"]),
    )
    if classes is not None:
        _check_heads(net, plan)
    like = next(net.parameters(), torch.empty(0))
    # Files of version 0.1 know nothing of bases.
    locked = given.get("base") == "locked"
    state = TaskState(plan.layout, num_tasks, given["mask_init"], s_max, given["clamp"], like, locked)
    if locked and plan.widened.slots is not None:
        state.set_base(indices_of(plan.widened.slots))
    rewrite_modules(net, plan, num_tasks, classes, locked)
    net.add_module(STATE, state.train(net.training))
    for graph, planned in zip(traced.graphs, plan.graphs, strict=True):
        rewrite_graph(net, graph, plan, planned.masks)
    interface = Interface.of(net)
    model = HatModel(net, traced.training, traced.evaluation, plan, s_max, inputs, origin)
    model.offer(interface)
    normalise_over_base(model)
    return model


def _check_heads(net: nn.Module, plan: Plan) -> None:
    """Raise a `ConversionError` unless output layers can be made with numbers of classes of their own."""
    kind = type(net).__name__
    if Policy.HEAD not in (*plan.modules.values(), *plan.tensors.values()):
        raise ConversionError(f"{kind}: num_classes is given, but no output layer was found; name it with heads=")
    modules = tuple(f"{path}." for path, policy in plan.modules.items() if policy is Policy.HEAD)
    for name, policy in plan.tensors.items():
        if policy is Policy.HEAD and not name.startswith(modules):
            raise ConversionError(
                f"{name}: num_classes is given, but {kind} has its output layer written as a function of this "
                "parameter, which has one size only; leave num_classes out, or make that layer a module"
            )


@torch.no_grad()
def _put_back(net: nn.Module, original: nn.Module) -> None:
    """Undo what running `net` has done to its parameters: some networks write to them while training."""
    for parameter, as_it_was in zip(net.parameters(), original.parameters(), strict=True):
        if not parameter.is_meta and not torch.equal(parameter, as_it_was):
            parameter.copy_(as_it_was)


def _reusable(given: Any) -> Any:
    """`given`, as a list if it could be iterated over only once."""
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _check_arguments(net: nn.Module, num_tasks: int, num_classes: int | Iterable[int] | None, s_max: float) -> None:
    """Raise an error that says why `net` cannot be converted as it is, or which argument is out of range."""
    if isinstance(net, HatModel):
        raise ConversionError("the network has been converted already")
    if not isinstance(net, nn.Module):
        raise ConversionError(f"expected a torch.nn.Module, not {type(net).__name__}")
    if isinstance(net, torch.jit.ScriptModule):
        raise ConversionError("a scripted network cannot be traced: convert the network it was made from")
    if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ConversionError(f"convert the network inside {type(net).__name__} (its .module), then wrap the result")
    if hasattr(net, "_orig_mod"):
        raise ConversionError("convert the original network (._orig_mod), then compile the result")
    if "forward" in vars(net):
        raise ConversionError(f"{type(net).__name__}: forward was replaced on the object; define it in a class")
    if hasattr(net, STATE):
        raise ConversionError(
            f"the attribute {STATE!r} is in the way: that name is reserved for the state of the tasks"
        )
    for path, module in net.named_modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            if hasattr(nn.Module, name):
                where = f"{path}.{name}" if path else name
                raise ConversionError(f"{where!r} has the name of a method of torch.nn.Module: rename that child")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in net.parameters()):
        raise ConversionError("the network has lazy modules: run it on an input once, then convert it")
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks must be a positive integer, not {num_tasks!r}")
    if not 1 < s_max < math.inf:
        raise ValueError(f"s_max must be finite and above 1, not {s_max!r}")
    class_counts(num_tasks, num_classes)


def _example_inputs(
    net: nn.Module, given: tuple[Any, ...] | dict[str, Any] | Tensor | None
) -> tuple[Any, ...] | dict[str, Any]:
    if given is None:
        return infer_example_inputs(net)
    if isinstance(given, Tensor):
        return (given,)
    return given if isinstance(given, dict) else tuple(given)
