"""Normalisation over masked features against its definition."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hatify
from hatify.nn.layer_norm import _MaskedLayerNorm, composite
from hatify.nn.norms import NORMS, is_known
from hatify.nn.per_task import PerTaskNorm

Make = Callable[[], nn.Module]
Definition = Callable[[nn.Module, Tensor, Tensor], Tensor]

C = 8

# Definitions ---------------------------------------------------------------------------------------------------------
# Each takes the normalisation, the input with its off features at zero, and a mask in [0, 1] that broadcasts
# against the input.


def moments(x: Tensor, a: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over `dims`, over the features that are on."""
    weight = a.expand(x.shape)
    total = weight.sum(dims, keepdim=True).clamp(min=1e-300)
    mean = (weight * x).sum(dims, keepdim=True) / total
    return mean, (weight * (x - mean).square()).sum(dims, keepdim=True) / total


def affine(norm: nn.Module, y: Tensor, a: Tensor, shape: tuple[int, ...]) -> Tensor:
    if norm.weight is not None:
        y = y * norm.weight.view(shape)
    if getattr(norm, "bias", None) is not None:
        y = y + norm.bias.view(shape)
    return y * a


def per_channel(norm: nn.Module, ndim: int) -> tuple[int, ...]:
    return (-1, *(1,) * (ndim - 2))


def batch_definition(norm: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    shape = per_channel(norm, x.ndim)
    if norm.training or norm.running_mean is None:
        mean, variance = moments(x, torch.ones_like(a), tuple(d for d in range(x.ndim) if d != 1))
    else:
        mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
    return affine(norm, (x - mean) / (variance + norm.eps).sqrt(), a, shape)


def instance_definition(norm: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    shape = per_channel(norm, x.ndim)
    if norm.training or norm.running_mean is None:
        mean, variance = moments(x, torch.ones_like(a), tuple(range(2, x.ndim)))
    else:
        mean, variance = norm.running_mean.view(shape), norm.running_var.view(shape)
    return affine(norm, (x - mean) / (variance + norm.eps).sqrt(), a, shape)


def layer_definition(norm: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    mean, variance = moments(x, a, tuple(range(-len(norm.normalized_shape), 0)))
    return affine(norm, (x - mean) / (variance + norm.eps).sqrt(), a, norm.normalized_shape)


def rms_definition(norm: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    dims = tuple(range(-len(norm.normalized_shape), 0))
    weight = a.expand(x.shape)
    square = (weight * x.square()).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    return affine(norm, x / (square + eps).sqrt(), a, norm.normalized_shape)


def group_definition(norm: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    grouped = x.unflatten(1, (norm.num_groups, -1))
    mask = a.expand(1, *x.shape[1:]).unflatten(1, (norm.num_groups, -1))
    mean, variance = moments(grouped, mask, tuple(range(2, grouped.ndim)))
    normal = ((grouped - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
    return affine(norm, normal, a, per_channel(norm, x.ndim))


# Cases: how to make the norm, its definition, the input's shape, the dimension of the features ------------------------

CASES: dict[str, tuple[Make, Definition, tuple[int, ...], int]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(C), batch_definition, (5, C), 1),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(C, affine=False), batch_definition, (3, C, 4), 1),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(C, momentum=None), batch_definition, (3, C, 4, 5), 1),
    "BatchNorm2d untracked": (lambda: nn.BatchNorm2d(C, track_running_stats=False), batch_definition, (3, C, 4, 5), 1),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(C), batch_definition, (2, C, 2, 3, 2), 1),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(C, affine=True), instance_definition, (3, C, 6), 1),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(C), instance_definition, (3, C, 4, 3), 1),
    "InstanceNorm2d tracked": (
        lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), instance_definition, (3, C, 4, 3), 1
    ),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(C, affine=True), instance_definition, (2, C, 2, 2, 3), 1),
    "LayerNorm": (lambda: nn.LayerNorm(C), layer_definition, (3, 5, C), -1),
    "LayerNorm without bias": (lambda: nn.LayerNorm(C, bias=False), layer_definition, (3, C), -1),
    "LayerNorm without weight": (lambda: nn.LayerNorm(C, elementwise_affine=False), layer_definition, (3, C), -1),
    "LayerNorm of whole images": (lambda: nn.LayerNorm((C, 3, 2)), layer_definition, (3, C, 3, 2), 1),
    "LayerNorm of whole sequences": (lambda: nn.LayerNorm((5, C)), layer_definition, (3, 5, C), -1),
    "RMSNorm": (lambda: nn.RMSNorm(C, eps=1e-6), rms_definition, (3, 5, C), -1),
    "RMSNorm without eps": (lambda: nn.RMSNorm(C), rms_definition, (3, C), -1),
    "RMSNorm without weight": (lambda: nn.RMSNorm(C, elementwise_affine=False), rms_definition, (3, C), -1),
    "RMSNorm of whole images": (lambda: nn.RMSNorm((C, 3, 2)), rms_definition, (3, C, 3, 2), 1),
    "GroupNorm": (lambda: nn.GroupNorm(2, C), group_definition, (3, C, 4, 3), 1),
    "GroupNorm of one group": (lambda: nn.GroupNorm(1, C), group_definition, (3, C, 4), 1),
    "GroupNorm of vectors": (lambda: nn.GroupNorm(2, C), group_definition, (3, C), 1),
    "GroupNorm of pairs, without affine": (
        lambda: nn.GroupNorm(4, C, affine=False), group_definition, (2, C, 2, 2, 2), 1
    ),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)
