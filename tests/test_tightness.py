"""What a finished task locks is exactly what its outputs depend on: no entry less, and no entry more.

Activations are smooth and numbers are double, so a weight that matters has a derivative that is not zero.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from oracles import dependencies, influences, leaks, locks, no_repairs, same_bits

Inputs = tuple[Tensor, ...]

# Masks ---------------------------------------------------------------------------------------------------------------


def finish(model: hatify.HatModel, task: int, source: random.Random, groups: int = 1, least: int = 2) -> None:
    """End `task` with random masks that leave at least `least` features on in each of `groups` parts of a layer.

    A norm over one feature would make it a constant, on which nothing before it has any influence.
    """
    model.begin_task(task)
    embedding = model.task_state.embeddings[task]
    for start, stop in model.task_state.groups.values():
        on = torch.tensor([source.choice((True, False)) for _ in range(start, stop)])
        for part in on.chunk(groups):
            part[source.sample(range(len(part)), min(least, len(part)))] = True
        embedding.data[start:stop] = torch.where(on, 2.0, -2.0).to(embedding.dtype)
    with no_repairs():
        model.end_task()


def convert(net: nn.Module, *shape: int, num_tasks: int = 2, **options: Any) -> hatify.HatModel:
    """`net` in double precision, with parameters and statistics as after some training."""
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if value.is_floating_point():
            value.data.copy_(
                0.5 * torch.randn_like(value) if not name.endswith("var") else torch.rand_like(value) + 0.5
            )
    return hatify.hatify(net.double(), num_tasks, torch.randn(2, *shape).double(), **options)


def batches(*shape: int, count: int = 3) -> list[Inputs]:
    return [(torch.randn(4, *shape).double(),) for _ in range(count)]


def assert_tight(model: hatify.HatModel, task: int, found: dict[str, Tensor]) -> None:
    """The locks of `task` are the entries in `found`."""
    locked = locks(model, task)
    assert set(found) == set(model.uses)
    for name, depended in found.items():
        assert torch.equal(locked[name], depended), (
            f"{name}: {int((locked[name] & ~depended).sum())} entries locked in vain, "
            f"{int((depended & ~locked[name]).sum())} not locked"
        )


# Chains --------------------------------------------------------------------------------------------------------------

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Mish)


def chain(source: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolution, norm, activation, pooling, flatten, linear; and the shape of an input."""
    spatial = source.choice((1, 2, 2, 3))
    channels = [
        source.choice((1, 3)),
        *(source.choice((4, 6, 8)) for _ in range(source.choice((1, 2) if spatial < 3 else (1,)))),
    ]
    edge = {1: 12, 2: 9, 3: 6}[spatial]
    edges = tuple(edge + source.choice((0, 1)) for _ in range(spatial))
    parts: list[nn.Module] = []
    for width, wide in zip(channels, channels[1:], strict=False):
        parts.append(CONV[spatial](width, wide, source.choice((1, 2, 3)), bias=source.choice((True, False))))
        norm = source.choice(("none", "batch", "group", "groups"))
        if norm == "batch":
            parts.append(BATCH_NORM[spatial](wide))
        elif norm != "none":
            parts.append(nn.GroupNorm(1 if norm == "group" else 2, wide))
        parts.append(source.choice(ACTIVATIONS)())
        pool = source.choice((None, MAX_POOL, AVG_POOL))
        if pool is not None:
            parts.append(pool[spatial](2))
    if source.choice((True, False)):
        parts.append(ADAPTIVE[spatial](source.choice((1, 2))))
    parts.append(nn.Flatten())
    with torch.no_grad():
        features = nn.Sequential(*parts).eval()(torch.zeros(2, channels[0], *edges)).shape[1]
    parts.append(nn.Linear(features, 5))
    for norm in source.choice(((), (nn.BatchNorm1d(5),), (nn.LayerNorm(5),), (nn.RMSNorm(5),))):
        parts.append(norm)
    parts += [source.choice(ACTIVATIONS)(), nn.Linear(5, 2)]
    return nn.Sequential(*parts), (channels[0], *edges)


@settings(max_examples=60)
@given(source=st.randoms(use_true_random=False), seed=st.integers(0, 1000), couple=st.booleans())
def test_chains_lock_exactly_what_they_depend_on(source: random.Random, seed: int, couple: bool) -> None:
    torch.manual_seed(seed)
    net, shape = chain(source)
    model = convert(net, *shape, couple=couple)
    for task in range(2):
        finish(model, task, source, groups=2)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(*shape)))


