"""Whole networks, generated: conversion keeps their function, and nothing a finished task answers ever changes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import hatify
from networks import BLOCKS, FRONTS, FUNCTIONS, Generated, answers_finitely, generate, networks
from oracles import (
    OPTIMIZERS,
    broken_promises,
    difference,
    half_on,
    leaks,
    locks,
    no_repairs,
    parity_errors,
    refuses,
    slopes_are_finite,
)

NUM_TASKS = 3
#: Largest difference between two outputs that rounding explains, in units of the largest number in them.
ROUNDING = 1e-5

each_front = pytest.mark.parametrize("front", FRONTS)
per_front = settings(max_examples=25)


def convert(generated: Generated, source: random.Random) -> tuple[hatify.HatModel, Generated]:
    """The model, and the network without the sizes that the model refuses."""
    model = hatify.hatify(generated.net, NUM_TASKS, generated.inputs(2), couple=source.choice((True, True, False)))
    return model, generated.accepted(lambda inputs: not refuses(model, inputs))


@each_front
@per_front
@given(data=st.data())
def test_with_every_feature_on_the_function_is_kept(front: str, data: st.DataObject) -> None:
    generated = data.draw(networks(front))
    note(generated)
    original = generated.net.eval()  # conversion leaves it alone
    model, generated = convert(generated, data.draw(st.randoms(use_true_random=False)))
    assert max(parity_errors(model, original, generated.probes())) < ROUNDING

    # In training mode likewise: the same noise, and then the same statistics.
    original.train()
    model.begin_task(1)
    for step in range(2):
        inputs = generated.of_any_size(4, seed=step)
        torch.manual_seed(step)
        expected = original(*inputs)
        torch.manual_seed(step)
        assert difference(model(*inputs), expected) < ROUNDING
    model.eval()
    with torch.no_grad():
        assert difference(model(*generated.inputs(3)), original.eval()(*generated.inputs(3))) < ROUNDING


@each_front
@per_front
@given(data=st.data())
def test_nothing_a_finished_task_answers_ever_changes(front: str, data: st.DataObject) -> None:
    generated = data.draw(networks(front))
    note(generated)
    source = data.draw(st.randoms(use_true_random=False))
    model, generated = convert(generated, source)
    assert broken_promises(model, generated.of_any_size, source, probes=generated.probes()) == []
    assert_no_leaks(model, generated)


def assert_no_leaks(model: hatify.HatModel, generated: Generated) -> None:
    """No entry that is free matters to a finished task, and hatify's own check comes to the same result."""
    probes = generated.probes()
    for task in model.finished_tasks:
        assert leaks(model, task, probes) == []
    for inputs in probes[:2]:
        hatify.verify_isolation(model, inputs)


# What the generated tests rest on ------------------------------------------------------------------------------------


@each_front
def test_generated_networks_can_be_trained_unconverted(front: str) -> None:
    for seed in range(10):
        generated = generate(random.Random(seed), front)
        assert all(answers_finitely(generated.net, probe) for probe in generated.probes()[2:])
        outputs = tree_leaves(generated.net.train()(*generated.inputs(4)))
        sum(y.square().mean() for y in outputs).backward()
        assert all(torch.isfinite(y).all() for y in outputs)
        assert any(p.grad is not None and p.grad.ne(0).any() for p in generated.net.parameters())


def test_every_kind_of_block_is_generated() -> None:
    seen = {name for seed in range(40) for front in FRONTS for name in generate(random.Random(seed), front).blocks}
    assert set(BLOCKS) <= seen
    assert {f"front:{front}" for front in FRONTS} <= seen


def test_many_networks_take_other_sizes() -> None:
    for front in (front for front in FRONTS if front != "vector"):
        found = [generate(random.Random(seed), front) for seed in range(20)]
        sizes = [[sum(map(math.prod, o)) - sum(map(math.prod, g.shapes)) for o in g.others] for g in found]
        assert sum(any(n < 0 for n in s) and any(n > 0 for n in s) for s in sizes) >= 8
        assert len({shapes for g in found for shapes in (g.shapes, *g.others)}) >= 5


