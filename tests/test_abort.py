"""Whatever interrupts a call, it has happened or it has not; and an open task can be abandoned whatever happened to it."""

import copy
import functools
import gc
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hatify
from hatify import HatWarning, TaskError
from hatify.lock import named_tensors
from small import answers, converted, images, learn, same, same_state, step

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

PACKAGE = str(Path(hatify.__file__).parent)


class Interrupted:
    """Within the context, Ctrl-C comes at the n-th line of hatify's code; `lines` lists them."""

    def __init__(self, at=0):
        self.at, self.lines = at, []

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # Models of earlier tests may be collected at any time.
        if frame.f_back.f_code.co_filename.endswith("weakref.py"):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self.at:
                raise KeyboardInterrupt
        return self.trace

    @property
    def places(self):
        """The first and the last time that each line of code was executed."""
        first, last = {}, {}
        for i, line in enumerate(self.lines, 1):
            first.setdefault(line, i)
            last[line] = i
        return sorted({*first.values(), *last.values()})


def quietly(call, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        call(*arguments)


def interrupted_everywhere(prepare, what, most=None):
    """Interrupt ``what(prepare())`` wherever it is in hatify's code; yields what was prepared."""
    quietly(what, prepare())  # what is remembered for later calls is remembered now
    with Interrupted() as counting:
        quietly(what, prepare())
    places = counting.places
    assert len(places) > 20
    for at in places[:: 1 if most is None else max(1, len(places) // most)]:
        prepared = prepare()
        try:
            with Interrupted(at):
                quietly(what, prepared)
        except KeyboardInterrupt:
            pass
        assert torch.is_grad_enabled()
        yield prepared


@functools.cache
def two_finished():
    model = converted()
    for task in range(2):
        learn(model, task)
    return model


def opened(task):
    """A model with two finished tasks and `task` open and trained."""
    model = copy.deepcopy(two_finished())
    model.begin_task(task)
    step(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    return model


def condition(model):
    """Everything about a model that a call could leave half done."""
    state = model.task_state
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in named_tensors(model)},
        "objects": {name: id(tensor) for name, tensor in named_tensors(model)},
        "modes": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": {name: len(p._post_accumulate_grad_hooks or ()) for name, p in model.named_parameters()},
        "progress": state.progress(),
        "each": state.choice.of_samples,
        "names": state.tensor_names,
        "graph": model.code,
        "origin": model.origin.added,
    }


def alike(a, b):
    tensors = zip(a["tensors"].items(), b["tensors"].items(), strict=True)
    equal = len(a["tensors"]) == len(b["tensors"]) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in tensors)
    return equal and all(a[key] == b[key] for key in a if key != "tensors")


def check_aborted(model, before):
    model.abort_task()
    assert same_state(model, before)
    for attribute in ("task", "learning", "finished"):
        assert getattr(model.task_state, attribute) == getattr(before.task_state, attribute)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in before.named_parameters()
    }
    assert same(answers(model), answers(before)) and not model.training


def check_usable(model, before):
    """Another task can be learned, and the finished ones stay as they are."""
    learn(model, 2, steps=1)
    assert same(answers(model, [0, 1]), answers(before, [0, 1]))


@pytest.mark.parametrize("task", [1, 2])
def test_ctrl_c_in_a_step(task):
    def train(model):
        step(model, torch.optim.AdamW(model.parameters(), lr=0.05))

    for model in interrupted_everywhere(lambda: opened(task), train, most=40):
        check_aborted(model, two_finished())
    check_usable(model, two_finished())


@pytest.mark.parametrize("task", [1, 2])
def test_ctrl_c_in_end_task(task):
    seen = set()
    for model in interrupted_everywhere(lambda: opened(task), lambda model: model.end_task(), most=150):
        seen.add(model.active_task)
        if model.active_task is not None:
            assert model.training and model.task_state.task == task
            check_aborted(model, two_finished())
        else:
            assert model.finished_tasks == tuple(sorted({0, 1, task})) and not model.training
            assert same(answers(model, [0]), answers(two_finished(), [0]))
            model.begin_task(task)
            model.abort_task()
    assert task in seen
    learn(model, 2, steps=1)
    assert same(answers(model, [0]), answers(two_finished(), [0]))


