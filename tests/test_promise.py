"""From `end_task` on, whatever users do between tasks, on other threads or with the model's weights, answers stay."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import hatify
from hatify import HatError, HatModel, TaskError
from hatify.lock import named_tensors
from small import SmallNet, answers, converted, images, learn, same, same_state, step

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture
def model() -> HatModel:
    """Tasks 0 and 1 are finished."""
    model = converted()
    for task in range(2):
        learn(model, task)
    return model


def shared(model: HatModel) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name in model.uses]


# Between tasks -------------------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("how", ["as it ended", "loaded", "copied", "cast"])
def test_a_forgotten_begin_task(model: HatModel, optimizer: str, how: str, tmp_path) -> None:
    if how == "loaded":
        hatify.save(model, tmp_path / "model")
        model = hatify.load(tmp_path / "model", SmallNet())
    model = copy.deepcopy(model) if how == "copied" else model.float() if how == "cast" else model
    expected = answers(model)
    made = OPTIMIZERS[optimizer](model.parameters())
    model.eval()

    def closure() -> Tensor:
        value = model(images()).square().sum()
        value.backward()
        return value

    for _ in range(3):
        made.step(closure)
        assert all(p.grad is None for p in shared(model))
        assert same(answers(model), expected)
    learn(model, 2)
    assert same(answers(model, [0, 1]), expected)


@each_optimizer
def test_gradients_left_over(model: HatModel, optimizer: str) -> None:
    expected = answers(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made = OPTIMIZERS[optimizer](model.parameters())
    made.step(lambda: torch.ones(()))
    assert same(answers(model), expected) and all(p.grad is None for p in shared(model))


def test_a_step_after_the_task_with_the_momentum_of_the_task() -> None:
    model = converted()
    model.begin_task(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    model.end_task()
    expected = answers(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what is zero moves by its momentum
    optimizer.step()
    assert same(answers(model), expected)


def test_saliency_can_be_asked_for(model: HatModel) -> None:
    weight = model.get_parameter("conv.weight")
    (gradient,) = torch.autograd.grad(model(images()).sum(), weight)
    assert gradient.ne(0).any()


class ScheduleFree(torch.optim.Optimizer):
    """Steps at one point, answers at another: `eval` and `train` swap weights (Defazio et al. 2024)."""

    def __init__(self, parameters, lr: float = 0.1, through_data: bool = False) -> None:
        super().__init__(parameters, {"lr": lr})
        self.through_data, self.training, self.count = through_data, True, 0

    def _swap(self, weight: float) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if "z" in self.state[parameter]:
                target = parameter.data if self.through_data else parameter
                with torch.no_grad():
                    target.lerp_(self.state[parameter]["z"], weight)

    def eval(self) -> None:
        if self.training:
            self._swap(1 - 1 / 0.9)
        self.training = False

    def train(self) -> None:
        if not self.training:
            self._swap(1 - 0.9)
        self.training = True

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert self.training
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    z = self.state[parameter].setdefault("z", parameter.detach().clone())
                    z.sub_(parameter.grad + 0.1 * parameter, alpha=group["lr"])
                    parameter.lerp_(z, 1 / (self.count + 1))


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.filterwarnings("error::hatify.HatWarning")
@pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")
def test_an_optimizer_that_swaps_weights_when_it_is_switched(through_data: bool) -> None:
    model = converted()
    optimizer = ScheduleFree(model.parameters(), through_data=through_data)
    expected: list[Tensor] = []
    for task in range(3):
        optimizer.train()
        model.begin_task(task)
        for i in range(3):
            step(model, optimizer, i)
        optimizer.eval()
        assert same(answers(model, range(task)), expected)
        model.train()
        optimizer.train()
        step(model, optimizer)
        optimizer.eval()
        model.end_task()
        expected = answers(model)
        optimizer.train()
        assert same(answers(model), expected)
        optimizer.eval()
        assert same(answers(model), expected)


@pytest.mark.parametrize("through_data", [False, True])
def test_what_is_written_outside_of_steps_is_put_right_at_the_next_call(model: HatModel, through_data: bool) -> None:
    expected = answers(model)
    for opened in (False, True):
        for parameter in model.parameters():
            with torch.no_grad():
                (parameter.data if through_data else parameter).mul_(0.9)
        assert same(answers(model, [0, 1]), expected)
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.9
        if not opened:
            model.begin_task(2)  # puts right, too
    model.abort_task()
    assert same(answers(model), expected)


@pytest.mark.parametrize("what", ["state_dict", "deepcopy", "save", "add_tasks", "forget_task"])
def test_what_is_written_between_tasks_is_not_taken_over(model: HatModel, what: str, tmp_path) -> None:
    expected, kept = answers(model), copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(0.9)
    if what == "state_dict":
        kept.load_state_dict(model.state_dict())
    elif what == "deepcopy":
        kept = copy.deepcopy(model)
    elif what == "save":
        hatify.save(model, tmp_path / "model")
        kept = hatify.load(tmp_path / "model", SmallNet())
    elif what == "add_tasks":
        model.add_tasks(1)
        kept = model
    else:
        hatify.forget_task(model, 0)
        kept = model
    assert same(answers(kept, [1]), expected[1:])


@pytest.mark.parametrize("opened", [False, True])
def test_buffers_that_are_overwritten_are_put_right(model: HatModel, opened: bool) -> None:
    expected = answers(model)
    if opened:
        model.begin_task(2)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.ndim:
            buffer.mul_(0.5)
    model.task_state.finished_masks.fill_(True)
    assert same(answers(model, [0, 1]), expected)


def test_a_model_that_only_answers_keeps_no_copy(model: HatModel, tmp_path) -> None:
    hatify.save(model, tmp_path / "model")
    loaded = hatify.load(tmp_path / "model", SmallNet())
    assert same(answers(loaded), answers(model))
    assert not loaded.guard.is_built and model.guard.is_built
    loaded(images()).sum().backward()
    assert loaded.guard.is_built


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("then", ["asked", "begun", "stepped", "copied", "saved"])
def test_writing_to_a_loaded_model_of_which_there_is_no_copy_is_refused(
    model: HatModel, through_data: bool, then: str, tmp_path
) -> None:
    hatify.save(model, tmp_path / "model")
    loaded = hatify.load(tmp_path / "model", SmallNet())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    with torch.no_grad():
        weight = loaded.conv.weight.data if through_data else loaded.conv.weight
        weight.mul_(0.5)
    does = {
        "asked": lambda: loaded.eval()(images()),
        "begun": lambda: loaded.begin_task(2),
        "stepped": optimizer.step,
        "copied": lambda: copy.deepcopy(loaded),
        "saved": loaded.state_dict,
    }
    with pytest.raises(HatError, match=r"conv\.weight: written to after the model was loaded"):
        does[then]()
    hatify.load(tmp_path / "model", SmallNet()).eval()(images())


def test_writing_what_is_there_already_to_a_loaded_model_is_no_fault(model: HatModel, tmp_path) -> None:
    hatify.save(model, tmp_path / "model")
    loaded = hatify.load(tmp_path / "model", SmallNet())
    with torch.no_grad():
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.copy_(tensor.clone())
    for tensor in loaded.parameters():
        tensor.data = tensor.data.clone()
    assert same(answers(loaded), answers(model))
    loaded.load_state_dict(model.state_dict())
    learn(loaded, 2)
    assert same(answers(loaded, [0, 1]), answers(model))


def test_a_copy_of_a_model_that_has_learned_is_put_right(model: HatModel) -> None:
    expected, copied = answers(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    assert same(answers(copied, [0, 1]), expected[:2])


def test_buffers_written_to_through_data_are_put_right(model: HatModel) -> None:
    expected = answers(model)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.ndim:
            buffer.data.mul_(0.5)
    assert same(answers(model), expected)


def replace_objects(model: HatModel) -> None:
    """As averaging callbacks do."""
    model.fc.weight = nn.Parameter(torch.randn_like(model.fc.weight))
    for norm in model.bn:
        norm.running_mean = torch.zeros_like(norm.running_mean)


@pytest.mark.parametrize("how", ["cast", "copied", "pickled", "state", "saved", "extracted"])
def test_what_was_replaced_is_put_right_before_it_is_taken_over(model: HatModel, how: str, tmp_path) -> None:
    expected = answers(model)
    replace_objects(model)
    if how == "cast":
        model.float()
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif how == "state":
        state, model = model.state_dict(), converted()
        model.load_state_dict(state)
    elif how == "saved":
        hatify.save(model, tmp_path / "model")
        model = hatify.load(tmp_path / "model", SmallNet())
    else:
        plain = hatify.extract_task(model, 0, compact=False)
        assert torch.equal(plain(images()), expected[0])
    assert same(answers(model, [0, 1]), expected)


def test_what_was_replaced_in_a_loaded_model_is_refused(model: HatModel, tmp_path) -> None:
    hatify.save(model, tmp_path / "model")
    loaded = hatify.load(tmp_path / "model", SmallNet())
    loaded.conv.weight = nn.Parameter(loaded.conv.weight.detach().clone())
    assert same(answers(copy.deepcopy(loaded)), answers(model))
    loaded.conv.weight = nn.Parameter(loaded.conv.weight.detach() * 0.5)
    with pytest.raises(HatError, match=r"conv\.weight: written to after the model was loaded"):
        loaded.begin_task(2)
    model.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    with pytest.raises(HatError, match=r"conv\.weight: has the shape \(4, 3, 3, 3\) now, and had"):
        model.begin_task(2)


def test_extraction_takes_what_is_put_right(model: HatModel) -> None:
    expected = answers(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(hatify.extract_task(model, 0, compact=False)(images()), expected[0])


# Other weights for one call ------------------------------------------------------------------------------------------


def test_calls_with_other_states_leave_no_trace(model: HatModel) -> None:
    other = converted()
    for task in range(2):
        learn(other, task, steps=5)
    expected, of_other, x = answers(model), answers(other), images()
    for m in (model, other):
        m.eval().set_task(0)
    model.load_state_dict(model.state_dict())  # nothing is remembered
    with torch.no_grad():
        for i in range(4):  # memory is used again
            noisy = {k: v + i if v.is_floating_point() else v.clone() for k, v in other.state_dict().items()}
            torch.func.functional_call(model, noisy, (x,))
            del noisy
        assert torch.equal(torch.func.functional_call(model, other.state_dict(), (x,)), of_other[0])
        stacked = [
            {name: torch.stack((tensor, dict(tensors(other))[name])) for name, tensor in tensors(model)}
            for tensors in (nn.Module.named_parameters, nn.Module.named_buffers)
        ]
        both = torch.func.vmap(lambda *state: torch.func.functional_call(model, state, (x,)))(*stacked)
    torch.testing.assert_close(both, torch.stack((expected[0], of_other[0])))
    assert same(answers(model), expected)


def test_a_task_that_has_just_ended_can_be_traced(model: HatModel) -> None:
    learn(model, 2)
    for norms in (model, hatify.hatify(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), 1)):
        if norms.active_task is None and not norms.finished_tasks:
            norms.begin_task(0)
            norms.end_task()
        x = images() if norms is model else torch.randn(3, 4)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the number of active features becomes a constant
            assert torch.equal(torch.jit.trace(norms.eval(), x)(x), norms(x))


# Threads -------------------------------------------------------------------------------------------------------------


def test_two_threads_each_ask_their_task(model: HatModel) -> None:
    expected, wrong = answers(model), []
    barrier = threading.Barrier(2)

    def ask(task: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                with model.task(task):
                    barrier.wait()
                    found = model(images())
                if not torch.equal(found, expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=ask, args=(task,)) for task in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and model.task_state.task == 1


def test_two_asyncio_tasks_each_ask_their_task(model: HatModel) -> None:
    expected = answers(model)

    async def ask(task: int) -> bool:
        right = True
        for _ in range(20):
            with model.task(task):
                await asyncio.sleep(0)
                right &= torch.equal(model(images()), expected[task])
                await asyncio.sleep(0)
        return right

    async def both() -> list[bool]:
        return await asyncio.gather(ask(0), ask(1))

    assert asyncio.run(both()) == [True, True]


def test_mixed_batches_in_one_thread_do_not_disturb_another(model: HatModel) -> None:
    expected, found = answers(model), []
    with model.task(torch.tensor([0, 1, 0, 1, 1])):
        thread = threading.Thread(target=lambda: found.append(model(images())))
        thread.start()
        thread.join()
        mixed = model(images())
    assert torch.equal(found[0], expected[1])
    assert all(
        torch.allclose(row, expected[task][i]) for i, (row, task) in enumerate(zip(mixed, [0, 1, 0, 1, 1], strict=True))
    )


def test_set_task_is_for_all(model: HatModel) -> None:
    expected, found = answers(model), []
    model.set_task(0)
    thread = threading.Thread(target=lambda: found.append(model(images())))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected[0])
    with model.task(1):
        model.set_task(0)
        assert torch.equal(model(images()), expected[0])
        assert torch.equal(copy.deepcopy(model)(images()), expected[0])
    with model.task(1), model.task(0):
        assert torch.equal(model(images()), expected[0])
    assert model.task_state.task == 0


# Conversion ----------------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """Writes to parameters while it trains, as moving averages do."""

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.codes, self.through_data = nn.Parameter(torch.randn(6)), through_data

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.training:
            codes = self.codes.data if self.through_data else self.codes.detach()
            codes.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.head(h + self.codes)


@pytest.mark.parametrize("through_data", [False, True])
def test_conversion_leaves_weights_that_training_writes_to(through_data: bool) -> None:
    net = Codebook(through_data)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = hatify.hatify(net, 2, torch.randn(3, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(model.eval()(torch.ones(2, 4)), net.eval()(torch.ones(2, 4)))
    for task in range(2):
        model.begin_task(task)
        model(torch.randn(3, 4)).sum().backward()
        model.end_task()
        if task == 0:
            expected = answers(model, [0], torch.ones(2, 4))
    assert same(answers(model, [0], torch.ones(2, 4)), expected)


# Models that are changed after conversion ----------------------------------------------------------------------------


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class LowRank(nn.Module):
    """An adapter as peft makes them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.base_layer(x, mask=mask) + self.up(self.down(x))


