"""What must hold of a converted network, found out without hatify's own analysis: by training, noise and autograd."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import hatify
from hatify import HatError, HatModel, Policy
from hatify.lock import locked_entries
from hatify.nn.per_task import PER_TASK

Inputs = tuple[Tensor, ...]

# Answers -------------------------------------------------------------------------------------------------------------


def answers(model: HatModel, task: int, inputs: Inputs) -> list[Tensor]:
    """The outputs of a task in evaluation mode; leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad(), model.task(task):
        return tree_leaves(model(*inputs))


def refuses(model: HatModel, inputs: Inputs) -> bool:
    """Whether the model says that a size of `inputs` chooses another path than the one that was traced."""
    model.eval()
    try:
        with torch.no_grad(), model.task(0):
            model(*inputs)
    except HatError as error:
        if "the network was traced where a size or condition is" not in str(error):
            raise
        return True
    return False


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether two lists of outputs are equal; NaN equals nothing."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(found: Any, expected: Any) -> float:
    """The largest difference between two outputs, in units of the largest expected number (at least 1)."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.isfinite(x).all() and torch.isfinite(y).all()
        largest = max(largest, ((x - y).abs().max() / y.abs().max().clamp(min=1)).item())
    return largest


def parity_errors(model: HatModel, original: nn.Module, batches: Iterable[Inputs]) -> Iterator[float]:
    """`difference` from the original's outputs, for each batch and each task, in evaluation mode."""
    model.eval()
    for inputs in batches:
        with torch.no_grad():
            expected = original(*inputs)
        for task in range(model.num_tasks):
            with torch.no_grad(), model.task(task):
                yield difference(model(*inputs), expected)


# Training ------------------------------------------------------------------------------------------------------------

#: Makers of optimizers that move weights in every way torch knows: with decay, momentum, preconditioners.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=True),
    # Not with momentum: torch's kernel cannot take a parameter whose first gradient comes after the first step.
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "Adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1, foreach=False),
    "Adagrad foreach": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1, foreach=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.005),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
    "LBFGS line search": lambda p: torch.optim.LBFGS(p, max_iter=2, line_search_fn="strong_wolfe"),
}


def half_on(model: HatModel, task: int, source: random.Random) -> None:
    """Set the embeddings of `task` to ±2 at random."""
    embedding = model.task_state.embeddings[task]
    signs = [source.choice((-2.0, 2.0)) for _ in range(embedding.numel())]
    embedding.data.copy_(torch.tensor(signs))


def loss(model: HatModel, inputs: Inputs) -> Tensor:
    """Something to be minimised: the distance of every output from noise, and the capacity used."""
    outputs = [y for y in tree_leaves(model(*inputs)) if y.is_floating_point()]
    return sum((y.float() - torch.randn(y.shape)).square().mean() for y in outputs) + 0.1 * model.regularization()


def slopes_are_finite(model: HatModel, inputs: Inputs) -> bool:
    """Whether the loss of the open task and its derivatives are finite; leaves no gradients behind."""
    value = loss(model, inputs)
    value.backward()
    found = all(torch.isfinite(t).all() for t in (value, *(p.grad for p in model.parameters() if p.grad is not None)))
    model.zero_grad()
    return found


def train(
    model: HatModel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Inputs],
    clip: bool = False,
    keep_gradients: bool = False,
    autocast: bool = False,
) -> None:
    """One optimizer step per batch, at a scale that grows from soft masks to hard ones."""

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=not keep_gradients)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(model, batch)
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return value

    scale = hatify.MaskScale(model, steps=len(batches), schedule="exponential")
    for batch in batches:
        optimizer.step(closure)
        scale.step()


