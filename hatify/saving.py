"""Saving and loading a converted model, exactly and whole.

A saved model is a folder of two files: ``hatify.json`` says how to make the network, by which plan it is converted, and
where the tasks stand; ``model.safetensors`` holds every parameter and buffer, and the plan's numbers. The two name each
other by a stamp. Loading makes the network, carries out the plan, and puts every tensor in its place.

Both files are written into a provisional folder first. Where there was none, that folder is renamed. Where there was
one, renaming the new ``hatify.json`` over the old one is what makes the new state count, and the weights follow: until
they have, readers find those with the right stamp in the provisional folder. Whatever moment a process is killed at,
either the old or the new state is there, and the next save clears away what was left.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hatify.convert import convert_by, hatify
from hatify.errors import CheckpointError, HatError
from hatify.lock import named_tensors
from hatify.model import HatModel
from hatify.nn.per_task import PerTaskNorm
from hatify.nn.state import STATE
from hatify.origin import Architecture, Origin, jsonable
from hatify.plan import Plan
from hatify.weights import check_keys
from hatify.without_plan import WITHOUT_PLAN, check_layout

WEIGHTS, DESCRIPTION = "model.safetensors", "hatify.json"
#: What does not count yet is in a folder of this name.
PROVISIONAL = ".new"
FORMAT = 2
#: Beside the model's own tensors, ``model.safetensors`` holds these, under names no module of the user's can have: the
#: values at ``begin_task`` that are no longer the current ones, the example inputs, modules' extra state, and the
#: numbers of the plan.
BEFORE, INPUTS, EXTRA, PLAN = (f"{STATE}.{name}" for name in ("before.", "example_inputs", "extra.", "plan"))


# Saving --------------------------------------------------------------------------------------------------------------


def save(model: HatModel, path: str | os.PathLike[str]) -> None:
    """Save a converted model with the state of its tasks into a folder, whole or not at all.

    What is there before stays readable until the new state is complete, also if the process is killed. In the middle
    of a task, what `HatModel.abort_task` returns to is saved too. The state of optimizers and schedules is the
    caller's to save.

    Args:
        model: the model.
        path: the folder: a new one, an empty one, or one that holds a saved model, which is replaced.

    Raises:
        CheckpointError: `path` is something else, cannot be written, or something in the model cannot be saved.
    """
    if not isinstance(model, HatModel):
        raise CheckpointError(f"expected a converted model itself, not {type(model).__name__} (which may hold one)")
    folder = Path(path).absolute()
    model.__dict__["origin"] = model.origin.resolved()
    model.put_right()
    stamp = uuid.uuid4().hex
    description, tensors = json.dumps(describe(model) | {"weights": stamp}, indent=2), _stored(model)
    with _failures_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder.parent):
            check_replaceable(folder)
            if (folder / DESCRIPTION).exists():
                _replace_files(folder, description, tensors, stamp)
            else:
                _make_folder(folder, description, tensors, stamp)


def check_replaceable(folder: Path) -> None:
    """Raise a `CheckpointError` unless `folder` is new, empty, or holds a saved model."""
    if folder.is_dir():
        if not (folder / DESCRIPTION).is_file() and any(folder.iterdir()):
            raise CheckpointError(f"{folder}: there are files in this folder, and none is {DESCRIPTION}")
    elif os.path.lexists(folder):
        raise CheckpointError(f"{folder}: this is a file, not a folder")


def _make_folder(folder: Path, description: str, tensors: dict[str, Tensor], stamp: str) -> None:
    with _written(folder.with_name(f".{folder.name}{PROVISIONAL}"), description, tensors, stamp) as provisional:
        if folder.exists():
            folder.rmdir()
        provisional.rename(folder)
        _flush(folder.parent)


def _replace_files(folder: Path, description: str, tensors: dict[str, Tensor], stamp: str) -> None:
    _finish(folder)
    with _written(folder / PROVISIONAL, description, tensors, stamp) as provisional:
        (provisional / DESCRIPTION).replace(folder / DESCRIPTION)
        _flush(folder)
        _finish(folder)


def _finish(folder: Path) -> None:
    """If weights that count by now are still in the provisional folder, put them in their place."""
    with suppress(FileNotFoundError, CheckpointError, SafetensorError):
        if _stamp_in(folder / PROVISIONAL / WEIGHTS) == read_description(folder)["weights"]:
            (folder / PROVISIONAL / WEIGHTS).replace(folder / WEIGHTS)
            _flush(folder)


@contextmanager
def _written(provisional: Path, description: str, tensors: dict[str, Tensor], stamp: str) -> Iterator[Path]:
    """A folder with both files, on the disk, to take them from; what another save has left there is cleared away."""
    shutil.rmtree(provisional, ignore_errors=True)
    try:
        provisional.mkdir()
        weights, text = provisional / WEIGHTS, provisional / DESCRIPTION
        text.write_text(description + "\n", encoding="utf-8")
        save_file(tensors, weights, metadata={"stamp": stamp})
        # safetensors lets nobody else read its files.
        weights.chmod(text.stat().st_mode)
        for path in (weights, text, provisional):
            _flush(path)
    except BaseException:
        shutil.rmtree(provisional, ignore_errors=True)
        raise
    # Not cleared away if what follows is interrupted: it may count by then.
    yield provisional
    shutil.rmtree(provisional, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time save into `folder`; the lock ends with the process. Not on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{folder}: cannot be written: {reason}; what was there is untouched") from error


def describe(model: HatModel) -> dict[str, Any]:
    """What ``hatify.json`` says of a model."""
    origin = model.origin.resolved()
    assert origin.architecture is not None
    trainable = model.trainable.names
    description = {
        "format": FORMAT,
        "architecture": vars(origin.architecture),
        "conversion": origin.arguments,
        "example_inputs": tree_map_only(Tensor, lambda t: f"{t.dtype}, {tuple(t.shape)}", model.example_inputs),
        "tasks_added": origin.added,
        "tasks": model.task_state.progress(),
        "training": model.training,
        "in_other_mode": [name for name, m in model.named_modules() if m.training != model.training],
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "never_trained": [name for name, _ in model.named_parameters() if name not in trainable],
        "strides": {name: t.stride() for name, t in _own_tensors(model) if t.stride() != _usual_stride(t)},
        "plan": model.plan.to_data()[0],
        "versions": _versions(),
    }
    for key, value in description.items():
        if not jsonable(value):
            if key == "example_inputs":
                description[key] = str(value)
            else:
                raise CheckpointError(f"cannot be saved: {key} {value!r} holds something JSON has no form for")
    return description


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("hatify", "torch", "timm"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _own_tensors(model: HatModel) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, but those that the conversion makes anew."""
    derived = {f"{STATE}.{name}" for name in model.task_state._non_persistent_buffers_set}
    derived |= {f"{path}.over" for path, module in model.named_modules() if isinstance(module, PerTaskNorm)}
    return ((name, tensor) for name, tensor in named_tensors(model) if name not in derived)