# Residual networks ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A basic or a bottleneck block, with an identity, projected or zero-padded shortcut and a scale per channel."""

    def __init__(self, width: int, wide: int, norm: Callable[[int], nn.Module], kind: str, scaled: bool) -> None:
        super().__init__()
        inner = 5
        self.padding = wide - width if kind == "padded" else 0
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if kind == "depthwise" else None
        self.conv1, self.norm1 = nn.Conv2d(width, inner, 3, padding=1), norm(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, wide, 3, padding=1, bias=False), norm(wide)
        self.shortcut = None if self.padding or width == wide else nn.Conv2d(width, wide, 1)
        self.scale = nn.Parameter(torch.randn(wide, 1, 1)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(x)))
        if self.depthwise is not None:
            y = torch.tanh(self.depthwise(y))
        y = self.norm2(self.conv2(y))
        if self.scale is not None:
            y = y * self.scale
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, 0, self.padding))
        return torch.tanh(y + (x if self.shortcut is None else self.shortcut(x)))


def residual_network(source: random.Random) -> nn.Module:
    norm: Callable[[int], nn.Module] = source.choice(
        (nn.BatchNorm2d, lambda channels: nn.GroupNorm(1, channels), lambda channels: nn.Identity())
    )
    widths = [4]
    parts: list[nn.Module] = [nn.Conv2d(3, 4, 2), norm(4), nn.Tanh()]
    for _ in range(source.choice((1, 2))):
        kind = source.choice(("plain", "depthwise", "padded"))
        width, wide = widths[-1], source.choice((widths[-1], widths[-1] + 3))
        parts.append(Block(width, wide, norm, kind, source.choice((True, False))))
        widths.append(wide)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(source.choice((1, 2))), nn.Flatten(), nn.LazyLinear(2))


@settings(max_examples=40)
@given(source=st.randoms(use_true_random=False), seed=st.integers(0, 1000))
def test_residual_networks_lock_exactly_what_they_depend_on(source: random.Random, seed: int) -> None:
    torch.manual_seed(seed)
    net = residual_network(source)
    net.eval()(torch.randn(2, 3, 6, 6))
    model = convert(net, 3, 6, 6)
    for task in range(2):
        finish(model, task, source)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(3, 6, 6)))


@settings(max_examples=10)
@given(source=st.randoms(use_true_random=False), seed=st.integers(0, 1000))
def test_without_coupling_residual_networks_lock_all_they_depend_on(source: random.Random, seed: int) -> None:
    torch.manual_seed(seed)
    net = residual_network(source)
    net.eval()(torch.randn(2, 3, 6, 6))
    model = convert(net, 3, 6, 6, couple=False)
    finish(model, 0, source)
    locked = locks(model, 0)
    for name, depended in dependencies(model, 0, batches(3, 6, 6)).items():
        assert (locked[name] >= depended).all(), name


# Other constructions -------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.value(x) * torch.sigmoid(self.gate(x)))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.c(torch.cat((self.b(x).sin(), self.a(x)), -1))))


class Tied(nn.Module):
    """Calls a layer on features of its own and of another layer; another parameter is used in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.tanh(self.again(torch.tanh(self.first(x))))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1, 6))
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.weight, self.bias)) * self.scale + self.shift
        return self.head(torch.tanh(self.layer(x)))


class Transformer(nn.Module):
    """Class token, position embeddings, one block. The key has no bias: softmax would cancel it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3, 6)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.proj, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.patches(x)), 1) + self.position
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (2, 3)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = x + self.scale * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x[:, 0])


class ZeroChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.layer, self.head = (
            nn.Linear(3, 4),
            nn.Linear(4, 7),
            nn.Linear(7, 5),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        return self.head(torch.tanh(self.layer(F.pad(x, (1, 2)) + self.wide(torch.tanh(x)))))


class BorderOfInfinity(nn.Module):
    """Max pooling with the padding of TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(self.first(x), (0, 1, 0, 1), value=-math.inf), 2, 1)
        return self.head(torch.tanh(self.second(x)).mean((2, 3)))


class LinearAttention(nn.Module):
    """q (softmax(k)ᵀ v), with heads, the softmax over tokens, and q normalised in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 8), nn.Linear(3, 8, bias=False), nn.Linear(3, 6)
        self.proj, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (2, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        y = F.rms_norm(q, (4,)) @ (k.softmax(-2).transpose(-1, -2) @ v)
        return self.head(torch.tanh(self.proj(y.transpose(1, 2).flatten(2))).mean(1))


class AsksForDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x.to(self.layer.weight.dtype).to(self.layer.weight.device))))