@pytest.mark.parametrize("task", [1, 2])
def test_ctrl_c_in_abort_task(task):
    for model in interrupted_everywhere(lambda: opened(task), lambda model: model.abort_task()):
        if model.active_task is not None:
            check_aborted(model, two_finished())
        else:
            assert same_state(model, two_finished())
    check_usable(model, two_finished())


@pytest.mark.parametrize("task", [1, 2])
def test_ctrl_c_in_begin_task(task):
    prepare = lambda: copy.deepcopy(two_finished())  # noqa: E731
    untouched = condition(prepare())
    for model in interrupted_everywhere(prepare, lambda model: model.begin_task(task)):
        if model.active_task is not None:
            check_aborted(model, two_finished())
        else:
            assert alike(
                condition(model) | {"objects": None, "hooks": None}, untouched | {"objects": None, "hooks": None}
            )
    check_usable(model, two_finished())


def test_ctrl_c_in_add_tasks():
    prepare = lambda: copy.deepcopy(two_finished())  # noqa: E731
    seen = set()
    for model in interrupted_everywhere(prepare, lambda model: model.add_tasks(2)):
        seen.add(model.num_tasks)
        assert same(answers(model), answers(two_finished()))
        assert {len(m) for m in model.modules() if isinstance(m, hatify.nn.per_task.PerTask)} == {model.num_tasks}
        assert len(model.task_state.finished) == len(model.task_state.finished_masks) == model.num_tasks
        assert len(model.origin.added) == (model.num_tasks - 3) // 2
        model.begin_task(model.num_tasks - 1)
        model.abort_task()
    assert 3 in seen
    check_usable(model, two_finished())


def test_ctrl_c_in_forget_task():
    for model in interrupted_everywhere(
        lambda: copy.deepcopy(two_finished()), lambda model: hatify.forget_task(model, 0), most=150
    ):
        assert same(answers(model, [1]), answers(two_finished(), [1]))
        if model.finished_tasks == (0, 1):
            assert same(answers(model), answers(two_finished()))
            assert same_state(model, two_finished())
        else:
            assert model.finished_tasks == (1,)


def test_ctrl_c_in_verify_isolation():
    model = opened(2)
    untouched = condition(model)
    for _ in interrupted_everywhere(lambda: model, hatify.verify_isolation):
        assert alike(condition(model), untouched)


def test_numbers_that_are_not_finite_and_exceptions():
    model = opened(2)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(RuntimeError):
        model(images()[:, :1])
    check_aborted(model, two_finished())


def test_there_must_be_something_to_abort():
    with pytest.raises(TaskError, match="needs an open task"):
        converted().abort_task()


# Memory ---------------------------------------------------------------------------------------------------------------


def bytes_alive():
    """Of all floating-point tensors there are, shared memory counted once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.is_floating_point()]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@pytest.mark.parametrize("on", [0.3, 0.7, 0.97])
def test_of_everything_one_copy_is_held_while_a_task_is_open_and_of_what_is_owned_between_tasks(on):
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 4))
    model = hatify.hatify(net, 2, (torch.zeros(2, 3, 5, 5),))
    own = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    few = 64 * 1024 // 8  # what is known of features
    before = bytes_alive()
    model.begin_task(0)
    assert bytes_alive() - before < own + few
    slots = torch.arange(model.task_state.num_slots)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.where(slots % 100 < 100 * on, 1.0, -1.0))
    model.end_task()
    model.guard_anew(built=True)
    assert bytes_alive() - before < (own + few if on > 0.9 else 2 * on**2 * own + few)
    model.begin_task(1)
    assert bytes_alive() - before < own + few
