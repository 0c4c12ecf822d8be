"""Equation 2, and that no optimizer gets around it."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer

from hatify import HatError, HatWarning, hatify, verify_isolation
from hatify.lock import Guard, locked_entries
from hatify.lock.entries import PartlyOwned
from hatify.lock.watch import STANDING
from hatify.slots import Use

# Masks are drawn at random here, without regard to capacity.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

INPUTS, TASKS = 5, 3


def make_net():
    """Convolution, batch norm, layer norm, a raw parameter and a residual stream."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 6, 3, padding=1)
            self.bn = nn.BatchNorm1d(6)
            self.position = nn.Parameter(torch.randn(1, INPUTS, 6))
            self.norm = nn.LayerNorm(6)
            self.up = nn.Linear(6, 8)
            self.down = nn.Linear(8, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.bn(self.conv(x)).relu().transpose(1, 2) + self.position
            x = x + self.down(F.gelu(self.up(self.norm(x))))
            return self.head(x.mean(1))

    return Net()


def make_model(net=None, tasks=TASKS):
    # A small s_max keeps the embeddings from leaving their signs within the few steps of a test.
    return hatify(net or make_net(), tasks, (torch.randn(2, 2, INPUTS),), s_max=5.0)


def set_masks(model, task, seed=None):
    """Turn about half of the features of a task on."""
    generator = torch.Generator().manual_seed(task if seed is None else seed)
    with torch.no_grad():
        e = model.task_state.embeddings[task]
        e.copy_(torch.randn(e.shape, generator=generator))


def batch(task, step=0):
    generator = torch.Generator().manual_seed(100 * task + step)
    return torch.randn(8, 2, INPUTS, generator=generator), torch.randint(2, (8,), generator=generator)


def loss_of(model, task, step=0):
    x, y = batch(task, step)
    return F.cross_entropy(model(x), y) + 0.5 * model.regularization()


def train(model, task, optimizer, steps=3):
    """An ordinary training loop; the closure serves LBFGS and is what the others call before a step as well."""
    model.begin_task(task)
    set_masks(model, task)
    for step in range(steps):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, task, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    model.end_task()


@torch.no_grad()
def outputs(model, task):
    """What a task answers, in evaluation mode."""
    (x, _), training = batch(99), model.training
    with model.task(task):
        answer = model.eval()(x)
    model.train(training)
    return answer


def finished_model(optimizer=None):
    """A model with task 0 finished."""
    model = make_model()
    train(model, 0, optimizer or optim.SGD(model.parameters(), lr=0.1))
    return model


def opened_model(optimizer=None):
    """A model that learns task 1 with half of its features on, and what task 0, which is finished, answers."""
    model = finished_model(optimizer)
    expected = outputs(model, 0)
    model.begin_task(1)
    set_masks(model, 1)
    return model, expected


# Equation 2 -----------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """Output and input masks of each task: lists of bools, (tasks, O) and (tasks, I)."""
    o, i, t = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    bits = st.lists(st.booleans(), min_size=o + i, max_size=o + i)
    rows = draw(st.lists(bits, min_size=t, max_size=t))
    return [row[:o] for row in rows], [row[o:] for row in rows]


def lock_of(written, read):
    """The locked entries of a linear layer whose output features are slots 0 … O − 1, its inputs the slots after."""
    o, i = len(written[0]), len(read[0])
    use = Use(torch.arange(o).view(o, 1, 1), torch.arange(o, o + i).view(1, i, 1))
    masks = torch.tensor([w + r for w, r in zip(written, read, strict=True)])
    return locked_entries([use], masks, torch.Size((o, i)))


@given(layers())
def test_an_entry_is_locked_where_one_task_has_both_of_its_features_on(masks):
    written, read = masks
    expected = [
        [any(w[o] and r[i] for w, r in zip(written, read, strict=True)) for i in range(len(read[0]))]
        for o in range(len(written[0]))
    ]
    assert lock_of(written, read).tolist() == expected


@given(layers())
def test_no_more_is_locked_than_by_equation_2_as_printed(masks):
    written, read = masks
    out, inp = torch.tensor(written).any(0), torch.tensor(read).any(0)
    printed = torch.minimum(out.unsqueeze(1).int(), inp.unsqueeze(0).int()).bool()
    assert not (lock_of(written, read) & ~printed).any()


def test_entries_between_features_of_different_tasks_stay_free():
    # Task 0 has output 0 and input 0 on, task 1 output 1 and input 1. Equation 2 as printed locks all four.
    assert lock_of([[True, False], [False, True]], [[True, False], [False, True]]).tolist() == [
        [True, False],
        [False, True],
    ]


def test_a_feature_with_several_slots_is_on_where_one_of_them_is():
    use = Use(torch.tensor([[[0, 1]], [[2, 2]]]), None)
    assert locked_entries([use], torch.tensor([[False, True, False]]), torch.Size((2, 3))).tolist() == [
        [True] * 3,
        [False] * 3,
    ]


def test_the_lock_of_a_tied_parameter_is_the_union_over_its_uses():
    uses = [Use(torch.tensor([[0], [1]]), None), Use(torch.tensor([[1], [2]]), None)]
    assert locked_entries(uses, torch.tensor([[False, False, True]]), torch.Size((2,))).tolist() == [False, True]


def test_the_always_on_slot_is_locked_by_any_finished_task():
    use = Use(torch.tensor([[2], [0]]), None)
    assert locked_entries([use], torch.tensor([[False, False]]), torch.Size((2,))).tolist() == [True, False]


# Gradients ------------------------------------------------------------------------------------------------------------


def locks(model, finished):
    """The entries of each shared parameter that finished tasks own, by their binary masks."""
    masks = torch.stack([model.task_state.finished_masks[t] for t in finished])
    parameters = dict(model.named_parameters())
    return {name: locked_entries(uses, masks, parameters[name].shape) for name, uses in model.uses.items()}


def assert_locked_gradients_are_zero(model, finished):
    some = False
    for name, lock in locks(model, finished).items():
        grad = model.get_parameter(name).grad
        if grad is not None:
            assert (grad[lock] == 0).all(), name
            some |= bool((grad[~lock] != 0).any())
    assert some


@pytest.mark.parametrize("backwards", [1, 3])
def test_gradients_of_locked_entries_are_exactly_zero(backwards):
    model = finished_model()
    model.begin_task(1)
    for step in range(backwards):
        loss_of(model, 1, step).backward()
    assert_locked_gradients_are_zero(model, [0])


def test_parameters_of_finished_tasks_get_no_gradient():
    model = finished_model()
    model.begin_task(1)
    loss_of(model, 1).backward()
    assert all(p.grad is None for p in model.get_submodule("head")[0].parameters())
    assert all(p.grad is not None for p in model.get_submodule("head")[1].parameters())


def test_parameters_that_are_locked_as_a_whole_get_no_gradient():
    model = make_model()
    model.begin_task(0)
    model.end_task()
    model.begin_task(1)
    loss_of(model, 1).backward()
    assert all(mask.all() for mask in model.masks(0).values())
    for name in model.uses:
        grad = model.get_parameter(name).grad
        assert grad is None or not grad.any()
    assert (model.task_state.probe.grad != 0).any()


def test_nothing_is_locked_while_no_task_is_finished():
    model = make_model()
    model.begin_task(0)
    loss_of(model, 0).backward()
    assert all((p.grad != 0).any() for name, p in model.named_parameters() if name in model.uses)


# Optimizers -----------------------------------------------------------------------------------------------------------


def variants():
    """(name, options) for every optimizer in torch.optim that takes dense gradients of any shape."""
    heavy = {"lr": 0.1, "weight_decay": 0.1}
    plain = {
        "SGD": {**heavy, "momentum": 0.9, "nesterov": True},
        "Adam": {**heavy, "amsgrad": True},
        "AdamW": heavy,
        "NAdam": heavy,
        "RAdam": heavy,
        "Adamax": heavy,
        "Adadelta": {**heavy, "lr": 10.0},
        "Adagrad": heavy,
        "RMSprop": {**heavy, "momentum": 0.9, "centered": True},
        "ASGD": heavy,
        "Rprop": {"lr": 0.1},
        "Adafactor": heavy,
    }
    fused = ("SGD", "Adam", "AdamW", "Adagrad")
    for name, options in plain.items():
        yield name, options
        yield name, {**options, "foreach": True}
        if name in fused:
            # torch's fused SGD cannot begin the momentum of some parameters later than that of others.
            yield name, {**options, "fused": True} | ({"momentum": 0, "nesterov": False} if name == "SGD" else {})
    yield "LBFGS", {"lr": 0.5, "max_iter": 4}
    yield "LBFGS", {"lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}


def identifier(value):
    if isinstance(value, str):
        return value
    return "-".join(k for k in ("foreach", "fused", "line_search_fn") if k in value) or "default"


def test_every_optimizer_of_torch_is_tried():
    names = {n for n, c in vars(optim).items() if isinstance(c, type) and issubclass(c, optim.Optimizer)}
    assert names - {"Optimizer"} == {name for name, _ in variants()} | {"Muon", "SparseAdam"}


@pytest.mark.parametrize(("name", "options"), list(variants()), ids=identifier)
def test_one_optimizer_kept_across_tasks_moves_nothing_that_is_finished(name, options):
    model = make_model()
    optimizer = getattr(optim, name)(model.parameters(), **options)
    answers = {}
    for task in range(TASKS):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, task, optimizer)
        moved = [n for n, p in model.named_parameters() if n in model.uses and not torch.equal(p, before[n])]
        assert moved, "the task learned nothing, so the test shows nothing"
        for earlier, expected in answers.items():
            assert torch.equal(outputs(model, earlier), expected)
        answers[task] = outputs(model, task)
    verify_isolation(model)


def test_fused_sgd_with_momentum_moves_nothing_that_is_finished():
    model = finished_model()
    expected, before = outputs(model, 0), model.get_parameter("up.weight").detach().clone()
    train(model, 1, optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=True))
    assert not torch.equal(model.get_parameter("up.weight"), before)
    assert torch.equal(outputs(model, 0), expected)


