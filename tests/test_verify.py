"""The experiment that shows isolation: it finds a leak, names it, and leaves no trace."""

import pytest
import torch
from torch import nn

from hatify import IsolationError, TaskError, hatify, verify_isolation
from hatify.lock import named_tensors
from hatify.slots import Use
from hatify.verify import unlocked_entries
from oracles import unguarded
from small import SmallNet, converted, images, learn

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


class Restless(SmallNet):
    """Counts its calls in a buffer, adds noise in evaluation too, and has a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x + 0.1 * torch.randn_like(x)) + 0 * self.calls


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = hatify(Restless(), 3, (images(2),))
    for task in range(2):
        learn(model, task)
    return model


@pytest.mark.parametrize("opened", [False, True])
def test_it_leaves_the_model_untouched(model, opened):
    if opened:
        model.begin_task(2)
        model.bn.eval()
    else:
        model.set_task(torch.tensor([0, 1, 1]))
    before = {name: (id(t), t.detach().clone()) for name, t in named_tensors(model)}
    modes = {name: m.training for name, m in model.named_modules()}
    state, numbers = model.task_state.progress(), torch.get_rng_state()
    verify_isolation(model)
    assert all(id(t) == before[n][0] and torch.equal(t, before[n][1]) for n, t in named_tensors(model))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert model.task_state.progress() == state and torch.equal(torch.get_rng_state(), numbers)
    assert opened or torch.equal(model.task_state.choice.of_samples, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("name", ["fc.weight", "conv.bias", "tokens"])
def test_a_leak_is_named_by_task_and_parameter(model, name):
    before = {n: t.detach().clone() for n, t in named_tensors(model)}
    # As if nobody had noticed what this parameter's entries write: none would be locked.
    nowhere = torch.full((1,) * (dict(named_tensors(model))[name].ndim + 1), -2)
    model.__dict__["uses"] = {**model.uses, name: [Use(nowhere, None)]}
    model.task_state.finished_masks[:, -1] = False
    model.task_state._constant_masks.clear()
    expected = rf"task 0: outputs depend on entries that are not locked, of {name}$"
    with unguarded(model), pytest.raises(IsolationError, match=expected):
        verify_isolation(model)
    model.task_state.finished_masks.copy_(before["_hat.finished_masks"])
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(model))


def test_every_entry_that_is_not_locked_is_replaced(model):
    for task in range(2):
        masks, unlocked = model.masks(task), unlocked_entries(model, task)
        assert torch.equal(unlocked["fc.weight"], ~(masks["fc"][:, None] & masks["conv"][None, :]))
        assert torch.equal(unlocked["conv.bias"], ~masks["conv"]) and unlocked["spare"].all()
        others = [n for n, t in named_tensors(model) if n.startswith(f"bn.{1 - task}.") and t.is_floating_point()]
        assert len(others) == 4 and all(unlocked[n].all() for n in others)
        assert not any(n.startswith((f"bn.{task}.", f"head.{task}.")) for n in unlocked)


def test_inputs_may_be_a_tensor_or_named(model):
    for inputs in (images(3), (images(3),), {"x": images(3)}):
        verify_isolation(model, inputs)


def test_without_a_finished_task_there_is_nothing_to_verify():
    with pytest.raises(TaskError, match="no task is finished"):
        verify_isolation(converted())
