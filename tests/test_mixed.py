"""Batches whose samples belong to different tasks: each is answered by its own."""

import pytest
import torch
from torch import nn

from hatify import TaskError, hatify
from small import answers, converted, images, learn, same

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

TASKS = torch.tensor([2, 0, 0, 1, 2, 0])


@pytest.fixture
def model():
    model = converted(4)
    for task in range(3):
        learn(model, task)
    return model


@torch.no_grad()
def one_by_one(model, tasks, x):
    """What each task answers on its own samples, put where they are."""
    expected = torch.empty(len(tasks), 3)
    for task in set(tasks.tolist()):
        expected[tasks == task] = answers(model, [task], x[tasks == task])[0]
    return expected


@torch.no_grad()
def test_each_sample_is_answered_by_its_own_task(model):
    x = images(6)
    expected = one_by_one(model, TASKS, x)
    model.set_task(TASKS)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x=x), expected)
    model.set_task(1)
    assert torch.equal(model(x), answers(model, [1], x)[0])


@torch.no_grad()
def test_it_lasts_for_a_context_or_until_another_task_is_set(model):
    x = images(6)
    expected = one_by_one(model, TASKS, x)
    model.set_task(1)
    with model.task(TASKS):
        assert torch.equal(model(x), expected)
        with model.task(0):
            assert torch.equal(model(x), answers(model, [0], x)[0])
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), answers(model, [1], x)[0])
    model.set_task(TASKS)
    model.begin_task(3)
    model.abort_task()
    assert model(x).shape == (6, 3)


def test_the_tensor_may_be_changed_afterwards(model):
    tasks = TASKS.clone()
    model.set_task(tasks)
    with torch.no_grad():
        before = model(images(6))
        tasks.fill_(0)
        assert torch.equal(model(images(6)), before)


class Nested(nn.Module):
    """Several inputs, nested outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, more, scale=None):
        h = torch.relu(self.a(x + more["y"]))
        return {"logits": self.b(h), "features": (h, [h.sum(1)])}


@torch.no_grad()
def test_nested_inputs_and_outputs():
    x, more = torch.randn(6, 4), {"y": torch.randn(6, 4)}
    model = hatify(Nested(), 3, {"x": x, "more": more})
    for task in range(3):
        model.begin_task(task)
        model.b[task].bias.fill_(task)
        model.end_task()
    model.set_task(TASKS)
    found = model(x, more)
    assert found.keys() == {"logits", "features"} and isinstance(found["features"], tuple)
    for task in range(3):
        own = task == TASKS
        with model.task(task):
            expected = model(x[own], {"y": more["y"][own]})
        assert torch.equal(found["logits"][own], expected["logits"])
        assert same(
            [found["features"][0][own], found["features"][1][0][own]],
            [*expected["features"][:1], *expected["features"][1]],
        )


def test_what_names_no_finished_tasks_is_refused(model):
    for tasks, reason in (
        (TASKS.float(), "int64"),
        (TASKS.int(), "int64"),
        (TASKS.view(2, 3), "int64"),
        (TASKS[:0], "int64"),
        (torch.tensor([0, 4]), "no task 4"),
        (torch.tensor([0, -1]), "no task -1"),
        (torch.tensor([0, 3]), "task 3 is not finished"),
    ):
        model.set_task(1)
        with pytest.raises(TaskError, match=reason):
            model.set_task(tasks)
        assert torch.equal(answers(model, [1])[0], model(images()))
    model.begin_task(2)
    with pytest.raises(TaskError, match="task 2 is not finished"):
        model.set_task(TASKS)
    model.eval()
    model.set_task(torch.tensor([0, 1]))
    assert model(images(2)).shape == (2, 3)


def test_calls_that_cannot_be_answered_side_by_side_are_refused(model):
    model.set_task(TASKS)
    with pytest.raises(TaskError, match=r"6 samples.*\(5, 3, 6, 6\)"):
        model(images(5))
    model.train()
    with pytest.raises(TaskError, match="evaluation mode"):
        model(images(6))
    model.eval()
    assert model(images(6)).shape == (6, 3)


def test_heads_of_different_sizes_are_refused():
    model = converted(3, num_classes=[2, 5, 2])
    for task in range(3):
        learn(model, task)
    model.set_task(torch.tensor([0, 2, 0]))
    assert model(images(3)).shape == (3, 2)
    model.set_task(torch.tensor([0, 1, 0]))
    with pytest.raises(TaskError, match=r"tasks 0 and 1 .*\(2, 2\).*\(1, 5\)"):
        model(images(3))
    with model.task(1):
        assert model(images(3)).shape == (3, 5)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).mean(0)


def test_outputs_without_a_batch_are_refused():
    model = hatify(Averaged(), 2, (torch.randn(2, 4),))
    for task in range(2):
        model.begin_task(task)
        model.end_task()
    model.set_task(torch.tensor([0, 1, 1]))
    with pytest.raises(TaskError, match="no row for each sample"):
        model(torch.randn(3, 4))
