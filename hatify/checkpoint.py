"""Reading the checkpoints that people have, none of which is trusted.

A file is known by its content, not its name. Pickles are read by torch's restricted unpickler alone, which builds
tensors and plain containers and calls nothing else; archives must not declare more than they hold.
"""

from __future__ import annotations

import argparse
import json
import re
import tarfile
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hatify.errors import CheckpointError

#: Where training scripts keep the weights, those first that are wanted first.
STATE_KEYS = (
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params",
    "model_ema", "state_dict_ema", "ema", "params_ema",
)  # fmt: skip
#: What `nn.DataParallel`, `torch.compile` and modules that hold the network put in front of its names.
PREFIXES = ("module.", "_orig_mod.", "model.")
#: Types without code of their own that checkpoints hold beside the weights: the command line's arguments, scores.
_SCALAR: Any = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")},
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
_ZIP, _SHARDS = b"PK\x03\x04", ".index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The weights found in a checkpoint.

    Attributes:
        state: {name: tensor}, on the CPU; names without `prefix`.
        state_key: the keys that lead to them in the file, joined by dots; empty if they are all there is.
        prefix: what was taken off the front of the names.
        left_out: what is among the weights in the file and not in `state`.
        other_keys: keys in the file under which there are other weights.
    """

    state: dict[str, Tensor]
    state_key: str = ""
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    other_keys: tuple[str, ...] = ()


def read_checkpoint(
    path: str | Path,
    expected: Collection[str] = (),
    state_key: str | None = None,
    strip_prefix: str | None = None,
) -> Checkpoint:
    """The weights in a file, or in a folder of sharded safetensors.

    Args:
        path: safetensors; what ``torch.save`` writes or wrote; an index of shards, or a folder with one.
        expected: the names the network has; of the prefixes that could be taken off, those are that match best.
        state_key: where the weights are, keys joined by dots; ``""`` for the file as a whole. None: found out.
        strip_prefix: what to take off the names; ``""`` for nothing. None: found out.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is no checkpoint; it holds Python objects that
            would have to be executed; nothing is found under `state_key` or `strip_prefix`.
    """
    path = Path(path)
    content = _content(path)
    if state_key is None:
        keys = _find_state(content)
    else:
        keys = (state_key,) if isinstance(content, Mapping) and state_key in content else _split(state_key)
    found: Any = content
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            raise CheckpointError(f"{path}: there is no {state_key!r} in it; at the top there is: {_listed(content)}")
        found = found[key]
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(
            f"{path}: no weights are in it; at the top there is: {_listed(content)}; say where by --state-key"
        )
    tensors = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    prefix = _find_prefix(list(tensors), expected) if strip_prefix is None else strip_prefix
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if not state:
        raise CheckpointError(f"{path}: no name begins with {prefix!r}; the first is {next(iter(tensors))!r}")
    return Checkpoint(
        state,
        ".".join(keys),
        prefix,
        tuple(str(name) for name in found if str(name).removeprefix(prefix) not in state),
        tuple(str(key) for key in content if _holds_weights(content[key]) and str(key) not in keys[:1]),
    )


# The file ------------------------------------------------------------------------------------------------------------


def _content(path: Path) -> Any:
    """Everything in a file, as plain containers and tensors."""
    try:
        if path.is_dir():
            return _content(_in_folder(path))
        if not path.exists():
            raise CheckpointError(f"{path}: there is no such file")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            start = file.read(64)
        if path.name.endswith(_SHARDS):
            return _sharded(path)
        if path.suffix == ".safetensors" or start[8:9] == b"{":
            return _safetensors(path)
        return _unpickled(path, start)
    except CheckpointError:
        raise
    # Damaged files make the readers fail in every way there is.
    except (Exception, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint: {first_line(error)}") from error


def _in_folder(folder: Path) -> Path:
    if (folder / "hatify.json").exists():
        raise CheckpointError(f"{folder}: a converted model, not a checkpoint of an original network")
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith((_SHARDS, ".safetensors")))
    index = [name for name in names if name.endswith(_SHARDS)]
    if len(index or names) != 1:
        raise CheckpointError(f"{folder}: a folder with {len(index or names)} checkpoints; name one file")
    return folder / (index or names)[0]


def _sharded(path: Path) -> dict[str, Any]:
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    whole: dict[str, Any] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name or name.endswith(_SHARDS):
            raise CheckpointError(f"{path}: the shard {name!r} is not a file beside it")
        whole |= _content(path.with_name(name))
    if absent := [key for key in shards if key not in whole]:
        raise CheckpointError(f"{path}: {absent[0]} is in none of its shards")
    return whole


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _unpickled(path: Path, start: bytes) -> Any:
    """What ``torch.save`` wrote, read without running any code in it."""
    if not start:
        raise CheckpointError(f"{path}: empty")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: only git-lfs's pointer to the file; fetch it by: git lfs pull")
    if start.startswith(_ZIP):
        _check_archive(path)
    elif tarfile.is_tarfile(path):
        raise CheckpointError(
            f"{path}: the tar format of torch before 0.1.10 cannot be read without running code; {_way_out(path)}"
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" not in str(error):
            raise
        name = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)|Type <class '([\w.]+)'>", str(error))
        what = next(filter(None, name.groups())) if name else "something"
        raise CheckpointError(
            f"{path}: holds {what} that would have to be executed to be read, and is refused; {_way_out(path)}"
        ) from error


def _way_out(path: Path) -> str:
    return (
        f"where you trust it, read it by torch.load({path.name!r}, weights_only=False), and torch.save the "
        "state_dict() of the network in it"
    )


def _check_archive(path: Path) -> None:
    """torch stores without compression: what declares to be larger than the file would not stop growing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path}: a TorchScript program; save its weights alone: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pt')"
        )
    declared, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: an archive of {size:,} bytes that unpacks to {declared:,}; torch.save does not compress, so this "
            "is not its work, and is refused"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote")


