"""Schedules of the mask scale: Equations 4 and 6, and the two others."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hatify import MaskScale, hatify
from hatify.schedule import SCHEDULES

S_MAX, STEPS = 400.0, 11


@pytest.fixture
def model():
    """All that a schedule needs of a model, in double precision."""
    return SimpleNamespace(s_max=S_MAX, mask_scale=None)


def scales(model, schedule, steps=STEPS, batches=STEPS):
    """The scale of each batch."""
    scale, seen = MaskScale(model, steps, schedule), []
    for _ in range(batches):
        seen.append(model.mask_scale)
        scale.step()
    return seen


@pytest.mark.parametrize("s_max", [2.0, 50.0, 400.0, 1e4])
def test_linear_is_equation_4(model, s_max):
    model.s_max = s_max
    expected = [1 / s_max + (s_max - 1 / s_max) * (b - 1) / (STEPS - 1) for b in range(1, STEPS + 1)]
    assert scales(model, "linear") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("s_max", [2.0, 50.0, 400.0, 1e4])
def test_cosine_is_equation_6_kept_positive(model, s_max):
    model.s_max = s_max
    printed = [s_max / 2 * (1 + math.cos(2 * math.pi * b / (STEPS - 1))) for b in range(STEPS)]
    assert scales(model, "cosine") == pytest.approx([max(s, 1 / s_max) for s in printed], rel=1e-12)


def test_exponential_goes_up_by_equal_factors(model):
    seen = scales(model, "exponential")
    factors = [b / a for a, b in pairwise(seen)]
    assert seen[0] == pytest.approx(1 / S_MAX) and seen[-1] == pytest.approx(S_MAX)
    assert factors == pytest.approx([S_MAX ** (2 / (STEPS - 1))] * (STEPS - 1))


def test_constant_stays_at_s_max(model):
    assert scales(model, "constant") == [S_MAX] * STEPS


def test_cosine_is_the_default(model):
    MaskScale(model, STEPS).step()
    assert model.mask_scale == SCHEDULES["cosine"](1 / (STEPS - 1), S_MAX)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_period_ends_at_s_max(model, schedule):
    assert scales(model, schedule)[-1] == pytest.approx(S_MAX)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_next_period_repeats_the_first(model, schedule):
    seen = scales(model, schedule, batches=2 * STEPS)
    assert seen[:STEPS] == seen[STEPS:]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_scale_is_positive_throughout(model, schedule):
    assert min(scales(model, schedule)) > 0


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_period_of_one_batch_is_at_s_max(model, schedule):
    assert scales(model, schedule, steps=1, batches=3) == pytest.approx([S_MAX] * 3)


def test_a_function_of_progress_and_bound_is_a_schedule(model):
    assert scales(model, lambda progress, s_max: s_max * (1 + progress), steps=3, batches=4) == pytest.approx(
        [S_MAX, 1.5 * S_MAX, 2 * S_MAX, S_MAX]
    )


@pytest.mark.parametrize("steps", [0, -1])
def test_a_period_without_batches_is_refused(model, steps):
    with pytest.raises(ValueError, match=f"steps.*{steps}"):
        MaskScale(model, steps)


def test_an_unknown_schedule_is_refused_with_the_known_ones(model):
    with pytest.raises(ValueError, match=r"'sawtooth'.*'linear'.*'cosine'"):
        MaskScale(model, STEPS, "sawtooth")


def test_a_loaded_state_goes_on_in_mid_period(model):
    scale = MaskScale(model, STEPS, "linear")
    for _ in range(4):
        scale.step()
    state, rest = scale.state_dict(), []
    for _ in range(STEPS):
        scale.step()
        rest.append(model.mask_scale)
    resumed = MaskScale(model, STEPS, "linear")
    resumed.load_state_dict(state)
    assert model.mask_scale == SCHEDULES["linear"](4 / (STEPS - 1), S_MAX)
    for expected in rest:
        resumed.step()
        assert model.mask_scale == expected


def test_a_converted_model_follows_the_schedule():
    model = hatify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1, s_max=50.0)
    model.begin_task(0)
    assert model.mask_scale == 50.0
    assert scales(model, "linear", steps=3, batches=3) == pytest.approx([1 / 50, 25.01, 50], rel=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive_and_finite_is_refused(bad):
    model = hatify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1)
    with pytest.raises(ValueError, match="positive"):
        MaskScale(model, 3, lambda progress, s_max: bad)
    assert model.mask_scale == model.s_max


def test_the_scale_softens_the_gates():
    model = hatify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 1)
    model.begin_task(0)
    model.mask_scale = 0.5
    gates = model.task_state.gates()
    torch.testing.assert_close(gates, torch.full((4,), 1 / (1 + math.exp(-0.5))))
