"""The public surface of a converted model: tasks in order, masks, and what goes wrong."""

import copy

import pytest
import torch
from torch import fx, nn, optim

from hatify import CapacityWarning, HatError, HatModel, HatWarning, MaskScale, TaskError, hatify, verify_isolation

# Capacity runs out in many of these small networks; the tests of the warnings ask for them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

CLASSES, TASKS = 4, 3


def make_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


@pytest.fixture
def net():
    return make_net()


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6)


@pytest.fixture
def model(net, x):
    return hatify(net, TASKS, (x,))


def embed(model, task, values):
    """Set a task's embedding, by layer: the convolution's six features and the linear layer's eight."""
    with torch.no_grad():
        for (start, stop), value in zip(model.task_state.groups.values(), values, strict=True):
            model.task_state.embeddings[task][start:stop] = torch.tensor(value)


FIRST_HALF = [[1.0] * 3 + [-1.0] * 3, [1.0] * 4 + [-1.0] * 4]
SECOND_HALF = [[-1.0] * 3 + [1.0] * 3, [-1.0] * 4 + [1.0] * 4]


def learn(model, task, x, embedding=FIRST_HALF, steps=2):
    model.begin_task(task)
    embed(model, task, embedding)
    optimizer = optim.SGD([p for p in model.parameters() if p.shape != (14,)], lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + model.regularization()).backward()
        optimizer.step()
    model.end_task()


@torch.no_grad()
def outputs(model, task, x):
    with model.task(task):
        return model(x)


# The converted model --------------------------------------------------------------------------------------------------


def test_it_is_a_graph_module_and_leaves_the_network_untouched(net, x):
    before, names = copy.deepcopy(net.state_dict()), [type(m) for m in net.modules()]
    model = hatify(net, TASKS, (x,))
    assert isinstance(model, HatModel) and isinstance(model, fx.GraphModule)
    learn(model, 0, x)
    assert [type(m) for m in net.modules()] == names
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("task", range(TASKS))
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_new_task_answers_what_the_network_answers(net, model, task, batch):
    x = torch.randn(batch, 3, 6, 6)
    model.eval()
    torch.testing.assert_close(outputs(model, task, x), net.eval()(x), rtol=1e-5, atol=1e-6)


def test_it_keeps_the_mode_of_the_network(net, x):
    assert all(m.training for m in hatify(net, 1, (x,)).modules())
    model = hatify(net.eval(), 1, (x,))
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model(x), net(x), rtol=1e-5, atol=1e-6)


def test_the_number_of_tasks_and_their_state_can_be_read(model, x):
    assert (model.num_tasks, model.finished_tasks, model.active_task) == (TASKS, (), None)
    model.begin_task(1)
    assert (model.finished_tasks, model.active_task) == ((), 1)
    model.end_task()
    assert (model.finished_tasks, model.active_task) == ((1,), None)
    model.begin_task(0)
    assert (model.finished_tasks, model.active_task) == ((1,), 0)
    model.end_task()
    assert (model.finished_tasks, model.active_task) == ((0, 1), None)


def test_begin_trains_and_end_evaluates(model, x):
    model.eval()
    model.begin_task(0)
    assert all(m.training for m in model.modules())
    model.end_task()
    assert not any(m.training for m in model.modules())


def test_begin_sets_the_scale_to_its_bound(net, x):
    model = hatify(net, TASKS, (x,), s_max=50.0)
    model.mask_scale = 3.0
    model.begin_task(0)
    assert model.mask_scale == model.s_max == 50.0


def test_the_scale_can_be_read_and_set(model):
    model.mask_scale = 2.5
    assert model.mask_scale == 2.5


# Masks ----------------------------------------------------------------------------------------------------------------


def test_new_tasks_have_every_mask_on(model):
    for task in range(TASKS):
        masks = model.masks(task)
        assert masks.keys() == {"0", "5"}
        assert all(mask.dtype == torch.bool and mask.all() for mask in masks.values())
    assert model.masks(0)["0"].shape == (6,) and model.masks(0)["5"].shape == (8,)