# What is in it -------------------------------------------------------------------------------------------------------


def _holds_weights(value: Any) -> bool:
    """Whether there are tensors in `value`, or in a mapping in it under a well-known key."""
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) or any(
        isinstance(value.get(key), Mapping) and any(isinstance(v, Tensor) for v in value[key].values())
        for key in STATE_KEYS
    )


def _find_state(content: Any, depth: int = 3) -> tuple[str, ...]:
    """The keys that lead to the weights."""
    if not depth or not isinstance(content, Mapping):
        return ()
    for key in STATE_KEYS:
        if _holds_weights(content.get(key)):
            return (key, *_find_state(content[key], depth - 1))
    if any(isinstance(value, Tensor) for value in content.values()):
        return ()
    inner = [key for key in content if isinstance(key, str) and _holds_weights(content[key])]
    return (inner[0], *_find_state(content[inner[0]], depth - 1)) if len(inner) == 1 else ()


def _find_prefix(names: list[str], expected: Collection[str]) -> str:
    """What to take off the names: of all stacks of known prefixes, the shortest that matches most."""
    stacks = list(_stacks(names))
    if not expected:
        return stacks[-1]
    wanted = set(expected)
    return max(stacks, key=lambda prefix: (len(wanted & {n.removeprefix(prefix) for n in names}), -len(prefix)))


def _stacks(names: list[str]) -> Iterator[str]:
    """Every stack of known prefixes that most names begin with, from the empty one on."""
    stack: str | None = ""
    while stack is not None:
        yield stack
        longer = (stack + prefix for prefix in PREFIXES)
        stack = next((s for s in longer if 2 * sum(name.startswith(s) for name in names) > len(names)), None)


def _split(state_key: str) -> tuple[str, ...]:
    return tuple(state_key.split(".")) if state_key else ()


def _listed(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join(map(str, list(content)[:8])) + (", …" if len(content) > 8 else "") or "nothing"


def first_line(error: BaseException) -> str:
    """What kind of error it is, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
