"""What a user registers of an operation gets everything that ours get."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from hatify.ops import OPERATIONS, Trait, alike, op
from oracles import half_on

pytestmark = pytest.mark.filterwarnings("ignore::hatify.HatWarning")


class Snap(nn.Module):
    """f(0) = 0; without a record it is traced through."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() > 0.1, x, torch.zeros_like(x))


def snap(x: Tensor) -> Tensor:
    return torch.where(x.abs() > 0.1, x, torch.zeros_like(x))


def raised(x: Tensor) -> Tensor:
    """Infinitely steep at zero."""
    return x.abs().sqrt()


@pytest.fixture(autouse=True)
def own_operations() -> Iterator[None]:
    before = dict(OPERATIONS)
    yield
    OPERATIONS.clear()
    OPERATIONS.update(before)


def register(*targets: Any, **known: Any) -> None:
    op(*targets, **known)(lambda call: call.label(0))


class Net(nn.Module):
    def __init__(self, between: Callable[[Net, Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.snap, self.between, self.after = Snap(), between, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head(torch.relu(self.second(self.between(self, self.first(x))))))


def converted(between: Callable[[Net, Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    torch.manual_seed(0)
    model = hatify.hatify(Net(between, after), 2, torch.randn(4, 6))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    model.end_task()
    return model


def locked_in_second(model: Any) -> Tensor:
    (lock,) = [p.lock.expand(8, 8) for p in model.guard.partial if p.name == "second.weight"]
    return lock


@pytest.mark.parametrize("way", [lambda net, h: net.snap(h), lambda net, h: snap(h)], ids=["module", "function"])
def test_labels_make_it_tight(way: Callable[[Net, Tensor], Tensor]) -> None:
    def loose(call: Any) -> Any:
        return call.all_on()

    op(Snap, snap)(loose)
    model = converted(way)
    assert torch.equal(locked_in_second(model), model.masks(0)["second"][:, None].expand(8, 8))
    OPERATIONS.pop(Snap), OPERATIONS.pop(snap)
    register(Snap, snap)
    model = converted(way)
    masks = model.masks(0)
    assert torch.equal(locked_in_second(model), masks["second"][:, None] & masks["first"])
    assert any(node.target in ("snap", snap) for node in model.graph.nodes)


@pytest.mark.parametrize("traits", [{Trait.ELEMENTWISE}, set()])
def test_traits_keep_masks_from_divisors(traits: set[Trait]) -> None:
    """A mask behind the sum would make the divisor zero for features that are off."""
    register(Snap, traits=traits)
    model = converted(lambda net, h: h / net.snap(h * h + 1.0))
    for task in model.finished_tasks:
        with model.task(task), torch.no_grad():
            finite = bool(torch.isfinite(model.eval()(torch.randn(5, 6))).all())
    masked = {str(n.args[0]) for n in model.graph.nodes if "masked" in str(n.target)}
    assert finite and ("add" in masked) == (not traits)


@pytest.mark.parametrize("told", [True, False])
def test_where_it_is_singular(told: bool) -> None:
    """What comes back to features that are off is not finite there, and has to be stopped."""
    register(raised, traits={Trait.ELEMENTWISE}, singular=(lambda node: node.args[:1]) if told else None)
    torch.manual_seed(0)
    model = hatify.hatify(Net(lambda net, h: raised(h), lambda x: x), 2, torch.randn(4, 6))
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0][::2] = -6.0  # exactly off
    off = model.task_state()["first"] == 0
    model(torch.randn(4, 6)).sum().backward()
    assert off.any() and bool(torch.isfinite(model.first.weight.grad).all()) == told


@pytest.mark.parametrize("traits", [{Trait.AFTER_HEADS}, set()])
def test_heads_are_found_behind_it(traits: set[Trait]) -> None:
    register(snap, traits={Trait.ELEMENTWISE, *traits})
    model = converted(lambda net, h: h, lambda y: snap(y))
    assert (model.census[4].policy == "head") == bool(traits)


@pytest.mark.parametrize("cut", [alike, None])
def test_extraction_takes_features_out_around_it(cut: Any) -> None:
    register(Snap, traits={Trait.ELEMENTWISE}, cut=cut)
    model = converted(lambda net, h: net.snap(h))
    plain = hatify.extract_task(model, 0)
    x = torch.randn(5, 6)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model.eval()(x))
    assert plain.first.out_features == int(model.masks(0)["first"].sum())
    put_back = any(node.target is torch.index_select for node in plain.graph.nodes)
    assert put_back == (cut is None)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.relu, "'relu' is registered already"),
        ("relu", "'relu' is registered already"),
        ("no_such_method", "'no_such_method' is no method of torch.Tensor"),
        (3, "3 is no function, method name or type of modules"),
        (dict, "dict is no type of modules"),
    ],
)
def test_targets_that_are_there_already_or_not_at_all_are_refused(target: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register(target)


def test_a_target_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'snap' is registered already"):
        register(snap, snap)


def test_no_function_of_torch_is_left_out_for_having_another_name() -> None:
    for function in (F.conv2d, F.linear, F.relu, torch.cat, torch.matmul):
        assert function in OPERATIONS
