"""Two processes train one model: they agree on every task that ends, and no wrapper can undo that.

Each test runs its scenario, a function of this file, in two processes that stay for the whole file.
"""

import copy
import datetime
import multiprocessing
import pickle
import traceback
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hatify import HatError, HatModel, HatWarning, MaskScale, TaskError
from hatify.choosing import TRIAL
from hatify.lock import named_tensors
from small import answers, converted, images, learn, same, same_state

RANKS = 2
pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
)


# Two processes -------------------------------------------------------------------------------------------------------


def serve(rank, pipe):
    """Run one scenario after the other; each answer is what went wrong, or None."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", HatWarning)
    while (order := pipe.recv()) is not None:
        scenario, arguments, store = order
        timeout = datetime.timedelta(seconds=30)
        distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)
        torch.manual_seed(rank)
        try:
            scenario(rank, *arguments)
            problem = None
        except BaseException:
            problem = f"rank {rank}:\n{traceback.format_exc()}"
        pipe.send(problem)
        # Not before the other one has got there: what it waits for in a scenario would fail for another reason.
        pipe.recv()
        distributed.destroy_process_group()


class Pair:
    """Two processes, started when needed, and anew once they hang."""

    def __init__(self):
        self.started = []

    def start(self):
        spawn = multiprocessing.get_context("spawn")
        for rank in range(RANKS):
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(rank, there), daemon=True)
            process.start()
            self.started.append((process, here))

    def run(self, store, scenario, *arguments):
        if not self.started:
            self.start()
        pipes = [pipe for _, pipe in self.started]
        for pipe in pipes:
            pipe.send((scenario, arguments, store))
        problems = []
        for pipe in pipes:
            if not pipe.poll(90):
                self.stop()
                pytest.fail("a rank hangs")
            try:
                problems.append(pipe.recv())
            except EOFError:
                self.stop()
                pytest.fail("a rank has died")
        for pipe in pipes:
            pipe.send("done")
        if any(problems):
            self.stop()
            pytest.fail("\n".join(filter(None, problems)), pytrace=False)

    def stop(self):
        for process, _ in self.started:
            process.kill()
            process.join()
        self.started.clear()


@pytest.fixture(scope="module")
def pair():
    pair = Pair()
    yield pair
    pair.stop()


@pytest.fixture
def run(pair, tmp_path):
    return lambda scenario, *arguments: pair.run(tmp_path / "store", scenario, *arguments)


# What scenarios are made of ------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Holds the model as a LightningModule does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def data(rank, seed=0):
    """Each rank has its own, of different means and variances."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(6, 3, 6, 6, generator=generator) * (1 + rank) + rank


def begin(model, task):
    """Every third feature, beginning with `task`, is on."""
    model.begin_task(task)
    with torch.no_grad():
        on = torch.arange(model.task_state.num_slots) % 3 == task % 3
        model.task_state.embeddings[task].copy_(torch.where(on, 2.0, -2.0))