binary = st.lists(st.booleans(), min_size=C, max_size=C).filter(any).map(lambda on: torch.tensor(on).double())


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Definition, Tensor, int]:
    """A normalisation in evaluation mode with random parameters and statistics, and a random input."""
    make, definition, shape, dim = CASES[name]
    norm = make().to(dtype)
    for key, value in (*norm.named_parameters(), *norm.named_buffers()):
        if value.is_floating_point():
            value.data.copy_(
                torch.rand_like(value) + 0.5 if key.endswith(("weight", "var")) else torch.randn_like(value)
            )
    return norm.eval(), definition, torch.randn(shape, dtype=dtype) + 0.5, dim


def along(mask: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    return mask.view(shape)


def apply(norm: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return NORMS[type(norm)](norm, x, mask)


def test_every_normalisation_of_torch_is_tested() -> None:
    tested = {type(make()) for make, *_ in CASES.values()}
    of_torch = {kind for kind in NORMS if kind.__module__.startswith("torch.nn")}
    assert tested == of_torch


# Values --------------------------------------------------------------------------------------------------------------


@every
@settings(max_examples=20)
@given(mask=binary, training=st.booleans(), seed=st.integers(0, 1000))
def test_the_active_features_are_normalised_among_themselves(
    name: str, mask: Tensor, training: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    norm, definition, x, dim = build(name)
    norm.train(training)
    a = along(mask, x, dim)
    expected = definition(copy.deepcopy(norm), x * a, a)
    torch.testing.assert_close(apply(norm, x * a, mask), expected, rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("training", [False, True])
def test_with_every_feature_on_it_is_the_ordinary_normalisation(name: str, training: bool) -> None:
    norm, _, x, _ = build(name)
    norm.train(training)
    ordinary = copy.deepcopy(norm)
    expected = ordinary(x)
    torch.testing.assert_close(apply(norm, x, torch.ones(C).double()), expected, rtol=1e-12, atol=1e-12)
    for (key, found), (_, wanted) in zip(norm.named_buffers(), ordinary.named_buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0, msg=key)


@every
def test_features_that_are_off_come_out_as_zero(name: str) -> None:
    norm, _, x, dim = build(name)
    mask = torch.tensor([0.0, 1, 1, 0, 1, 1, 0, 1]).double()
    a = along(mask, x, dim)
    y = apply(norm, x * a, mask)
    assert y[(a == 0).expand_as(y)].eq(0).all()
    assert y[(a == 1).expand_as(y)].ne(0).all()


@every
def test_a_wider_normalisation_with_features_off_is_the_narrow_one(name: str) -> None:
    """Cutting the features that are off out of the network changes nothing."""
    norm, definition, x, dim = build(name)
    mask = torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 0] if "pairs" not in name else [1.0, 1, 0, 0, 1, 1, 0, 0]).double()
    a = along(mask, x, dim)
    y = apply(norm, x * a, mask)
    kept = mask.nonzero().flatten()
    narrow = copy.deepcopy(norm)
    for key, value in (*norm.named_parameters(), *norm.named_buffers()):
        if value.is_floating_point():
            at = dim if value.ndim == x.ndim - 1 and dim < 0 else 0
            setattr(narrow, key, type(value)(value.data.index_select(at, kept)) if isinstance(value, nn.Parameter)
                    else value.index_select(at, kept))  # fmt: skip
    if hasattr(norm, "normalized_shape"):
        narrow.normalized_shape = tuple(4 if n == C else n for n in norm.normalized_shape)
    elif hasattr(norm, "num_channels"):
        narrow.num_channels = 4
        narrow.num_groups = {1: 1, 2: 2, 4: 2}[norm.num_groups]
    else:
        narrow.num_features = 4
    expected = narrow(x.index_select(dim, kept))
    torch.testing.assert_close(y.index_select(dim, kept), expected, rtol=1e-12, atol=1e-12)


@every
def test_no_feature_on_gives_finite_zeros(name: str) -> None:
    norm, _, x, _ = build(name)
    y = apply(norm, torch.zeros_like(x), torch.zeros(C).double())
    assert y.eq(0).all()


def test_a_group_without_active_features_leaves_the_others_alone() -> None:
    norm, definition, x, dim = build("GroupNorm")
    mask = torch.tensor([0.0, 0, 0, 0, 1, 0, 1, 1]).double()
    a = along(mask, x, dim)
    y = apply(norm, x * a, mask)
    assert y[:, :4].eq(0).all()
    torch.testing.assert_close(y, definition(norm, x * a, a), rtol=1e-12, atol=1e-12)


# Precision -----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(name: str, dtype: torch.dtype) -> None:
    norm, definition, x, dim = build(name, dtype)
    mask = torch.tensor([0.0, 1, 0, 1, 0, 0, 1, 1]).to(dtype)
    a = along(mask, x, dim)
    x = 100 * x * a
    y = apply(norm, x, mask)
    assert y.dtype == dtype
    assert torch.isfinite(y).all()
    if hasattr(norm, "eps") and norm.eps is None:
        norm.eps = torch.finfo(torch.float32).eps  # statistics are taken in single precision
    expected = definition(copy.deepcopy(norm).double(), x.double(), a.double())
    torch.testing.assert_close(
        y.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item()
    )


@every
@pytest.mark.parametrize("mask", [torch.full((C,), 1e-6), torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), torch.zeros(C)])
def test_gradients_are_finite_for_any_mask(name: str, mask: Tensor) -> None:
    norm, _, x, dim = build(name, torch.float32)
    norm.train()
    mask = mask.clone().requires_grad_()
    x = x.requires_grad_()
    y = apply(norm, x * along(mask, x, dim), mask)
    (torch.randn_like(y) * y).sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(mask.grad).all()


@every
def test_a_soft_mask_tends_to_the_hard_one(name: str) -> None:
    norm, _, x, dim = build(name)
    hard = torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 1]).double()
    a = along(hard, x, dim)
    expected = apply(norm, x * a, hard)
    distances = []
    for softness in (1e-3, 1e-6, 1e-9):
        soft = hard * (1 - softness) + (1 - hard) * softness
        y = apply(norm, x * along(soft, x, dim), soft)
        distances.append((y - expected).abs().max().item())
    assert distances[0] < 0.5
    assert distances[2] < 1e-6
    assert distances[0] > distances[1] > distances[2]


