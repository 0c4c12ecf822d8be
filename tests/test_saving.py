"""Saved and loaded again: everything is as it was; killed while saving, the old or the new state is there."""

import copy
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hatify as hat
import hatify.timm_models
from hatify import CheckpointError, HatModel, TaskError, load, save, verify_isolation
from hatify.convert import hatify as convert
from small import CLASSES, SmallNet, answers, converted, images, learn, same, same_state, step

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

HERE = Path(__file__).parent


@pytest.fixture
def model():
    model = converted()
    learn(model, 0)
    return model


def run_python(code, *arguments, check=True):
    """Run a script in a process of its own that can import this folder's modules."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        check=check,
        capture_output=True,
        text=True,
    )


# The round trip -------------------------------------------------------------------------------------------------------


def test_everything_is_as_it_was(model, tmp_path):
    learn(model, 2)
    model.set_task(2)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    assert loaded.task_state.progress() == model.task_state.progress()
    assert (loaded.finished_tasks, loaded.active_task, loaded.task_state.task) == ((0, 2), None, 2)
    assert not any(m.training for m in loaded.modules())
    assert same(answers(loaded), answers(model))
    for task in (0, 2):
        for name, mask in model.masks(task).items():
            assert torch.equal(loaded.masks(task)[name], mask)
    assert str(loaded.census) == str(model.census) and loaded.code == model.code
    verify_isolation(loaded)


def test_a_fresh_process_answers_bit_for_bit_the_same(model, tmp_path):
    save(model, tmp_path / "out")
    run_python(
        """
        import sys, torch, hatify
        torch.set_num_threads(1)
        model = hatify.load(sys.argv[1])
        from small import answers
        torch.save(answers(model), sys.argv[2])
        """,
        tmp_path / "out",
        tmp_path / "answers.pt",
    )
    assert same(torch.load(tmp_path / "answers.pt"), answers(model))


def test_tasks_go_on_as_if_nothing_had_happened(model, tmp_path):
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    before = answers(model, [0])
    for each in (model, loaded):
        learn(each, 1)
    assert same(answers(loaded), answers(model)) and same(answers(loaded, [0]), before)
    verify_isolation(loaded)


@pytest.mark.parametrize("reopened", [False, True])
def test_training_resumes_in_the_middle_of_a_task_bit_for_bit(model, tmp_path, reopened):
    learn(model, 1)
    task = 1 if reopened else 2
    model.set_task(0)
    model.begin_task(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.bn.eval()
    step(model, optimizer)
    model.mask_scale = 3.25
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    resumed = torch.optim.AdamW(loaded.parameters(), lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (loaded.active_task, loaded.mask_scale, loaded.training) == (task, 3.25, True)
    assert {n: m.training for n, m in loaded.named_modules()} == {n: m.training for n, m in model.named_modules()}
    for each, its_optimizer in ((model, optimizer), (loaded, resumed)):
        for i in range(3):
            step(each, its_optimizer, i)
    assert same_state(loaded, model)
    for each in (model, loaded):
        each.end_task()
    assert same(answers(loaded), answers(model))


def test_a_task_can_be_aborted_after_resuming(model, tmp_path):
    model.set_task(1)
    expected = converted()
    learn(expected, 0)
    model.begin_task(2)
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    with torch.no_grad():
        model.conv.weight[0].fill_(torch.nan)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.conv.weight.isnan(), model.conv.weight.isnan())
    for each in (model, loaded):
        each.abort_task()
    assert loaded.task_state.task == 1 and loaded.active_task is None
    assert same_state(loaded, expected) and same_state(loaded, model)


def test_the_guard_holds_after_resuming(model, tmp_path):
    before = answers(model, [0])
    model.begin_task(1)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1, weight_decay=0.5)
    for i in range(3):
        step(loaded, optimizer, i)
    loaded.end_task()
    assert same(answers(loaded, [0]), before)


def test_what_was_frozen_stays_frozen(tmp_path):
    net = SmallNet()
    net.conv.weight.requires_grad_(False)
    net.bn.bias.requires_grad_(False)
    model = convert(net, 2, (images(2),))
    model.begin_task(0)
    model.fc.weight.requires_grad_(False)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for each in (model, loaded):
        each.end_task()
        each.begin_task(1)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("change", ["bfloat16", "double", "channels_last"])
def test_dtypes_and_memory_formats_are_kept(model, tmp_path, change):
    model = model.to(memory_format=torch.channels_last) if change == "channels_last" else getattr(model, change)()
    x = images().to(model.conv.weight.dtype)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    assert same(answers(loaded, x=x), answers(model, x=x))


class Tied(nn.Module):
    """Tied weights, parameters that are views of one tensor, one that is not contiguous, and extra state."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        flat = torch.randn(72)
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.one.weight = nn.Parameter(flat[:36].view(6, 6))
        self.two.weight = nn.Parameter(flat[36:].view(6, 6).t())
        self.out = nn.Linear(6, 10, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.extra = {"steps": 3, "history": torch.arange(3)}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, x):
        return self.out(self.two(torch.relu(self.one(self.embed(x)))))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Tied()

    def forward(self, x):
        return self.body(x)


