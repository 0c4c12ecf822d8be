"""Masks multiplied into parameters are remembered, and never for too long."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hatify
from hatify.nn import folding
from oracles import unguarded


@pytest.fixture
def model() -> hatify.HatModel:
    """A finished task, half of whose features are off; every layer's mask is folded into its weight or norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 6), nn.LayerNorm(6), nn.Flatten()
    )
    model = hatify.hatify(net, 2, (torch.randn(2, 3, 8, 8),), heads=None)
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.tensor([1.0, -1.0]).repeat(model.task_state.num_slots)[::2])
        model.task_state.embeddings[0][::2] = -1
    model.end_task()
    return model


@torch.no_grad()
def answer(model: hatify.HatModel) -> Tensor:
    return model(torch.ones(2, 3, 8, 8) * torch.arange(8))


def test_it_is_computed_once(model: hatify.HatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(model)
    assert any(module in folding._REMEMBERED for module in model.modules())
    monkeypatch.setattr("hatify.nn.norms._masked_affine", lambda *_: pytest.fail("computed again"))
    assert torch.equal(answer(model), first)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_it_is_what_is_computed_anew(model: hatify.HatModel, with_gradients: bool) -> None:
    answer(model)
    remembered = answer(model)
    with torch.set_grad_enabled(with_gradients):
        fresh = model(torch.ones(2, 3, 8, 8) * torch.arange(8))
    assert torch.equal(remembered, fresh.detach())


def _in_place(p: nn.Parameter) -> None:
    p.add_(0.5)


def _replaced(p: nn.Parameter) -> None:
    p.data = p.data + 0.5


@pytest.mark.parametrize("change", [_in_place, _replaced])
def test_changed_parameters_are_seen(model: hatify.HatModel, change: Callable[[nn.Parameter], None]) -> None:
    for name, parameter in model.named_parameters():
        if name.startswith("_hat") or ".1." in name:
            continue
        with torch.no_grad(), unguarded(model):
            before = answer(model)
            change(parameter)
            assert not torch.equal(answer(model), before), name


def test_the_caches_see_what_is_put_right(model: hatify.HatModel) -> None:
    before = answer(model)
    for _, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.5)
        assert torch.equal(answer(model), before)


def test_another_task_has_its_own(model: hatify.HatModel) -> None:
    first = answer(model)
    model.begin_task(1)
    model.end_task()
    second = answer(model)
    assert not torch.equal(second, first)
    with model.task(0):
        assert torch.equal(answer(model), first)
    assert torch.equal(answer(model), second)


def test_another_dtype_has_its_own(model: hatify.HatModel) -> None:
    first = answer(model)
    model.double()
    with torch.no_grad():
        second = model(torch.ones(2, 3, 8, 8, dtype=torch.float64) * torch.arange(8))
    torch.testing.assert_close(second.float(), first)


def test_inference_mode_leaves_nothing_behind_that_gradients_cannot_use(model: hatify.HatModel) -> None:
    with torch.inference_mode():
        answer(model)
    model(torch.ones(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert torch.equal(answer(model), answer(model))
