"""README's loop is a program that runs."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_in_the_readme_runs_word_for_word():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(compile(program, str(README), "exec"), namespace)
    model = namespace["model"]
    assert model.finished_tasks == (0, 1, 2)
    assert namespace["logits"].shape == (8, 2)
    _the_code_is_what_the_readme_prints(model)


def _the_code_is_what_the_readme_prints(model):
    (printed,) = re.findall(r"```text\n(def forward.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    # fx frees names behind semicolons, which README leaves out.
    code = [line.split(";")[0].rstrip() for line in model.layer1[0].code.splitlines()]
    lines = [line for line in printed.splitlines() if line.strip() != "…"]
    found = [line for line in code if line in lines]
    assert found == lines


def test_the_readme_opens_with_the_two_commands():
    first = re.search(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == ["make demo", "make test"]