def test_tied_shared_and_strided_tensors_survive(tmp_path):
    x = torch.arange(8).view(2, 4)
    model = convert(Holder(), 2, (x,), heads=None)
    model.begin_task(0)
    torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    model.end_task()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.body.out.weight is loaded.body.embed.weight
    assert same_state(loaded, model)
    assert same(answers(loaded, x=x), answers(model, x=x))


def test_extra_state_of_modules_survives(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), WithExtra(), nn.Linear(4, 2))
    net[1].extra = {"steps": 5, "history": torch.arange(3)}
    model = convert(net, 1, (torch.randn(2, 4),), policies={"1": "per_task"})
    save(model, tmp_path / "out")
    found = load(tmp_path / "out", nn.Sequential(nn.Linear(4, 4), WithExtra(), nn.Linear(4, 2)))
    (extra,) = [m.extra for m in found.modules() if isinstance(m, WithExtra)]
    assert extra["steps"] == 5 and torch.equal(extra["history"], torch.arange(3))


class WithExtra(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, x):
        return x * self.scale


def test_extra_state_that_needs_code_to_be_read_is_refused(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), WithExtra(), nn.Linear(4, 2))
    net[1].extra = lambda: None
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 1, (torch.randn(2, 4),))
    model.add_module("late", net[1])
    with pytest.raises(CheckpointError, match="extra state of late"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversion_arguments_are_repeated(tmp_path):
    options = {"num_classes": (n for n in (2, 4, 5)), "mask_init": 0.5, "couple": False, "s_max": 50.0, "clamp": 50}
    model = converted(heads=(name for name in ["head"]), policies={"fc": "row"}, **options)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    assert (loaded.s_max, loaded.task_state.clamp, loaded.task_state.mask_init) == (50.0, 50, 0.5)
    assert str(loaded.census) == str(model.census)
    assert [a.shape[1] for a in answers(loaded, range(3))] == [2, 4, 5]


def test_loading_leaves_the_random_numbers_alone(model, tmp_path):
    save(model, tmp_path / "out")
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    load(tmp_path / "out")
    assert torch.equal(torch.randn(3), expected)


# The architecture -----------------------------------------------------------------------------------------------------


def test_the_description_is_readable(model, tmp_path):
    save(model, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["hatify.json", "model.safetensors"]
    text = json.loads((tmp_path / "out" / "hatify.json").read_text())
    assert text["architecture"] == {"kind": "factory", "name": "small:SmallNet", "arguments": {}}
    assert text["conversion"]["num_tasks"] == 3 and text["tasks"]["finished"] == [True, False, False]
    assert torch.__version__.startswith(text["versions"]["torch"])


@pytest.mark.parametrize("entry", ["plain", "hat"])
def test_timm_models_are_made_again(tmp_path, entry):
    options = {"in_chans": 1, "drop_path_rate": 0.1}
    if entry == "plain":
        model = convert(timm.create_model("test_resnet", num_classes=5, **options), 2)
    else:
        model = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=[5, 3], **options)
    save(model, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "hatify.json").read_text())
    assert text["architecture"]["kind"] == "timm" and text["architecture"]["name"].startswith("test_resnet")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    x = torch.randn(2, 1, 64, 64)
    assert same(answers(loaded, range(2), x), answers(model, range(2), x))
    if entry == "hat":
        assert loaded.num_classes == model.num_classes == (5, 3)
        assert loaded.get_classifier().out_features == model.get_classifier().out_features


