"""Equation 5, against the same sums written out in Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hatify import hatify
from hatify.regularization import Capacity, capacity_regularization

# One list per layer, of (gate, used by an earlier task) per feature.
feature = st.tuples(st.floats(0, 1), st.booleans())
networks = st.lists(st.lists(feature, min_size=1, max_size=6), min_size=1, max_size=5)


def share(features):
    """How much of the free capacity of some features is taken, or 0 where none is free."""
    free = sum(1 - used for _, used in features)
    return sum(a * (1 - used) for a, used in features) / free if free else 0.0


def equation_5(layers, num_tasks):
    return sum(max(share(features) - 1 / num_tasks, 0.0) for features in layers)


def regularization(layers, num_tasks=5, per_layer=True, quota=True):
    flat = [feature for features in layers for feature in features]
    gates = torch.tensor([a for a, _ in flat], dtype=torch.float64, requires_grad=True)
    used = torch.tensor([used for _, used in flat], dtype=torch.float64)
    layer = torch.tensor([i if per_layer else 0 for i, features in enumerate(layers) for _ in features])
    capacity = Capacity.beside(used, layer, len(layers) if per_layer else 1)
    return gates, capacity_regularization(gates, capacity, num_tasks, quota)


@given(networks, st.integers(1, 10))
def test_it_is_equation_5(layers, num_tasks):
    _, value = regularization(layers, num_tasks)
    assert value.item() == pytest.approx(equation_5(layers, num_tasks), abs=1e-12)


@given(networks, st.integers(1, 10))
def test_without_quota_it_is_the_sum_of_the_shares(layers, num_tasks):
    _, value = regularization(layers, num_tasks, quota=False)
    assert value.item() == pytest.approx(sum(map(share, layers)), abs=1e-12)


@given(networks)
def test_network_wide_and_without_quota_it_is_the_original_form(layers):
    # Serrà et al. 2018, Equation 6: one quotient of sums over all layers.
    _, value = regularization(layers, per_layer=False, quota=False)
    assert value.item() == pytest.approx(share([f for features in layers for f in features]), abs=1e-12)


@given(networks, st.integers(1, 10))
def test_network_wide_with_quota_it_counts_the_network_as_one_layer(layers, num_tasks):
    _, value = regularization(layers, num_tasks, per_layer=False)
    one = [[f for features in layers for f in features]]
    assert value.item() == pytest.approx(equation_5(one, num_tasks), abs=1e-12)


@given(networks, st.integers(1, 10))
def test_its_gradient_reaches_free_features_of_layers_over_their_share_only(layers, num_tasks):
    gates, value = regularization(layers, num_tasks)
    value.backward()
    expected = []
    for features in layers:
        free = sum(1 - used for _, used in features)
        over = share(features) > 1 / num_tasks
        expected += [(1 - used) / free if over else 0.0 for _, used in features]
    if all(abs(share(features) - 1 / num_tasks) > 1e-9 for features in layers):
        torch.testing.assert_close(gates.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("per_layer", [True, False])
def test_without_capacity_left_it_is_zero_and_so_is_its_gradient(per_layer):
    gates, value = regularization([[(1.0, True)] * 3, [(0.5, True)] * 2], per_layer=per_layer)
    value.backward()
    assert value.item() == 0
    assert gates.grad.tolist() == [0.0] * 5


def test_one_full_layer_leaves_the_others_their_part():
    full, open_ = [(1.0, True)] * 3, [(1.0, False)] * 4
    _, value = regularization([full, open_], num_tasks=2)
    assert value.item() == 0.5


def test_a_task_within_its_quota_pays_nothing():
    _, value = regularization([[(0.2, False)] * 5, [(0.1, False)] * 3], num_tasks=5)
    assert value.item() == 0


# The model's own ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    """Layers of 6 and 4 features; task 0 is finished with 4 and 1 of them, task 1 is open."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    model = hatify(net, 3)
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.tensor([1, 1, -1, 1, 1, -1, -1, 1, -1, -1.0]))
    model.end_task()
    model.begin_task(1)
    with torch.no_grad():
        model.task_state.embeddings[1].normal_()
    model.mask_scale = 1.5
    return model


def layers_of(model, task, used_by):
    """(gate, used) of each feature of each layer, from the embeddings and the masks of other tasks."""
    gates = torch.sigmoid(model.mask_scale * model.task_state.embeddings[task]).tolist()
    used = {name: sum(model.masks(t)[name] for t in used_by).bool().tolist() for name in ("0", "2")}
    return [list(zip(gates[:6], used["0"], strict=True)), list(zip(gates[6:], used["2"], strict=True))]


def test_the_model_counts_what_finished_tasks_use(model):
    layers = layers_of(model, 1, used_by=[0])
    flat = [[f for features in layers for f in features]]
    assert model.regularization().item() == pytest.approx(equation_5(layers, 3), rel=1e-6)
    assert model.regularization(quota=False).item() == pytest.approx(sum(map(share, layers)), rel=1e-6)
    assert model.regularization(per_layer=False, quota=False).item() == pytest.approx(share(flat[0]), rel=1e-6)


def test_the_model_trains_the_open_task_towards_fewer_features(model):
    model.regularization().backward()
    grad = model.task_state.embeddings[1].grad
    used = torch.cat([model.masks(0)["0"], model.masks(0)["2"]])
    assert (grad[used] == 0).all() and (grad[~used] > 0).any() and (grad >= 0).all()
    assert model.task_state.embeddings[0].grad is None


def test_a_reopened_task_does_not_count_against_itself(model):
    model.end_task()
    model.begin_task(0)
    model.mask_scale = 1.5
    layers = layers_of(model, 0, used_by=[1])
    assert model.regularization().item() == pytest.approx(equation_5(layers, 3), rel=1e-6)


def test_a_network_without_masks_has_nothing_to_regularise():
    model = hatify(nn.Sequential(nn.Linear(3, 2)), 2)
    model.begin_task(0)
    assert model.regularization().item() == 0
    (model(torch.randn(4, 3)).sum() + model.regularization()).backward()
