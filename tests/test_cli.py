"""The commands: what they write and print; one line and exit status 2 for whatever is wrong."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from hatify import IsolationError, load, save
from hatify.cli import app, convert_app, run
from small import SmallNet, answers, converted, images, learn, same, same_state

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")
HERE = Path(__file__).parent
NETWORK = ["--factory", "small:SmallNet", "--num-tasks", "2", "--input-shape", "3,6,6"]


@pytest.fixture
def command(capsys):
    """Run a command in this process: (exit status, standard output, standard error)."""

    def call(*arguments, commands=app):
        status = run(commands, "hatify", [str(a) for a in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def refused(command):
    """Run a command that must be refused, and return the one line it says."""

    def call(*arguments, commands=app):
        status, out, err = command(*arguments, commands=commands)
        assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
        return err

    return call


@pytest.fixture
def saved(tmp_path):
    """A folder with a model of three tasks, two of which are finished, and the model."""
    model = converted()
    learn(model, 0)
    learn(model, 1)
    save(model, tmp_path / "out")
    return tmp_path / "out", model


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(SmallNet().state_dict(), tmp_path / "x.pt")
    return tmp_path / "x.pt"


# convert --------------------------------------------------------------------------------------------------------------


def resnet20_file(path, net):
    """A file of the form of resnet20-12fca82f.th: old format, under state_dict, keys prefixed by nn.DataParallel."""
    state = {f"module.{name}": t for name, t in net.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.7}, path, _use_new_zipfile_serialization=False)
    return path


def resnet20(monkeypatch):
    benchmarks = HERE.parent / "benchmarks"
    if not (benchmarks / "resnet_cifar.py").exists():
        pytest.skip("benchmarks/resnet_cifar.py is not there")
    monkeypatch.syspath_prepend(str(benchmarks))
    import resnet_cifar

    return resnet_cifar.resnet20()


def convert_resnet20(command, file, out):
    arguments = [
        "--factory",
        "resnet_cifar:resnet20",
        "--num-tasks",
        5,
        "--input-shape",
        "3,32,32",
        "-o",
        out,
        "--json",
    ]
    status, output, err = command(file, *arguments, commands=convert_app)
    assert (status, err) == (0, "")
    return json.loads(output)


def test_a_file_like_resnet20s_becomes_five_tasks_that_answer_the_same(command, tmp_path, monkeypatch):
    net = resnet20(monkeypatch)
    x = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        net.train()(x)
        expected = net.eval()(x[:8])
    report = convert_resnet20(command, resnet20_file(tmp_path / "resnet20.th", net), tmp_path / "out")
    assert report["checkpoint"]["state_key"] == "state_dict" and report["checkpoint"]["prefix_stripped"] == "module."
    assert report["checkpoint"]["left_out"] == [] and report["parameters_before"] == 269722
    model = load(tmp_path / "out")
    assert model.num_tasks == 5
    for answer in answers(model, range(5), x[:8]):
        torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(answer.argmax(1), expected.argmax(1))


@pytest.mark.skipif("HATIFY_DATA" not in os.environ, reason="HATIFY_DATA names no folder with checkpoints and CIFAR-10")
def test_the_real_resnet20_keeps_its_accuracy(command, tmp_path, monkeypatch):
    data = Path(os.environ["HATIFY_DATA"])
    net = resnet20(monkeypatch).eval()
    import cifar10
    import resnet_cifar

    file = data / "checkpoints" / "resnet20-12fca82f.th"
    report = convert_resnet20(command, file, tmp_path / "out")
    assert report["checkpoint"]["tensors"] == len(resnet_cifar.read_checkpoint(file))
    net.load_state_dict(resnet_cifar.read_checkpoint(file), strict=False)
    model = load(tmp_path / "out")
    images = cifar10.load(data)
    x, y = images.test_images[:2000], images.test_labels[:2000]
    found = {}
    with torch.no_grad():
        for name, each in {"before": net, "after": model.eval()}.items():
            predicted = torch.cat([each(cifar10.normalise(part)).argmax(1) for part in x.split(250)])
            found[name] = (predicted == y).float().mean().item()
    assert found["before"] == found["after"] > 0.7
    print(found)


def test_a_checkpoint_becomes_a_folder(command, checkpoint, tmp_path):
    status, output, err = command("convert", checkpoint, *NETWORK, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["hatify.json", "model.safetensors"]
    model, net = load(tmp_path / "out"), SmallNet()
    net.load_state_dict(torch.load(checkpoint))
    for answer in answers(model, range(2)):
        torch.testing.assert_close(answer, net.eval()(images()).detach(), rtol=1e-5, atol=1e-6)
    for shown in (
        "conv",
        "shared",
        "norm",
        "head",
        "parameters before",
        "checkpoint: ",
        "each task's own",
        "written to",
    ):
        assert shown in output.replace("\n", " ")


def test_the_report_counts_what_is_there(command, checkpoint, tmp_path):
    status, output, _ = command("convert", checkpoint, *NETWORK, "-o", tmp_path / "out", "--json")
    report, model = json.loads(output), load(tmp_path / "out")
    assert report["parameters_before"] == sum(p.numel() for p in SmallNet().parameters())
    assert report["parameters_after"] == sum(p.numel() for p in model.parameters())
    assert sum(row["before"] for row in report["layers"]) == report["parameters_before"]
    per_task = report["parameters_per_task"]
    model.add_tasks(1)
    assert sum(p.numel() for p in model.parameters()) - report["parameters_after"] == per_task
    rows = {row["layer"]: row for row in report["layers"]}
    assert rows["conv"] == {"layer": "conv", "policy": "shared", "features": 8, "before": 224, "after": 224}
    assert (rows["bn"]["policy"], rows["bn"]["before"], rows["bn"]["after"]) == ("norm", 16, 32)


def test_options_reach_the_conversion(command, checkpoint, tmp_path):
    options = ["--num-classes", "2,5", "--mask-init", "0.5", "--heads", "head", "--factory-arg", "width=8"]
    assert command("convert", checkpoint, *NETWORK, *options, "-o", tmp_path / "out")[0] == 0
    model = load(tmp_path / "out")
    assert [a.shape[1] for a in answers(model, range(2))] == [2, 5]
    assert torch.equal(model.task_state.embeddings[0], torch.full_like(model.task_state.embeddings[0], 0.5))
    assert command("convert", checkpoint, *NETWORK, "--spare", "0.25", "-o", tmp_path / "spare")[0] == 0
    spare, plain = load(tmp_path / "spare"), load(tmp_path / "out")
    assert spare.task_state.has_spare and spare.conv.out_channels == plain.conv.out_channels + 2
    assert command("convert", checkpoint, *NETWORK, "--heads", "none", "-o", tmp_path / "none")[0] == 0
    assert "head" not in {str(e.policy) for e in load(tmp_path / "none").census}


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_timm_models_are_named(command, tmp_path, name):
    net = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    torch.save({"model": net.state_dict()}, tmp_path / "x.pth")
    arguments = [tmp_path / "x.pth", "--model", name, "--model-arg", "num_classes=5", "--model-arg", "in_chans=1"]
    status, _, err = command(
        "convert", *arguments, "--num-tasks", 2, "-o", tmp_path / "out", "--input-shape", "1,64,64"
    )
    assert (status, err) == (0, "")
    x = torch.randn(2, 1, 64, 64)
    model = load(tmp_path / "out")
    torch.testing.assert_close(answers(model, [1], x)[0], net.eval()(x).detach(), rtol=1e-5, atol=1e-5)
    assert model.get_classifier().out_features == 5


def test_timms_own_weights_need_no_checkpoint(command, tmp_path, monkeypatch):
    net, create = timm.create_model("test_resnet", num_classes=5), timm.create_model
    asked = []

    def create_model(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        return net if pretrained else create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", create_model)
    arguments = ["--model", "test_resnet", "--pretrained", "--model-arg", "num_classes=5", "--num-tasks", 2]
    assert command("convert", *arguments, "-o", tmp_path / "out")[0] == 0
    assert asked == [True]
    model = load(tmp_path / "out")
    (x,) = model.example_inputs
    torch.testing.assert_close(answers(model, [0], x)[0], net.eval()(x).detach(), rtol=1e-5, atol=1e-5)


def test_what_was_chosen_and_left_out_is_said(command, tmp_path):
    state = {f"model.{name}": t for name, t in SmallNet().state_dict().items()}
    averaged = SmallNet().state_dict()
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(2)}, "ema": averaged}, tmp_path / "x.ckpt")
    status, output, _ = command("convert", tmp_path / "x.ckpt", *NETWORK, "--dry-run")
    said = " ".join(output.split())
    assert "under 'state_dict', renamed: without 'model.'" in said and "skipped: loss.weight" in said
    assert "other weights in it (--state-key): ema" in said and "nothing written" in said
    assert command("convert", tmp_path / "x.ckpt", *NETWORK, "--state-key", "ema", "-o", tmp_path / "out")[0] == 0
    assert torch.equal(load(tmp_path / "out").fc.weight, averaged["fc.weight"])


def test_a_dry_run_writes_nothing(command, checkpoint, tmp_path):
    assert command("convert", checkpoint, *NETWORK, "--dry-run", "-o", tmp_path / "out")[0] == 0
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_what_is_there_is_replaced_only_by_force(command, refused, checkpoint, saved):
    out, model = saved
    assert "--force" in refused("convert", checkpoint, *NETWORK, "-o", out)
    assert same_state(load(out), model)
    assert command("convert", checkpoint, *NETWORK, "-o", out, "--force")[0] == 0
    assert load(out).num_tasks == 2
    (out / "hatify.json").unlink()
    assert "none is hatify.json" in refused("convert", checkpoint, *NETWORK, "-o", out, "--force")


WRONG = {
    "no checkpoint": (["--factory", "small:SmallNet", "--num-tasks", "2", "-o", "OUT"], "either a CHECKPOINT"),
    "both sources": (
        ["FILE", "--model", "resnet18", "--pretrained", "--num-tasks", "2", "-o", "OUT"],
        "either a CHECK",
    ),
    "pretrained factory": (["--factory", "small:SmallNet", "--pretrained", "--num-tasks", "2", "-o", "OUT"], "--model"),
    "no network": (["FILE", "--num-tasks", "2", "-o", "OUT"], "--factory"),
    "two networks": (["FILE", "--model", "resnet18", *NETWORK, "-o", "OUT"], "--factory"),
    "argument of nothing": (["FILE", *NETWORK, "--model-arg", "a=1", "-o", "OUT"], "goes with --model"),
    "no tasks": (["FILE", "--factory", "small:SmallNet", "-o", "OUT"], "--num-tasks"),
    "zero tasks": (["FILE", "--factory", "small:SmallNet", "--num-tasks", "0", "-o", "OUT"], "positive integer, not 0"),
    "tasks in words": (["FILE", "--factory", "small:SmallNet", "--num-tasks", "two", "-o", "OUT"], "--num-tasks"),
    "no OUT": (["FILE", *NETWORK], "-o OUT"),
    "no such file": (["gone.pt", *NETWORK, "-o", "OUT"], "gone.pt: there is no such file"),
    "unknown model": (["FILE", "--model", "resnet19", "--num-tasks", "2", "-o", "OUT"], "near: resnet1"),
    "model of a hub": (["FILE", "--model", "hf-hub:a/b", "--num-tasks", "2", "-o", "OUT"], "no model 'hf-hub:a/b'"),
    "wrong architecture": (
        ["FILE", "--model", "test_resnet", "--num-tasks", "2", "-o", "OUT"],
        r"missing: \S+ \(and .*unexpected: \S+ \(and",
    ),
    "another width": (["FILE", *NETWORK, "--factory-arg", "width=9", "-o", "OUT"], r"of another shape: \S+ \(8,\)"),
    "unknown argument": (["FILE", *NETWORK, "--factory-arg", "wide=9", "-o", "OUT"], "wide"),
    "no pair": (["FILE", *NETWORK, "--factory-arg", "wide", "-o", "OUT"], "expected key=value"),
    "no module": (["FILE", "--factory", "gone:Net", "--num-tasks", "2", "-o", "OUT"], "gone"),
    "no callable": (["FILE", "--factory", "small", "--num-tasks", "2", "-o", "OUT"], "package.module:callable"),
    "no network made": (["FILE", "--factory", "small:images", "--num-tasks", "2", "-o", "OUT"], "returned a Tensor"),
    "no numbers": (["FILE", *NETWORK, "--num-classes", "a,b", "-o", "OUT"], "--num-classes 'a,b'"),
    "too many numbers": (["FILE", *NETWORK, "--num-classes", "1,2,3", "-o", "OUT"], "2 of them"),
    "no initialisation": (["FILE", *NETWORK, "--mask-init", "sparse", "-o", "OUT"], "--mask-init 'sparse'"),
    "no share": (["FILE", *NETWORK, "--spare", "-1", "-o", "OUT"], r"--spare -1.0: expected 0 or more"),
    "spare beside nothing": (["FILE", *NETWORK, "--spare", "1", "--base", "none", "-o", "OUT"], "beside --base locked"),
    "no head": (["FILE", *NETWORK, "--heads", "tail", "-o", "OUT"], "tail"),
    "another shape": (["FILE", *NETWORK, "--input-shape", "5,6,6", "-o", "OUT"], r"\(2, 5, 6, 6\)"),
    "unknown option": (["FILE", *NETWORK, "--frobnicate", "-o", "OUT"], "--frobnicate"),
    "no such key": (["FILE", *NETWORK, "--state-key", "ema", "-o", "OUT"], "no 'ema'"),
    "no such prefix": (["FILE", *NETWORK, "--strip-prefix", "x.", "-o", "OUT"], "begins with 'x.'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_is_wrong_is_one_line_and_writes_nothing(refused, checkpoint, tmp_path, what):
    arguments, reason = WRONG[what]
    places = {"FILE": checkpoint, "OUT": tmp_path / "out"}
    line = refused(*(places.get(a, a) for a in arguments), commands=convert_app)
    assert line.startswith("hatify: ") and re.search(reason, line), line
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left"),
        (RecursionError("too deep"), "too deep"),
        (AssertionError("several\nlines"), "several lines"),
    ],
)
def test_whatever_happens_is_one_line(refused, checkpoint, tmp_path, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    for place in ("hatify", "save"):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["hatify.cli.convert"], place, fail)
            assert said in refused("convert", checkpoint, *NETWORK, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [checkpoint]


def installed(*arguments, **options):
    code = "import sys; from hatify.cli import main_convert; sys.argv[0] = 'hatify-convert'; main_convert()"
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background has interrupts ignored, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def test_ctrl_c_in_the_middle_is_one_line(checkpoint, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom small import SmallNet\ndef net() -> SmallNet:\n    open('begun', 'w').close()\n    time.sleep(60)\n"
    )
    process = installed(checkpoint, "--factory", "slow:net", "--num-tasks", 2, "-o", tmp_path / "out", cwd=tmp_path)
    for _ in range(600):
        time.sleep(0.05)
        if (tmp_path / "begun").exists():
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and err.strip() == "hatify-convert: interrupted"
    assert not (tmp_path / "out").exists()


def test_factories_that_files_may_not_name_are_given_again(command, refused, checkpoint, tmp_path):
    arguments = ["--factory", "small:undeclared", "--factory-arg", "width=8"]
    where = [*NETWORK[2:], "-o", tmp_path / "out"]
    status, _, err = command("convert", checkpoint, *arguments, *where)
    assert status == 0 and "annotate it" in err and err.count("\n") == 1
    assert "annotate it" in refused("inspect", tmp_path / "out")
    assert command("inspect", tmp_path / "out", *arguments)[0] == 0


def test_entry_points_are_declared():

    import tomllib

    scripts = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hatify": "hatify.cli:main", "hatify-convert": "hatify.cli:main_convert"}


@pytest.mark.parametrize("name", [None, "convert", "inspect", "verify", "forget", "extract"])
def test_help_says_what_there_is(command, name):
    status, output, err = command(*([name] if name else []), "--help")
    assert (status, err) == (0, "") and "Usage" in output


# The other commands ---------------------------------------------------------------------------------------------------


def test_inspect_counts_what_tasks_use(command, saved, tmp_path):
    out, model = saved
    status, output, err = command("inspect", out, "--json")
    report = json.loads(output)
    assert (status, err) == (0, "") and report["finished_tasks"] == [0, 1] and report["num_tasks"] == 3
    for row in report["layers"]:
        masks = [model.masks(task)[row["layer"]] for task in (0, 1)]
        assert row["used"] == {str(t): int(mask.sum()) for t, mask in enumerate(masks)}
        assert row["free"] == int((~(masks[0] | masks[1])).sum()) and row["features"] == masks[0].numel()
    status, output, _ = command("inspect", out)
    assert status == 0 and "task 1" in output and "free" in output and "finished: 0, 1" in output


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_inspect_draws_a_picture(command, saved, tmp_path, suffix):
    out, _ = saved
    assert command("inspect", out, "--plot", tmp_path / f"picture.{suffix}")[0] == 0
    content = (tmp_path / f"picture.{suffix}").read_bytes()
    assert content.startswith(b"\x89PNG") if suffix == "png" else b"<svg" in content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", f"picture.{suffix}"]


def test_inspect_draws_only_what_it_can(refused, saved, tmp_path):
    out, _ = saved
    assert "doc" in refused("inspect", out, "--plot", tmp_path / "picture.doc")
    assert "No such file" in refused("inspect", out, "--plot", tmp_path / "gone" / "picture.png")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_verify_says_that_answers_hold(command, saved):
    out, model = saved
    status, output, _ = command("verify", out)
    assert status == 0 and "task 0: the same answers" in output and "task 1" in output
    assert json.loads(command("verify", out, "--json")[1])["isolated"] is True
    assert same_state(load(out), model)


def test_verify_fails_with_status_one(command, saved, monkeypatch):
    def leak(model):
        raise IsolationError("task 0: outputs depend on entries that are not locked, of fc.weight")

    monkeypatch.setattr(sys.modules["hatify.cli.saved"], "verify_isolation", leak)
    status, output, err = command("verify", saved[0])
    assert (status, output) == (1, "") and "task 0" in err and "fc.weight" in err and err.count("\n") == 1


def test_forget_forgets_one_task(command, saved, checkpoint):
    out, model = saved
    before = answers(model)
    status, output, _ = command("forget", out, "--task", 1, "--dry-run", "--json")
    report = json.loads(output)
    assert status == 0 and report["forgotten"] and same_state(load(out), model)
    assert "nothing was changed" in command("forget", out, "--task", 1, "--dry-run")[1]
    status, output, _ = command("forget", out, "--task", 1, "--reset", "original", "--original", checkpoint, "--json")
    assert status == 0 and json.loads(output)["forgotten"] == report["forgotten"]
    loaded = load(out)
    assert loaded.finished_tasks == (0,) and same(answers(loaded, [0]), before[:1])


def test_what_cannot_be_done_with_a_saved_model_is_one_line(refused, saved, tmp_path):
    out, model = saved
    for command in ("inspect", "verify"):
        assert "no saved model" in refused(command, tmp_path)
        assert "OUT" in refused(command)
    assert "no task 9" in refused("forget", out, "--task", 9)
    assert "task 2 is not finished" in refused("forget", out, "--task", 2)
    assert "'random', 'original', 'zero'" in refused("forget", out, "--task", 1, "--reset", "nothing")
    assert "original" in refused("forget", out, "--task", 1, "--reset", "original")
    assert "no such file" in refused("forget", out, "--task", 1, "--reset", "original", "--original", "gone.pt")
    assert same_state(load(out), model)
    save(converted(), tmp_path / "new")
    assert "no task is finished" in refused("verify", tmp_path / "new")


def test_results_that_cannot_be_written_leave_the_folder(refused, saved, monkeypatch):
    out, model = saved

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["hatify.saving"], "save_file", full)
    assert "No space left on device" in refused("forget", out, "--task", 1)
    assert same_state(load(out), model) and len(list(out.iterdir())) == 2


# extract --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def extracting():
    pytest.importorskip("hatify.extract")


@pytest.mark.parametrize("compact", ["--compact", "--no-compact"])
def test_extract_exports_by_torch(extracting, command, saved, tmp_path, compact):
    out, model = saved
    status, output, _ = command("extract", out, "--task", 0, "-o", tmp_path / "x.pt2", compact, "--json")
    report = json.loads(output)
    assert status == 0 and (report["parameters"] < report["parameters_before"]) == (compact == "--compact")
    program = torch.export.load(tmp_path / "x.pt2").module()
    for n in (2, 7):
        torch.testing.assert_close(program(images(n)), answers(model, [0], images(n))[0], rtol=1e-5, atol=1e-5)


def test_extract_exports_onnx(extracting, command, saved, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    out, model = saved
    status, output, _ = command("extract", out, "--task", 1, "-o", tmp_path / "x.onnx", "--json")
    assert status == 0 and json.loads(output)["task"] == 1
    onnx.checker.check_model(str(tmp_path / "x.onnx"))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"))
    for n in (2, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: images(n).numpy()})
        torch.testing.assert_close(torch.from_numpy(found), answers(model, [1], images(n))[0], rtol=1e-4, atol=1e-4)


def test_extract_without_onnx_says_what_to_install(refused, saved, tmp_path, monkeypatch):
    module = sys.modules["hatify.cli.extract"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "pip install onnx onnxscript" in refused("extract", saved[0], "--task", 0, "-o", tmp_path / "x.onnx")


def test_extract_writes_weights_alone(extracting, command, saved, tmp_path):
    out, _ = saved
    assert command("extract", out, "--task", 0, "-o", tmp_path / "x.safetensors")[0] == 0
    from hatify.extract import extract_task

    expected = extract_task(load(out), 0).state_dict()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())


def test_extract_replaces_only_by_force(extracting, command, refused, saved, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text("mine")
    assert "--force" in refused("extract", saved[0], "--task", 0, "-o", file)
    assert ".pt2, .onnx, .safetensors" in refused("extract", saved[0], "--task", 0, "-o", tmp_path / "x.bin")
    assert "no task 9" in refused("extract", saved[0], "--task", 9, "-o", file, "--force")
    assert file.read_text() == "mine"
    assert command("extract", saved[0], "--task", 0, "-o", file, "--force")[0] == 0
    assert load_file(file)