def test_masks_are_where_the_embedding_is_positive(model):
    embed(model, 1, [[0.5, -0.5, 0.0, 2.0, -1e-3, 1e-3], [1.0] * 8])
    assert model.masks(1)["0"].tolist() == [True, False, False, True, False, True]


def test_masks_of_a_finished_task_are_fixed(model, x):
    learn(model, 0, x)
    expected = {name: mask.clone() for name, mask in model.masks(0).items()}
    embed(model, 0, SECOND_HALF)
    assert all(torch.equal(mask, expected[name]) for name, mask in model.masks(0).items())
    assert expected["0"].tolist() == [True] * 3 + [False] * 3


def test_features_that_are_off_do_not_reach_the_output(model, x):
    embed(model, 0, FIRST_HALF)
    model.eval()
    expected = outputs(model, 0, x)
    with torch.no_grad():
        model.get_parameter("5.weight")[4:] = 100.0
        model.get_parameter("0.weight")[3:] = 100.0
    assert torch.equal(outputs(model, 0, x), expected)


def test_features_that_meet_have_one_mask(x):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Linear(5, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.block(x))

    x, net = torch.randn(2, 5), Residual()
    coupled, apart = hatify(net, 1, (x,)), hatify(net, 1, (x,), couple=False)
    assert coupled.task_state.num_slots == 6 and apart.task_state.num_slots == 12
    with torch.no_grad():
        coupled.task_state.embeddings[0][:2] = -1
    masks = coupled.masks(0)
    assert masks["stem"].tolist() == masks["block"].tolist() == [False] * 2 + [True] * 4


def test_apart_a_sum_is_on_where_either_term_is():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block, self.norm = nn.Linear(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
            self.last, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.last(self.norm(x + self.block(x))).relu())

    x = torch.randn(3, 5)
    model = hatify(Residual(), 2, (x,), couple=False)
    model.begin_task(0)
    with torch.no_grad():
        for (start, stop), value in zip(
            model.task_state.groups.values(), ([1, 1, -1, -1], [1, -1, 1, -1], [1, 1, -1]), strict=True
        ):
            model.task_state.embeddings[0][start:stop] = torch.tensor(value)
    model.end_task()
    seen = {}
    model.get_submodule("last").register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    model(x)
    assert (seen["x"] != 0).all(0).tolist() == [True, True, True, False]
    assert (seen["x"][:, 3] == 0).all()
    verify_isolation(model)


@pytest.mark.parametrize(
    ("init", "check"),
    [
        ("dense", lambda e: (e == 1).all()),
        (0.25, lambda e: (e == 0.25).all()),
        (-1, lambda e: (e == -1).all()),
        ("normal", lambda e: e.unique().numel() == e.numel() and abs(e.mean()) < 0.3 and 0.7 < e.std() < 1.3),
    ],
)
def test_masks_start_as_asked(init, check):
    model = hatify(nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 2)), 2, mask_init=init)
    for embedding in model.task_state.embeddings:
        assert check(embedding.detach())


@pytest.mark.parametrize("init", ["sparse", None, True])
def test_an_unknown_start_of_the_masks_is_refused(net, x, init):
    with pytest.raises(ValueError, match=r"mask_init.*'dense'"):
        hatify(net, 1, (x,), mask_init=init)


# Choosing a task ------------------------------------------------------------------------------------------------------


def test_set_task_chooses_who_answers(model, x):
    learn(model, 0, x)
    learn(model, 1, x, SECOND_HALF)
    first, second = outputs(model, 0, x), outputs(model, 1, x)
    assert not torch.equal(first, second)
    model.set_task(0)
    assert torch.equal(model(x), first)
    model.set_task(1)
    assert torch.equal(model(x), second)


def test_the_task_context_restores_the_task(model, x):
    learn(model, 0, x)
    learn(model, 1, x, SECOND_HALF)
    expected = model(x)
    with model.task(0) as same:
        assert same is model
        with model.task(2):
            pass
        assert not torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)
    with pytest.raises(KeyError), model.task(0):
        raise KeyError
    assert torch.equal(model(x), expected)


