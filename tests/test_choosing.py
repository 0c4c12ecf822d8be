"""Tasks choose their features: which, how many, when, and what is said if something is amiss."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

import hatify
from hatify import CapacityWarning, HatModel, HatWarning, TaskError
from hatify.choosing import TRIAL
from hatify.nn.per_task import PerTaskNorm
from tests.small import SmallNet, images

WIDTH, CLASSES = 30, 3


class Net(nn.Module):
    """Images (N, 3, 6, 6) → logits (N, CLASSES), by a convolution, a batch norm and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))))


@pytest.fixture
def model() -> HatModel:
    torch.manual_seed(0)
    return hatify.hatify(Net(), 3, (images(2),))


def batches(steps: int, task: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(task)
    return [
        (torch.randn(6, 3, 6, 6, generator=generator), torch.randint(CLASSES, (6,), generator=generator))
        for _ in range(steps)
    ]


def train(model: HatModel, optimizer: optim.Optimizer, steps: int, task: int = 0) -> None:
    for x, y in batches(steps, task):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def adamw(model: HatModel) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), lr=1e-3)


def on(model: HatModel) -> dict[str, int]:
    """How many features of each layer the open task has on."""
    return {name: int((mask > 0).sum()) for name, mask in model.task_state().items()}


# How many -------------------------------------------------------------------------------------------------------------


class MuonAndAdamW(optim.Optimizer):
    """Muon for matrices, AdamW for the rest: one optimizer to its user, which steps two."""

    def __init__(self, model: HatModel) -> None:
        matrices = [p for p in model.parameters() if p.ndim == 2 and p.requires_grad]
        rest = [p for p in model.parameters() if p.ndim != 2 or not p.requires_grad]
        self.both = optim.Muon(matrices, lr=1e-2), optim.AdamW(rest, lr=1e-3)
        super().__init__([*matrices, *rest], {})

    def step(self) -> None:
        for optimizer in self.both:
            optimizer.step()


OPTIMIZERS = {
    "SGD": lambda model: optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda model: optim.AdamW(model.parameters(), lr=1e-3),
    "AdamW, slow": lambda model: optim.AdamW(model.parameters(), lr=1e-4),
    "Adafactor": lambda model: optim.Adafactor(model.parameters(), lr=1e-2),
    "Muon": MuonAndAdamW,
    "Lion": lambda model: __import__("timm.optim", fromlist=["Lion"]).Lion(model.parameters(), lr=1e-4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_task_takes_its_share_under_any_optimizer(model: HatModel, name: str) -> None:
    if name == "Muon" and not hasattr(optim, "Muon"):
        pytest.skip("this version of torch has no Muon")
    free = dict.fromkeys(model.masks(0), WIDTH)
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", HatWarning)
        warnings.simplefilter("error", CapacityWarning)
        for task in range(3):
            taken = model.task_state.used()
            model.begin_task(task)
            train(model, OPTIMIZERS[name](model), TRIAL + 3, task)
            model.end_task()
            new = model.task_state.finished_masks[task] & ~taken
            for layer, (start, stop) in model.task_state.groups.items():
                assert int(new[start:stop].sum()) == free[layer] // (3 - task)
                free[layer] -= free[layer] // (3 - task)
            # What others own is there to be read.
            assert model.task_state.finished_masks[task][taken].all()
            answers.append(model(images()))
            for earlier, answer in enumerate(answers):
                with model.task(earlier):
                    assert torch.equal(model(images()), answer)
    assert not any(free.values())
    hatify.verify_isolation(model)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.1, {"conv": 3, "fc": 3}),
        (1, {"conv": 30, "fc": 30}),
        ({"fc": 0.5}, {"conv": 10, "fc": 15}),
        ({"conv": 0.0, "fc": 0.01}, {"conv": 1, "fc": 1}),
    ],
)
def test_a_budget_says_what_the_task_may_keep(model: HatModel, budget, expected: dict[str, int]) -> None:
    model.begin_task(0, budget=budget)
    train(model, adamw(model), TRIAL)
    assert on(model) == expected
    model.end_task()
    assert {name: int(mask.sum()) for name, mask in model.masks(0).items()} == expected


