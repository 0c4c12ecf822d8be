"""One task's network: equal to the model's answers, smaller where features are off, and free of hatify."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from hatify.ops import OPERATIONS, Trait, alike, op
from networks import FRONTS, generate
from oracles import answers, difference, half_on, no_repairs, same_bits

SEEDS = 60
#: Largest difference that rounding explains, in units of the largest output (at least 1).
ROUNDING = 1e-5


def finish(model: hatify.HatModel, task: int, on: Callable[[int], Tensor] | None = None, seed: int = 0) -> None:
    """End `task` with masks that are half on at random, or those that `on` gives for a number of slots."""
    model.begin_task(task)
    if on is None:
        half_on(model, task, random.Random(seed))
    else:
        embedding = model.task_state.embeddings[task]
        embedding.data.copy_(torch.where(on(embedding.numel()), 2.0, -2.0))
    with no_repairs():
        model.end_task()


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def trained_like(net: nn.Module) -> nn.Module:
    """`net` with biases and statistics that are not those of a fresh network."""
    for name, value in (*net.named_parameters(), *net.named_buffers()):
        if value.is_floating_point() and value.ndim == 1:
            value.data.copy_(torch.rand_like(value) + 0.5 if name.endswith("var") else torch.randn_like(value))
    return net


# Generated networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(SEEDS))
def test_generated_networks(seed: int) -> None:
    source = random.Random(seed)
    generated = generate(source, FRONTS[seed % len(FRONTS)])
    model = hatify.hatify(generated.net, 2, generated.inputs(2), couple=source.choice((True, False)))
    for task in range(2):
        finish(model, task, seed=seed + task)
    exact, compact = (hatify.extract_task(model, 1, compact=c) for c in (False, True))
    assert size(compact) <= size(exact)
    for batch in (max(generated.smallest_batch, 1), 5):
        inputs = generated.inputs(batch, seed=batch)
        expected = answers(model, 1, inputs)
        with torch.no_grad():
            assert same_bits(torch.utils._pytree.tree_leaves(exact(*inputs)), expected)
            assert difference(compact(*inputs), expected) < ROUNDING


@pytest.mark.parametrize("seed", range(12))
def test_what_was_taken_out_does_not_matter(seed: int) -> None:
    """Noise in exactly the entries that are gone: the model answers as before, bit for bit."""
    generated = generate(random.Random(seed), FRONTS[seed % len(FRONTS)])
    model = hatify.hatify(trained_like(generated.net), 2, generated.inputs(2))
    finish(model, 0, seed=seed)
    exact, compact = (dict(hatify.extract_task(model, 0, compact=c).named_parameters()) for c in (False, True))
    inputs = generated.inputs(4)
    expected = answers(model, 0, inputs)
    model.__dict__["guard"] = None  # else what is written below is put right
    parameters = dict(model.named_parameters())
    for name, left in compact.items():
        if name in exact and name in parameters and exact[name].shape == parameters[name].shape:
            gone = ~torch.isin(exact[name], left)
            parameters[name].data[gone] = torch.randn(int(gone.sum()), dtype=left.dtype)
    assert same_bits(answers(model, 0, inputs), expected)


# What goes -----------------------------------------------------------------------------------------------------------


def every_third(count: int) -> Tensor:
    return torch.arange(count) % 3 == 0


def extracted(net: nn.Module, *shape: int, on: Callable[[int], Tensor] = every_third) -> nn.Module:
    """The compact network of a task, after a check of its outputs."""
    inputs = (torch.randn(2, *shape),)
    model = hatify.hatify(trained_like(net), 2, inputs)
    finish(model, 0, on)
    compact = hatify.extract_task(model, 0)
    for batch in (1, 4):
        probe = (torch.randn(batch, *shape),)
        assert difference(compact(*probe), answers(model, 0, probe)) < ROUNDING
        assert same_bits([hatify.extract_task(model, 0, compact=False)(*probe)], answers(model, 0, probe))
    compact.masks = model.masks(0)
    return compact


def test_a_chain_keeps_exactly_the_features_that_are_on() -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 7, 3), nn.GroupNorm(1, 7), nn.SiLU(),
        nn.ConvTranspose2d(7, 5, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(5 * 49, 11), nn.LayerNorm(11), nn.GELU(),
        nn.Linear(11, 8), nn.RMSNorm(8), nn.Linear(8, 2),
    )  # fmt: skip
    compact = extracted(chain, 3, 10, 10)
    on = {path: int(mask.sum()) for path, mask in compact.masks.items()}
    widths = [on[path] for path in ("0", "3", "6", "9", "12")]
    layers = [compact.get_submodule(path) for path in ("0", "3", "6", "9", "12", "14")]
    assert [layer.weight.shape[0 if i != 2 else 1] for i, layer in enumerate(layers)] == [*widths, 2]
    assert [layers[1].in_channels, layers[2].in_channels, layers[3].in_features] == [*widths[:2], widths[2] * 49]
    assert [compact.get_submodule(p).weight.numel() for p in ("1", "4", "10", "13")] == [
        widths[i] for i in (0, 1, 3, 4)
    ]


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_grouped_convolutions_keep_equally_many_features_in_each_group(groups: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=groups), nn.Flatten(), nn.Linear(108, 2))
    grouped = extracted(net, 3, 5, 5, on=lambda n: torch.arange(n) % 12 < 6).get_submodule("1")
    assert (grouped.in_channels, grouped.out_channels) == (6, 6)
    assert grouped.groups == max(1, groups // 2)


def test_groups_of_unequal_remainders_are_filled_with_zeros() -> None:
    net = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(24, 2))
    on = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0] * 2, dtype=torch.bool)
    grouped = extracted(net, 3, 5, on=lambda n: on).get_submodule("1")
    assert (grouped.in_channels, grouped.out_channels, grouped.groups) == (6, 6, 2)


class Residual(nn.Module):
    """A stream with a padded shortcut, a concatenation, a scale, and chunks that gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.scale = nn.Conv2d(6, 9, 3, padding=1), nn.Parameter(torch.randn(9, 1, 1))
        self.side, self.gates, self.head = nn.Conv2d(9, 4, 1), nn.Conv2d(13, 10, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = F.pad(x, (0, 0, 0, 0, 1, 2)) + self.scale * self.conv(F.relu(x))
        value, gate = self.gates(torch.cat((x, self.side(x)), 1)).chunk(2, 1)
        return self.head((value * torch.sigmoid(gate)).mean((2, 3)))


def test_streams_concatenations_and_chunks_shrink_together() -> None:
    compact = extracted(Residual(), 3, 6, 6)
    on = {path: int(mask.sum()) for path, mask in compact.masks.items()}
    assert (compact.stem.out_channels, compact.conv.out_channels, compact.side.out_channels) == (
        on["stem"], on["conv"], on["side"],
    )  # fmt: skip
    assert compact.scale.numel() == on["conv"] == compact.side.in_channels
    assert compact.gates.in_channels == on["conv"] + on["side"]
    assert compact.head.in_features <= on["gates"]


class Attention(nn.Module):
    """Tokens with a class token and positions, through one block of attention."""

    def __init__(self, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.words, self.token = nn.Embedding(11, 12), nn.Parameter(torch.randn(1, 1, 12))
        self.position, self.norm = nn.Parameter(torch.randn(1, 5, 12)), nn.LayerNorm(12)
        self.qkv, self.proj, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.words(x)), 1) + self.position
        batch, length, width = x.shape
        y = self.qkv(self.norm(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(batch, length, width)))[:, 0])


