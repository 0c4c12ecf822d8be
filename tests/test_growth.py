"""More tasks than foreseen: finished ones answer as before, new ones learn, and it survives saving."""

import copy

import pytest
import timm
import torch
from torch import nn

import hatify.timm_models
from hatify import ConversionError, TaskError, load, save, verify_isolation
from hatify.convert import hatify as convert
from small import SmallNet, answers, converted, images, learn, same, same_state

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


@pytest.fixture
def model():
    model = converted(2)
    learn(model, 0)
    return model


def test_finished_tasks_answer_as_before_and_new_ones_learn(model):
    before = answers(model)
    model.add_tasks(2)
    assert model.num_tasks == 4 and model.finished_tasks == (0,) and same(answers(model), before)
    for task in (3, 1, 2):
        learn(model, task)
    assert same(answers(model, [0]), before) and model.finished_tasks == (0, 1, 2, 3)
    verify_isolation(model)


def test_new_tasks_are_like_those_foreseen(model):
    foreseen = converted(4)
    model = converted(2)
    model.add_tasks(2)
    assert same_state(model, foreseen)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in foreseen.named_parameters()
    }
    for each in (model, foreseen):
        for task in range(4):
            learn(each, task)
    assert same_state(model, foreseen) and same(answers(model), answers(foreseen))


def test_they_start_from_the_last_task_if_all_are_finished(model):
    learn(model, 1)
    model.add_tasks(1)
    assert torch.equal(model.head[2].weight, model.head[1].weight)
    assert torch.equal(model.bn[2].running_mean, model.bn[1].running_mean)
    assert torch.equal(model.task_state.embeddings[2], torch.ones(model.task_state.num_slots))
    assert model.head[2].weight.requires_grad and not model.head[1].weight.requires_grad


def test_every_parameter_there_was_stays_the_same_object(model):
    optimizer = torch.optim.Adam(model.parameters())
    before = dict(model.named_parameters())
    model.add_tasks(1)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {n for n, p in after.items() if id(p) not in held} == after.keys() - before.keys() != set()


def test_what_was_frozen_at_conversion_is_frozen_in_new_tasks():
    net = SmallNet()
    net.bn.bias.requires_grad_(False)
    model = convert(net, 1, (images(2),))
    model.add_tasks(1)
    assert not model.bn[1].bias.requires_grad and model.bn[1].weight.requires_grad


def test_what_was_frozen_since_is_frozen_in_new_tasks(model):
    model.head.requires_grad_(False)
    model.add_tasks(1)
    model.begin_task(2)
    assert not any(p.requires_grad for p in model.head[2].parameters())
    assert all(p.requires_grad for p in model.bn[2].parameters())


@pytest.mark.parametrize(
    ("at_first", "added", "expected"),
    [(None, None, [3, 3, 3, 3]), (None, [4, 5], [3, 3, 4, 5]), (2, None, [2, 2, 2, 2]), ([2, 4], 6, [2, 4, 6, 6])],
)
def test_heads_of_any_size(tmp_path, at_first, added, expected):
    model = converted(2, num_classes=at_first)
    learn(model, 0)
    before = answers(model)
    model.add_tasks(2, added)
    assert [a.shape[1] for a in answers(model, range(4))] == expected and same(answers(model), before)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model) and same(answers(loaded, range(4)), answers(model, range(4)))
    loaded.add_tasks(1, 7)
    save(loaded, tmp_path / "out")
    assert load(tmp_path / "out").num_tasks == 5


def test_the_state_dict_of_a_grown_model_fits_another(model):
    other = converted(2)
    for each in (model, other):
        each.add_tasks(1)
    other.load_state_dict(model.state_dict())
    assert same(answers(other), answers(model))


def test_it_can_be_repeated_copied_and_mixed(model):
    model.add_tasks(1)
    model.add_tasks(1)
    learn(model, 3)
    clone = copy.deepcopy(model)
    model.set_task(torch.tensor([0, 3, 0, 3, 3]))
    clone.set_task(torch.tensor([0, 3, 0, 3, 3]))
    assert torch.equal(model.eval()(images()), clone.eval()(images()))


def test_timm_models_grow():
    model = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=[3, 5])
    model.add_tasks(1, 4)
    assert model.num_classes == (3, 5, 4) and hatify.timm_models
    model.set_task(2)
    assert model.get_classifier().out_features == 4
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("fc.")}
    model.load_state_dict(kept, strict=False)
    assert torch.equal(model.bn1[2].weight, state["bn1.weight"])


def test_what_is_out_of_range_is_refused_and_changes_nothing(model):
    before = copy.deepcopy(model)
    for arguments, reason in {
        (0,): "positive",
        (True,): "positive",
        (1, 0): "num_classes",
        (2, (1,)): "2 of them",
    }.items():
        with pytest.raises(ValueError, match=reason):
            model.add_tasks(*arguments)
    assert same_state(model, before)
    with pytest.raises(ValueError, match="give num_classes"):
        converted(2, num_classes=[2, 3]).add_tasks(1)
    headless = converted(2, heads=None)
    with pytest.raises(ValueError, match="no heads"):
        headless.add_tasks(1, 3)
    headless.add_tasks(1)
    odd = convert(nn.Sequential(nn.Linear(4, 4), Odd()), 1, (torch.randn(2, 4),), heads=["1"])
    with pytest.raises(ConversionError, match="Odd"):
        odd.add_tasks(1, 3)
    assert odd.num_tasks == 1
    model.begin_task(1)
    with pytest.raises(TaskError, match="task 1 is open"):
        model.add_tasks(1)


class Odd(nn.Linear):
    """An output layer of a type of its own, which cannot be made with another number of outputs."""

    def __init__(self):
        super().__init__(4, 2)

    def forward(self, x):
        return super().forward(x).tanh()