def test_the_same_seed_gives_the_same_network() -> None:
    first, second = generate(random.Random(7), "image2d"), generate(random.Random(7), "image2d")
    assert repr(first) == repr(second)
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)


@each_front
def test_without_a_lock_the_tests_would_fail(front: str) -> None:
    """Of every generated network's locks, take one away: both checks must see it, or neither (a dead weight)."""
    seen = 0
    for seed in range(6):
        source = random.Random(seed)
        generated = generate(source, front)
        model, generated = convert(generated, source)
        with no_repairs():
            model.begin_task(0)
            half_on(model, 0, source)
            model.end_task()
        probes = generated.probes()[1:]
        for name in [name for name, locked in locks(model, 0).items() if name in model.uses and locked.any()]:
            uses = model.uses.pop(name)
            leaking = leaks(model, 0, probes) != []
            model.uses[name] = [type(uses[0])(torch.tensor([model.task_state.num_slots]), None)]
            assert leaks(model, 0, probes) == []
            model.uses[name] = uses
            seen += leaking
    assert seen > 10


# Optimizers ----------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A small network with one of each: convolutions, norms, raw parameters, attention, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))
        self.norm2, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale * self.proj(y)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), 0.1, self.training)
        return self.head(x[:, 0])


class Only(random.Random):
    """Choices that begin with given ones."""

    def __init__(self, *first: object) -> None:
        super().__init__(0)
        self.first = list(first)

    def choice(self, options: object) -> object:  # type: ignore[override]
        return self.first.pop(0) if self.first else super().choice(options)  # type: ignore[arg-type]


@pytest.mark.parametrize("one_for_all_tasks", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_moves_what_finished_tasks_own(optimizer: str, one_for_all_tasks: bool) -> None:
    torch.manual_seed(0)
    model = hatify.hatify(Everything(), NUM_TASKS, torch.randn(2, 3, 8, 8))
    generated = Generated(nn.Identity(), ((3, 8, 8),), False, (), 1)
    source = Only(*[optimizer] * NUM_TASKS, one_for_all_tasks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert broken_promises(model, generated.inputs, source) == []
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in model.uses)
    assert_no_leaks(model, generated)


# Numbers -------------------------------------------------------------------------------------------------------------


def _softmax(x: Tensor) -> Tensor:
    e = (x - x.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


#: Functions of tokens (N, L, C) that are singular, or infinitely steep, for a channel that is zero at every token.
STEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "root": lambda x: x.abs().sqrt(),
    "power below one": lambda x: x.abs() ** 0.5,
    "unit length of tokens": lambda x: x / x.norm(dim=-1, keepdim=True),
    "unit length of channels": lambda x: x / x.norm(dim=1, keepdim=True),
    "largest of one": lambda x: x / x.abs().amax(1, keepdim=True),
    "standardized channels": lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
    "root mean square of channels": lambda x: x * x.pow(2).mean(1, keepdim=True).rsqrt(),
    "handwritten softmax over tokens": _softmax,
    "shares of softplus": lambda x: F.softplus(x) / F.softplus(x).mean(1).unsqueeze(1),
    "quotient added": lambda x: torch.addcdiv(x, x, 1 + x.abs()),
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "hypotenuse": lambda x: torch.hypot(x, 2 * x),
    "x log y": lambda x: torch.xlogy(x, x.abs() + 1e-3),
    "entropy": lambda x: torch.special.entr(torch.sigmoid(x)),
    "log gamma": lambda x: torch.lgamma(x.abs() + 1),
    "inverse root": lambda x: torch.float_power(x.abs() + 1, -0.5).float(),
}


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.function(self.first(x)))))


@pytest.mark.parametrize("name", [*FUNCTIONS, *STEEP])
def test_features_that_are_off_leave_this_function_finite(name: str) -> None:
    torch.manual_seed(0)
    net = Between({**FUNCTIONS, **STEEP}[name])
    inputs = (torch.randn(4, 5, 3),)
    net(*inputs).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    net.zero_grad()
    model = hatify.hatify(net, 1, inputs)
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    assert slopes_are_finite(model, inputs)
    with no_repairs():
        model.end_task()
    assert torch.isfinite(model(*inputs)).all()
    assert leaks(model, 0, [inputs]) == []