@pytest.mark.parametrize(("name", "edge"), [("test_efficientnet", 64), ("test_convnext", 64), ("test_vit", 160)])
def test_models_of_many_kinds_come_back_in_the_middle_of_a_task(tmp_path, name, edge):
    x = torch.randn(2, 3, edge, edge)
    model = convert(
        timm.create_model(name, num_classes=4, img_size=edge) if "vit" in name else timm.create_model(name), 2
    )
    for task in range(2):
        model.begin_task(task)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model(x).square().mean().backward()
        optimizer.step()
        if task == 0:
            model.end_task()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    for each in (model, loaded):
        each.abort_task()
    assert same_state(loaded, model) and same(answers(loaded, x=x), answers(model, x=x))


def test_what_cannot_be_made_by_name_is_given(tmp_path):
    torch.manual_seed(0)
    model = convert(SmallNet(12), 2, (images(2),))
    learn(model, 0)
    save(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hatify.json").read_text())["architecture"]["kind"] == "caller"
    with pytest.raises(CheckpointError, match=r"given by the caller.*model="):
        load(tmp_path / "out")
    loaded = load(tmp_path / "out", SmallNet(12))
    assert same_state(loaded, model)
    save(loaded, tmp_path / "again")
    assert same_state(load(tmp_path / "again", SmallNet(12)), model)


def test_a_class_made_with_other_settings_is_not_taken_for_the_default(tmp_path):
    net = SmallNet()
    net.bn.eps = 0.5
    model = convert(net, 1, (images(2),))
    save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="given by the caller"):
        load(tmp_path / "out")


def describe_as(folder, **changes):
    path = folder / "hatify.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"kind": "factory", "name": "os:system", "arguments": {"command": "touch PWNED"}}, "not in a module of yours"),
        ({"kind": "factory", "name": "small:undeclared", "arguments": {}}, "not declared to return"),
        ({"kind": "factory", "name": "small:nothing", "arguments": {}}, "nothing"),
        ({"kind": "factory", "name": "no_such_module:x", "arguments": {}}, "no_such_module"),
        ({"kind": "factory", "name": "small:SmallNet", "arguments": {"wide": 3}}, "wide"),
        ({"kind": "timm", "name": "hf-hub:someone/something", "arguments": {}}, "timm has no model"),
        ({"kind": "timm", "name": "resnet19", "arguments": {}}, "resnet18"),
        ({"kind": "timm"}, "damaged"),
        (["timm"], "damaged"),
    ],
)
def test_a_description_cannot_have_anything_run_or_fetched(model, tmp_path, monkeypatch, architecture, reason):
    monkeypatch.chdir(tmp_path)
    save(model, tmp_path / "out")
    describe_as(tmp_path / "out", architecture=architecture)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "out")
    assert not (tmp_path / "PWNED").exists()


# What is damaged, or does not fit -------------------------------------------------------------------------------------


def damage(folder, how):
    weights, text = folder / "model.safetensors", folder / "hatify.json"
    if how == "no folder":
        shutil.rmtree(folder)
    elif how == "no description":
        text.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "truncated description":
        text.write_text(text.read_text()[:-50])
    elif how == "no JSON object":
        text.write_text("[]")
    elif how == "other format":
        describe_as(folder, format=99)
    elif how == "tasks missing":
        describe_as(folder, tasks={})
    elif how == "other conversion":
        describe_as(folder, conversion={**json.loads(text.read_text())["conversion"], "num_tasks": 2})
    elif how.startswith("plan"):
        plan = json.loads(text.read_text())["plan"]
        if how == "plan of another graph":
            plan["graphs"][0]["nodes"][2] = "relu: relu(conv)"
        elif how == "plan without a policy":
            plan["modules"]["conv"] = "none"
        elif how == "plan of two graphs":
            plan["graphs"].append(plan["graphs"][0])
        describe_as(folder, plan={} if how == "plan that is empty" else plan)
    else:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(weights)
        if how == "other save":
            metadata = {"stamp": "0"}
        elif how == "numbers of the plan missing":
            del tensors["_hat.plan"]
        elif how == "numbers of the plan cut off":
            tensors["_hat.plan"] = tensors["_hat.plan"][:3]
        elif how == "tensor missing":
            del tensors["fc.weight"]
        elif how == "tensor too many":
            tensors["more"] = torch.ones(1)
        elif how == "tensor of another shape":
            tensors["fc.weight"] = torch.ones(2, 2)
        save_file(tensors, weights, metadata)