def test_muon_moves_nothing_that_is_finished():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2))
    model = hatify(net, 2)
    matrices = [model.get_parameter("0.weight"), model.get_parameter("2.weight")]
    optimizer = optim.Muon(matrices, lr=0.1, weight_decay=0.1)
    x, answers = torch.randn(8, 4), []
    for task in range(2):
        before = [m.detach().clone() for m in matrices]
        model.begin_task(task)
        set_masks(model, task)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        model.end_task()
        assert not any(torch.equal(a, b) for a, b in zip(before, matrices, strict=True))
        with model.task(0):
            answers.append(model(x))
    assert torch.equal(*answers)


def test_sparse_adam_moves_no_locked_entry_of_an_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 6, sparse=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.words(x).mean(1))

    x = torch.arange(10).view(5, 2)
    model = hatify(Words(), 2, (x,))
    weight = model.get_parameter("words.weight")
    optimizer, answers = optim.SparseAdam([weight], lr=0.1), []
    for task in range(2):
        before = weight.detach().clone()
        model.begin_task(task)
        set_masks(model, task)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            assert weight.grad.is_sparse
            optimizer.step()
        model.end_task()
        assert not torch.equal(weight, before)
        with model.task(0):
            answers.append(model(x))
    assert torch.equal(*answers)
    verify_isolation(model)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_may_be_made_before_or_after_the_task_is_begun(made):
    model = finished_model()
    expected = outputs(model, 0)
    optimizer = optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5) if made == "before" else None
    model.begin_task(1)
    optimizer = optimizer or optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss_of(model, 1).backward()
    optimizer.step()
    model.end_task()
    assert torch.equal(outputs(model, 0), expected)


