"""Checkpoints as people have them are read; what is hostile or damaged is refused, with the reason."""

import argparse
import collections
import io
import json
import os
import pickle
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hatify import CheckpointError
from hatify.checkpoint import read_checkpoint
from hatify.cli import convert_app, run
from small import SmallNet

STATE = SmallNet().state_dict()
FLAT = {name: t for name, t in STATE.items()}


def prefixed(prefix, state=FLAT):
    return {prefix + name: t for name, t in state.items()}


def is_the_state(checkpoint):
    return checkpoint.state.keys() == FLAT.keys() and all(torch.equal(t, FLAT[n]) for n, t in checkpoint.state.items())


# What people have -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "pth", "th", "bin", "pth.tar", "ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_and_used_to_save(tmp_path, suffix, zipped):
    path = tmp_path / f"x.{suffix}"
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert is_the_state(found) and (found.state_key, found.prefix, found.left_out) == ("", "", ())


def test_safetensors_by_name_or_by_content(tmp_path):
    for name in ("x.safetensors", "x.bin"):
        save_file(FLAT, tmp_path / name)
        assert is_the_state(read_checkpoint(tmp_path / name))


def shard(folder):
    names = list(FLAT)
    files = {"a-1.safetensors": names[:4], "a-2.safetensors": names[4:]}
    for file, own in files.items():
        save_file({name: FLAT[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (folder / "a.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_sharded_safetensors_by_their_index_or_their_folder(tmp_path):
    shard(tmp_path)
    assert is_the_state(read_checkpoint(tmp_path / "a.safetensors.index.json"))
    assert is_the_state(read_checkpoint(tmp_path))


def test_shards_that_are_missing_elsewhere_or_incomplete_are_refused(tmp_path):
    index = shard(tmp_path)
    path = tmp_path / "a.safetensors.index.json"
    for place, reason in {"../a-1.safetensors": "not a file beside it", "gone.safetensors": "no such file"}.items():
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], "fc.bias": place}}))
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(path)
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "more": "a-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="more is in none of its shards"):
        read_checkpoint(path)
    for text in ("", "[]", "{}", '{"weight_map": 3}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "module", "net", "model_state_dict", "anything"])
def test_weights_under_a_key(tmp_path, key):
    torch.save({"epoch": 3, key: STATE, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert is_the_state(found) and found.state_key == key


def test_weights_under_keys_under_keys(tmp_path):
    torch.save({"model": {"state_dict": prefixed("module."), "epoch": 1}, "best": 0.3}, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert is_the_state(found) and (found.state_key, found.prefix) == ("model.state_dict", "module.")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
@pytest.mark.parametrize("expected", [(), FLAT.keys()])
def test_prefixes_come_off(tmp_path, prefix, expected):
    torch.save(prefixed(prefix), tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt", expected)
    assert is_the_state(found) and found.prefix == prefix


def test_a_prefix_that_is_the_networks_own_stays(tmp_path):
    torch.save(prefixed("module.model."), tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt", prefixed("model.").keys())
    assert found.prefix == "module." and found.state.keys() == prefixed("model.").keys()


def test_what_is_not_under_the_prefix_is_left_out_and_said_so(tmp_path):
    content = {"state_dict": {**prefixed("model."), "loss.weight": torch.ones(3), "model.note": "text"}}
    torch.save(content, tmp_path / "x.ckpt")
    found = read_checkpoint(tmp_path / "x.ckpt", FLAT.keys())
    assert is_the_state(found) and found.left_out == ("loss.weight", "model.note")


def test_the_choice_can_be_overridden(tmp_path):
    averaged = {name: t + 1 for name, t in prefixed("module.").items()}
    torch.save({"state_dict": prefixed("module."), "model_ema": averaged, "deep": {"er": STATE}}, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert is_the_state(found) and found.other_keys == ("model_ema",)
    found = read_checkpoint(tmp_path / "x.pt", state_key="model_ema")
    assert torch.equal(found.state["fc.bias"], FLAT["fc.bias"] + 1) and found.other_keys == ("state_dict",)
    assert is_the_state(read_checkpoint(tmp_path / "x.pt", state_key="deep.er"))
    assert read_checkpoint(tmp_path / "x.pt", strip_prefix="").state.keys() == averaged.keys()
    assert "bias" in read_checkpoint(tmp_path / "x.pt", strip_prefix="module.fc.").state
    for options, reason in (({"state_key": "ema"}, "no 'ema' in it.*state_dict"), ({"strip_prefix": "x."}, "'x.'")):
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(tmp_path / "x.pt", **options)
    with pytest.raises(CheckpointError, match="no weights"):
        read_checkpoint(tmp_path / "x.pt", state_key="")


def test_scores_and_arguments_beside_the_weights_do_no_harm(tmp_path):
    content = {
        "model": collections.OrderedDict(STATE),
        "args": argparse.Namespace(lr=0.1, layers=[1, 2]),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }
    torch.save(content, tmp_path / "x.pt")
    assert is_the_state(read_checkpoint(tmp_path / "x.pt"))


# What is hostile or damaged -------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_hostile(path, kind):
    """A file that must not be read; returns what the refusal says."""
    if kind == "module":
        torch.save(SmallNet(), path)
        return r"holds small\.SmallNet.* weights_only=False.*state_dict\(\)"
    if kind == "module in a dict":
        torch.save({"model": nn.Linear(2, 2), "epoch": 1}, path)
        return r"holds torch\.nn\.modules\.linear\.Linear"
    if kind == "malicious":
        torch.save({"state_dict": STATE, "x": Malicious(path.with_name("PWNED"))}, path)
        return r"holds (posix|nt)\.system.*refused"
    if kind == "malicious, old format":
        torch.save({"x": Malicious(path.with_name("PWNED"))}, path, _use_new_zipfile_serialization=False)
        return r"holds (posix|nt)\.system.*refused"
    if kind == "malicious, plain pickle":
        path.write_bytes(pickle.dumps(Malicious(path.with_name("PWNED")), protocol=2))
        return r"holds (posix|nt)\.system.*refused"
    if kind == "malicious, newer pickle":
        path.write_bytes(pickle.dumps(Malicious(path.with_name("PWNED")), protocol=4))
        return "refused"
    if kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", b"\0" * 10_000_000)
        return "unpacks to 10,000,000"
    if kind == "zip bomb of overlapping entries":
        torch.save({"a": torch.ones(1000)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("data/0"))
            for i in range(50):
                again = zipfile.ZipInfo(f"x/data/{i + 1}")
                again.header_offset, again.CRC = entry.header_offset, entry.CRC
                again.file_size = again.compress_size = entry.file_size
                archive.filelist.append(again)
            archive._didModify = True
        return "unpacks to"
    if kind == "other zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "text")
        return "not one that torch.save wrote"
    if kind == "TorchScript":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("x/data.pkl", "x/constants.pkl", "x/code/__torch__.py"):
                archive.writestr(name, "text " * 100)
        return r"TorchScript.*torch\.jit\.load"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        return "tar format of torch before 0.1.10"
    if kind == "git-lfs pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
        return "git lfs pull"
    if kind == "text":
        path.write_text("hello, world\n" * 20)
        return "damaged, or not a checkpoint"
    if kind == "empty":
        path.write_bytes(b"")
        return "empty"
    if kind == "huge storage":
        path.write_bytes(huge_storage())
        return "damaged, or not a checkpoint"
    if kind == "no weights":
        torch.save({"epoch": 3, "names": ["a"]}, path)
        return "no weights are in it; at the top there is: epoch, names"
    if kind == "a tensor alone":
        torch.save(torch.ones(3), path)
        return "no weights are in it; at the top there is: a Tensor"
    headers = {
        "header longer than the file": (b"{}", 10**15),
        "header of negative length": (b"{}", 2**64 - 1),
        "header beyond the data": (b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}', None),
        "header with another shape": (b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}', None),
        "header that overflows": (b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', None),
        "header with negative offsets": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', None),
        "header that overlaps": (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            None,
        ),
        "header of unknown type": (b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', None),
        "header that is no JSON": (b'{"a":', None),
    }
    header, length = headers[kind]
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + b"\0\0\0\0")
    return "damaged, or not a checkpoint"


def huge_storage():
    """An old-format file of a few hundred bytes that claims a storage of 10¹⁵ numbers."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(77_777)}, buffer, _use_new_zipfile_serialization=False)
    data, claim = buffer.getvalue()[:1000], b"J" + (77_777).to_bytes(4, "little")
    assert claim in data
    return data.replace(claim, b"\x8a\x07" + (10**15).to_bytes(7, "little"))


HOSTILE = (
    "module", "module in a dict", "malicious", "malicious, old format", "malicious, plain pickle",
    "malicious, newer pickle", "zip bomb", "zip bomb of overlapping entries", "other zip", "TorchScript", "tar",
    "git-lfs pointer", "text", "empty", "huge storage", "no weights", "a tensor alone", "header longer than the file",
    "header of negative length", "header beyond the data", "header with another shape", "header that overflows",
    "header with negative offsets", "header that overlaps", "header of unknown type", "header that is no JSON",
)  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_with_the_reason(tmp_path, kind, capsys):
    path = tmp_path / ("x.safetensors" if kind.startswith("header") else "x.pt")
    reason = write_hostile(path, kind)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    out = tmp_path / "out"
    status = run(convert_app, "hatify-convert", [str(path), *NETWORK, "-o", str(out)])
    said = capsys.readouterr()
    assert status == 2 and said.out == "" and said.err.count("\n") == 1 and str(path) in said.err
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {"gone": "no such file", "pipe": "not a file", "": "0 checkpoints"}.items():
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(tmp_path / name)


NETWORK = ["--factory", "small:SmallNet", "--num-tasks", "2", "--input-shape", "3,6,6"]


def mutated(data, source):
    """`data` with a few bytes changed, cut out, repeated or put in."""
    data = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 5, 20))):
        # Mostly where the structure is: at both ends.
        at = source.choice(
            (source.randrange(len(data)), source.randrange(min(len(data), 600)), -source.randrange(1, 600))
        )
        at %= len(data)
        match source.randrange(5):
            case 0:
                data[at] ^= 1 << source.randrange(8)
            case 1:
                data[at] = source.randrange(256)
            case 2:
                del data[at : at + source.choice((1, 4, 100))]
            case 3:
                data[at:at] = data[at : at + source.choice((1, 8, 64))]
            case 4:
                data[at : at + 8] = source.choice((b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little")))
        data = data or bytearray(b"x")
    return bytes(data[: source.randrange(len(data))] if source.random() < 0.1 else data)


def test_a_thousand_mutated_files_give_one_line_or_a_result(tmp_path, capsys, monkeypatch):
    bases = []
    for name, options in {"new.pt": {}, "old.pt": {"_use_new_zipfile_serialization": False}}.items():
        torch.save({"state_dict": prefixed("module."), "epoch": 1}, tmp_path / name, **options)
        bases.append(((tmp_path / name).read_bytes(), "x.pt"))
    save_file(FLAT, tmp_path / "x.safetensors")
    bases.append(((tmp_path / "x.safetensors").read_bytes(), "x.safetensors"))
    source, refused = random.Random(0), 0
    work = tmp_path / "work"
    work.mkdir()
    for i in range(1000):
        base, name = bases[i % 3]
        (work / name).write_bytes(mutated(base, source))
        status = run(convert_app, "hatify-convert", [str(work / name), *NETWORK, "--dry-run", "--json"])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        if status:
            assert (status, said.out, said.err.count("\n")) == (2, "", 1), (i, said)
            refused += 1
        else:
            json.loads(said.out)
        for path in work.iterdir():
            path.unlink()
    assert refused > 300
    with capsys.disabled():
        print(f" [1,000 mutated: {refused} refused]", end="")