@pytest.mark.parametrize("fused", [True, False])
def test_whole_heads_go_and_the_stream_with_its_raw_parameters(fused: bool) -> None:
    ids = (torch.randint(11, (2, 4)),)
    model = hatify.hatify(Attention(4, fused), 1, ids)
    state = model.task_state
    slots = state.masks_from(torch.arange(state.num_slots, dtype=torch.float64))
    on = every_third(state.num_slots)
    heads = torch.tensor([True, False, True, False]).view(1, 4, 1).expand(3, 4, 3).flatten()
    on[slots[model.plan.owners["qkv"]].long()] = heads
    finish(model, 0, lambda _: on)
    compact = hatify.extract_task(model, 0)
    stream = int(model.masks(0)["words"].sum())
    assert 0 < stream < 12
    assert (compact.qkv.in_features, compact.qkv.out_features) == (stream, 18)
    assert (compact.proj.in_features, compact.proj.out_features, compact.head.in_features) == (6, stream, stream)
    assert compact.token.shape == (1, 1, stream) and compact.position.shape == (1, 5, stream)
    probe = (torch.randint(11, (3, 4)),)
    assert difference(compact(*probe), answers(model, 0, probe)) < ROUNDING


class Stubborn(nn.Module):
    """Operations that cannot do without features that are off: a reshape that mixes them, a sort, statistics of all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.head, self.how = nn.Linear(3, 12), nn.Linear(12, 2), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "reshape":
            x = torch.roll(x.view(-1, 3, 4), 1, 2).flatten(1)
        elif self.how == "sort":
            x = x.sort(1).values
        elif self.how == "softmax":
            x = x.softmax(1)
        elif self.how == "norm":
            x = F.layer_norm(x, (12,))
        return self.head(x)


@pytest.mark.parametrize(
    ("how", "kept", "put_back"), [("reshape", 12, False), ("sort", 4, True), ("softmax", 4, True), ("norm", 4, False)]
)
def test_zeros_are_put_back_where_they_are_needed(how: str, kept: int, put_back: bool) -> None:
    compact = extracted(Stubborn(how), 3)
    assert compact.first.out_features == kept
    assert any(node.target is torch.index_select for node in compact.graph.nodes) == put_back
    assert kept == 12 or compact.first.weight.all()


@pytest.mark.parametrize(
    ("name", "share"),
    [("convnext_atto", 0.35), ("vit_tiny_patch16_224", 0.5), ("mobilenetv3_small_050", 0.35), ("regnety_002", 0.5)],
)
def test_timm_models_shrink(name: str, share: float) -> None:
    """With half of the features on at random, heads are never off as wholes, and groups never equally full."""
    options = {"img_size": 64, "depth": 2} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=4, **options)
    model = hatify.hatify(net, 2, torch.randn(2, 3, 64, 64))
    finish(model, 1)
    compact = hatify.extract_task(model, 1)
    assert size(compact) < share * size(net)
    assert all(type(m).__module__.startswith("torch.") for m in compact.modules() if m is not compact)
    inputs = (torch.randn(3, 3, 64, 64),)
    assert difference(compact(*inputs), answers(model, 1, inputs)) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(3, 12), nn.LayerNorm(12), nn.GroupNorm(3, 12), nn.RMSNorm(12), nn.Linear(12, 2))
    x = torch.randn(4, 3, dtype=dtype)
    model = hatify.hatify(net.to(dtype), 1, x)
    finish(model, 0)
    expected = answers(model, 0, (x,))
    assert same_bits([hatify.extract_task(model, 0, compact=False)(x)], expected)
    compact = hatify.extract_task(model, 0)
    assert compact(x).dtype == dtype
    assert difference(compact(x), expected) < 10 * torch.finfo(dtype).eps


def test_the_number_of_features_may_be_asked_for() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x.view(x.size(0), x.shape[-1]) * x.shape[-1] ** -0.5)

    assert extracted(Asks(), 3).first.out_features == 4


# What comes out ------------------------------------------------------------------------------------------------------


def test_names_and_signature_are_the_originals() -> None:
    net = timm.create_model("resnet18", num_classes=4)
    model = hatify.hatify(net, 2, torch.randn(2, 3, 32, 32))
    finish(model, 1)
    for compact in (False, True):
        plain = hatify.extract_task(model, 1, compact=compact)
        assert set(plain.state_dict()) == set(net.state_dict())
        assert not plain.training
        assert all(type(m).__module__.startswith("torch.") for m in plain.modules() if m is not plain)


def test_the_model_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model = hatify.hatify(net, 2, torch.randn(2, 3))
    finish(model, 0)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    model.begin_task(1)  # an earlier task can be extracted while another one learns
    expected = answers(model, 0, (torch.ones(2, 3),))
    model.train()
    plain = hatify.extract_task(model, 0, compact=False)
    assert model.training and model.active_task == 1 and model.task_state.task == 1
    model.abort_task()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items() if "scale" not in name)
    for parameter in plain.parameters():
        parameter.data.zero_()
    assert same_bits(answers(model, 0, (torch.ones(2, 3),)), expected)


def deployed(name: str = "resnet") -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A small compact network of each kind, and inputs."""
    inputs: tuple[Tensor, ...] = (torch.randn(2, 3, 8, 8),)
    net: nn.Module = Residual()
    if name == "attention":
        net, inputs = Attention(4, fused=True), (torch.randint(11, (2, 4)),)
    model = hatify.hatify(net, 1, inputs)
    finish(model, 0)
    return hatify.extract_task(model, 0), inputs


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_a_process_without_hatify_loads_it(name: str, tmp_path: Path) -> None:
    plain, inputs = deployed(name)
    with torch.no_grad():
        torch.save((plain, inputs, plain(*inputs)), tmp_path / "plain.pt")
    script = (
        "import sys; sys.modules['hatify'] = None; import torch; "
        f"plain, inputs, expected = torch.load({str(tmp_path / 'plain.pt')!r}, weights_only=False); "
        "assert torch.equal(plain(*inputs), expected); assert not any(n.startswith('hatify.') for n in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_torch_export_and_compile(name: str) -> None:
    plain, inputs = deployed(name)
    with torch.no_grad():
        expected = plain(*inputs)
        assert difference(torch.export.export(plain, inputs).module()(*inputs), expected) < ROUNDING
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            assert difference(torch.compile(plain, backend=backend, fullgraph=True)(*inputs), expected) < ROUNDING


@pytest.mark.parametrize("name", ["residual", "attention"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plain, inputs = deployed(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(plain, inputs, tmp_path / "plain.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "plain.onnx")
    names = [i.name for i in session.get_inputs()]
    found = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})[0]
    assert difference(torch.from_numpy(found), plain(*inputs).detach()) < ROUNDING


# Refusals ------------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """An operation that is registered as elementwise, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1) + x


@pytest.mark.parametrize("labels", [lambda call: call.all_on(), lambda call: call.label(0)])
def test_a_wrong_record_makes_no_other_network(labels: Callable[[Any], Any]) -> None:
    """Each operation is run beside its original; in the end, the network stays at full size."""
    op(Mixing, traits={Trait.ELEMENTWISE}, cut=alike)(labels)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compact = extracted(nn.Sequential(nn.Linear(3, 12), Mixing(), nn.Linear(12, 2)), 3)
    finally:
        del OPERATIONS[Mixing]
    assert compact.get_submodule("0").out_features == 12
    said = [str(w.message) for w in caught if "task 0 stays at full size" in str(w.message)]
    assert all("without the features that are off, _2 would be another one" in message for message in said)


def test_what_cannot_be_extracted_is_said() -> None:
    model = hatify.hatify(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), 2, torch.randn(2, 3))
    with pytest.raises(hatify.TaskError, match="no task 2"):
        hatify.extract_task(model, 2)
    with pytest.raises(hatify.TaskError, match=r"task 0 is not finished: .*end_task\(\)"):
        hatify.extract_task(model, 0)
    model.begin_task(0)
    with pytest.raises(hatify.TaskError, match=r"task 0 is open for training: call end_task\(\)"):
        hatify.extract_task(model, 0)
    with no_repairs():
        model.end_task()
    with pytest.raises(hatify.HatError, match="expected a converted model, not Linear"):
        hatify.extract_task(nn.Linear(2, 2), 0)  # type: ignore[arg-type]
    with pytest.raises(hatify.HatError, match=r"does not accept .*shape \(2, 5\)"):
        hatify.extract_task(model, 0, example_inputs=torch.randn(2, 5))
