"""Forgetting one task: it is gone, the others answer as before bit for bit, and its slot can learn again."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hatify import CheckpointError, HatWarning, TaskError, forget_task, hatify, load, save, verify_isolation
from hatify.lock import named_tensors
from small import SmallNet, answers, converted, learn, same, same_state

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


@pytest.fixture(scope="module")
def learned():
    """Three tasks learned; task 2's features overlap none of the others'."""
    model = converted()
    for task in range(3):
        learn(model, task)
    return model


@pytest.fixture
def model(learned):
    return copy.deepcopy(learned)


def tensors(model):
    return {name: t.detach().clone() for name, t in named_tensors(model)}


def expected_entries(model, task):
    """Which entries are a task's alone, by the definition: loops over entries and pairs of features."""
    masks = {t: model.masks(t) for t in model.finished_tasks}
    conv, fc = ({t: m[layer] for t, m in masks.items()} for layer in ("conv", "fc"))
    found = {}

    def alone(owners):
        return task in owners and len(owners) == 1

    for o in range(8):
        for layer, on in (("conv", conv), ("fc", fc)):
            if alone([t for t in on if on[t][o]]):
                found[f"{layer}.bias"] = found.get(f"{layer}.bias", 0) + 1
        if alone([t for t in conv if conv[t][o]]):
            found["conv.weight"] = found.get("conv.weight", 0) + 27
            found["tokens"] = found.get("tokens", 0) + 1
        pairs = [i for i in range(8) if alone([t for t in fc if fc[t][o] and conv[t][i]])]
        if pairs:
            found["fc.weight"] = found.get("fc.weight", 0) + len(pairs)
    return found


@pytest.mark.parametrize("reset", ["random", "zero", "original"])
@pytest.mark.parametrize("task", range(3))
def test_the_others_answer_as_before_bit_for_bit(model, task, reset):
    others = [t for t in range(3) if t != task]
    before = answers(model, others)
    forgotten = forget_task(model, task, reset, original=SmallNet() if reset == "original" else None)
    assert same(answers(model, others), before)
    assert model.finished_tasks == tuple(others)
    verify_isolation(model)
    assert {n: c for n, c in forgotten.items() if n in model.uses} and not model.task_state.finished_masks[task].any()


@pytest.mark.parametrize("task", range(3))
def test_the_report_counts_what_belongs_to_the_task_alone(model, task):
    expected = expected_entries(model, task)
    forgotten = forget_task(model, task, dry_run=True)
    assert {name: count for name, count in forgotten.items() if name in model.uses} == expected
    own = {n: t.numel() for n, t in named_tensors(model) if f".{task}." in f"{n}." and not n.startswith("_hat")}
    assert {n: c for n, c in forgotten.items() if n in own} == own
    assert forgotten[f"_hat.embeddings.{task}"] == model.task_state.num_slots
    assert forgotten.keys() == expected.keys() | own.keys() | {f"_hat.embeddings.{task}"}


def test_a_dry_run_changes_nothing_and_reports_the_same(model, learned):
    report = forget_task(model, 1, dry_run=True)
    assert same_state(model, learned) and model.finished_tasks == (0, 1, 2)
    assert forget_task(model, 1) == report


@pytest.mark.parametrize("reset", ["random", "zero"])
def test_nothing_of_the_task_is_left(model, reset):
    before = tensors(model)
    forgotten = forget_task(model, 1, reset)
    for name, value in tensors(model).items():
        if name == "_hat.finished_masks":
            assert not value[1].any() and torch.equal(value[::2], before[name][::2])
        elif name not in forgotten:
            assert torch.equal(value, before[name])
        elif value.is_floating_point():
            assert torch.isfinite(value).all()
            changed = int((value != before[name]).sum())
            # A normalisation starts at ones and zeros, the embedding where it is initialised, whatever they were.
            assert changed == forgotten[name] or name.startswith(("bn.", "_hat.", "act.")), name
            if reset == "zero" and name in model.uses:
                assert torch.equal(value[value != before[name]], torch.zeros(changed))


def test_random_entries_are_spread_as_their_layer_initialises_them(learned):
    model = hatify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)), 1, (torch.randn(2, 64),))
    model.begin_task(0)
    with torch.no_grad():
        getattr(model, "0").weight.fill_(100.0)
    torch.optim.SGD(model.parameters(), lr=0.1)
    model.end_task()
    forget_task(model, 0)
    weight = getattr(model, "0").weight
    assert weight.abs().max() <= 1 / 8 and 0.05 < weight.std() < 0.1