@contextmanager
def no_repairs() -> Iterator[None]:
    """Within the context, warnings that a layer is all off or full are ignored; any other one is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(every feature off|free of finished tasks).*", hatify.HatWarning)
        warnings.filterwarnings("ignore", ".*", FutureWarning)
        warnings.filterwarnings("ignore", ".*", DeprecationWarning)
        yield


def broken_promises(
    model: HatModel,
    make_inputs: Callable[[int, int], Inputs],
    source: random.Random,
    smallest_batch: int = 1,
    probes: Sequence[Inputs] | None = None,
) -> list[str]:
    """Teach every task of `model` a little, in a random manner, and report each answer that changed afterwards.

    Masks are half on at random, the optimizer and how it is used are drawn from `source`. Finished tasks are asked
    again in the middle of training, after each task, after a task that is abandoned, and after one that is reopened.

    Args:
        model: fresh from conversion.
        make_inputs: inputs to learn from, for a batch size and a seed.
        source: of every choice.
        smallest_batch: of the probes.
        probes: what finished tasks are asked; None: batches of `make_inputs`.
    """
    names = [source.choice(tuple(OPTIMIZERS)) for _ in range(model.num_tasks)]
    one_optimizer = source.choice((False, True))
    options = {name: source.choice((False, True)) for name in ("clip", "keep_gradients")}
    torch.manual_seed(source.getrandbits(16))
    if probes is None:
        probes = [make_inputs(max(smallest_batch, size), 100 + size) for size in (1, 3)]
    optimizer = OPTIMIZERS[names[0]](model.parameters()) if one_optimizer else None
    known: dict[int, list[list[Tensor]]] = {}
    broken: list[str] = []

    def check(when: str) -> None:
        for task, expected in known.items():
            if not all(same_bits(answers(model, task, p), e) for p, e in zip(probes, expected, strict=True)):
                broken.append(f"task {task} {when} ({', '.join(names)}, {options})")

    reopened = [0] if source.choice((False, False, True)) else []
    abandoned = source.choice((*range(model.num_tasks), None, None, None))
    with no_repairs():
        for task in (*range(model.num_tasks), *reopened):
            known.pop(task, None)
            for attempt in ("abandoned", "finished") if task == abandoned else ("finished",):
                model.begin_task(task)
                half_on(model, task, source)
                batches = [make_inputs(4, 10 * task + i) for i in range(2)]
                if not slopes_are_finite(model, batches[0]):
                    broken.append(f"task {task} is not finite before it has learned anything")
                train(model, optimizer or OPTIMIZERS[names[task]](model.parameters()), batches, **options)
                # Products of numbers this large would overflow, which is no forgetting.
                diverged = not all((p.abs() < 1e3).all() for p in model.parameters())
                if not diverged:
                    check(f"while task {task} learned")
                if diverged or attempt == "abandoned":
                    model.abort_task()
                    check(f"after task {task} was abandoned")
                    continue
                model.end_task()
                check(f"after task {task} had learned")
                known[task] = [answers(model, task, p) for p in probes]
    return broken


# Locks ---------------------------------------------------------------------------------------------------------------


def locks(model: HatModel, task: int) -> dict[str, Tensor]:
    """What `task` owns: {parameter or buffer: bool, True where nothing but reopening the task may change it}.

    Whatever no policy accounts for counts as owned by nobody. hatify's own state is left out.
    """
    masks = model.task_state.binary(task).unsqueeze(0)
    constant = {entry.name for entry in model.census if entry.policy is Policy.CONSTANT}
    own = [f"{name}.{task}" for name, module in model.named_modules() if isinstance(module, PER_TASK)]
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.startswith("_hat."):
            continue
        if name in model.uses:
            found[name] = locked_entries(model.uses[name], masks, tensor.shape)
        else:
            mine = name in constant or any(name == prefix or name.startswith(f"{prefix}.") for prefix in own)
            found[name] = torch.full(tensor.shape, mine)
    return found


@contextmanager
def unguarded(model: HatModel) -> Iterator[None]:
    """Within the context, nothing puts back what is written to a finished task's weights."""
    guard = model.guard
    model.__dict__["guard"] = None
    try:
        yield
    finally:
        model.__dict__["guard"] = guard


@contextmanager
def noise_in(model: HatModel, entries: dict[str, Tensor], seed: int = 0) -> Iterator[None]:
    """Within the context, the given entries of parameters and buffers are random numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = {name: tensors[name].detach().clone() for name in entries}
    generator = torch.Generator().manual_seed(seed)
    try:
        for name, chosen in entries.items():
            tensor = tensors[name]
            if tensor.is_floating_point():
                noise = 2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                with torch.no_grad():
                    tensor.copy_(torch.where(chosen, noise, tensor))
        with unguarded(model):
            yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value)


def leaks(model: HatModel, task: int, probes: Sequence[Inputs]) -> list[str]:
    """Tensors through whose unlocked entries the answers of `task` can change: all at once first, then one by one."""
    free = {name: ~locked for name, locked in locks(model, task).items() if not locked.all()}
    others = [t for t in range(model.num_tasks) if t != task]
    free |= {f"_hat.embeddings.{t}": torch.ones(model.task_state.num_slots, dtype=torch.bool) for t in others}
    expected = [answers(model, task, p) for p in probes]

    def changes(entries: dict[str, Tensor]) -> bool:
        with noise_in(model, entries):
            return not all(same_bits(answers(model, task, p), e) for p, e in zip(probes, expected, strict=True))

    if not changes(free):
        return []
    return [name for name, chosen in free.items() if changes({name: chosen})] or ["several together"]


# Dependence ----------------------------------------------------------------------------------------------------------


def dependencies(model: HatModel, task: int, batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """Entries of shared parameters that the outputs of `task` depend on: those with a non-zero derivative."""
    parameters = {name: p for name, p in model.named_parameters() if name in model.uses}
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    model.eval()
    with model.task(task):
        for inputs in batches:
            outputs = tree_leaves(model(*inputs))
            total = sum((torch.randn_like(y) * y).sum() for y in outputs)
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    found[name] |= gradient != 0
    return found


def influences(model: HatModel, task: int, batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """Entries of shared parameters that the outputs of `task` depend on: those whose change changes the outputs."""
    parameters = {name: p for name, p in model.named_parameters() if name in model.uses}
    expected = [answers(model, task, b) for b in batches]
    found = {}
    for name, parameter in parameters.items():
        flat = parameter.detach().view(-1)
        changed = torch.zeros(flat.shape, dtype=torch.bool)
        for i, value in enumerate(flat.tolist()):
            flat[i] = value + 1.5
            with unguarded(model):
                now = [answers(model, task, b) for b in batches]
            changed[i] = not all(same_bits(found, e) for found, e in zip(now, expected, strict=True))
            flat[i] = value
        found[name] = changed.view(parameter.shape)
    return found
