"""The documentation's programs run: all ``python`` blocks of a page, in order. (``py`` blocks need more than the tests.)"""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hatify
from hatify.ops import OPERATIONS

matplotlib.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python" in page.read_text(encoding="utf-8"))


@pytest.fixture
def own_operations():
    """Operations that are added meanwhile are removed again."""
    before = dict(OPERATIONS)
    yield
    OPERATIONS.clear()
    OPERATIONS.update(before)


@pytest.mark.usefixtures("own_operations")
@pytest.mark.filterwarnings("ignore::hatify.HatWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {}
    for block in re.finditer(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        line = page.read_text(encoding="utf-8")[: block.start()].count("\n")
        exec(compile("\n" * (line + 1) + block[1], str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_module_trains_one_task_after_the_other(tmp_path, monkeypatch):
    installed = next((name for name in ("pytorch_lightning", "lightning") if find_spec(name)), None)
    if installed is None:
        pytest.skip("neither pytorch-lightning nor lightning is installed")
    lightning = import_module(installed)
    monkeypatch.chdir(tmp_path)
    tasks = [TensorDataset(torch.randn(64, 8), torch.randint(2, (64,))) for _ in range(2)]
    model = hatify.hatify(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), 2, torch.randn(2, 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    namespace = {"L": lightning, "torch": torch, "F": F, "hatify": hatify, "model": model}
    namespace["loaders"] = [DataLoader(task, batch_size=16) for task in tasks]
    page = (DOCS / "how-to" / "loops.md").read_text(encoding="utf-8")
    (program,) = (found for found in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "LightningModule" in found)
    exec(program, namespace)
    assert model.finished_tasks == (0, 1)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in model.uses)
    hatify.verify_isolation(model, torch.randn(4, 8))


def test_pictures_shown_are_those_of_committed_results():
    results = {path.name for path in (DOCS.parent / "benchmarks" / "results").glob("*.png")}
    shown = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (DOCS / "experiments.md").read_text(encoding="utf-8"))
    assert shown
    assert {Path(picture).name for picture in shown} <= results