@pytest.mark.parametrize(
    ("how", "reason"),
    {
        "no folder": "no saved model",
        "no description": "no saved model",
        "no weights": r"model\.safetensors: missing",
        "truncated weights": "model.safetensors: damaged",
        "empty weights": "model.safetensors: damaged",
        "truncated description": r"hatify\.json: cannot be read",
        "no JSON object": "does not describe",
        "other format": "format 99",
        "tasks missing": "damaged",
        "other conversion": "missing|unexpected|shape",
        "plan that is empty": "damaged",
        "plan of another graph": r"the first operation that differs was relu: relu\(conv\), and is \w+: .* now",
        "plan of two graphs": "the first operation that differs was x: x\\(\\), and is not there now",
        "plan without a policy": "damaged: ValueError: 'none'",
        "numbers of the plan missing": "damaged: KeyError",
        "numbers of the plan cut off": "damaged",
        "other save": "belong",
        "tensor missing": r"missing: fc\.weight",
        "tensor too many": "unexpected: more",
        "tensor of another shape": r"another shape: fc\.weight",
    }.items(),
)
def test_damage_is_named(model, tmp_path, how, reason):
    save(model, tmp_path / "out")
    damage(tmp_path / "out", how)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)


def test_a_network_that_is_not_the_one_is_refused(model, tmp_path):
    save(model, tmp_path / "out")
    for wrong in (SmallNet(12), nn.Linear(3, 2)):
        with pytest.raises(CheckpointError, match="out: "):
            load(tmp_path / "out", wrong)
    with pytest.raises(CheckpointError, match="converted already"):
        load(tmp_path / "out", model)


def test_other_files_are_never_replaced(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for path in ("file", "folder", "file/below"):
        with pytest.raises(CheckpointError):
            save(model, tmp_path / path)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_empty_or_missing_folder_is_filled(model, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in ("empty", "new/below"):
        save(model, tmp_path / path)
        assert same_state(load(tmp_path / path), model)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(model, tmp_path, there):
    """Files larger than 4 kB cannot be written, as on a full disk."""
    if there:
        save(model, tmp_path / "out")
    result = run_python(
        """
        import resource, sys, hatify, small
        model = small.converted()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            hatify.save(model, sys.argv[1])
        except hatify.CheckpointError as error:
            print(error)
        """,
        tmp_path / "out",
    )
    assert "cannot be written" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])
    if there:
        assert same_state(load(tmp_path / "out"), model)
        assert len(list((tmp_path / "out").iterdir())) == 2


def test_only_converted_models_are_saved(model, tmp_path):
    for wrong in (SmallNet(), nn.DataParallel(model)):
        with pytest.raises(CheckpointError, match=type(wrong).__name__):
            save(wrong, tmp_path / "out")


def test_tensors_without_values_are_refused(model, tmp_path):
    model.register_buffer("nowhere", torch.empty(2, device="meta"))
    with pytest.raises(CheckpointError, match="nowhere"):
        save(model, tmp_path / "out")


# Killed while saving --------------------------------------------------------------------------------------------------