def _stored(model: HatModel) -> dict[str, Tensor]:
    """What ``model.safetensors`` holds."""
    tensors = dict(_own_tensors(model))
    saved = model.values_before
    if saved is not None:
        tensors |= {BEFORE + name: saved[name] for name in list(tensors) if not _same_bits(saved[name], tensors[name])}
    tensors[INPUTS], tensors[PLAN] = _packed(model.example_inputs, "example_inputs"), model.plan.to_data()[1]
    for path, state in _extra_states(model):
        tensors[EXTRA + path] = _packed(state, f"the extra state of {path}")
    return storable(tensors)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values as safetensors takes them: contiguous, on the CPU, none in the memory of another.

    Raises:
        CheckpointError: a tensor has no dense values, or a dtype that the format lacks.
    """
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype == torch.complex128:
            kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise CheckpointError(f"{name}: a tensor that is {kind} cannot be saved")
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        stored[name] = own
    return stored


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _usual_stride(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


def _extra_states(model: HatModel) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        if path != STATE and type(module).get_extra_state is not nn.Module.get_extra_state:
            yield path, module.get_extra_state()


def _packed(value: Any, what: str) -> Tensor:
    """`value` as bytes that can be read without running code, uint8."""
    buffer = io.BytesIO()
    try:
        torch.save(tree_map_only(Tensor, lambda t: t.detach().cpu(), value), buffer)
        _unpacked(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    except Exception as error:
        raise CheckpointError(f"{what} cannot be saved: {str(error).splitlines()[0]}") from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), map_location="cpu", weights_only=True)


# Loading -------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> HatModel:
    """A model that `save` has saved, with everything as it was, on the CPU.

    It answers bit for bit what the saved one answered, and training goes on where it stopped.

    Args:
        path: the folder.
        model: the network that was converted, before its conversion; its weights do not matter. Needed where it is
            neither timm's nor made by something importable. The result is on its device.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the network; or the network has to be given.
    """
    folder = Path(path)
    description, tensors = _read(folder)
    try:
        converted = _converted(description, tensors, model)
        _restore(converted, description, tensors)
    except HatError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION}: damaged: {type(error).__name__}: {error}") from error
    return converted


def read_description(folder: Path) -> dict[str, Any]:
    """What ``hatify.json`` in `folder` says.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{folder}: no saved model: there is no {DESCRIPTION}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(description, dict) or "weights" not in description:
        raise CheckpointError(f"{path}: does not describe a saved model")
    if description.get("format") not in (FORMAT, WITHOUT_PLAN):
        raise CheckpointError(
            f"{path}: format {description.get('format')!r}, but this version reads formats {WITHOUT_PLAN} and {FORMAT}"
        )
    return description


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description, and the tensors that belong to it: a save may be under way, or have been killed."""
    fault: Exception | None = None
    for _ in range(3):
        description = read_description(folder)
        for path in (folder / WEIGHTS, folder / PROVISIONAL / WEIGHTS):
            try:
                with safe_open(path, "pt") as file:
                    if (file.metadata() or {}).get("stamp") == description["weights"]:
                        return description, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, SafetensorError) as error:
                fault = error
    reason = f"damaged: {fault}" if fault else f"missing, or does not belong to {DESCRIPTION}"
    raise CheckpointError(f"{folder / WEIGHTS}: {reason}") from fault


def _stamp_in(weights: Path) -> Any:
    with safe_open(weights, "pt") as file:
        return (file.metadata() or {}).get("stamp")


def _converted(description: dict[str, Any], tensors: dict[str, Tensor], net: nn.Module | None) -> HatModel:
    """The model as it was after conversion, but for its weights; takes what that needs out of `tensors`."""
    inputs = tensors.pop(INPUTS)
    architecture = Architecture(**description["architecture"])
    given, options = net is not None, description["conversion"]
    with torch.random.fork_rng(devices=[]):
        net = architecture.build() if net is None else net
        device = next((t.device for t in net.parameters()), torch.device("cpu"))
        example = tree_map_only(Tensor, lambda t: t.to(device), _unpacked(inputs))
        if description["format"] == WITHOUT_PLAN:
            model = hatify(net, example_inputs=example, **options)
        else:
            plan = Plan.from_data(description["plan"], tensors.pop(PLAN))
            model = convert_by(plan, net, example, options)
        if architecture.kind == "timm" and not given:
            from hatify.timm_models import keep_interface

            keep_interface(model)
        for count, num_classes in description["tasks_added"]:
            model.add_tasks(count, num_classes)
    model.__dict__["origin"] = Origin(**{**vars(model.origin), "architecture": architecture, "arguments": options})
    if description["format"] == WITHOUT_PLAN:
        check_layout(model, description)
    return model


def _restore(model: HatModel, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Put every tensor, mode and flag in its place, and guard the task that is open."""
    own = dict(_own_tensors(model))
    stored = {name: t for name, t in tensors.items() if not name.startswith((BEFORE, EXTRA))}
    check_keys(
        missing=[name for name in own if name not in stored],
        unexpected=[name for name in stored if name not in own],
        mismatched=[name for name in own if name in stored and own[name].shape != stored[name].shape],
    )
    for name, tensor in own.items():
        stride = description["strides"].get(name) or _usual_stride(tensor)
        # Memory of their own, aligned like any other: kernels may round by where and how their operands lie.
        value = torch.empty_strided(tensor.shape, stride, dtype=stored[name].dtype)
        tensor.data = value.copy_(stored[name]).to(tensor.device)
    for name, packed in tensors.items():
        if name.startswith(EXTRA):
            model.get_submodule(name.removeprefix(EXTRA)).set_extra_state(_unpacked(packed))
    model.task_state.set_progress(description["tasks"])
    never, frozen, flipped = (set(description[key]) for key in ("never_trained", "frozen", "in_other_mode"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.trainable.as_it_is(model, never)
    model.train(description["training"])
    for name, module in model.named_modules():
        module.training = description["training"] != (name in flipped)
    if model.active_task is None:
        model.guard_anew()
    else:
        before = {name: t.detach().clone() for name, t in named_tensors(model)}
        model.guard_anew(before | {name: tensors[BEFORE + name].clone() for name in own if BEFORE + name in tensors})