def test_a_task_that_is_begun_answers(model, x):
    learn(model, 0, x)
    model.set_task(0)
    model.begin_task(1)
    model(x).sum().backward()
    assert model.get_submodule("7")[1].weight.grad is not None
    assert model.get_submodule("7")[0].weight.grad is None


def test_finished_tasks_can_be_asked_while_another_learns(model, x):
    learn(model, 0, x)
    expected = outputs(model, 0, x)
    model.begin_task(1)
    model.eval()
    assert torch.equal(outputs(model, 0, x), expected)
    model.train()
    model(x)


# Wrong order ----------------------------------------------------------------------------------------------------------


def test_beginning_twice_says_how_to_close(model):
    model.begin_task(0)
    with pytest.raises(TaskError, match=r"task 0 is still open.*end_task\(\).*abort_task\(\)"):
        model.begin_task(1)
    assert model.active_task == 0


@pytest.mark.parametrize("call", ["end_task", "abort_task", "regularization"])
def test_what_needs_an_open_task_says_so(model, call):
    with pytest.raises(TaskError, match=rf"{call}\(\).*begin_task\(\)"):
        getattr(model, call)()


@pytest.mark.parametrize("call", ["end_task", "abort_task"])
def test_ending_twice_is_an_error(model, call):
    model.begin_task(0)
    model.end_task()
    with pytest.raises(TaskError, match=r"begin_task\(\)"):
        getattr(model, call)()


@pytest.mark.parametrize("call", ["begin_task", "set_task", "task", "masks"])
@pytest.mark.parametrize("task", [-1, TASKS, True, 1.0, "0", None])
def test_there_are_only_tasks_0_to_n_minus_1(model, call, task):
    with pytest.raises(TaskError, match=rf"no task {task!r}: tasks are 0 … {TASKS - 1}"):
        result = getattr(model, call)(task)
        with result:
            pass
    assert model.active_task is None


def test_training_without_a_task_says_what_to_call(model, x):
    model.train()
    with pytest.raises(TaskError, match=r"begin_task\(\).*eval\(\)"):
        model(x)


def test_training_without_a_task_is_an_error_without_masks_too():
    model = hatify(nn.Sequential(nn.Linear(3, 2)), 2)
    model.train()
    with pytest.raises(TaskError, match=r"begin_task\(\)"):
        model(torch.randn(2, 3))


def test_training_another_task_than_the_open_one_says_what_to_call(model, x):
    model.begin_task(0)
    model.set_task(1)
    with pytest.raises(TaskError, match=r"task 0 is learning, but task 1 is set.*eval\(\).*set_task\(\)"):
        model(x)
    model.set_task(0)
    model(x)


def test_there_is_nothing_to_verify_before_a_task_is_finished(model):
    model.begin_task(0)
    with pytest.raises(TaskError, match="no task is finished"):
        verify_isolation(model)


def test_task_errors_are_hat_errors():
    assert issubclass(TaskError, HatError) and issubclass(HatError, RuntimeError)


@pytest.mark.parametrize("num_tasks", [0, -1, True, 2.0, "3"])
def test_the_number_of_tasks_must_be_a_positive_integer(net, x, num_tasks):
    with pytest.raises(ValueError, match="num_tasks"):
        hatify(net, num_tasks, (x,))


@pytest.mark.parametrize("s_max", [1, 0, -5, float("nan"), float("inf")])
def test_the_bound_of_the_scale_must_be_finite_and_above_1(net, x, s_max):
    with pytest.raises(ValueError, match="s_max"):
        hatify(net, 1, (x,), s_max=s_max)


def test_a_converted_model_is_not_converted_again(model, x):
    with pytest.raises(HatError, match="already"):
        hatify(model, 2, (x,))


# Learning -------------------------------------------------------------------------------------------------------------


