"""Whether a converted model still is what its conversion made: what was wrapped or added since, no policy claims."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hatify.converted import Converted
from hatify.errors import HatError
from hatify.nn.layers import HatLayer
from hatify.nn.per_task import PER_TASK
from hatify.nn.state import STATE


def tensor_names(model: nn.Module) -> frozenset[str]:
    """The names of every parameter and buffer, all of them where one has several."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return frozenset(name for name, _ in named)


def layer_types(model: nn.Module) -> dict[str, type]:
    """The types of what conversion has put in the place of layers, by path."""
    kinds: tuple[type, ...] = (HatLayer, *PER_TASK)
    return {path: type(module) for path, module in model.named_modules() if isinstance(module, kinds)}


def check_structure(model: Converted) -> None:
    """Raise a `HatError` if a parameter, buffer or layer has been wrapped, replaced or added since the conversion."""
    expected, found = model.task_state.tensor_names, tensor_names(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    gone, added = sorted(expected - found), sorted((found - expected) & parameters)
    if gone:
        owner = _nearest(model, gone[0])
        now = f" ({', '.join(added[:3])} came instead)" if added else ""
        raise HatError(
            f"{gone[0]} is gone from the converted model{now}: something has wrapped, pruned or parametrised {owner} "
            "since the conversion, so that what finished tasks own cannot be told any more; undo that "
            "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove, an adapter's unload), "
            "or do it before the conversion"
        )
    if added:
        raise HatError(
            f"{added[0]} was added to the converted model: no policy claims this parameter, so that training it would "
            "change what finished tasks answer; remove it, or add it before the conversion"
        )
    modules = dict(model.named_modules())
    for path, kind in model.task_state.layer_types.items():
        if not isinstance(modules.get(path), kind):
            now = type(modules[path]).__name__ if path in modules else "gone"
            raise HatError(
                f"{path}: the {kind.__name__} that conversion has put there is {now} now, which applies no masks; put "
                "it back, and load weights into it with load_state_dict"
            )


_SIMPLE = (bool, int, float, str, type(None))


def settings(model: Converted) -> dict[str, Any]:
    """What decides, besides tensors, what a model computes: types of modules, their numbers and flags, and hooks."""
    found: dict[str, Any] = {
        "global_hooks": (*nn.modules.module._global_forward_hooks, *nn.modules.module._global_forward_pre_hooks)
    }
    for path, module in model.named_modules():
        if path.partition(".")[0] == STATE:
            continue
        found[path or "the model"] = type(module).__name__
        for name, value in vars(module).items():
            items = value if isinstance(value, tuple) else (value,)
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                value = tuple(value)
            elif name == "forward" and module is not model:
                value = (id(value),)  # one that was put in the place of the class's
            elif name.startswith("_") or name == "training" or not all(isinstance(item, _SIMPLE) for item in items):
                continue
            found[f"{path}.{name}" if path else name] = value
    return found


def check_leaves(model: Converted, inputs: Any, outputs: Any) -> None:
    """Raise a `HatError` if a parameter that the model does not hold takes part in `outputs`, as through a hook."""
    known = {id(parameter) for parameter in model.parameters()}
    given = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    known |= {id(t) for t in given}
    for leaf in _leaves(tree_leaves(outputs), {t.grad_fn for t in given}):
        if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
            hooked = [name or "the model itself" for name, m in model.named_modules() if _is_hooked(m)]
            where = f", perhaps through a forward hook on {hooked[0]}" if hooked else ""
            raise HatError(
                f"a parameter of shape {tuple(leaf.shape)} takes part that the converted model does not hold{where}: "
                "training it would change what finished tasks answer; remove it, or make it a part of the network "
                "before the conversion"
            )


def _leaves(outputs: Iterable[Any], stop: set[Any]) -> Iterator[Tensor]:
    """The leaf tensors that `outputs` were computed from, but for what lies behind the nodes of `stop`."""
    waiting: list[Any] = [t.grad_fn for t in outputs if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = {*stop, None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        waiting.extend(earlier for earlier, _ in node.next_functions)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _nearest(model: nn.Module, name: str) -> str:
    """The innermost module on the way to `name` that is still there."""
    modules = dict(model.named_modules())
    parts = name.split(".")[:-1]
    paths = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((path for path in paths if path in modules), "the model")


def children_of(model: nn.Module) -> nn.Module:
    """A module with the model's children and parameters, that has no attributes of its own to hide them."""
    bare = nn.Module()
    vars(bare).update({table: vars(model)[table] for table in ("_modules", "_parameters", "_buffers", "training")})
    return bare