def test_weight_decay_does_move_locked_weights_where_nothing_guards_them():
    # What the guard is for: on the bare network the same loop moves weights whose gradient is zero.
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.zeros(2)
    optim.AdamW([weight], lr=0.1, weight_decay=0.5).step()
    assert (weight != 1).all()


# Steps that leave locked entries alone ----------------------------------------------------------------------------------


STILL = [
    pytest.param(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), id="SGD"),
    pytest.param(lambda p: optim.Adam(p, lr=0.1, amsgrad=True), id="Adam"),
    pytest.param(lambda p: optim.AdamW(p, lr=0.1, weight_decay=0), id="AdamW"),
    pytest.param(lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True), id="RMSprop"),
]


def step_of(model, optimizer, task=1, step=0):
    optimizer.zero_grad()
    loss_of(model, task, step).backward()
    optimizer.step()


@pytest.mark.parametrize("make", STILL)
def test_a_single_write_through_data_is_put_back_by_the_next_step(make):
    # It leaves no trace: neither in a version nor in the entries that somebody might look at.
    model, expected = opened_model()
    optimizer = make(model.parameters())
    step_of(model, optimizer)
    for p in model.guard.partial:
        before = p.parameter.detach().clone()
        for index in p.lock.nonzero():
            with torch.no_grad():
                p.parameter.data[tuple(index)] += 1
            step_of(model, optimizer)
            assert torch.equal(p.parameter[p.lock], before[p.lock])
    assert torch.equal(outputs(model, 0), expected)