def test_later_tasks_change_no_bit_of_earlier_ones(model, x):
    answers = []
    for task in range(TASKS):
        learn(model, task, x, [FIRST_HALF, SECOND_HALF, FIRST_HALF][task])
        answers.append(outputs(model, task, x))
        for earlier in range(task + 1):
            assert torch.equal(outputs(model, earlier, x), answers[earlier])
        verify_isolation(model)


def test_tasks_may_be_learned_in_any_order(model, x):
    learn(model, 2, x)
    expected = outputs(model, 2, x)
    learn(model, 0, x, SECOND_HALF)
    assert torch.equal(outputs(model, 2, x), expected)
    assert model.finished_tasks == (0, 2)


def test_each_task_starts_where_the_network_started(net, model, x):
    learn(model, 0, x)
    expected = net.state_dict()
    for task in (1, 2):
        assert torch.equal(model.get_submodule("7")[task].weight, expected["7.weight"])
        assert torch.equal(model.get_submodule("1")[task].running_mean, expected["1.running_mean"])


def test_a_reopened_task_learns_and_the_others_stay(model, x):
    learn(model, 0, x)
    learn(model, 1, x, SECOND_HALF)
    answers = [outputs(model, task, x) for task in range(2)]
    learn(model, 0, x, [[1.0, -1.0] * 3, [1.0, -1.0] * 4])
    assert not torch.equal(outputs(model, 0, x), answers[0])
    assert torch.equal(outputs(model, 1, x), answers[1])
    assert model.finished_tasks == (0, 1)
    assert model.masks(0)["0"].tolist() == [True, False] * 3
    verify_isolation(model)


def test_a_reopened_task_that_is_abandoned_is_as_it_was(model, x):
    learn(model, 0, x)
    expected = outputs(model, 0, x)
    model.begin_task(0)
    embed(model, 0, SECOND_HALF)
    with torch.no_grad():
        model.get_parameter("5.weight").add_(1.0)
    model.abort_task()
    assert torch.equal(outputs(model, 0, x), expected)
    assert model.finished_tasks == (0,)


@pytest.mark.parametrize("sizes", [5, [2, 3, 4]])
def test_heads_have_the_asked_sizes(net, x, sizes):
    model = hatify(net, TASKS, (x,), num_classes=sizes)
    expected = [sizes] * TASKS if isinstance(sizes, int) else sizes
    model.eval()
    assert [outputs(model, task, x).shape[1] for task in range(TASKS)] == expected
    weights = [model.get_submodule("7")[task].weight for task in range(TASKS)]
    assert not torch.equal(weights[0][:2], weights[1][:2])


def test_the_documented_loop_runs(net):
    data = [[(torch.randn(4, 3, 6, 6), torch.randint(2, (4,))) for _ in range(3)] for _ in range(2)]
    model = hatify(net, num_tasks=2, num_classes=2)
    for task, loader in enumerate(data):
        model.begin_task(task)
        optimizer = optim.AdamW(model.parameters())
        scale = MaskScale(model, steps=len(loader), schedule="cosine")
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y) + 0.75 * model.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scale.step()
        model.end_task()
    assert model.finished_tasks == (0, 1)


# Capacity -------------------------------------------------------------------------------------------------------------


def messages(record):
    return [str(w.message) for w in record]


def test_a_layer_that_is_off_keeps_its_strongest_feature_with_a_warning(model):
    model.begin_task(0)
    embed(model, 0, [[-3.0, -2.0, -0.5, -1.0, -4.0, -5.0], [1.0] * 4 + [-1.0] * 4])
    with pytest.warns(HatWarning) as record:
        model.end_task()
    assert messages(record) == ["0: task 0 has every feature off; its strongest one is kept on"]
    assert model.masks(0)["0"].tolist() == [False, False, True, False, False, False]


def test_a_layer_without_free_features_is_warned_of(model):
    model.begin_task(0)
    embed(model, 0, [[1.0] * 6, [1.0] * 7 + [-1.0]])
    model.end_task()
    with pytest.warns(CapacityWarning) as record:
        model.begin_task(1)
    (message,) = messages(record)
    assert (
        message
        == "0: no feature is left that is free of finished tasks; task 1 can only reuse them; model.widen(0.25) makes room"
    )