def train(model, call, rank, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for seed in range(steps):
        optimizer.zero_grad()
        (call(data(rank, seed)).square().mean() + 0.1 * model.regularization()).backward()
        optimizer.step()


def everywhere(value):
    """`value` of each rank."""
    found = [None] * RANKS
    distributed.all_gather_object(found, value)
    return found


def agreed(model):
    """Whether all ranks have the same of everything."""
    state = {name: pickle.dumps(tensor.detach().numpy()) for name, tensor in named_tensors(model)}
    states = everywhere((state, model.task_state.progress()))
    return all(each == states[0] for each in states)


class Remembered:
    """What finished tasks have answered when they ended."""

    def __init__(self, model):
        self.model, self.answers = model, {}

    def add(self, task):
        self.answers[task] = answers(self.model, [task])

    def check(self, call=None):
        """By the model itself, or by a wrapper of it."""
        training = self.model.training
        self.model.eval()
        for task, expected in self.answers.items():
            with torch.no_grad(), self.model.task(task):
                assert torch.equal((call or self.model)(images()), expected[0]), f"task {task} has changed"
        self.model.train(training)


def wrap(model, nested=False, **options):
    return DistributedDataParallel(Holder(model) if nested else model, **options)


# Wrapped anew for each task ------------------------------------------------------------------------------------------


def anew_for_each_task(rank, nested, options):
    model = converted()
    with torch.no_grad():
        # As with seeds of their own.
        model.get_parameter("fc.weight").add_(rank)
    before = Remembered(model)
    for task in range(3):
        begin(model, task)
        call = wrap(model, nested, **options)
        train(model, call, rank)
        before.check()
        before.check(call)
        train(model, call, rank)
        before.check()
        assert not agreed(model)
        model.end_task()
        assert agreed(model)
        before.add(task)
        # The wrapper copies buffers in evaluation too, also with no task open.
        before.check(call)
        before.check()
        assert agreed(model)
    assert model.finished_tasks == (0, 1, 2)


OPTIONS = [{}, {"broadcast_buffers": False}, {"gradient_as_bucket_view": True}, {"static_graph": True}]
NAMES = ["plain", *(next(iter(options)) for options in OPTIONS[1:])]


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
def test_wrapped_anew_for_each_task(run, nested, options):
    run(anew_for_each_task, nested, options)


def reopened(rank):
    model = converted()
    for task in (0, 1, 0):
        begin(model, task)
        train(model, wrap(model), rank)
        model.end_task()
        assert agreed(model)


def test_a_reopened_task(run):
    run(reopened)


def chooses(rank, nested):
    model = converted()
    for task in range(3):
        model.begin_task(task)
        call = wrap(model, nested)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(TRIAL + 2):
            optimizer.zero_grad()
            call(data(rank, seed)).square().mean().backward()
            optimizer.step()
            masks = everywhere(model.task_state.embeddings[task].detach())
            assert torch.equal(*masks), f"after step {seed + 1}"
        assert model.task_state.course.chosen
        model.end_task()
        assert agreed(model)
    assert model.task_state.used().all()


@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
def test_all_ranks_choose_the_same_features(run, nested):
    run(chooses, nested)


def learns_masks_once_wrapped(rank, nested):
    model = converted()
    model.begin_task(0)
    call = wrap(model, nested)
    scale = MaskScale(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(4):
        optimizer.zero_grad()
        (call(data(rank, seed)).square().mean() + 0.1 * model.regularization()).backward()
        optimizer.step()
        scale.step()
        assert torch.equal(*everywhere(model.task_state.embeddings[0].detach()))
    assert (model.task_state.embeddings[0] != 1).any()
    model.end_task()
    assert agreed(model)


@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
def test_masks_that_are_learned_by_a_wrapper_that_was_made_before(run, nested):
    run(learns_masks_once_wrapped, nested)


def gradients_accumulate(rank):
    model = converted()
    for task in range(2):
        begin(model, task)
        call = wrap(model)
        for seed in range(2):
            with call.no_sync():
                call(data(rank, seed)).square().mean().backward()
            train(model, call, rank, steps=1)
        model.end_task()
        assert agreed(model)


def test_no_sync(run):
    run(gradients_accumulate)


def compiled(rank, whole):
    model = converted()
    before = Remembered(model)
    for task in range(2):
        begin(model, task)
        if whole:
            call = torch.compile(wrap(model), backend="eager")
        else:
            call = wrap(torch.compile(model, backend="eager", fullgraph=True))
        train(model, call, rank)
        assert not agreed(model)
        model.end_task()
        assert agreed(model)
        before.add(task)
        before.check()


@pytest.mark.parametrize("whole", [False, True], ids=["in the wrapper", "with the wrapper"])
def test_compiled(run, whole):
    run(compiled, whole)


# A wrapper made before the task --------------------------------------------------------------------------------------


def once_with_a_task_open(rank, nested, options):
    model = converted()
    begin(model, 0)
    call = wrap(model, nested, **options)
    train(model, call, rank)
    model.end_task()
    begin(model, 1)
    for _ in range(2):
        with pytest.raises(
            TaskError, match=r"before begin_task\(1\).* bn\.1\.weight.* never be reduced.* anew after begin"
        ):
            call(data(rank))
    train(model, wrap(model, nested, **options), rank)
    model.end_task()
    assert agreed(model)


@pytest.mark.parametrize("nested", [False, True], ids=["direct", "nested"])
@pytest.mark.parametrize("unused", [False, True])
def test_wrapped_once_with_a_task_open(run, nested, unused):
    run(once_with_a_task_open, nested, {"find_unused_parameters": unused})


def once_before_any_task(rank):
    model = converted()
    call = wrap(model, find_unused_parameters=True)
    before = Remembered(model)
    for task in range(3):
        begin(model, task)
        train(model, call, rank, steps=3)
        before.check()
        before.check(call)
        model.end_task()
        assert agreed(model)
        before.add(task)
        before.check(call)
        before.check()


def test_wrapped_once_before_any_task(run):
    run(once_before_any_task)


def once_without_looking_for_unused(rank):
    model = converted()
    call = wrap(model)
    begin(model, 0)
    with pytest.raises(TaskError, match=r"waits for gradients of bn\.1\.weight.* pass find_unused_parameters=True"):
        call(data(rank))
    model.abort_task()
    assert agreed(model)


def test_wrapped_once_without_looking_for_unused_parameters(run):
    run(once_without_looking_for_unused)


def left_alone(rank):
    """Names that the user has set are the user's to reduce; a model beside the wrapped one is nobody's business."""
    model, teacher = converted(), converted()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["fc.weight"])
    begin(model, 0)
    call = wrap(model)
    assert "fc.weight" in call.parameters_to_ignore
    train(model, call, rank, steps=1)

    class Student(Holder):
        def forward(self, x):
            return self.model(x) + teacher(x).detach()

    begin(teacher, 0)
    train(teacher, teacher, rank, steps=1)
    train(model, DistributedDataParallel(Student(model)), rank, steps=1)
    if rank == 0:
        teacher.end_task()
    everywhere(None)


def test_what_the_wrapper_does_not_hold(run):
    run(left_alone)


# Ranks that do not agree ---------------------------------------------------------------------------------------------


def opened(rank):
    """A model whose task 0 is finished and whose task 1 has been trained."""
    model = converted()
    begin(model, 0)
    train(model, wrap(model), rank)
    model.end_task()
    before = copy.deepcopy(model)
    begin(model, 1)
    train(model, wrap(model), rank)
    return model, before


def disagreeing(rank, name):
    model, before = opened(rank)
    tensor = dict(named_tensors(model))[name]
    # Some entry that task 0 does not own.
    entry = (tensor != before.state_dict()[name]).flatten().nonzero()[0] if tensor.is_floating_point() else -1
    if rank == 1:
        with torch.no_grad():
            flat = tensor.view(-1)
            flat[entry] = flat[entry].logical_not() if tensor.dtype == torch.bool else flat[entry] + 1
    with pytest.raises(HatError, match=rf"^{name}: not the same on rank 1 as on rank 0 after training task 1"):
        model.end_task()
    assert model.active_task == 1 and model.finished_tasks == (0,)
    again = copy.deepcopy(model)
    model.abort_task()
    assert same_state(model, before) and agreed(model)
    begin(model, 1)
    train(model, wrap(model), rank)
    model.end_task()
    assert agreed(model)
    # The other way out.
    distributed.broadcast(dict(named_tensors(again))[name].detach(), 0)
    train(again, wrap(again), rank, steps=1)
    again.end_task()
    assert agreed(again)


@pytest.mark.parametrize("name", ["fc.weight", "head.1.bias", "_hat.embeddings.1"])
def test_a_rank_that_disagrees(run, name):
    run(disagreeing, name)


def with_a_history_of_its_own(rank):
    model = converted()
    if rank == 1:
        learn(model, 2)
    begin(model, 0)
    # As a whole, the wrapper would not take it: the ranks ask it to leave different buffers alone.
    train(model, wrap(model, nested=True), rank)
    with pytest.raises(HatError, match=r"the model on rank 1 is not the one on rank 0"):
        model.end_task()
    model.abort_task()
    assert model.finished_tasks == ((2,) if rank else ())


def test_a_rank_with_a_history_of_its_own(run):
    run(with_a_history_of_its_own)


def infinite_on_one_rank(rank):
    model, before = opened(rank)
    if rank == 1:
        model.get_buffer("bn.1.running_mean").fill_(torch.inf)
    model.end_task()
    assert agreed(model) and same(answers(model, [0]), answers(before, [0]))


def test_statistics_that_are_infinite_on_one_rank(run):
    run(infinite_on_one_rank)


def interrupted(rank):
    model, before = opened(rank)
    for name in ("all_gather", "broadcast"):

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.end_task()
        assert model.active_task == 1 and model.finished_tasks == (0,)
    twin = copy.deepcopy(model)
    model.end_task()
    assert agreed(model)
    twin.abort_task()
    assert same_state(twin, before)


def test_interrupted_while_they_talk(run):
    run(interrupted)


# Ranks that have nothing to do with each other -----------------------------------------------------------------------


def alone(rank):
    model, _ = opened(rank)
    twin, file = copy.deepcopy(model), pickle.dumps(model)
    model.abort_task()
    # The model has been trained through a wrapper, but not since begin_task; its copies never have been.
    begin(model, 1)
    train(model, model, rank, steps=1 + rank)
    before = Remembered(model)
    call = wrap(model, find_unused_parameters=True, init_sync=False, broadcast_buffers=False)
    before.add(0)
    before.check(call)
    if rank == 0:
        model.end_task()
        twin.end_task()
        pickle.loads(file).end_task()
    assert everywhere(len(model.finished_tasks)) == [2, 1]
    fresh = converted()
    begin(fresh, 0)
    train(fresh, fresh, rank)
    if rank == 1:
        fresh.end_task()
    assert everywhere(len(fresh.finished_tasks)) == [0, 1]


def test_without_a_wrapper_ranks_do_not_talk(run):
    run(alone)


# One process ---------------------------------------------------------------------------------------------------------


def test_wrappers_leave_finished_tasks_buffers_alone():
    model = converted()
    assert model._ddp_params_and_buffers_to_ignore == []
    learn(model, 1)
    buffers = {f"bn.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(model._ddp_params_and_buffers_to_ignore) == buffers
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["fc.weight"])
    assert set(copy.deepcopy(model)._ddp_params_and_buffers_to_ignore) == buffers | {"fc.weight"}
    model.begin_task(1)
    assert model._ddp_params_and_buffers_to_ignore == ["fc.weight"]
    model.abort_task()
    learn(model, 0)
    assert len(model._ddp_params_and_buffers_to_ignore) == 7


def test_after_the_process_group_has_gone(tmp_path):
    model = converted()
    begin(model, 0)
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        train(model, wrap(model), 0)
    finally:
        distributed.destroy_process_group()
    model.end_task()
    assert isinstance(model, HatModel) and model.finished_tasks == (0,)
