"""How the package hangs together: imports go one way, and a model's private names are its own."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from torch import fx

import hatify

PACKAGE = Path(hatify.__file__).parent
FILES = {
    ".".join(("hatify", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
#: The files in which a model's own names are made.
MODEL = ("hatify.model", "hatify.part")


def imports(name):
    """The files of the package that one imports anywhere in it, for type checking alone included."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # A file that is taken from its package takes the package, too, unless it is that package.
                taken = {whole, node.module} - {name} if whole in FILES else {node.module}
                yield from taken & FILES.keys()


def test_imports_go_one_way():
    graph = {name: {*imports(name)} - {name} for name in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"an import circle: {' ← '.join(error.args[1])}") from None


def own_names():
    """The private names of a model's class: its methods, annotations, and what is written into its dictionary."""
    names = set()
    for module in MODEL:
        for cls in (node for node in TREES[module].body if isinstance(node, ast.ClassDef)):
            for node in ast.walk(cls):
                if isinstance(node, ast.FunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
                elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                    names.add(str(node.slice.value))
                elif isinstance(node, ast.keyword) and node.arg is not None:
                    names.add(node.arg)
                elif isinstance(node, ast.Assign):
                    names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def reads(tree, names):
    """Where other objects' attributes of these names are used, also by way of a dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            parent = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            if not itself and not parent:
                yield f"{ast.unparse(node)}, line {node.lineno}"
        elif (isinstance(node, ast.Constant) and node.value in names) or (
            isinstance(node, ast.keyword) and node.arg in names
        ):
            yield f"{ast.unparse(node)}, line {node.lineno}"


def test_a_models_private_names_are_used_by_its_own_file_alone():
    names = own_names()
    assert {"_graphs", "_mode_readers", "_state", "_chosen"} <= names
    # Names that torch gives every module of its kind.
    names -= {name for name in names if hasattr(fx.GraphModule, name)}
    found = {name: list(reads(tree, names)) for name, tree in TREES.items() if name not in MODEL}
    assert {name: where for name, where in found.items() if where} == {}


def test_reading_a_private_name_would_be_found():
    source = "model._open\nmodel.__dict__['_open']\nmodel.__dict__.update(_open=None)\nself._open\nsuper()._open"
    assert len(list(reads(ast.parse(source), {"_open"}))) == 3