WRAPPED = {
    "parametrized": lambda model: parametrize.register_parametrization(model.fc, "weight", Half()),
    "weight norm": lambda model: parametrizations.weight_norm(model.fc),
    "pruned": lambda model: prune.l1_unstructured(model.fc, "weight", 0.5),
    "adapter": lambda model: setattr(model, "fc", LowRank(model.fc)),
    "replaced": lambda model: model.set_submodule("fc", nn.Sequential(model.fc)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_was_wrapped_is_found_at_begin_task(model: HatModel, how: str) -> None:
    WRAPPED[how](model)
    with pytest.raises(HatError, match=r"fc\.(weight|bias) is gone .* has wrapped, pruned or parametrised fc"):
        model.begin_task(2)
    assert model.active_task is None


@pytest.mark.parametrize("how", WRAPPED)
def test_what_was_wrapped_is_found_at_end_task_and_can_be_abandoned(model: HatModel, how: str) -> None:
    expected, fc = answers(model), model.fc
    model.begin_task(2)
    WRAPPED[how](model)
    with pytest.raises(HatError, match=r"fc\.(weight|bias) is gone"):
        model.end_task()
    assert model.active_task == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.abort_task()
    assert model.active_task is None and model.finished_tasks == (0, 1)
    if how == "parametrized":
        parametrize.remove_parametrizations(model.fc, "weight", leave_parametrized=False)
    elif how in ("adapter", "replaced"):
        model.fc = fc
    else:
        return
    assert same(answers(model), expected)
    learn(model, 2)
    assert same(answers(model, [0, 1]), expected)


def test_a_parameter_added_by_a_hook_is_found(model: HatModel) -> None:
    model.begin_task(2)
    model.fc.register_parameter("extra", nn.Parameter(torch.zeros(8)))
    handle = model.fc.register_forward_hook(lambda module, _, out: out + module.extra)
    with pytest.raises(HatError, match=r"fc\.extra was added to the converted model"):
        model(images())
    with pytest.raises(HatError, match=r"fc\.extra was added"):
        model.end_task()
    model.abort_task()
    with pytest.raises(HatError, match=r"fc\.extra was added"):
        model.begin_task(2)
    handle.remove()
    del model.fc.extra
    learn(model, 2)


def test_a_parameter_that_only_a_hook_knows_is_found(model: HatModel) -> None:
    extra = nn.Parameter(torch.zeros(8))
    handle = model.fc.register_forward_hook(lambda module, _, out: out + extra)
    model.begin_task(2)
    with pytest.raises(HatError, match=r"a parameter of shape \(8,\) takes part .* forward hook on fc"):
        model(images())
    handle.remove()
    model(images())
    model.end_task()


def test_other_networks_and_hooks_that_only_look_are_welcome(model: HatModel) -> None:
    before, seen = nn.Conv2d(1, 3, 1), []
    handle = model.fc.register_forward_hook(lambda *_: seen.append(1))
    prompt = nn.Parameter(torch.zeros(3, 6, 6))
    model.begin_task(2)
    model(before(torch.randn(2, 1, 6, 6)) + prompt).sum().backward()
    model(prompt.expand(2, -1, -1, -1)).sum().backward()
    assert seen and prompt.grad is not None and before.weight.grad is not None
    handle.remove()
    model.end_task()


def replaced_activation(model: HatModel) -> None:
    model.act = nn.Sigmoid()


def replaced_layer(model: HatModel) -> None:
    model.fc = nn.Linear(8, 8)


def another_eps(model: HatModel) -> None:
    for norm in model.bn:
        norm.eps = 1e-3


def a_hook_that_adds(model: HatModel) -> None:
    model.fc.register_forward_hook(lambda module, _, out: out + 1)


CHANGES = {
    replaced_activation: r"act\b",
    replaced_layer: r"fc: the HatLinear that conversion has put there is Linear now",
    another_eps: r"bn\.0\.eps has become 0\.001",
    a_hook_that_adds: r"fc\._forward_hooks has changed",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_was_changed_while_a_task_was_open_is_found(model: HatModel, change) -> None:
    model.begin_task(2)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    change(model)
    with pytest.raises(HatError, match=CHANGES[change]):
        model.end_task()
    assert model.active_task == 2
    model.abort_task()


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_was_changed_between_tasks_is_found(model: HatModel, change) -> None:
    change(model)
    with pytest.raises(HatError, match=CHANGES[change]):
        model.begin_task(2)
    assert model.active_task is None


def test_settings_that_change_no_answer_may_change(model: HatModel) -> None:
    for do in (model.begin_task, lambda _: model.end_task()):
        model.shift_by = 3
        model.conv.note = "seen"
        do(2)
    assert model.finished_tasks == (0, 1, 2)


def test_a_hook_whose_own_numbers_change_is_found(model: HatModel) -> None:
    outside = torch.zeros(8)
    model.fc.register_forward_hook(lambda module, _, out: out + outside)
    model.begin_task(2)
    outside += 100
    with pytest.raises(HatError, match="something that is no part of the model, perhaps a hook, has changed"):
        model.end_task()


def test_a_parameter_that_only_a_hook_knows_is_found_in_evaluation_mode(model: HatModel) -> None:
    extra = nn.Parameter(torch.zeros(8))
    model.begin_task(2)
    model.fc.register_forward_hook(lambda module, _, out: out + extra)
    with pytest.raises(HatError, match=r"a parameter of shape \(8,\) takes part .* forward hook on fc"):
        model.eval()(images())


def wrapped_forward(model: HatModel) -> None:
    forward = model.fc.forward
    model.fc.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.01


def a_hook_on_everything(model: HatModel) -> None:
    model.handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: out * 1.005 if isinstance(out, Tensor) else None
    )


@pytest.mark.parametrize(
    ("change", "name"), [(wrapped_forward, r"fc\.forward"), (a_hook_on_everything, "global_hooks")]
)
def test_small_changes_from_outside_are_found(model: HatModel, change, name: str) -> None:
    model.begin_task(2)
    change(model)
    try:
        with pytest.raises(HatError, match=f"does not answer as before, since {name} has changed"):
            model.end_task()
    finally:
        if hasattr(model, "handle"):
            model.handle.remove()


@pytest.mark.parametrize("begin", [False, True])
def test_autocast_around_begin_or_end_is_no_fault(model: HatModel, begin: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=begin):
        model.begin_task(2)
    model.act.note = 0.3
    with torch.autocast("cpu", torch.bfloat16, enabled=not begin):
        model.end_task()
    assert model.finished_tasks == (0, 1, 2)


def test_a_normalisation_that_cannot_be_masked_is_named(model: HatModel) -> None:
    for task, norm in enumerate(model.bn):
        model.bn[task] = nn.LocalResponseNorm(2)
        assert norm is not None
    with pytest.raises(HatError, match="a LocalResponseNorm has taken the place of a normalisation"):
        model.eval()(images())


def test_begin_task_in_inference_mode_is_refused(model: HatModel) -> None:
    with torch.inference_mode(), pytest.raises(TaskError, match=r"inside torch\.inference_mode"):
        model.begin_task(2)


def test_a_swap_that_rounds_gives_one_warning(model: HatModel) -> None:
    model.begin_task(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0000001)
    with pytest.warns(hatify.HatWarning, match="fc.*more: .* entries that finished tasks own were changed") as caught:
        model.end_task()
    assert sum("outside any" in str(w.message) for w in caught) == 1


def test_gradients_of_each_sample(model: HatModel) -> None:
    model = hatify.hatify(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), 1)
    model.begin_task(0)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 4)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        for name, gradient in torch.func.grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], gradient)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_free_entries_that_are_huge_are_refused(model: HatModel) -> None:
    expected = answers(model)
    model.begin_task(2)
    free = ~model.masks(0)["fc"] & ~model.masks(1)["fc"]
    with torch.no_grad():
        model.fc.weight[free] = 1e38
        model.conv.weight[~model.masks(0)["conv"] & ~model.masks(1)["conv"]] = 1e38
    assert not torch.isfinite(answers(model, [0])[0]).all()
    with pytest.raises(HatError, match=r"task 0 does not answer as before: .* call\s+abort_task\(\)"):
        model.end_task()
    assert model.active_task == 2
    model.abort_task()
    assert same(answers(model), expected)