def test_with_a_budget_of_nothing_a_later_task_only_reads(model: HatModel) -> None:
    for task, budget in enumerate((None, 0)):
        model.begin_task(task, budget=budget)
        train(model, adamw(model), TRIAL)
        model.end_task()
    assert torch.equal(model.task_state.finished_masks[0], model.task_state.finished_masks[1])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (1.5, "share of conv must be from 0 to 1, not 1.5"),
        (-0.1, "from 0 to 1"),
        (math.nan, "from 0 to 1"),
        (True, "from 0 to 1"),
        ("all", "from 0 to 1"),
        ({"conv": 2}, "share of conv must be from 0 to 1"),
        ({"stem": 0.5}, "no layer 'stem' with a mask; there are conv, fc"),
    ],
)
def test_budgets_that_are_none_are_refused(model: HatModel, budget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.begin_task(0, budget=budget)
    assert model.active_task is None


def test_more_tasks_than_features(model: HatModel) -> None:
    model = hatify.hatify(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)), 3, (torch.randn(2, 4),))
    for task in range(3):
        if task == 2:
            with pytest.warns(CapacityWarning, match="no feature is left"):
                model.begin_task(task)
        else:
            model.begin_task(task)
        optimizer = adamw(model)
        for _ in range(TRIAL):
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
        model.end_task()
        assert model.task_state.used().sum() == min(task + 1, 2)


def test_a_reopened_task_keeps_its_masks(model: HatModel) -> None:
    for task in (0, 1, 0):
        model.begin_task(task)
        before = model.masks(0)
        train(model, adamw(model), TRIAL + 2)
        model.end_task()
    assert all(torch.equal(mask, before[name]) for name, mask in model.masks(0).items())


@pytest.mark.parametrize(("again", "expected"), [({"budget": 0.2}, 0), ({"like": 1}, 5)])
def test_a_reopened_task_chooses_again_if_that_is_asked_for(model: HatModel, again, expected: int) -> None:
    for task, how in ((0, {}), (1, {}), (0, again)):
        model.begin_task(task, **how)
        others = model.task_state.used(besides=task)
        train(model, adamw(model), TRIAL)
        model.end_task()
    # The task that came after it reads, and so owns, all that it had.
    new = model.task_state.finished_masks[0] & ~others
    assert [int(new[slice(*place)].sum()) for place in model.task_state.groups.values()] == [expected] * 2


# Which ----------------------------------------------------------------------------------------------------------------


def test_importance_is_what_autograd_says_of_masks(model: HatModel) -> None:
    twin, ((x, y),) = Net(), batches(1)
    twin.load_state_dict({n.replace("bn.0", "bn").replace("head.0", "head"): t for n, t in model.state_dict().items()
                          if "_hat" not in n and ".1." not in n and ".2." not in n})  # fmt: skip
    gates = {name: torch.ones(WIDTH, requires_grad=True) for name in ("conv", "fc")}
    hidden = torch.relu(twin.bn(twin.conv(x)) * gates["conv"][:, None, None]).mean((2, 3))
    F.cross_entropy(twin.head(torch.relu(twin.fc(hidden) * gates["fc"])), y).backward()
    model.begin_task(0)
    train(model, adamw(model), 1)
    for name, (start, stop) in model.task_state.groups.items():
        change = gates[name].grad.abs()
        expected = (change / change.mean()).clamp(1e-3, 6)
        torch.testing.assert_close(model.task_state.embeddings[0][start:stop].detach(), expected, rtol=1e-3, atol=1e-4)


