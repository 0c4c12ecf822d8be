"""Where a converted model comes from: what is needed to make it again in another process."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from hatify.errors import CheckpointError

#: Arguments of timm that have nothing to do with the architecture, or would fetch something.
_NOT_ARCHITECTURE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "checkpoint_path")


@dataclass(frozen=True)
class Architecture:
    """How to build the network that was converted.

    Attributes:
        kind: ``"timm"``, ``"factory"``, or ``"caller"`` where only the caller can.
        name: timm's name, ``package.module:callable``, or the class of what the caller gave.
        arguments: the keyword arguments, none but what JSON can hold.
    """

    kind: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network, with weights of no meaning.

        Raises:
            CheckpointError: the caller has to give it, or it cannot be built here.
        """
        if self.kind == "caller":
            raise CheckpointError(
                f"the network ({self.name}) was given by the caller: give it again, hatify.load(path, model=…)"
            )
        try:
            return self._timm() if self.kind == "timm" else declared_factory(self.name)(**self.arguments)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.kind} {self.name}, {self.arguments}: cannot be built: {error}") from error

    def _timm(self) -> nn.Module:
        import timm

        arguments = {key: value for key, value in self.arguments.items() if key not in _NOT_ARCHITECTURE}
        return timm.create_model(known_to_timm(self.name), pretrained=False, **arguments)


@dataclass(frozen=True)
class Origin:
    """How a converted model was made.

    Attributes:
        arguments: those of `hatify.hatify`, besides the network and the example inputs.
        made_of: `fingerprint` of the network.
        class_name: its class, with its module.
        candidates: what may build the same network.
        architecture: what does, as far as that has been found out.
        added: the arguments of every later ``add_tasks``.
    """

    arguments: dict[str, Any]
    made_of: str
    class_name: str
    candidates: tuple[Architecture, ...]
    architecture: Architecture | None = None
    added: tuple[tuple[int, Any], ...] = ()

    @classmethod
    def of(cls, net: nn.Module, arguments: dict[str, Any]) -> Origin:
        """The origin of what `net` is converted to with `arguments`."""
        kind = type(net)
        name = f"{kind.__module__}:{kind.__qualname__}"
        return cls(arguments, fingerprint(net), name, tuple(_candidates(net)))

    def resolved(self) -> Origin:
        """With `architecture` found: the first candidate that builds a network with the same fingerprint."""
        if self.architecture is not None:
            return self
        same = (candidate for candidate in self.candidates if _builds(candidate, self.made_of))
        return replace(self, architecture=next(same, Architecture("caller", self.class_name)))


def known_to_timm(name: str) -> str:
    """`name`, if it is the name of one of timm's architectures.

    Raises:
        CheckpointError: it is not; names those that come near. (Names of hubs or folders are none: they would be
            fetched.)
    """
    import timm

    if timm.is_model(name) and ":" not in name and "/" not in name:
        return name
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, 0.5)
    raise CheckpointError(f"timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))


def find_factory(name: str) -> Any:
    """The callable behind ``package.module:callable``.

    Raises:
        CheckpointError: there is no such module or callable.
    """
    module, _, attribute = name.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"factory {name!r}: {error}; expected package.module:callable") from error
    if not callable(found):
        raise CheckpointError(f"factory {name!r} is not callable")
    return found


def declared_factory(name: str) -> Any:
    """`find_factory`, for names that come out of a file: only what is declared to make networks is ever called.

    Raises:
        CheckpointError: it is neither a class of networks nor annotated as returning one.
    """
    if name.partition(":")[0].partition(".")[0] in {*sys.stdlib_module_names, "__main__"}:
        raise CheckpointError(f"factory {name!r} is not in a module of yours; give the network: model=…")
    found = find_factory(name)
    if not makes_networks(found):
        raise CheckpointError(
            f"factory {name!r} is not declared to return a torch.nn.Module, and a file may name anything: annotate it "
            "(-> nn.Module), or give the network: model=…"
        )
    return found


def makes_networks(factory: Any) -> bool:
    """Whether `factory` is a class of networks, or annotated as returning one."""
    try:
        made = factory if isinstance(factory, type) else get_type_hints(factory).get("return")
    except (NameError, TypeError, AttributeError):
        return False
    return isinstance(made, type) and issubclass(made, nn.Module)


def fingerprint(net: nn.Module) -> str:
    """A digest of everything about a network but the values of its tensors: modules, settings, names, shapes."""
    lines = [(path, _named(type(m)), _settings(m)) for path, m in net.named_modules()]
    named = (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    shapes = [(name, tuple(tensor.shape)) for name, tensor in named]
    return hashlib.sha256(repr((lines, shapes)).encode()).hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key != "training"}
    return sorted((key, _plain(value)) for key, value in own.items() if not isinstance(value, (Tensor, nn.Module)))


def _plain(value: Any, depth: int = 4) -> Any:
    """`value` as text, without anything that differs from process to process."""
    if isinstance(value, functools.partial):
        value = {"function": value.func, "arguments": value.args, **value.keywords}
    if depth and isinstance(value, dict):
        return str({str(key): _plain(item, depth - 1) for key, item in value.items()})
    if depth and isinstance(value, (list, tuple)):
        return str([_plain(item, depth - 1) for item in value])
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    return _named(value if hasattr(value, "__qualname__") else type(value))


def _named(thing: Any) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def _candidates(net: Any) -> Iterator[Architecture]:
    """What may have built `net`: timm, with the arguments it left there or those that can be read off; its class."""
    config = getattr(net, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("architecture"):
        tag = config.get("tag")
        name = f"{config['architecture']}.{tag}" if tag else str(config["architecture"])
        read_off: dict[str, Any] = {"num_classes": getattr(net, "num_classes", None)}
        first = next((m for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        if first is not None and first.in_channels != (config.get("input_size") or (3,))[0]:
            read_off["in_chans"] = first.in_channels
        for given in (getattr(net, "_model_args", None), read_off):
            arguments = {key: value for key, value in (given or {}).items() if key not in _NOT_ARCHITECTURE}
            if given is not None and jsonable(arguments):
                # As they will be read again: with lists for tuples.
                yield Architecture("timm", name, json.loads(json.dumps(arguments)))
    kind = type(net)
    if kind.__module__ not in ("__main__", "builtins") and "<" not in kind.__qualname__:
        parameters = inspect.signature(kind).parameters.values()
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            yield Architecture("factory", _named(kind))


def _builds(candidate: Architecture, made_of: str) -> bool:
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return fingerprint(candidate.build()) == made_of
        # Some networks compute with values while they are built, which the meta device has not.
        except Exception:
            continue
    return False


def jsonable(value: Any) -> bool:
    """Whether JSON can hold `value`."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