def test_rounding_that_differs_from_begin_to_end_is_no_fault(model: HatModel) -> None:
    model.begin_task(2)
    for task in (0, 1):  # as other kernels would have answered
        model.known_answers.of[task] = [y + 1e-7 for y in model.known_answers.of[task]]
    model.end_task()
    assert model.finished_tasks == (0, 1, 2)


def test_example_inputs_that_cannot_be_asked_any_more_do_no_harm(model: HatModel) -> None:
    model.__dict__["example_inputs"] = (torch.randn(2, 1, 6, 6),)
    learn(model, 2)
    assert model.finished_tasks == (0, 1, 2)


# What the user has frozen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before any task", "between tasks", "within a task"])
def test_frozen_stays_frozen(when: str) -> None:
    model = converted()
    if when == "before any task":
        model.bn.requires_grad_(False)
    else:
        learn(model, 0)
        if when == "between tasks":
            model.bn.requires_grad_(False)
    for task in range(3)[-model.num_tasks + len(model.finished_tasks) :]:
        model.begin_task(task)
        if when == "within a task":
            model.bn.requires_grad_(False)
        frozen = [p.detach().clone() for p in model.bn[task].parameters()]
        assert not any(p.requires_grad for p in model.bn.parameters())
        assert all(p.requires_grad for p in model.head[task].parameters())
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert all(torch.equal(p, q) for p, q in zip(model.bn[task].parameters(), frozen, strict=True))
        model.end_task()
        assert not any(p.requires_grad for p in model.bn.parameters())