def test_the_features_that_matter_most_are_kept(model: HatModel) -> None:
    model.begin_task(0)
    with torch.no_grad():
        model.head[0].weight[:, ::3] *= 1000
    train(model, adamw(model), TRIAL)
    start, stop = model.task_state.groups["fc"]
    kept = model.task_state.binary(0)[start:stop]
    assert kept.sum() == 10
    # Some of those have no part in any answer, since nothing makes them positive.
    assert kept[::3].sum() >= 7


def test_masks_are_those_of_the_finished_task_from_the_end_of_the_trial_on(model: HatModel) -> None:
    model.begin_task(0)
    optimizer = adamw(model)
    train(model, optimizer, TRIAL - 1)
    assert on(model) == {"conv": WIDTH, "fc": WIDTH}
    train(model, optimizer, 1)
    chosen = {name: mask.detach().clone() for name, mask in model.task_state().items()}
    assert on(model) == {"conv": WIDTH // 3, "fc": WIDTH // 3}
    train(model, optimizer, 5)
    assert all(torch.equal(mask, chosen[name]) for name, mask in model.task_state().items())
    model.end_task()
    assert all(torch.equal(mask.float(), chosen[name]) for name, mask in model.masks(0).items())


def test_the_answer_after_the_task_is_the_one_before_it_ended(model: HatModel) -> None:
    model.begin_task(0)
    train(model, adamw(model), TRIAL + 5)
    model.eval()
    before = model(images())
    model.train()
    model.end_task()
    assert torch.equal(model(images()), before)


# Steps ----------------------------------------------------------------------------------------------------------------


def test_steps_are_the_optimizers_not_the_batches(model: HatModel) -> None:
    model.begin_task(0)
    optimizer = adamw(model)
    for i, (x, y) in enumerate(batches(2 * TRIAL)):
        assert (on(model) == {"conv": WIDTH, "fc": WIDTH}) == (i < 2 * TRIAL)
        F.cross_entropy(model(x), y).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert model.task_state.course.steps == TRIAL and model.task_state.course.chosen


def test_two_optimizers_of_one_backward_pass_are_one_step(model: HatModel) -> None:
    model.begin_task(0)
    parameters = list(model.parameters())
    pair = [optim.AdamW(parameters[::2]), optim.SGD(parameters[1::2], lr=0.1)]
    for x, y in batches(3):
        F.cross_entropy(model(x), y).backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
    assert model.task_state.course.steps == 3


def test_steps_of_other_models_do_not_count(model: HatModel) -> None:
    other = nn.Linear(2, 2)
    optimizer = optim.SGD(other.parameters(), lr=0.1)
    model.begin_task(0)
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    other(torch.randn(2, 2)).sum().backward()
    optimizer.step()
    assert model.task_state.course.steps == 0


def test_a_step_without_finite_gradients_does_no_harm(model: HatModel) -> None:
    model.begin_task(0)
    train(model, adamw(model), 2)
    model.task_state.probe.grad = torch.full_like(model.task_state.probe, torch.nan)
    optim.SGD(model.parameters(), lr=0.0).step()
    assert torch.isfinite(model.task_state.embeddings[0]).all()


# Copies and files -----------------------------------------------------------------------------------------------------


def test_copies_and_files_go_on_choosing(model: HatModel, tmp_path) -> None:
    model.begin_task(0, budget={"fc": 0.5})
    train(model, optim.SGD(model.parameters(), lr=0.1), 4)
    hatify.save(model, tmp_path / "saved")
    others = [copy.deepcopy(model), hatify.load(tmp_path / "saved", Net())]
    for each in (model, *others):
        train(each, optim.SGD(each.parameters(), lr=0.1), TRIAL - 4, task=1)
        assert on(each) == {"conv": 10, "fc": 15}
        each.end_task()
    for other in others:
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_an_averaged_model_has_off_what_the_task_dropped(model: HatModel) -> None:
    model.begin_task(0)
    optimizer = adamw(model)
    averaged = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.999))
    for _ in range(TRIAL + 5):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    assert torch.equal(averaged.module.task_state.binary(0), model.task_state.binary(0))


