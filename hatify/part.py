"""A module of the original as a graph of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

#: What a part has of the module in whose place it is.
_TABLES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "training")
#: Names that a GraphModule needs for itself.
TAKEN = frozenset(dir(fx.GraphModule({}, fx.Graph())))


class Part(fx.GraphModule):
    """A module of the original as a graph of its own, or as two where it takes other paths in training.

    Args:
        module: the original, whose children, parameters, buffers and attributes the part takes over.
        class_name: what the part's class is called.
    """

    _graphs: dict[bool, fx.Graph]

    def __init__(self, module: nn.Module, class_name: str) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=class_name)
        for name, value in vars(module).items():
            if name in _TABLES or (name not in self.__dict__ and not hasattr(type(self), name)):
                self.__dict__[name] = value

    def install(self, graphs: dict[bool, fx.Graph], mode: bool) -> None:
        """Run these graphs from now on, {training: graph}."""
        self.__dict__["_graphs"] = graphs
        self.use_graph(mode, anew=True)

    @property
    def graphs(self) -> dict[bool, fx.Graph]:
        """The graphs it runs, {training: graph}; one and the same for both modes, if that will do."""
        return self._graphs

    def use_graph(self, mode: bool, anew: bool = False) -> None:
        """Use the graph of a mode (most networks have one for both); `anew`: write its code in any case."""
        graph = self._graphs[mode]
        if anew or self.__dict__.get("_graph") is not graph:
            self.__dict__["_graph"] = graph
            graph.owning_module = self
            self.recompile()

    def recompile(self) -> Any:
        """Generate ``forward`` from the graph.

        The original's children keep their names even where those are names of methods here; the generated code
        reaches such a child through the table it is registered in.
        """
        tables = ("_modules", "_parameters", "_buffers")
        own = {name: table for table in tables for name in self.__dict__[table] if self._hides(name)}
        pattern = re.compile(rf"\bself\.({'|'.join(map(re.escape, own))})\b")

        def reach_children(lines: list[str]) -> list[str]:
            return [pattern.sub(lambda m: f"self.{own[m[1]]}[{m[1]!r}]", line) for line in lines] if own else lines

        with self._graph.on_generate_code(lambda _: reach_children):
            code = super().recompile()
        # fx wraps every call in order to print where errors come from; a traceback says the same.
        del type(self).__call__
        return code

    def _hides(self, name: str) -> bool:
        """Whether ``self.name`` would not find the child `name`."""
        return name in self.__dict__ or hasattr(type(self), name)

    def _recompile_submodules(self) -> list[Any]:
        return []  # each part is written by itself

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        copied = memo[id(self)] = Part.__new__(Part)
        state = copy.deepcopy(self._state(), memo)
        return _filled(copied, type(self).__name__, state, copy_graphs(self._graphs, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _part, (type(self).__name__, self._state(), copy_graphs(self._graphs, {}))

    def _state(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_graph", "_graphs")}


def _part(name: str, state: dict[str, Any], graphs: dict[bool, fx.Graph]) -> Part:
    """A part from what `pickle` kept of it."""
    return _filled(Part.__new__(Part), name, state, graphs)


def _filled(part: Part, name: str, state: dict[str, Any], graphs: dict[bool, fx.Graph]) -> Part:
    type(part).__name__ = name
    part.__dict__.update(state)
    part.install(graphs, part.training)
    return part


def copy_graphs(graphs: Mapping[bool, fx.Graph], memo: dict[int, Any]) -> dict[bool, fx.Graph]:
    """Copies of the graphs of both modes: one where they are one."""
    training = copy.deepcopy(graphs[True], memo)
    same = graphs[True] is graphs[False]
    return {True: training, False: training if same else copy.deepcopy(graphs[False], memo)}