def test_one_tasks_own_can_be_frozen_and_thawed() -> None:
    model = converted()
    model.head[1].requires_grad_(False)
    for task in range(2):
        model.begin_task(task)
        assert all(p.requires_grad is (task == 0) for p in model.head[task].parameters())
        model.abort_task()
    model.head[1].requires_grad_(True)
    model.begin_task(1)
    assert all(p.requires_grad for p in model.head[1].parameters())
    model.abort_task()
    model.head[2].requires_grad_(False)
    copied = copy.deepcopy(model)
    copied.add_tasks(1)
    copied.begin_task(2)
    assert not any(p.requires_grad for p in copied.head[2].parameters())


# State dictionaries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_weights_of_the_original_do_not_overwrite_finished_tasks(model: HatModel, opened: bool, strict: bool) -> None:
    if opened:
        model.begin_task(2)
    before = copy.deepcopy(model)
    with pytest.raises(TaskError, match=r"load_state_dict: tasks 0, 1(, 2)? have learned .*load_plain_state_dict"):
        model.load_state_dict(SmallNet().state_dict(), strict=strict)
    with pytest.raises(TaskError, match="load_state_dict"):
        model.load_state_dict({"bn.0.weight": torch.zeros(8)}, strict=False)
    with pytest.raises(TaskError, match="load_state_dict"):
        nn.ModuleDict({"inner": model}).load_state_dict({"inner.fc.weight": torch.zeros(8, 8)}, strict=False)
    assert same_state(model, before)