def test_original_entries_come_from_what_is_given(model):
    net = SmallNet()
    by_module, by_state = copy.deepcopy(model), copy.deepcopy(model)
    before = tensors(model)
    forgotten = forget_task(by_module, 1, "original", original=net)
    assert forget_task(by_state, 1, "original", original=net.state_dict()) == forgotten
    assert same_state(by_module, by_state)
    for name, original in net.named_parameters():
        if name in model.uses:
            value = dict(by_module.named_parameters())[name]
            assert ((value == original) | (value == before[name])).all()
            assert int((value == original).sum()) >= forgotten[name]
    assert torch.equal(by_module.head[1].weight, net.head.weight)
    assert torch.equal(by_module.bn[1].running_mean, net.bn.running_mean)


def test_a_forgotten_task_answers_by_chance():
    torch.manual_seed(0)
    x = torch.randn(300, 3, 6, 6)
    y = (x.mean((2, 3)) * torch.tensor([1.0, 1.01, 0.99])).argmax(1)
    model = converted()
    model.begin_task(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.end_task()
    right = [(answers(model, [0], x)[0].argmax(1) == y).float().mean().item()]
    for seed in range(8):
        torch.manual_seed(seed)
        forgotten = copy.deepcopy(model)
        forget_task(forgotten, 0)
        right.append((answers(forgotten, [0], x)[0].argmax(1) == y).float().mean().item())
    assert right[0] > 0.8 and 0.15 < sum(right[1:]) / 8 < 0.52, right


def test_the_slot_can_be_trained_again(model):
    before = answers(model, [0, 2])
    forget_task(model, 1)
    learn(model, 1)
    assert model.finished_tasks == (0, 1, 2) and same(answers(model, [0, 2]), before)
    verify_isolation(model)


def test_it_survives_saving(model, tmp_path):
    forget_task(model, 1)
    save(model, tmp_path / "out")
    assert same_state(load(tmp_path / "out"), model) and load(tmp_path / "out").finished_tasks == (0, 2)


def test_a_task_that_owns_nothing_alone_is_said_to():
    model = converted(2)
    for task in range(2):
        model.begin_task(task)
        model.end_task()
    with pytest.warns(HatWarning, match="task 1: no entry of any shared parameter belongs to it alone"):
        forgotten = forget_task(model, 1)
    assert not forgotten.keys() & model.uses.keys()


def test_modules_that_do_not_initialise_themselves_become_like_another_tasks():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 3.0))
            self.register_buffer("table", torch.arange(4.0))

        def forward(self, x):
            return x * self.scale + self.table * 0

    net = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 2))
    model = hatify(net, 2, (torch.randn(2, 4),), policies={"1": "per_task"})
    model.begin_task(0)
    with torch.no_grad():
        getattr(model, "1")[0].scale.fill_(7.0)
    model.end_task()
    forget_task(model, 0)
    odd = getattr(model, "1")[0]
    assert torch.equal(odd.scale, torch.full((4,), 3.0)) and torch.equal(odd.table, torch.arange(4.0))


def test_raw_parameters_are_drawn_from_what_is_left(model):
    before = model.tokens.detach().clone()
    count = forget_task(model, 1)["tokens"]
    changed = model.tokens != before
    assert int(changed.sum()) == count
    assert all(bool((value == before[~changed]).any()) for value in model.tokens[changed])


def test_what_cannot_be_forgotten_is_refused(model, learned):
    fresh = converted()
    state = SmallNet().state_dict()
    wrong = {**state, "fc.weight": torch.zeros(3, 3)}
    del (incomplete := dict(state))["fc.weight"]
    for call, error, reason in (
        (lambda: forget_task(fresh, 0), TaskError, "task 0 is not finished"),
        (lambda: forget_task(model, 7), TaskError, "no task 7"),
        (lambda: forget_task(model, 0, "all"), ValueError, "'random', 'original', 'zero'"),
        (lambda: forget_task(model, 0, "original"), ValueError, "original="),
        (lambda: forget_task(model, 0, original=state), ValueError, "original="),
        (lambda: forget_task(model, 0, "original", original=wrong), CheckpointError, r"fc\.weight.*\(3, 3\)"),
        (lambda: forget_task(model, 0, "original", original=incomplete), CheckpointError, r"fc\.weight"),
    ):
        with pytest.raises(error, match=reason):
            call()
        assert same_state(model, learned) and model.finished_tasks == (0, 1, 2)
    model.begin_task(0)
    with pytest.raises(TaskError, match="task 0 is open"):
        forget_task(model, 1)
    model.abort_task()
    assert same(answers(model), answers(learned))
