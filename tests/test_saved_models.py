"""Models that earlier versions have saved open, answer as they did, and go on learning."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

import hatify
from hatify import HatModel

SAVED = Path(__file__).parent / "saved"
VERSIONS = sorted(folder.name for folder in SAVED.iterdir() if folder.is_dir() and folder.name[0].isdigit())
KINDS = ("resnet", "vit", "own", "opened", "grown")

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make", SAVED / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(make: ModuleType, version: str, kind: str) -> HatModel:
    given = kind not in ("resnet", "vit")
    return hatify.load(SAVED / version / kind, make.network(kind) if given else None)


def answers_as_then(make: ModuleType, model: HatModel, version: str, kind: str) -> bool:
    found = make.answers(model, make.inputs(kind))
    with safe_open(SAVED / version / f"{kind}.safetensors", "pt") as file:
        expected = {task: file.get_tensor(task) for task in file.keys()}  # noqa: SIM118
        same_kernels = file.metadata()["kernels"] == make.kernels()
    for task, then in expected.items():
        if not (torch.equal(found[task], then) if same_kernels else torch.allclose(found[task], then, 1e-4, 1e-5)):
            return False
    return found.keys() == expected.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_what_earlier_versions_saved_answers_as_it_did(make: ModuleType, version: str, kind: str, tmp_path) -> None:
    model = opened(make, version, kind)
    assert answers_as_then(make, model, version, kind)
    if model.active_task is not None:
        assert kind == "opened" and model.active_task == 2
        model.abort_task()
        assert answers_as_then(make, model, version, kind)
    make.learn(model, 2, make.inputs(kind))
    found = make.answers(model, make.inputs(kind))
    assert len(found) == len(model.finished_tasks) and "2" in found
    hatify.forget_task(model, 2)
    assert answers_as_then(make, model, version, kind)
    hatify.verify_isolation(model)
    hatify.save(model, tmp_path / "again")
    again = hatify.load(tmp_path / "again", None if kind in ("resnet", "vit") else make.network(kind))
    assert answers_as_then(make, again, version, kind)


def test_a_file_of_version_0_1_that_this_version_would_convert_otherwise_is_refused(make: ModuleType, tmp_path) -> None:
    shutil.copytree(SAVED / "0.1" / "own", tmp_path / "own")
    text = tmp_path / "own" / "hatify.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"layout": "0"}))
    with pytest.raises(hatify.CheckpointError, match=r"converts it differently .*saved with .*torch"):
        hatify.load(tmp_path / "own", make.network("own"))


def test_what_is_saved_now_opens_whatever_the_analysis_would_find_later(
    make: ModuleType, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        model = make.converted(kind)
        hatify.save(model, tmp_path / kind)
        with monkeypatch.context() as patch:
            for stage in ("classify", "accepted_sizes", "analyse", "make_plan"):
                patch.setattr(f"hatify.convert.{stage}", lambda *_: pytest.fail("derived again"))
            again = hatify.load(tmp_path / kind, None if kind in ("resnet", "vit") else make.network(kind))
        x = make.inputs(kind)
        found, expected = make.answers(again, x), make.answers(model, x)
        assert found.keys() == expected.keys() and all(torch.equal(found[t], expected[t]) for t in found)
        assert str(again.code) == str(model.code) and again.census == model.census
        assert again.plan.to_data()[0] == model.plan.to_data()[0]