KILLED = """
import itertools, os, random, signal, shutil, sys, time, torch
import hatify, hatify.saving as saving, small
from hatify.lock import named_tensors
torch.set_num_threads(1)

folder, kills = sys.argv[1], int(sys.argv[2])
old, new = small.converted(), small.converted()
small.learn(old, 0); small.learn(new, 0); small.learn(new, 1)
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "fcntl.flock"}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(event_number, model):
    "In a child: save, and be killed at the n-th access to the file system, or while the weights are being written."
    left = event_number
    def audit(event, args):
        nonlocal left
        if event in EVENTS:
            left -= 1
            if left == 0:
                die()
    write = saving.save_file
    def write_partly(tensors, path, metadata):
        write(tensors, path, metadata)
        if event_number % 7 == 3:
            os.truncate(path, random.Random(event_number).randrange(os.path.getsize(path)))
            die()
    saving.save_file = write_partly
    sys.addaudithook(audit)
    saving.save(model, folder)
    os._exit(0)

def die_after(seconds, model):
    signal.signal(signal.SIGALRM, lambda *_: die())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    saving.save(model, folder)
    os._exit(0)

source, counts = random.Random(0), {"old": 0, "new": 0, "none": 0, "killed": 0}
start = time.perf_counter(); saving.save(old, folder); duration = time.perf_counter() - start
for trial in itertools.count():
    if counts["killed"] == kills:
        break
    fresh = trial % 4 == 0
    shutil.rmtree(folder, ignore_errors=True)
    if not fresh:
        saving.save(old, folder)
    child = os.fork()
    if child == 0:
        # In two out of three, at a known point; else at any time.
        die_after(source.uniform(0, 0.9) * duration, new) if trial % 3 == 0 else die_at(1 + trial % 23, new)
    source.random()
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.waitstatus_to_exitcode(status) == 0, status
    counts["killed"] += os.WIFSIGNALED(status)
    if fresh and not os.path.exists(folder):
        counts["none"] += 1
    else:
        loaded = hatify.load(folder)
        found = [name for name, model in (("old", old), ("new", new)) if small.same_state(loaded, model)]
        assert found and (found == ["new"] or not fresh), (trial, found)
        counts[found[0]] += 1
    saving.save(new, folder)
    assert sorted(os.listdir(folder)) == ["hatify.json", "model.safetensors"]
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)], os.listdir(os.path.dirname(folder))
print(counts)
assert min(counts.values()) > 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")
def test_a_hundred_kills_leave_the_old_or_the_new_state(tmp_path):
    result = run_python(KILLED, tmp_path / "out", 100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)


# The original's weights -----------------------------------------------------------------------------------------------


def test_original_weights_reach_the_copies_of_every_task():
    model, net = converted(), SmallNet()
    hat.load_plain_state_dict(model, {name: t.bfloat16().float() for name, t in net.state_dict().items()})
    rounded = SmallNet()
    rounded.load_state_dict({name: t.bfloat16().float() for name, t in net.state_dict().items()})
    expected = rounded.eval()(images()).detach()
    for answer in answers(model, range(3)):
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.bn[2].running_mean, rounded.bn.running_mean)


def test_original_weights_that_do_not_fit_change_nothing():
    model = converted()
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    state = SmallNet().state_dict()
    state["more"] = state.pop("fc.bias")
    state["head.weight"] = torch.zeros(2, 8)
    state["tokens"] = torch.zeros(9)
    with pytest.raises(CheckpointError) as caught:
        hat.load_plain_state_dict(model, state)
    assert "missing: fc.bias" in str(caught.value) and "unexpected: more" in str(caught.value)
    assert "of another shape: tokens (9,) instead of (8,) (and 1 more)" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)


def test_heads_made_afresh_need_no_weights():
    model = converted(num_classes=[2, CLASSES, 5])
    fresh = model.head[0].weight.clone()
    net = SmallNet()
    hat.load_plain_state_dict(model, net.state_dict())
    assert torch.equal(model.head[0].weight, fresh) and torch.equal(model.head[1].weight, net.head.weight)
    hat.load_plain_state_dict(model, {k: v for k, v in net.state_dict().items() if not k.startswith("head.")})


def test_original_weights_are_refused_once_something_is_learned(model):
    with pytest.raises(TaskError, match="tasks 0 are finished"):
        hat.load_plain_state_dict(model, SmallNet().state_dict())
    model = converted()
    model.begin_task(0)
    with pytest.raises(TaskError, match="task 0 is open"):
        hat.load_plain_state_dict(model, SmallNet().state_dict())


def test_a_loaded_model_is_a_model(model, tmp_path):
    save(model, tmp_path / "out")
    assert isinstance(load(tmp_path / "out"), HatModel)
