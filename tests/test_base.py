"""A network that has learned something as a base: every task reads its features, none changes them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hatify
from hatify import TaskError, forget_task, verify_isolation
from tests.small import SmallNet, converted, images

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def train(model: hatify.HatModel, steps: int = 3, **options) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
    for seed in range(steps):
        x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        F.cross_entropy(model(x), LABELS).backward()
        optimizer.step()


def shared(model: hatify.HatModel) -> dict[str, torch.Tensor]:
    return {name: dict(model.named_parameters())[name].detach().clone() for name in model.uses}


def test_the_base_is_on_and_stays_as_it_is_while_tasks_learn_norms_and_heads() -> None:
    model = converted(base="locked")
    before, answers = shared(model), []
    assert all(mask.all() for task in range(3) for mask in model.masks(task).values())
    for task in range(3):
        model.begin_task(task)
        own = copy.deepcopy([model.bn[task], model.head[task]])
        train(model)
        model.end_task()
        assert all(torch.equal(before[name], value) for name, value in shared(model).items())
        for old, new in zip(own, (model.bn[task], model.head[task]), strict=True):
            assert not torch.equal(old.weight, new.weight)
        answers.append(model(images()))
        for earlier, answer in enumerate(answers):
            with model.task(earlier):
                assert torch.equal(model(images()), answer)
    verify_isolation(model)


def test_a_base_that_no_task_has_read_yet_may_still_be_loaded() -> None:
    model, other = converted(base="locked"), SmallNet()
    hatify.load_plain_state_dict(model, other.state_dict())
    torch.testing.assert_close(model.eval()(images()), other.eval()(images()))


def test_the_base_stays_on_whatever_the_embeddings_are() -> None:
    model = converted(base="locked")
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].fill_(-6)
    hatify.MaskScale(model, 10)
    assert all((mask == 1).all() for mask in model.task_state().values())
    train(model)
    model.end_task()
    assert model.task_state.finished_masks[0].all()


def test_nothing_is_said_of_layers_that_were_never_to_be_shared_out(recwarn) -> None:
    model = converted(base="locked")
    model.begin_task(0)
    train(model)
    model.end_task()
    assert not recwarn


def test_a_task_over_a_base_is_forgotten_without_touching_the_base() -> None:
    model = converted(base="locked")
    before = shared(model)
    model.begin_task(0)
    train(model)
    model.end_task()
    with pytest.warns(hatify.HatWarning, match="belongs to it alone"):
        forget_task(model, 0)
    assert all(torch.equal(before[name], value) for name, value in shared(model).items())


def test_an_aborted_first_task_leaves_a_model_that_weights_can_be_loaded_into() -> None:
    model = converted(base="locked")
    model.begin_task(0)
    with pytest.raises(TaskError, match="is open"):
        hatify.load_plain_state_dict(model, SmallNet().state_dict())
    model.abort_task()
    hatify.load_plain_state_dict(model, SmallNet().state_dict())


def test_new_heads_on_a_base_begin_at_zero_and_old_ones_as_they_are() -> None:
    fresh, old = converted(base="locked", num_classes=5), converted(base="locked")
    assert not any(p.any() for head in fresh.head for p in head.parameters())
    assert all(torch.equal(head.weight, old.head[0].weight) and head.weight.any() for head in old.head)
    fresh.add_tasks(1, num_classes=2)
    assert fresh.head[3].weight.shape == (2, 8) and not fresh.head[3].weight.any()
    fresh.begin_task(0)
    train(fresh)
    assert all(p.any() for p in fresh.head[0].parameters())
    assert converted(num_classes=5).head[0].weight.any()
    fresh.end_task()
    with pytest.warns(hatify.HatWarning, match="belongs to it alone"):
        forget_task(fresh, 0)
    assert not any(p.any() for p in fresh.head[0].parameters())


def test_copies_and_files_keep_the_base(tmp_path) -> None:
    model = converted(base="locked")
    model.begin_task(0)
    train(model)
    model.end_task()
    hatify.save(model, tmp_path / "saved")
    for again in (copy.deepcopy(model), hatify.load(tmp_path / "saved")):
        before = shared(again)
        again.begin_task(1)
        train(again)
        again.end_task()
        assert all(torch.equal(before[name], value) for name, value in shared(again).items())


def test_extraction_of_a_task_over_a_base_is_the_whole_network() -> None:
    model = converted(base="locked")
    model.begin_task(0)
    train(model)
    model.end_task()
    plain = hatify.extract_task(model, 0)
    torch.testing.assert_close(plain(images()), model(images()))
    assert plain.conv.weight.shape == model.conv.weight.shape


def test_more_tasks_read_the_base_as_well() -> None:
    model = converted(num_tasks=1, base="locked")
    model.begin_task(0)
    train(model)
    model.end_task()
    before = shared(model)
    model.add_tasks(1)
    model.begin_task(1)
    train(model)
    model.end_task()
    assert all(torch.equal(before[name], value) for name, value in shared(model).items())


@pytest.mark.parametrize("base", ["frozen", True, 1])
def test_other_words_for_a_base_are_refused(base) -> None:
    with pytest.raises(ValueError, match="base must be 'locked' or None"):
        converted(base=base)


def test_a_base_reads_all_inputs() -> None:
    with pytest.raises(ValueError, match="mask_inputs"):
        hatify.hatify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 2, base="locked", mask_inputs=True)
