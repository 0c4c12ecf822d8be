"""Copies, files, dtypes, compilers, process groups: whatever people do with a model, locks survive it."""

import copy
import io
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F

from hatify import HatModel, MaskScale, TaskError, hatify, verify_isolation

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


class Net(nn.Module):
    """Convolution, batch norm, layer norm, a raw parameter, a residual stream, dropout, and a branch by mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.bias = nn.Parameter(torch.randn(6))
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu().mean((2, 3)) + self.bias
        x = x + self.fc2(F.dropout(F.gelu(self.fc1(self.norm(x))), 0.1, self.training))
        if self.training:
            x = x * 1.0
        return self.head(x)


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6)


@pytest.fixture
def model(x):
    """Task 0 is finished."""
    model = hatify(Net(), 3, (x,), s_max=10.0)
    train(model, 0, x)
    return model


def set_masks(model, task):
    slots = torch.arange(model.task_state.num_slots)
    with torch.no_grad():
        model.task_state.embeddings[task].copy_(torch.where(slots % (2 + task) == 0, 1.0, -1.0))


def steps(model, x, count=2, call=None):
    """A few steps, with weight decay, that move a good deal."""
    call = call or model
    # In float16, Adam's epsilon is zero.
    kind = torch.optim.SGD if x.dtype == torch.float16 else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(count):
        optimizer.zero_grad()
        (call(x).float().square().mean() + model.regularization()).backward()
        optimizer.step()


def train(model, task, x, call=None):
    model.begin_task(task)
    set_masks(model, task)
    steps(model, x, call=call)
    model.end_task()


@torch.no_grad()
def outputs(model, task, x):
    training = model.training
    with model.task(task):
        answer = model.eval()(x)
    model.train(training)
    return answer


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if torch.is_tensor(value) else value == b[name], name


# Copies ---------------------------------------------------------------------------------------------------------------


@COPIES
def test_a_copy_is_the_same_model(copied, model, x):
    twin = copied(model)
    assert isinstance(twin, HatModel) and twin is not model
    assert_same_state(twin, model)
    assert torch.equal(outputs(twin, 0, x), outputs(model, 0, x))
    assert (twin.num_tasks, twin.finished_tasks, twin.active_task) == (3, (0,), None)
    assert (twin.s_max, twin.training, twin.code) == (model.s_max, model.training, model.code)
    assert twin.census == model.census
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


@COPIES
def test_a_copy_goes_on_learning_on_its_own(copied, model, x):
    twin = copied(model)
    expected, state = outputs(model, 0, x), copy.deepcopy(model.state_dict())
    train(twin, 1, x)
    assert torch.equal(outputs(twin, 0, x), expected)
    verify_isolation(twin)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if torch.is_tensor(v))
    assert model.finished_tasks == (0,)


@COPIES
def test_a_copy_in_mid_task_keeps_protecting(copied, model, x):
    expected = outputs(model, 0, x)
    model.begin_task(1)
    set_masks(model, 1)
    steps(model, x, 1)
    twin = copied(model)
    assert twin.active_task == 1 and twin.training
    assert_same_state(twin, model)
    for each in (twin, model):
        steps(each, x)
        assert torch.equal(outputs(each, 0, x), expected)
    twin.end_task()
    verify_isolation(twin)
    assert model.active_task == 1
    model.end_task()
    verify_isolation(model)


@COPIES
def test_a_copy_in_mid_task_can_be_abandoned(copied, model, x):
    before = copy.deepcopy(model.state_dict())
    model.begin_task(1)
    steps(model, x, 1)
    twin = copied(model)
    steps(twin, x, 1)
    twin.abort_task()
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items() if torch.is_tensor(v))
    assert twin.finished_tasks == (0,) and twin.active_task is None


@COPIES
def test_a_copy_switches_modes_like_the_original(copied, model, x):
    twin = copied(model)
    model.begin_task(1)
    twin.begin_task(1)
    assert twin.code == model.code
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(twin(x), expected)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_state_dict_restores_a_model_converted_anew(model, x):
    train(model, 1, x)
    fresh = hatify(Net(), 3, (x,), s_max=10.0)
    fresh.load_state_dict(model.state_dict())
    assert fresh.finished_tasks == (0, 1)
    for task in range(3):
        assert torch.equal(outputs(fresh, task, x), outputs(model, task, x))
        assert all(torch.equal(mask, model.masks(task)[name]) for name, mask in fresh.masks(task).items())
    expected = outputs(fresh, 0, x)
    train(fresh, 2, x)
    assert torch.equal(outputs(fresh, 0, x), expected)
    verify_isolation(fresh)


def test_a_state_dict_can_be_loaded_with_weights_only(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = hatify(Net(), 3, (torch.randn(2, 3, 6, 6),), s_max=10.0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(fresh, model)


def test_a_state_dict_of_a_task_in_progress_goes_on_protected(model, x):
    expected = outputs(model, 0, x)
    model.begin_task(1)
    set_masks(model, 1)
    steps(model, x, 1)
    fresh = hatify(Net(), 3, (x,), s_max=10.0)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert fresh.active_task == 1
    fresh.train()
    steps(fresh, x)
    assert torch.equal(outputs(fresh, 0, x), expected)
    fresh.end_task()
    assert fresh.finished_tasks == (0, 1)
    verify_isolation(fresh)


def test_a_state_dict_without_a_task_in_progress_closes_an_open_one(model, x):
    state = copy.deepcopy(model.state_dict())
    expected = outputs(model, 0, x)
    model.begin_task(1)
    steps(model, x, 1)
    model.load_state_dict(state)
    assert model.active_task is None
    with pytest.raises(TaskError, match="begin_task"):
        model.end_task()
    assert torch.equal(outputs(model, 0, x), expected)
    train(model, 1, x)
    assert torch.equal(outputs(model, 0, x), expected)


def test_a_fresh_process_gives_the_same_answers_bit_for_bit(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        from torch import nn
        from hatify import hatify

        torch.set_num_threads(1)
        folder = sys.argv[1]
        layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        model = hatify(net, 3, (torch.randn(2, 3, 6, 6),))
        model.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
        whole = torch.load(f"{folder}/model.pt", weights_only=False)
        x, answers = torch.load(f"{folder}/answers.pt")
        for each in (model, whole):
            assert each.finished_tasks == (0, 1), each.finished_tasks
            each.eval()
            for task, answer in enumerate(answers):
                with each.task(task), torch.no_grad():
                    assert torch.equal(each(x), answer), task
        """
    )
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(4, 3, 6, 6)
    model = hatify(net, 3, (x,), s_max=10.0)
    for task in range(2):
        train(model, task, x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    torch.save((x, [outputs(model, task, x) for task in range(3)]), tmp_path / "answers.pt")
    (tmp_path / "check.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", tmp_path / "check.py", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Precisions -----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_converted_model_can_be_cast(dtype, model, x):
    expected = outputs(model, 0, x)
    model.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    answer = outputs(model, 0, x.to(dtype))
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_the_short_forms_of_casting_work(cast, model, x):
    getattr(model, cast)()
    dtype = next(model.parameters()).dtype
    assert dtype == {"double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}[cast]
    assert outputs(model, 0, x.to(dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_of_any_precision_converts_learns_and_is_isolated(dtype, x):
    net, x = Net().to(dtype), x.to(dtype)
    model = hatify(net, 2, (x,), s_max=10.0)
    torch.testing.assert_close(outputs(model, 0, x), net.eval()(x), rtol=0.02, atol=0.02)
    train(model, 0, x)
    expected = outputs(model, 0, x)
    train(model, 1, x)
    assert expected.isfinite().all()
    assert torch.equal(outputs(model, 0, x), expected)
    verify_isolation(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_in_mid_task_keeps_protecting(dtype, model, x):
    model.begin_task(1)
    set_masks(model, 1)
    steps(model, x, 1)
    model.to(dtype)
    x = x.to(dtype)
    expected = outputs(model, 0, x)
    steps(model, x)
    assert torch.equal(outputs(model, 0, x), expected)
    model.end_task()
    verify_isolation(model, (x,))


def test_a_cast_in_mid_task_can_be_abandoned(model, x):
    expected = outputs(copy.deepcopy(model).double(), 0, x.double())
    model.begin_task(1)
    model.double()
    steps(model, x.double())
    model.abort_task()
    assert torch.equal(outputs(model, 0, x.double()), expected)


def test_moving_to_where_it_is_changes_nothing(model, x):
    model.begin_task(1)
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    expected = outputs(model, 0, x)
    model.to("cpu").float().cpu()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    model(x).sum().backward()
    optimizer.step()
    assert torch.equal(outputs(model, 0, x), expected)


# Compilers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_captures_training_and_evaluation_whole(backend, model, x):
    torch._dynamo.reset()
    expected = outputs(model, 0, x)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    model.begin_task(1)
    set_masks(model, 1)
    scale = MaskScale(model, steps=3, schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (compiled(x).square().mean() + model.regularization()).backward()
        assert model.task_state.embeddings[1].grad.abs().sum() > 0
        optimizer.step()
        scale.step()
    model.end_task()
    assert torch.equal(outputs(model, 0, x), expected)
    verify_isolation(model)
    for task in range(2):
        with model.task(task), torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_a_compiled_step_is_the_eager_step(model, x):
    torch._dynamo.reset()
    x = x.double()
    eager, compiled = model.double(), copy.deepcopy(model)
    call = torch.compile(compiled, backend="eager", fullgraph=True)
    for each in (eager, compiled):
        each.begin_task(1)
        set_masks(each, 1)
        each.mask_scale = 1.0
    for forward in (eager, call):
        torch.manual_seed(0)
        forward(x).square().mean().backward()
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_the_evaluation_model_can_be_exported(model, x):
    for task in (0, 1):
        model.set_task(task)
        program = torch.export.export(model.eval(), (x,))
        torch.testing.assert_close(program.module()(x), model(x))


def test_inference_mode_leaves_nothing_behind(model, x):
    model.set_task(0)
    with torch.inference_mode():
        expected = model(x)
    x.requires_grad_()
    answer = model(x)
    assert torch.equal(answer, expected)
    answer.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_leaves_nothing_behind(strict, model, x):
    model.set_task(0)
    torch.export.export(model, (x,), strict=strict)
    twin = copy.deepcopy(model)
    assert type(model(x)) is torch.Tensor
    assert torch.equal(model(x), twin(x))


def test_functional_call_works_with_weights_from_elsewhere(model, x):
    state = {name: value.clone() for name, value in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, state, (x,)), model(x))


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_training_is_isolated(model, x):
    expected = outputs(model, 0, x)
    before = model.get_parameter("fc1.weight").detach().clone()
    model.begin_task(1)
    set_masks(model, 1)
    steps(model, x, call=nn.parallel.DistributedDataParallel(model))
    model.end_task()
    assert not torch.equal(model.get_parameter("fc1.weight"), before)
    assert torch.equal(outputs(model, 0, x), expected)
    verify_isolation(model)


# Reading the result ---------------------------------------------------------------------------------------------------


def test_the_code_shows_the_original_structure_and_the_masks(model):
    code = model.eval().code
    for name in ("conv", "bn", "fc1", "norm", "fc2", "head"):
        assert f"self.{name}(" in code
    assert "masks = self._hat()" in code
    for name in ("conv", "fc1"):
        assert f"{name}_mask = masks['{name}']" in code
    assert "self.fc1(norm, mask = fc1_mask)" in code
    assert "self.bias" in code
    order = [code.index(f"self.{name}(") for name in ("conv", "bn", "norm", "fc1", "fc2", "head")]
    assert order == sorted(order)


def test_the_graph_prints_as_a_table(model, capsys):
    pytest.importorskip("tabulate", reason="torch.fx needs tabulate for print_tabular")
    model.graph.print_tabular()
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("call_module", "conv", "fc1_mask", "_hat"))


def test_the_model_prints_its_modules(model):
    printed = repr(model)
    assert printed.startswith("HatModel(")
    assert "(conv): " in printed and "(head): PerTask(" in printed


def test_shared_parameters_keep_their_names_and_shapes(model):
    original = dict(Net().named_parameters())
    kept = dict(model.named_parameters())
    for name in ("conv.weight", "conv.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "bias"):
        assert kept[name].shape == original[name].shape
    for task in range(3):
        for name in ("bn", "norm", "head"):
            assert kept[f"{name}.{task}.weight"].shape == original[f"{name}.weight"].shape
    ours = {name for name in kept if name.startswith("_hat.")}
    assert ours == {f"_hat.embeddings.{task}" for task in range(3)}
    assert len(kept) == 7 + 3 * 6 + 3


def test_shared_weights_are_those_of_the_network(x):
    net = Net()
    model = hatify(net, 2, (x,))
    for name in ("conv.weight", "fc1.weight", "bias"):
        assert torch.equal(model.get_parameter(name), net.get_parameter(name))
        assert model.get_parameter(name) is not net.get_parameter(name)