# In a network --------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Make] = {
    "batch": lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Flatten(), nn.Linear(4 * C, 2)),
    "batch of the batch": lambda: nn.Sequential(
        nn.Conv2d(3, C, 1), nn.BatchNorm2d(C, track_running_stats=False), nn.Flatten(), nn.Linear(4 * C, 2)
    ),
    "instance": lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.InstanceNorm2d(C), nn.Flatten(), nn.Linear(4 * C, 2)),
    "group": lambda: nn.Sequential(
        nn.Conv2d(3, C, 1), nn.GroupNorm(2, C), nn.ReLU(), nn.Flatten(), nn.Linear(4 * C, 2)
    ),
    "layer": lambda: nn.Sequential(nn.Linear(2, C), nn.LayerNorm(C), nn.GELU(), nn.Flatten(), nn.Linear(6 * C, 2)),
    "rms": lambda: nn.Sequential(nn.Linear(2, C), nn.RMSNorm(C), nn.GELU(), nn.Flatten(), nn.Linear(6 * C, 2)),
    "whole": lambda: nn.Sequential(nn.Conv2d(3, C, 1), nn.LayerNorm((C, 2, 2)), nn.Flatten(), nn.Linear(4 * C, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_statistics_do_not_depend_on_features_that_are_off(name: str) -> None:
    model = hatify.hatify(NETWORKS[name](), 2, torch.randn(2, 3, 2, 2))
    on = torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 1]) > 0
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.where(on, 2.0, -2.0))
    model.eval()
    x = torch.randn(3, 3, 2, 2)
    first = model.get_submodule("0")
    before = model(x)
    with torch.no_grad():
        first.weight[~on] = 100 * torch.randn_like(first.weight[~on])
        first.bias[~on] = 100.0
    assert torch.equal(model(x), before)
    with torch.no_grad():
        first.weight[on] += 0.5 * torch.randn_like(first.weight[on])
    assert not torch.equal(model(x), before)


