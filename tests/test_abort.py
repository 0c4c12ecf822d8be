"""An open task can be abandoned whatever happened to it, also in the middle of hatify's own code."""

import copy
import functools
import sys
import warnings

import pytest
import torch

from hatify import HatWarning, TaskError
from small import answers, converted, images, learn, same, same_state, step

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

OWN_CODE = ("hatify/model.py", "hatify/lock.py", "hatify/nn/state.py")


class Interrupted:
    """Within the context, Ctrl-C comes at the n-th line of hatify's code about tasks; `lines` counts them."""

    def __init__(self, at):
        self.at, self.lines = at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def trace(self, frame, event, _):
        if not frame.f_code.co_filename.replace("\\", "/").endswith(OWN_CODE):
            return None
        # Models of earlier tests may be collected at any time.
        if frame.f_back.f_code.co_filename.endswith("weakref.py"):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.trace


@functools.cache
def two_finished():
    model = converted()
    for task in range(2):
        learn(model, task)
    return model


def opened(task):
    """A model with two finished tasks and `task` open and trained, and what it was before."""
    before = two_finished()
    model = copy.deepcopy(before)
    model.begin_task(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    step(model, optimizer)
    return model, before, optimizer


def interrupted_everywhere(what, sample):
    """Interrupt ``what(model, optimizer)`` at each of `sample` lines; yields the model and what it was before."""
    for task in (1, 2):
        model, _, optimizer = opened(task)
        with Interrupted(0) as count:
            what(model, optimizer)
        assert count.lines > 20
        for at in range(1, count.lines + 1, max(1, count.lines // sample)):
            model, before, optimizer = opened(task)
            with pytest.raises(KeyboardInterrupt), Interrupted(at):
                what(model, optimizer)
            yield task, model, before


def check_aborted(model, before):
    model.abort_task()
    assert same_state(model, before)
    for attribute in ("task", "learning", "finished"):
        assert getattr(model.task_state, attribute) == getattr(before.task_state, attribute)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in before.named_parameters()
    }
    assert same(answers(model), answers(before)) and not model.training
    learn(model, 2)
    assert same(answers(model, [0, 1]), answers(before))


def test_after_ctrl_c_in_a_step():
    for _, model, before in interrupted_everywhere(lambda model, optimizer: step(model, optimizer), 10):
        check_aborted(model, before)


def end(model, _):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model.end_task()


def test_after_ctrl_c_in_end_task_it_is_open_or_ended():
    seen = set()
    for task, model, before in interrupted_everywhere(end, 25):
        seen.add(model.active_task)
        if model.active_task is not None:
            check_aborted(model, before)
        else:
            assert model.finished_tasks == tuple(sorted({0, 1, task}))
            assert same(answers(model, [0]), answers(before, [0]))
            model.begin_task(task)
            model.abort_task()
    assert seen == {None, 1, 2}


def test_after_ctrl_c_in_abort_task_it_can_be_repeated():
    for _, model, before in interrupted_everywhere(lambda model, _: model.abort_task(), 20):
        if model.active_task is not None:
            check_aborted(model, before)
        else:
            assert same_state(model, before)
            learn(model, 2)
            assert same(answers(model, [0, 1]), answers(before))


def test_after_ctrl_c_in_begin_task_it_is_open_or_not():
    model = converted()
    learn(model, 0)
    model.mask_scale = 2.5
    each = copy.deepcopy(model)
    with Interrupted(0) as count:
        each.begin_task(1)
    assert count.lines > 20
    for at in range(1, count.lines + 1, max(1, count.lines // 30)):
        each = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt), Interrupted(at):
            each.begin_task(1)
        if each.active_task is not None:
            each.abort_task()
        assert same_state(each, model) and same(answers(each), answers(model))
        each.begin_task(1)
        each.abort_task()
        assert same_state(each, model)


def test_after_numbers_that_are_not_finite_and_exceptions():
    model, before, _ = opened(2)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    with pytest.raises(RuntimeError):
        model(images()[:, :1])
    check_aborted(model, before)


def test_there_must_be_something_to_abort():
    with pytest.raises(TaskError, match="needs an open task"):
        converted().abort_task()
