"""The experiments run, start to end: each in its fast mode, which writes its figures and a picture."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = ("initialisation_and_scaling", "feature_importance", "regularization", "pretrained", "long_sequences")
DATA = os.environ.get("HATIFY_DATA")


def run(script, output, *options):
    """Run a script in its fast mode on one thread."""
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--fast", "--output", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_fast_mode_writes_figures_and_a_picture(script, tmp_path):
    done = run(script, tmp_path / "figures.json")
    assert done.returncode == 0, done.stderr
    assert "conditions" in json.loads((tmp_path / "figures.json").read_text())
    assert (tmp_path / "figures.png").stat().st_size > 5_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_committed_figures_are_of_a_full_run(script):
    figures = json.loads((BENCHMARKS / "results" / f"{script}.json").read_text())
    assert figures["conditions"]["fast"] is False


@pytest.mark.skipif(DATA is None, reason="set HATIFY_DATA to a folder with CIFAR-10, see benchmarks/cifar10.py")
def test_selective_forgetting_runs(tmp_path):
    done = run("selective_forgetting", tmp_path / "figures.json", "--data", DATA)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(DATA is None, reason="set HATIFY_DATA to a folder with CIFAR-10, see benchmarks/cifar10.py")
def test_learning_runs_and_goes_on_where_it_was(tmp_path):
    options = ("--data", DATA, "--settings", "resnet20_adamw", "omniglot_adamw", "--seeds", "0")
    some = run("learning", tmp_path / "figures.json", *options, "--methods", "hatify", "separate")
    assert some.returncode == 0, some.stderr
    before = json.loads((tmp_path / "figures.json").read_text())["cells"]
    assert len(before) == 4
    rest = run("learning", tmp_path / "figures.json", *options, "--methods", "hatify", "joint", "fine_tuning", "frozen")
    assert rest.returncode == 0, rest.stderr
    cells = json.loads((tmp_path / "figures.json").read_text())["cells"]
    assert len(cells) == 9 and all(cell in cells for cell in before)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("selective_forgetting", ()),
        ("pretrained", ("--checkpoint", "none.th")),
        ("learning", ("--settings", "resnet18_sgd")),
    ],
)
def test_missing_data_is_one_line_and_status_2(script, options, tmp_path):
    done = run(script, tmp_path / "figures.json", "--data", str(tmp_path), *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "neither cifar-10-batches-py/ nor cifar10-jpeg.tar.xz" in done.stderr
    assert not list(tmp_path.iterdir())


def test_spare_features_of_timms_models_are_measured_and_gone_on_with(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "timm_spare.py"), "--output", str(tmp_path / "spare.csv"), "--models"]
    for names in (("test_resnet",), ("test_resnet", "test_vit")):
        done = subprocess.run([*command, *names], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "spare.csv").open()))
    assert [row["name"] for row in rows] == ["test_resnet", "test_vit"]
    assert "test_resnet:" not in done.stdout  # it was there
    for row in rows:
        assert int(row["spare"]) > 0 and row["isolated"] == "yes" and float(row["parity_training"]) < 1e-4