def test_abort_returns_to_before_the_choice(model: HatModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.begin_task(0)
    train(model, adamw(model), TRIAL + 2)
    model.abort_task()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.begin_task(0)
    assert on(model) == {"conv": WIDTH, "fc": WIDTH}


# The paper's form -----------------------------------------------------------------------------------------------------


def by_schedule(model: HatModel) -> None:
    hatify.MaskScale(model, 10)


def by_regularization(model: HatModel) -> None:
    model.regularization()


def by_hand(model: HatModel) -> None:
    with torch.no_grad():
        model.task_state.embeddings[0][::2] = -1


def by_name(model: HatModel) -> None:
    model.learn_masks()


@pytest.mark.parametrize("how", [by_schedule, by_regularization, by_hand, by_name])
def test_masks_are_learned_where_that_is_asked_for(model: HatModel, how) -> None:
    model.begin_task(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    how(model)
    before = model.task_state.embeddings[0].detach().clone()
    train(model, optimizer, TRIAL + 3)
    assert model.task_state.course.learned
    assert (model.task_state.embeddings[0] != before).any()
    expected = model.task_state.embeddings[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model.end_task()
    assert torch.equal(model.task_state.finished_masks[0] & expected, expected)


def test_the_next_task_chooses_again(model: HatModel) -> None:
    model.begin_task(0)
    model.learn_masks()
    model.end_task()
    model.begin_task(1)
    assert not model.task_state.course.learned


def test_learning_masks_needs_an_open_task(model: HatModel) -> None:
    with pytest.raises(TaskError, match="open task"):
        model.learn_masks()


# What is said ---------------------------------------------------------------------------------------------------------


def ended(model: HatModel) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.end_task()
    return [str(w.message) for w in caught]


def test_a_task_that_ends_too_soon_chooses_then_and_says_so(model: HatModel) -> None:
    model.begin_task(0)
    train(model, adamw(model), 3)
    (said,) = ended(model)
    assert "ended after 3 of the 10 steps" in said and "train for more steps" in said
    assert int(model.task_state.finished_masks[0].sum()) == 20


def test_evaluation_mode_left_on_is_said(model: HatModel) -> None:
    model.begin_task(0)
    model.eval()
    train(model, adamw(model), TRIAL + 2)
    (said,) = ended(model)
    assert "evaluation mode" in said and "call train()" in said


def test_a_task_that_learned_nothing_keeps_everything_and_nothing_is_said(model: HatModel) -> None:
    model.begin_task(0)
    assert not ended(model)
    assert model.task_state.finished_masks[0].all()


def test_a_compiled_model_chooses_as_well_and_nothing_is_said(model: HatModel) -> None:
    twin = copy.deepcopy(model)
    for each, call in ((model, model), (twin, torch.compile(twin, backend="aot_eager", fullgraph=True))):
        each.begin_task(0)
        optimizer = adamw(each)
        for x, y in batches(TRIAL + 2):
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
        assert not ended(each)
    assert torch.equal(model.task_state.finished_masks, twin.task_state.finished_masks)


def test_optimizers_that_are_not_torchs_are_told_of(model: HatModel) -> None:
    model.begin_task(0)
    ((x, y),) = batches(1)
    F.cross_entropy(model(x), y).backward()
    (said,) = ended(model)
    assert "no step of an optimizer of torch.optim was seen" in said
    assert int(model.task_state.finished_masks[0].sum()) == 20


def test_masks_that_never_moved_and_a_schedule_that_was_not_stepped_are_told_of(model: HatModel) -> None:
    for task, without in enumerate((True, False)):
        model.begin_task(task)
        hatify.MaskScale(model, 10)
        masks = {id(p) for p in model.task_state.embeddings}
        optimizer = optim.SGD([p for p in model.parameters() if not (without and id(p) in masks)], lr=0.1)
        train(model, optimizer, 3)
        said = ended(model)
        assert any(("never moved" if without else "set only once") in message for message in said)


def test_undecided_masks_are_told_of(model: HatModel) -> None:
    model.begin_task(0)
    scale = hatify.MaskScale(model, 10)
    train(model, optim.SGD(model.parameters(), lr=0.1), 3)
    scale.step()
    with torch.no_grad():
        model.task_state.embeddings[0][::2] = 0.01
    (said,) = ended(model)
    assert "50% of its masks are undecided" in said


# Like another task ----------------------------------------------------------------------------------------------------


def test_a_task_begins_like_another_one() -> None:
    torch.manual_seed(0)
    model = hatify.hatify(Net(), 3, (images(2),), num_classes=[3, 3, 5])
    for task, steps in ((0, TRIAL), (1, TRIAL)):
        model.begin_task(task)
        train(model, adamw(model), steps)
        model.end_task()
    masks = model.task_state.finished_masks
    before = copy.deepcopy(model)
    model.begin_task(2, like=0)
    assert torch.equal(model.task_state.binary(2), masks[0] | ~masks[1])
    for norm in (m for m in model.modules() if isinstance(m, PerTaskNorm)):
        assert all(
            torch.equal(a, b) for a, b in zip(norm[2].state_dict().values(), norm[0].state_dict().values(), strict=True)
        )
    # A head of another size begins afresh.
    assert torch.equal(model.head[2].weight, before.head[2].weight)
    model.abort_task()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    model.begin_task(2, like=0)
    train(model, adamw(model), TRIAL)
    model.end_task()
    new = masks[2] & ~masks[0]
    assert int(new.sum()) == 20 and not (new & masks[1]).any()
    hatify.verify_isolation(model)


@pytest.mark.parametrize("like", [1, 0, 2])
def test_only_finished_tasks_are_to_be_like(model: HatModel, like: int) -> None:
    with pytest.raises(TaskError, match="like="):
        model.begin_task(0, like=like)
    assert model.active_task is None


def test_there_must_be_such_a_task_to_be_like(model: HatModel) -> None:
    with pytest.raises(TaskError, match="no task 7"):
        model.begin_task(0, like=7)


# Pace -----------------------------------------------------------------------------------------------------------------


def normalised(model: HatModel) -> Tensor:
    return model.conv.weight.detach().flatten(1).clone()


def test_new_features_behind_a_batch_norm_turn_faster_and_compute_the_same(model: HatModel) -> None:
    model.begin_task(0)
    optimizer = adamw(model)
    train(model, optimizer, TRIAL - 1)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    before = normalised(model)
    train(model, optimizer, 1)
    kept = model.task_state.binary(0)[slice(*model.task_state.groups["conv"])]
    torch.testing.assert_close(normalised(model)[kept], before[kept] * math.sqrt(1 / 3))
    assert torch.equal(normalised(model)[~kept], before[~kept])
    x = images()
    answer = model(x)
    with torch.no_grad():
        model.conv.weight[kept] *= math.sqrt(3)
    torch.testing.assert_close(model(x), answer, rtol=1e-3, atol=1e-4)


def test_plain_gradient_descent_and_whole_networks_need_nothing_of_the_kind(model: HatModel) -> None:
    whole = hatify.hatify(Net(), 1, (images(2),))
    for each, optimizer in ((model, optim.SGD), (whole, optim.AdamW)):
        each.begin_task(0)
        still = optimizer(each.parameters(), lr=0.0)
        before = normalised(each)
        train(each, still, TRIAL)
        assert torch.equal(normalised(each), before)


def test_the_small_network_of_other_tests_is_chosen_from_as_well() -> None:
    model = hatify.hatify(SmallNet(), 2, (images(2),))
    model.begin_task(0)
    train(model, adamw(model), TRIAL)
    assert set(on(model).values()) == {4}