#: Network, shape of an input, number of parts in which features must be on.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "gate": (Gated, (3,), 1),
    "concatenation": (Concatenated, (3,), 1),
    "layer called twice": (Tied, (3,), 1),
    "functional layer": (Functional, (3,), 1),
    "zero channels": (ZeroChannels, (3,), 1),
    "transformer": (Transformer, (4, 3), 1),
    "border of infinity": (BorderOfInfinity, (2, 4, 4), 1),
    "linear attention": (LinearAttention, (4, 3), 2),
    "weight asked for its dtype": (AsksForDtype, (3,), 1),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)), (2, 2, 2), 1
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.Tanh(), nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(64, 2)
        ), (2, 2, 2), 1
    ),
    "zero borders": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ZeroPad2d(1), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(36, 2)),
        (2, 2, 2), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_this_construction_locks_exactly_what_it_depends_on(name: str, seed: int) -> None:
    make, shape, groups = NETWORKS[name]
    torch.manual_seed(seed)
    model = convert(make(), *shape)
    source = random.Random(seed)
    for task in range(2):
        finish(model, task, source, groups)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(*shape)))


def test_an_embedding_table_is_locked_in_the_columns_that_are_on() -> None:
    net = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(18, 2))
    model = hatify.hatify(net.double(), 1, torch.zeros(2, 3, dtype=torch.int64))
    finish(model, 0, random.Random(0))
    ids = [(torch.randint(5, (4, 3)),) for _ in range(8)]
    assert_tight(model, 0, dependencies(model, 0, ids))


# One entry at a time -------------------------------------------------------------------------------------------------

TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), (2,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)), (2,)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 2)),
        (1, 3, 3),
    ),
    "depthwise convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 2, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)),
        (2, 3),
    ),
    "gate": (Gated, (3,)),
    "concatenation": (Concatenated, (3,)),
    "layer called twice": (Tied, (3,)),
    "functional layer": (Functional, (3,)),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_changing_one_entry_changes_the_outputs_exactly_if_it_is_locked(name: str) -> None:
    make, shape = TINY[name]
    torch.manual_seed(0)
    model = convert(make(), *shape)
    source = random.Random(1)
    for task in range(2):
        finish(model, task, source)
    for task in range(2):
        assert_tight(model, task, influences(model, task, batches(*shape, count=2)))


# Two tasks -----------------------------------------------------------------------------------------------------------


def test_entries_between_features_of_different_tasks_stay_free() -> None:
    """Equation 2 as printed would lock them."""
    model = convert(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), 2)
    first, second = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    for task, on in enumerate((first, second)):
        model.begin_task(task)
        model.task_state.embeddings[task].data.copy_(torch.cat((on, on)).double() * 4 - 2)
        model.end_task()
    locked = locks(model, 0)["2.weight"] | locks(model, 1)["2.weight"]
    expected = torch.outer(first, first).bool() | torch.outer(second, second).bool()
    assert torch.equal(locked, expected)
    assert not locked[:2, 2:].any()


def test_training_changes_every_free_entry_and_no_locked_one() -> None:
    """What the locks say is what an optimizer meets: what is free can be learned."""
    torch.manual_seed(0)
    model = convert(Concatenated(), 3)
    finish(model, 0, random.Random(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.begin_task(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for (x,) in batches(3, count=4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    locked = locks(model, 0)
    for name, parameter in model.named_parameters():
        if name in model.uses:
            assert torch.equal(parameter != before[name], ~locked[name]), name
    model.abort_task()


# The oracles themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", ["0.weight", "0.bias", "3.weight"])
def test_the_oracle_for_leaks_sees_a_lock_that_is_missing(removed: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(16, 2)
    )
    model = convert(net, 2, 4, 4)
    finish(model, 0, random.Random(0))
    probes = batches(2, 4, 4)
    assert leaks(model, 0, probes) == []
    hatify.verify_isolation(model, probes[0])
    del model.uses[removed]
    assert leaks(model, 0, probes) == [removed]


def test_the_oracle_for_leaks_sees_one_entry_that_is_not_locked() -> None:
    model = convert(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), 2)
    finish(model, 0, random.Random(0))
    probes = batches(2)
    (use,) = model.uses["2.weight"]
    on = model.masks(0)["0"].nonzero().flatten()
    off = (~model.masks(0)["0"]).nonzero().flatten()
    assert len(on) and len(off)
    read = use.read.clone()
    read[:, on[0]] = read[:, off[0]]
    model.uses["2.weight"] = [type(use)(use.written, read)]
    assert leaks(model, 0, probes) == ["2.weight"]
    with pytest.raises(hatify.IsolationError, match=r"2\.weight"):
        hatify.verify_isolation(model, probes[0])


def test_the_oracle_compares_bits() -> None:
    x = torch.tensor([1.0])
    assert same_bits([x], [x.clone()])
    assert not same_bits([x], [torch.nextafter(x, torch.tensor(2.0))])
    assert not same_bits([x], [])
    assert not same_bits([torch.tensor([torch.nan])], [torch.tensor([torch.nan])])