def test_writes_through_data_to_what_a_finished_task_has_for_itself_are_put_back_by_the_next_step():
    model, expected = opened_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step_of(model, optimizer)
    for w in model.guard.whole:
        if isinstance(w.parameter, nn.Parameter) and w.parameter.numel() > 1:
            before = w.parameter.detach().clone()
            w.parameter.data[-1] += 1
            step_of(model, optimizer)
            assert torch.equal(w.parameter, before)
    assert torch.equal(outputs(model, 0), expected)


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["locked runs written", "free runs set aside"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_either_way_of_reaching_locked_runs_keeps_them_and_frees_the_others(few, decay, monkeypatch):
    monkeypatch.setattr("hatify.lock.entries.FEW", few)
    model, expected = opened_model()
    before = model.get_parameter("conv.weight").detach().clone()
    (lock,) = [p.lock.expand(p.parameter.shape) for p in model.guard.partial if p.name == "conv.weight"]
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
    for step in range(3):
        step_of(model, optimizer, step=step)
        weight = model.get_parameter("conv.weight")
        assert torch.equal(weight[lock], before[lock]) and (weight.grad[lock] == 0).all()
        assert torch.equal(outputs(model, 0), expected)
    assert (weight[~lock] != before[~lock]).any() and (weight.grad[~lock] != 0).any()


LOCKS = {
    "rows of a matrix": ((6, 5), torch.tensor([True, False, True, False, False, True]).view(6, 1)),
    "columns of a matrix": ((6, 5), torch.tensor([True, False, True, True, True])),
    "entries of a matrix": ((4, 3), torch.eye(4, 3, dtype=torch.bool)),
    "nearly all entries": ((4, 3), torch.arange(12).view(4, 3) != 5),
    "kernels": ((4, 3, 2, 2), torch.eye(4, 3, dtype=torch.bool).view(4, 3, 1, 1)),
    "nearly all kernels": ((4, 3, 2, 2), torch.arange(12).view(4, 3, 1, 1) != 5),
    "places of a table": ((2, 3, 4), torch.tensor([True, False, True]).view(1, 3, 1)),
    "a vector": ((5,), torch.tensor([True, False, True, False, False])),
}


@pytest.mark.parametrize("with_free", [True, False], ids=["and what is free", "what is locked alone"])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("name", LOCKS)
def test_locked_entries_are_put_back_zeroed_and_counted_and_no_others(name, contiguous, with_free):
    shape, lock = LOCKS[name]
    lock = lock.expand(shape)
    value = torch.randn(shape)
    own = value.clone() if contiguous else value.transpose(0, -1).contiguous().clone().transpose(0, -1)
    parameter = nn.Parameter(own)
    owned = PartlyOwned("weight", parameter, value.clone(), lock, with_free)
    with torch.no_grad():
        assert owned.changed() == 0
        parameter.fill_(torch.nan)
        assert owned.changed() == lock.sum()
        owned.restore()
        assert owned.changed() == 0
        assert torch.equal(parameter[lock], value[lock]) and parameter[~lock].isnan().all()
        gradient = torch.full_like(parameter, torch.inf)
        owned.zero(gradient)
        assert torch.equal(gradient, torch.where(lock, 0.0, torch.inf))
        owned.zero(gradient.transpose(0, -1).contiguous().transpose(0, -1))
        assert torch.equal(owned.saved[lock], value[lock])
        if with_free:
            assert torch.equal(owned.saved, value)


@pytest.mark.parametrize("make", STILL)
def test_momentum_of_an_earlier_task_moves_nothing_locked(make):
    model = make_model()
    optimizer = make(model.parameters())
    train(model, 0, optimizer)
    expected = outputs(model, 0)
    model.begin_task(1)
    set_masks(model, 1)
    for step in range(3):
        step_of(model, optimizer, step=step)
        assert torch.equal(outputs(model, 0), expected)


@pytest.mark.parametrize("make", STILL)
def test_momentum_loaded_into_the_optimizer_moves_nothing_locked(make):
    model = make_model()
    optimizer = make(model.parameters())
    train(model, 0, optimizer)
    earlier = copy.deepcopy(optimizer.state_dict())
    expected = outputs(model, 0)
    model.begin_task(1)
    set_masks(model, 1)
    for step in range(4):
        if step == 2:
            optimizer.load_state_dict(earlier)
        step_of(model, optimizer, step=step)
        assert torch.equal(outputs(model, 0), expected)


@pytest.mark.parametrize("make", STILL)
@pytest.mark.parametrize("change", ["added to", "replaced", "data"])
def test_gradients_changed_after_backward_move_nothing_locked(make, change):
    model, expected = opened_model()
    optimizer = make(model.parameters())
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, 1, step).backward()
        for p in [p for p in model.parameters() if p.grad is not None]:
            if change == "added to":
                p.grad.add_(0.1)
            elif change == "replaced":
                p.grad = torch.ones_like(p)
            else:
                p.grad.data.add_(0.1)
        optimizer.step()
        assert torch.equal(outputs(model, 0), expected)