FAULTY = {
    "a key is missing": (lambda state: state.pop("fc.weight"), "missing: fc.weight"),
    "another shape": (lambda state: state.update({"fc.weight": torch.zeros(8, 9)}), "of another shape: fc.weight"),
    "one too many": (lambda state: state.update({"other": torch.zeros(1)}), "unexpected: other"),
    "no progress": (lambda state: state.pop("_hat._extra_state"), "missing: _hat._extra_state"),
    "masks and one layer": (
        lambda state: [state.pop(k) for k in list(state) if k not in ("fc.weight", "_hat.finished_masks")],
        "missing: tokens",
    ),
}


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("fault", FAULTY)
def test_a_state_that_does_not_fit_is_refused_as_a_whole(
    model: HatModel, opened: bool, wrapped: bool, fault: str
) -> None:
    if opened:
        model.begin_task(2)
    before, state = copy.deepcopy(model), copy.deepcopy(converted().state_dict())
    spoil, message = FAULTY[fault]
    spoil(state)
    holder: nn.Module = nn.ModuleDict({"inner": model}) if wrapped else model
    if wrapped:
        state = {f"inner.{key}": value for key, value in state.items()}
        message = message.replace(": ", ": inner.")
    strict = fault != "masks and one layer"
    if fault != "one too many" or not wrapped:
        with pytest.raises(hatify.CheckpointError, match=message):
            holder.load_state_dict(state, strict=strict)
        assert same_state(model, before) and model.task_state.progress() == before.task_state.progress()