def test_capacity_counts_every_finished_task_but_the_one_that_is_reopened(model, x, recwarn):
    learn(model, 0, x, FIRST_HALF)
    learn(model, 1, x, SECOND_HALF)
    assert not recwarn
    model.begin_task(1)
    model.abort_task()
    assert not recwarn
    model.begin_task(2)
    assert [m.split(":")[0] for m in messages(recwarn)] == ["0, 5"]


def test_without_capacity_a_task_learns_and_nothing_earlier_changes(model, x):
    learn(model, 0, x, [[1.0] * 6, [1.0] * 8])
    before = outputs(model, 0, x)
    with pytest.warns(CapacityWarning, match="0, 5: "):
        learn(model, 1, x, [[1.0] * 6, [1.0] * 8])
    assert torch.equal(outputs(model, 0, x), before)
    assert not torch.equal(outputs(model, 1, x), before)


def test_warnings_point_at_the_callers_line(model):
    model.begin_task(0)
    embed(model, 0, [[-1.0, -2.0] * 3, [1.0] * 8])
    with pytest.warns(HatWarning) as record:
        model.end_task()
        model.begin_task(1)
    assert len(record) == 2
    assert {w.filename for w in record} == {__file__}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "7.0.bias", "1.0.running_var", "_hat.embeddings.0"])
def test_a_task_with_values_that_are_not_finite_cannot_be_ended(model, name, value):
    model.begin_task(0)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        tensors[name].view(-1)[0] = value
    with pytest.raises(HatError, match=rf"{name}.*not finite.*abort_task\(\)"):
        model.end_task()
    assert model.active_task == 0
    model.abort_task()
    assert model.active_task is None


# Abandoning -----------------------------------------------------------------------------------------------------------


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}


@pytest.mark.parametrize("finished", [0, 1])
def test_an_abandoned_task_leaves_no_trace(model, x, finished):
    for task in range(finished):
        learn(model, task, x)
    model.eval().set_task(0)
    before, answer, tasks = snapshot(model), model(x), model.finished_tasks
    model.begin_task(finished)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    for factor in (1.0, float("nan")):
        optimizer.zero_grad()
        (model(x).square().mean() * factor).backward()
        optimizer.step()
    assert model.get_parameter("0.weight").isnan().any()
    model.abort_task()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(x), answer)
    assert (model.finished_tasks, model.active_task, model.training) == (tasks, None, False)
    assert all(p.grad is None for p in model.parameters())


def test_an_abandoned_task_can_be_begun_again_as_if_nothing_had_been(model, x):
    learn(model, 0, x)
    twin = copy.deepcopy(model)
    model.begin_task(1)
    (model(x) * float("nan")).sum().backward()
    optim.SGD(model.parameters(), lr=0.1).step()
    model.abort_task()
    for each in (model, twin):
        learn(each, 1, x, SECOND_HALF)
    assert torch.equal(outputs(model, 0, x), outputs(twin, 0, x))
    assert torch.equal(outputs(model, 1, x), outputs(twin, 1, x))


# Trainable parameters -------------------------------------------------------------------------------------------------


def test_only_the_open_task_and_what_is_shared_gets_gradients(model, x):
    learn(model, 0, x)
    model.begin_task(1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    shared = {"0.weight", "0.bias", "5.weight", "5.bias"}
    assert trainable == shared | {"1.1.weight", "1.1.bias", "7.1.weight", "7.1.bias"}
    model.learn_masks()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable | {"_hat.embeddings.1"}


def test_parameters_that_were_frozen_stay_frozen(net, x):
    net[0].weight.requires_grad_(False)
    net[7].bias.requires_grad_(False)
    model = hatify(net, 2, (x,))
    weight = model.get_parameter("0.weight").detach().clone()
    learn(model, 0, x)
    learn(model, 1, x)
    assert not model.get_parameter("0.weight").requires_grad
    assert torch.equal(model.get_parameter("0.weight"), weight)
    for task in range(2):
        assert torch.equal(model.get_submodule("7")[task].bias, net[7].bias)