@pytest.mark.parametrize("make", STILL)
def test_a_weight_decay_set_while_a_task_is_open_moves_nothing_locked(make):
    model, expected = opened_model()
    optimizer = make(model.parameters())
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0]["weight_decay"] = 0.5
        step_of(model, optimizer, step=step)
        assert torch.equal(outputs(model, 0), expected)


# Ways of training -----------------------------------------------------------------------------------------------------


def clipped(model, optimizer):
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


def clipped_by_value(model, optimizer):
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optimizer.step()


def accumulated(model, optimizer):
    optimizer.zero_grad()
    for step in range(3):
        loss_of(model, 1, step).backward()
    optimizer.step()


def zeroed_in_place(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    loss_of(model, 1).backward()
    optimizer.step()


def never_zeroed(model, optimizer):
    loss_of(model, 1).backward()
    optimizer.step()


def in_bfloat16(model, optimizer):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, 1)
    loss.backward()
    optimizer.step()


def with_gradient_scaler(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    scaler.update()


def with_gradients_made_up(model, optimizer):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def with_the_gradient_of_autograd(model, optimizer):
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(model, 1), parameters, allow_unused=True)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize(
    "step",
    [
        clipped,
        clipped_by_value,
        accumulated,
        zeroed_in_place,
        never_zeroed,
        in_bfloat16,
        with_gradient_scaler,
        with_gradients_made_up,
        with_the_gradient_of_autograd,
    ],
    ids=lambda step: step.__name__,
)
@pytest.mark.filterwarnings("error:.*put back")
def test_finished_tasks_stay_however_the_step_is_made(step):
    model = finished_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    expected, before = outputs(model, 0), model.get_parameter("up.weight").detach().clone()
    model.begin_task(1)
    set_masks(model, 1)
    for _ in range(3):
        step(model, optimizer)
        assert torch.equal(outputs(model, 0), expected)
    assert not torch.equal(model.get_parameter("up.weight"), before)
    model.end_task()
    assert torch.equal(outputs(model, 0), expected)
    verify_isolation(model)


