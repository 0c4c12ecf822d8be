"""Equations 1 and 3, against the printed formulas evaluated in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hatify.gate import EMBEDDING_LIMIT, FLOOR, clamp_factor, gate

# In float64 the printed formula can be evaluated as it stands while |s·e| is below this: cosh(s·e) is finite, and
# σ'(s·e) times any gradient below is a normal number.
LARGEST = 600.0

embeddings = st.floats(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
scales = st.floats(1e-3, 1e4)
gradients = st.floats(1e-6, 1e3) | st.floats(-1e3, -1e-6) | st.just(0.0)


def differentiate(embedding, scale, grad=1.0, s_max=400.0, clamp=None, dtype=torch.float64):
    """The gate and the gradient that reaches the embedding, for a gradient `grad` with respect to the gate."""
    e = torch.as_tensor(embedding, dtype=dtype).clone().requires_grad_()
    a = gate(e, torch.tensor(scale, dtype=dtype), s_max, clamp)
    a.backward(torch.full_like(a, grad))
    return a.detach(), e.grad


def sigmoid_slope(x):
    """σ'(x), without cancellation."""
    return math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2


def equation_3(e, s, grad, s_max, clamp=LARGEST):
    """q' as printed, from q = grad · s · σ'(s·e), with |s·e| clamped as in the published implementation."""
    q = grad * s * sigmoid_slope(s * e)
    return s_max * (math.cosh(min(abs(s * e), clamp)) + 1) / (s * (math.cosh(e) + 1)) * q


@given(embeddings, scales)
def test_the_gate_is_the_sigmoid_of_equation_1(e, s):
    x = s * e
    expected = 1 / (1 + math.exp(-x)) if x > -LARGEST else 0.0
    a, _ = differentiate(e, s)
    assert a.item() == pytest.approx(0.0 if expected < FLOOR else expected, rel=1e-13)


@given(embeddings, scales, gradients, st.floats(2, 1e4))
def test_the_gradient_is_that_of_equation_3(e, s, grad, s_max):
    s = min(s, LARGEST / abs(e)) if e else s
    _, q = differentiate(e, s, grad, s_max)
    assert q.item() == pytest.approx(equation_3(e, s, grad, s_max), rel=1e-11, abs=1e-200)


@given(embeddings, scales, gradients, st.floats(2, 1e4), st.floats(1, 100))
def test_the_clamp_is_the_published_one(e, s, grad, s_max, clamp):
    s = min(s, LARGEST / abs(e)) if e else s
    _, q = differentiate(e, s, grad, s_max, clamp)
    assert q.item() == pytest.approx(equation_3(e, s, grad, s_max, clamp), rel=1e-9, abs=1e-200)


def test_the_clamp_acts_beyond_its_bound_only():
    x = torch.tensor([-60.0, -50.0, -10.0, 0.0, 10.0, 50.0, 60.0], dtype=torch.float64)
    factor = clamp_factor(x, 50.0)
    torch.testing.assert_close(factor[1:-1], torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(factor[[0, -1]], torch.full((2,), math.exp(-10.0), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp", [None, 50.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0, 400.0, 1e4])
def test_gate_and_gradient_are_finite_up_to_scale_10000(dtype, clamp, scale):
    e = torch.linspace(-EMBEDDING_LIMIT, EMBEDDING_LIMIT, 1001)
    a, q = differentiate(e, scale, s_max=1e4, clamp=clamp, dtype=dtype)
    assert a.dtype == q.dtype == dtype
    assert a.isfinite().all() and q.isfinite().all()
    assert (a >= 0).all() and (a <= 1).all()
    if clamp is None:
        assert (q > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_accurate_in_low_precision(dtype):
    e = torch.linspace(-EMBEDDING_LIMIT, EMBEDDING_LIMIT, 97).to(dtype)
    _, q = differentiate(e, 400.0, dtype=dtype)
    expected = torch.tensor([400.0 * sigmoid_slope(x) for x in e.tolist()])
    torch.testing.assert_close(q.float(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@given(st.floats(-EMBEDDING_LIMIT, 0), scales)
def test_gate_values_below_the_floor_are_exactly_zero(e, s):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, _ = differentiate(e, s, dtype=dtype)
        assert a.item() == 0 or a.item() >= 2.0**-24


def test_no_gate_is_subnormal():
    e = torch.linspace(-EMBEDDING_LIMIT, EMBEDDING_LIMIT, 1001)
    a, _ = differentiate(e, 50.0, dtype=torch.float32)
    subnormal = torch.sigmoid(50.0 * e) < torch.finfo(torch.float32).tiny
    assert (subnormal & (torch.sigmoid(50.0 * e) > 0)).any()
    assert (a[subnormal] == 0).all()


def test_a_feature_under_the_floor_can_come_back():
    a, q = differentiate(-EMBEDDING_LIMIT, 400.0, dtype=torch.float32)
    assert a == 0 and q > 0


def test_at_scale_one_the_gradient_is_the_ordinary_one_times_s_max():
    e = torch.linspace(-4, 4, 41, dtype=torch.float64)
    _, q = differentiate(e, 1.0, s_max=100.0)
    ordinary = e.clone().requires_grad_()
    torch.sigmoid(ordinary).sum().backward()
    torch.testing.assert_close(q, 100 * ordinary.grad)


def test_the_scale_gets_no_gradient():
    scale = torch.tensor(3.0, requires_grad=True)
    gate(torch.ones(2, requires_grad=True), scale, 400.0).sum().backward()
    assert scale.grad is None