def test_an_averaged_model_that_does_not_know_what_is_finished_is_refused() -> None:
    import timm.utils

    model = converted()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    for task in range(2):
        learn(model, task)
        average.update(model)
    before = copy.deepcopy(model)
    with pytest.raises(hatify.CheckpointError, match="masks of task 0, 1, but counts it as not finished"):
        model.load_state_dict(average.module.state_dict())
    assert same_state(model, before) and model.finished_tasks == (0, 1)


def test_a_fresh_model_still_takes_parts_of_the_original() -> None:
    model, net = converted(), SmallNet()
    model.load_state_dict(net.state_dict(), strict=False)
    assert torch.equal(model.fc.weight, net.fc.weight)


@pytest.mark.parametrize("opened", [False, True])
def test_the_state_dict_holds_tensors_only_and_loads_again(model: HatModel, opened: bool, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    if opened:
        model.begin_task(2)
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    save_file(state, tmp_path / "state.safetensors")
    other = converted()
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other.task_state.progress() == model.task_state.progress() and same_state(other, model)
    assert same(answers(other), answers(model))
    if opened:
        other.train()
        step(other, torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5))
        assert same(answers(other, [0, 1]), answers(model, [0, 1]))


def test_state_dicts_of_version_0_1_load(model: HatModel) -> None:
    state = model.state_dict()
    state["_hat._extra_state"] = {"task": 1, "learning": None, "task_before": 0, "finished": [True, True, False]}
    other = converted()
    other.load_state_dict(state)
    assert other.finished_tasks == (0, 1) and other.task_state.task == 1
    assert same(answers(other), answers(model))


def averages() -> Iterator[str]:
    import timm.utils

    yield from (name for name in ("ModelEma", "ModelEmaV2", "ModelEmaV3") if hasattr(timm.utils, name))


@pytest.mark.parametrize("name", averages())
def test_averaged_models_of_timm(model: HatModel, name: str) -> None:
    import timm.utils

    expected = answers(model)
    model.begin_task(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    average = getattr(timm.utils, name)(model, decay=0.5)
    for i in range(3):
        step(model, optimizer, i)
        average.update(model)
    averaged = average.ema if name == "ModelEma" else average.module
    assert all(torch.isfinite(t).all() for _, t in named_tensors(averaged) if t.is_floating_point())
    assert averaged.task_state.get_extra_state().equal(model.task_state.get_extra_state())
    assert same(answers(averaged, [0, 1]), expected)
    model.load_state_dict(averaged.state_dict())
    model.train()
    model.end_task()
    assert same(answers(model, [0, 1]), expected) and F.softmax(answers(model, [2])[0], 1).isfinite().all()
    del average, averaged
    gc.collect()