def test_finished_tasks_answer_the_same_under_autocast_too():
    model = finished_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(model, 0)
    train(model, 1, optim.AdamW(model.parameters(), lr=0.1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(model, 0), expected)


def test_finished_tasks_can_be_asked_between_two_steps():
    model = finished_model()
    expected = outputs(model, 0)
    optimizer = optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model.begin_task(1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, 1, step).backward()
        optimizer.step()
        assert torch.equal(outputs(model, 0), expected)


def test_an_optimizer_may_step_within_the_backward_pass():
    model = finished_model()
    expected, before = outputs(model, 0), model.get_parameter("up.weight").detach().clone()
    optimizers = {p: optim.AdamW([p], lr=0.1, weight_decay=0.5) for p in model.parameters()}
    model.begin_task(1)
    set_masks(model, 1)

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters() if p.requires_grad]
    for i in range(3):
        loss_of(model, 1, i).backward()
        assert torch.equal(outputs(model, 0), expected)
    for handle in handles:
        handle.remove()
    assert not torch.equal(model.get_parameter("up.weight"), before)
    model.end_task()
    assert torch.equal(outputs(model, 0), expected)


def assert_locked_entries_are(model, weights, finished):
    for name, lock in locks(model, finished).items():
        assert torch.equal(model.get_parameter(name)[lock], weights[name][lock]), name