def test_each_task_has_statistics_of_its_own() -> None:
    norms = PerTaskNorm(nn.BatchNorm1d(C), [{}, {}])
    norms.choice.set(1)
    norms.train()
    norms(torch.randn(6, C) + 3, torch.ones(C))
    assert [norm.num_batches_tracked.item() for norm in norms] == [0, 1, 0]
    assert norms[1].running_mean.ne(0).all()
    assert norms[0].running_mean.eq(0).all()


def test_a_subclass_is_known_only_if_it_computes_what_its_base_does() -> None:
    class Renamed(nn.LayerNorm):
        pass

    class Different(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(-1)

    assert is_known(Renamed(C))
    assert not is_known(Different(C))
    assert not is_known(nn.Linear(C, C))


@given(mask=st.lists(st.floats(0.05, 1), min_size=C, max_size=C), weighted=st.booleans(), biased=st.booleans())
def test_the_gradients_of_a_masked_layer_norm_are_those_of_its_definition(
    mask: list[float], weighted: bool, biased: bool
) -> None:
    a = torch.tensor(mask, dtype=torch.float64, requires_grad=True)
    x = (torch.randn(2, 3, C, dtype=torch.float64) * a.detach()).requires_grad_()
    weight = torch.randn(C, dtype=torch.float64, requires_grad=True) if weighted else None
    bias = torch.randn(C, dtype=torch.float64, requires_grad=True) if biased else None

    def fused(*inputs: Tensor) -> Tensor:
        return _MaskedLayerNorm.apply(*inputs, weight, bias, 0.1)[0]

    inputs = [t for t in (x, a, weight, bias) if t is not None]
    grad = torch.randn(2, 3, C, dtype=torch.float64)
    found = torch.autograd.grad(fused(x, a), inputs, grad)
    expected = torch.autograd.grad(composite(x, a, weight, bias, 0.1), inputs, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_masked_layer_norm_can_be_differentiated_twice() -> None:
    a = torch.rand(C, dtype=torch.float64, requires_grad=True)
    x, weight, bias = (torch.randn(*shape, C, dtype=torch.float64, requires_grad=True) for shape in ((3,), (), ()))
    torch.autograd.gradgradcheck(lambda *inputs: _MaskedLayerNorm.apply(*inputs, 1e-3)[0], (x, a, weight, bias))