def test_a_step_to_nan_by_an_optimizer_of_the_weights_alone_moves_no_locked_entry():
    model = finished_model()
    weights = {name: model.get_parameter(name).detach().clone() for name in model.uses}
    optimizer = optim.SGD([model.get_parameter(name) for name in weights], lr=0.1)
    model.begin_task(1)
    for name in weights:
        model.get_parameter(name).grad = torch.full_like(weights[name], torch.nan)
    optimizer.step()
    assert model.get_parameter("up.weight").isnan().any()
    assert_locked_entries_are(model, weights, [0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_training_that_diverges_moves_nothing_that_is_finished(value):
    model = finished_model()
    expected = outputs(model, 0)
    weights = {name: model.get_parameter(name).detach().clone() for name in model.uses}
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    model.begin_task(1)
    set_masks(model, 1)
    for _ in range(2):
        optimizer.zero_grad()
        (loss_of(model, 1) * value).backward()
        optimizer.step()
    assert model.get_parameter("up.weight").isnan().any()
    assert_locked_entries_are(model, weights, [0])
    with pytest.raises(HatError, match="abort_task"):
        model.end_task()
    model.abort_task()
    assert torch.equal(outputs(model, 0), expected)


def test_embeddings_stay_where_their_gradient_reaches_them():
    model = make_model()
    model.begin_task(0)
    optimizer = optim.SGD([model.task_state.embeddings[0]], lr=1e4)
    (1e3 * loss_of(model, 0)).backward()
    optimizer.step()
    e = model.task_state.embeddings[0].detach()
    assert e.abs().max() == 6.0


# Mistakes -------------------------------------------------------------------------------------------------------------


def tampered(change):
    """Open task 1 with task 0 finished, change the model by hand, end the task; the outputs before and after."""
    model = finished_model()
    expected = outputs(model, 0)
    model.begin_task(1)
    with torch.no_grad():
        change(model)
    with pytest.warns(HatWarning, match=r"finished tasks own.*put back"):
        model.end_task()
    return outputs(model, 0), expected


def add_to_a_weight(model):
    model.get_parameter("up.weight").add_(1.0)


def add_to_data(model):
    model.get_parameter("up.weight").data.add_(1.0)


def replace_data(model):
    weight = model.get_parameter("up.weight")
    weight.data = torch.zeros_like(weight)


def change_the_head_of_another_task(model):
    model.get_parameter("head.0.weight").add_(1.0)


def change_statistics_of_another_task(model):
    model.get_submodule("bn")[0].running_mean.add_(1.0)


def change_the_embedding_of_another_task(model):
    model.task_state.embeddings[0].neg_()


def change_a_raw_parameter(model):
    model.get_parameter("position").add_(1.0)


def make_weights_not_finite(model):
    lock = locks(model, [0])["up.weight"]
    model.get_parameter("up.weight")[lock] = torch.nan


def load_other_weights(model):
    state = {k: v + 1 if torch.is_tensor(v) and v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def assign_other_weights(model):
    state = {k: v + 1 if torch.is_tensor(v) and v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replace_a_parameter(model):
    model.get_submodule("up").weight = nn.Parameter(torch.zeros_like(model.get_parameter("up.weight")))


@pytest.mark.parametrize(
    "change",
    [
        add_to_a_weight,
        add_to_data,
        replace_data,
        change_the_head_of_another_task,
        change_statistics_of_another_task,
        change_the_embedding_of_another_task,
        change_a_raw_parameter,
        make_weights_not_finite,
        load_other_weights,
        assign_other_weights,
        replace_a_parameter,
    ],
    ids=lambda change: change.__name__,
)
def test_a_change_by_hand_is_undone_with_a_warning_when_the_task_ends(change):
    after, expected = tampered(change)
    assert torch.equal(after, expected)


def test_the_warning_names_the_parameter_and_counts_the_entries():
    model = finished_model()
    lock = locks(model, [0])["down.weight"]
    model.begin_task(1)
    with torch.no_grad():
        model.get_parameter("down.weight").add_(1.0)
    with pytest.warns(HatWarning, match=rf"^down\.weight: {int(lock.sum())} entries"):
        model.end_task()


def test_changes_to_free_entries_are_the_users_right():
    model = finished_model()
    free = ~locks(model, [0])["up.weight"]
    model.begin_task(1)
    with torch.no_grad():
        model.get_parameter("up.weight")[free] = 7.0
    model.end_task()
    assert (model.get_parameter("up.weight")[free] == 7.0).all()


def test_no_warning_without_a_change(recwarn):
    model = finished_model()
    train(model, 1, optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    assert not [w for w in recwarn if "put back" in str(w.message)]


def test_a_step_after_the_task_has_ended_moves_nothing():
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    train(model, 0, optimizer)
    expected = outputs(model, 0)
    optimizer.step()
    assert torch.equal(outputs(model, 0), expected)


# Hooks ----------------------------------------------------------------------------------------------------------------


def standing() -> int:
    """How many guards there are."""
    return sum(isinstance(watcher, Guard) for watcher in STANDING)


@pytest.fixture
def guards_before():
    """How many guards there are, without those of earlier tests' models."""
    gc.collect()
    return standing()


def test_one_guard_stands_from_the_first_task_on(guards_before):
    model = make_model()
    assert standing() == guards_before
    model.begin_task(0)
    model.abort_task()
    assert standing() == guards_before
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks
    model = finished_model()
    for _ in range(2):
        assert standing() == guards_before + 1
        model.begin_task(1)
        assert standing() == guards_before + 1
        model.abort_task()


def test_all_models_share_one_hook():
    models = [finished_model() for _ in range(3)]
    for model in models:
        model.begin_task(1)
    hooks = list(torch_optimizer._global_optimizer_post_hooks.values())
    assert len([hook for hook in hooks if "hatify" in hook.__module__]) == 1


def test_no_guard_outlives_its_model(guards_before):
    model = finished_model()
    model.begin_task(1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 1).backward()
    optimizer.step()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert standing() == guards_before
    optimizer.step()


def test_a_model_may_be_collected_while_hooks_are_called():
    models = [finished_model(), finished_model()]
    for model in models:
        model.begin_task(1)
    expected = outputs(models[0], 0)

    def collect(*_):
        del models[1:]
        gc.collect()

    handle = torch_optimizer.register_optimizer_step_post_hook(collect)
    try:
        step_of(models[0], optim.AdamW(models[0].parameters(), lr=0.1, weight_decay=0.5))
    finally:
        handle.remove()
    assert torch.equal(outputs(models[0], 0), expected)


def test_a_model_is_collected_in_every_state(guards_before):
    models = [make_model(), finished_model(), copy.deepcopy(finished_model())]
    open_ = finished_model()
    open_.begin_task(1)
    models += [open_, copy.deepcopy(open_)]
    alive = [weakref.ref(model) for model in models]
    del models, open_
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
    assert standing() == guards_before


def test_an_optimizer_of_something_else_is_left_alone():
    model = finished_model()
    model.begin_task(1)
    weight = model.get_parameter("up.weight")
    with torch.no_grad():
        weight.add_(1.0)
    changed = weight.detach().clone()
    other = nn.Linear(2, 2)
    other(torch.randn(3, 2)).sum().backward()
    optim.SGD(other.parameters(), lr=0.1).step()
    assert torch.equal(weight, changed)


@pytest.mark.parametrize("together", [True, False])
def test_models_side_by_side_keep_out_of_each_others_way(together):
    models = [finished_model(), finished_model()]
    expected = [outputs(model, 0) for model in models]
    groups = [list(model.parameters()) for model in models]
    if together:
        groups = [[*groups[0], *groups[1]]]
    optimizers = [optim.AdamW(group, lr=0.1, weight_decay=0.5) for group in groups]
    for model in models:
        model.begin_task(1)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(loss_of(model, 1, step) for model in models).backward()
        for optimizer in optimizers:
            optimizer.step()
    models[0].end_task()
    models[1].abort_task()
    for model, answer in zip(models, expected, strict=True):
        assert torch.equal(outputs(model, 0), answer)
    verify_isolation(models[0])


def test_a_state_loaded_while_the_same_task_is_open_is_guarded_as_it_was_loaded():
    ahead = finished_model()
    ahead.begin_task(1)
    model = make_model()
    model.begin_task(1)
    model.load_state_dict(ahead.state_dict())
    expected = outputs(ahead, 0)
    model.train()
    optimizer = optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        step_of(model, optimizer, step=step)
    model.end_task()
    assert torch.equal(outputs(model, 0), expected)


class Moving(nn.Module):
    """Keeps an average of its features in a buffer, which it reaches in one way or another."""

    def __init__(self, way):
        super().__init__()
        self.first, self.head, self.way = nn.Linear(3, 6), nn.Linear(6, 2), way
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("statistics", torch.stack((torch.zeros(6), torch.ones(6))))

    def forward(self, x):
        h = self.first(x)
        if self.way == "norm":
            h = F.batch_norm(h, self.statistics[0], self.statistics[1], training=self.training)
        elif self.training:
            reached = {"data": lambda b: b.data, "view": lambda b: b.view(-1), "detach": lambda b: b.detach()}
            reached[self.way](self.average).mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.head(torch.relu(h - self.average))


@pytest.mark.parametrize("way", ["data", "view", "detach", "norm"])
@pytest.mark.filterwarnings("error:.*put back")
def test_buffers_that_move_belong_to_a_task_however_they_are_reached(way):
    model = hatify(Moving(way), 2, torch.randn(2, 3))
    x = torch.randn(8, 3)
    answers = []
    for task in range(2):
        model.begin_task(task)
        set_masks(model, task)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x + task).square().mean().backward()
            optimizer.step()
        model.end_task()
        with torch.no_grad(), model.task(0):
            answers.append(model(x))
    assert torch.equal(*answers)
    policy = {entry.name: entry.policy.value for entry in model.census}
    assert policy["statistics" if way == "norm" else "average"] == "per_task"
