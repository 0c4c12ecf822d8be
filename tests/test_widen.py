"""More features in every layer: what there was computes the same, finished tasks answer the same, tasks take the new."""

import copy
import pickle
import random
import warnings

import pytest
import timm
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
import hatify.timm_models
from hatify import (
    CapacityWarning,
    HatError,
    HatWarning,
    TaskError,
    extract_task,
    forget_task,
    load,
    load_plain_state_dict,
    save,
    verify_isolation,
)
from hatify.asking import answers as task_answers
from hatify.asking import equal
from networks import FRONTS, networks
from small import SmallNet, answers, images, learn, same, same_state

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, features = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.heads, features // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (features // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, features))


class Block(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(features), Attention(features, heads)
        self.norm2, self.fc1, self.fc2 = nn.RMSNorm(features), nn.Linear(features, 24), nn.Linear(24, features)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """(N, 6, 5) → (N, 3), with a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(5, 16), nn.Parameter(torch.randn(1, 6, 16) * 0.1)
        self.blocks = nn.Sequential(Block(16, 4), Block(16, 4))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(1))


class Convolutional(nn.Module):
    """(N, 3, 8, 8) → (N, 3): groups, depthwise, joined and split features, one group for all, and another way to train."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.grouped, self.gn = nn.Conv2d(8, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.depthwise, self.one = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.GroupNorm(1, 16)
        self.act, self.fc, self.head = nn.PReLU(16), nn.Linear(24, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = self.act(self.one(self.depthwise(self.gn(self.grouped(x)))))
        x = torch.cat((x, y), 1).mean((2, 3))
        if self.training:
            x = x * 1.0
        a, b = self.fc(x).chunk(2, 1)
        return self.head(a * torch.sigmoid(b))


CASES = {
    "transformer": (Transformer, (6, 5)),
    "convolutional": (Convolutional, (3, 8, 8)),
    "small": (SmallNet, (3, 6, 6)),
}
each_network = pytest.mark.parametrize("case", CASES)


def made(case: str, tasks: int = 3, **options) -> tuple[nn.Module, hatify.HatModel, Tensor]:
    build, shape = CASES[case]
    torch.manual_seed(0)
    net = build().eval()
    x = torch.randn(8, *shape)
    return net, hatify.hatify(net, tasks, (x[:2],), **options), x


def train(model, task: int, x: Tensor, optimizer=None, steps: int = 12) -> torch.optim.Optimizer:
    """README's loop."""
    model.begin_task(task)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = torch.Generator().manual_seed(task)
    for _ in range(steps):
        target = torch.randint(3, (len(x),), generator=numbers)
        loss = F.cross_entropy(model(x + torch.randn(x.shape, generator=numbers)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.end_task()
    return optimizer


# Spare features beside a base ----------------------------------------------------------------------------------------


@each_network
def test_spare_features_are_silent(case):
    net, model, x = made(case, spare=0.25)
    assert model.origin.arguments["base"] == "locked" and model.task_state.has_spare
    assert close(model(x), net(x))
    model.begin_task(0)
    net.train()
    assert close(model(x), net(x))
    assert close(model(x), net(x))  # statistics have moved alike


@each_network
def test_gradients_of_the_original_are_the_originals(case):
    net, model, x = made(case, spare=0.25)
    net(x).square().sum().backward()
    with torch.random.fork_rng():
        model(x).square().sum().backward()
    found = 0
    for entry in model.census:
        dims = model.plan.widened.tensors.get(entry.name, (None,) * len(entry.shape))
        if entry.kind != "parameter" or entry.policy not in ("shared", "masked"):
            continue
        own = model.get_parameter(entry.name).grad
        for d, place in enumerate(dims):
            if place is not None:
                rows = torch.cat([torch.arange(first, first + count) for first, count in place[1]])
                own = own.index_select(d, rows)
        expected = net.get_parameter(entry.name).grad
        assert torch.allclose(own, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        found += 1
    assert found


@each_network
def test_tasks_take_spare_features_and_leave_the_base_alone(case):
    _, model, x = made(case, spare=0.5)
    base = {n: p.clone() for n, p in model.named_parameters() if n in model.uses}
    known = []
    for task in range(3):
        train(model, task, x)
        with model.task(task):
            known.append(model(x))
        assert (model.task_state.finished_masks[task] & ~model.task_state.base).any()
    for task, answer in enumerate(known):
        with model.task(task):
            assert torch.equal(model(x), answer)
    verify_isolation(model)
    for name, before in base.items():
        for use in model.uses[name]:
            slots = torch.cat((model.task_state.base, torch.ones(1, dtype=torch.bool)))
            written = slots[use.written].any(-1).expand(before.shape)
            assert torch.equal(model.get_parameter(name)[written], before[written])


def test_what_a_task_adds_does_not_reach_the_base():
    _, model, x = made("transformer", spare=0.5)
    train(model, 0, x)
    seen = {}
    watched = {"embed": 16, "blocks.0.attention.proj": 16, "blocks.1.fc2": 16}
    for path in watched:
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: seen.setdefault(path, out))
    with_spare = (model(x), dict(seen))[1]
    state = model.task_state
    state.finished_masks[0] &= state.base
    seen = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model(x)
    for path, count in watched.items():
        assert close(with_spare[path][..., :count], seen[path][..., :count])


def test_heads_and_groups_come_whole():
    _, model, _ = made("transformer", spare=0.25)
    assert model.blocks[0].attention.qkv.out_features == 3 * 5 * 4
    _, model, _ = made("convolutional", spare=0.25)
    grouped, depthwise = model.grouped, model.depthwise
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (5, 10, 20)
    assert (depthwise.groups, depthwise.weight.shape[0]) == (20, 20)
    assert model.gn[0].num_groups == 5 and model.one[0].num_groups == 1


def test_weights_of_the_original_load_into_the_base():
    net, model, x = made("convolutional", spare=0.25)
    other = CASES["convolutional"][0]().eval()
    load_plain_state_dict(model, other.state_dict())
    assert close(model(x), other(x)) and not close(model(x), net(x))
    with pytest.raises(hatify.CheckpointError, match=r"of another shape: stem\.weight"):
        load_plain_state_dict(model, {**other.state_dict(), "stem.weight": torch.zeros(9, 3, 3, 3)})


def test_what_cannot_grow_is_named():
    class Responses(nn.Module):
        """Divides by the mean over its features, as global response normalisation does."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.fc1(x))
            x = x * (x / (x.mean(-1, keepdim=True) + 1e-6))
            return self.head(torch.relu(self.fc2(x)))

    net = Responses()
    with pytest.warns(HatWarning, match=r"no features are added to fc1: mean needs all of it"):
        model = hatify.hatify(net, 2, (torch.randn(4, 4),), spare=0.25)
    assert model.fc1.out_features == 8 and model.fc2.out_features == 8  # 6 and 2 more
    x = torch.randn(3, 4)
    assert close(model.eval()(x), net.eval()(x))


def test_a_network_that_cannot_grow_at_all_is_refused():
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(x).softmax(-1))

    with pytest.raises(HatError, match="widen: no layer can be given more features; fc: softmax needs all of it"):
        hatify.hatify(Averaged(), 2, (torch.randn(4, 4),), spare=0.25)


@pytest.mark.parametrize("spare", [-0.1, float("nan"), float("inf"), True, "a"])
def test_a_share_is_a_number(spare):
    with pytest.raises(ValueError, match="spare must be a share"):
        hatify.hatify(SmallNet(), 2, (images(2),), spare=spare)


# Later ---------------------------------------------------------------------------------------------------------------


@each_network
def test_finished_tasks_answer_as_before_and_new_ones_learn(case):
    _, model, x = made(case)
    for task in range(2):
        train(model, task, x)
    before = answers(model, x=x)
    parameters = [*model.parameters()]
    slots = model.task_state.num_slots
    model.widen(0.25)
    after = answers(model, x=x)
    assert all(map(close, before, after)) and model.task_state.num_slots > slots
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert str(model.census) and all(
        tuple(model.get_parameter(e.name).shape) == e.shape for e in model.census if e.policy == "shared"
    )
    train(model, 2, x)
    assert same(answers(model, [0, 1], x), after)
    verify_isolation(model)
    assert (model.task_state.finished_masks[2] & ~model.task_state.finished_masks[:2].any(0)).any()


def test_room_is_made_where_there_was_none():
    _, model, x = made("small", tasks=2)
    train(model, 0, x)
    train(model, 1, x)
    model.add_tasks(1)
    with pytest.warns(CapacityWarning, match=r"can only reuse them; model.widen\(0.25\) makes room"):
        model.begin_task(2)
    model.abort_task()
    model.widen(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CapacityWarning)
        train(model, 2, x)


@each_network
def test_again_and_again(case):
    net, model, x = made(case, spare=0.25)
    train(model, 0, x)
    (before,) = answers(model, x=x)
    model.widen(0.5)
    model.widen(0.1)
    (after,) = answers(model, x=x)
    assert close(before, after)
    train(model, 1, x)
    assert same(answers(model, [0], x), [after])
    verify_isolation(model)
    untouched = answers(model, [2], x)[0]
    assert close(untouched, net(x))  # a task that has learned nothing answers as the base


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
    ids=["sgd", "adamw", "adafactor", "rmsprop"],
)
def test_optimizers_go_on(make):
    _, model, x = made("convolutional")
    optimizer = train(model, 0, x, make(model.parameters()))
    momenta = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state}
    model.widen(0.25)
    model.widen(0.25)
    (known,) = answers(model, x=x)
    model.begin_task(1)
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
    stem = model.stem.weight
    if "exp_avg" in momenta[stem]:
        before = momenta[stem]["exp_avg"]
        for group in optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        stem.grad.zero_()
        optimizer.step()
        now, decay = optimizer.state[stem]["exp_avg"], optimizer.param_groups[0]["betas"][0]
        assert close(now[:8], before * decay) and not now[8:].any()
    model.abort_task()
    train(model, 1, x, make(model.parameters()))
    assert same(answers(model, [0], x), [known])
    train(model, 2, x, optimizer)
    assert same(answers(model, [0], x), [known])


def test_an_optimizer_that_remembers_something_else_is_refused():
    _, model, x = made("small")
    optimizer = train(model, 0, x)
    optimizer.state[model.conv.weight]["exp_avg"] = torch.zeros(5, 7)
    model.widen(0.25)
    model.begin_task(1)
    model(x).sum().backward()
    with pytest.raises(HatError, match=r"exp_avg of conv\.weight is of shape \(5, 7\), which cannot be widened along"):
        optimizer.step()


def test_graphs_of_before_are_no_hindrance():
    _, model, x = made("small")
    train(model, 0, x)
    kept = model(x)  # holds what accumulates gradients of parameters as they were
    model.widen(0.25)
    train(model, 1, x)
    assert kept.requires_grad


@each_network
def test_saved_copied_and_pickled(case, tmp_path):
    _, model, x = made(case, spare=0.25)
    train(model, 0, x)
    model.widen(0.25)
    model.add_tasks(1)
    train(model, 1, x)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", CASES[case][0]())
    assert same_state(model, loaded) and same(answers(model, x=x), answers(loaded, x=x))
    assert str(loaded.census) == str(model.census) and loaded.plan.widened == model.plan.widened
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (loaded, copied, pickled):
        torch.manual_seed(5)
        other.widen(0.25)
        train(other, 3, x)
        verify_isolation(other)
    assert same(answers(loaded, x=x), answers(copied, x=x)) and same(answers(pickled, x=x), answers(copied, x=x))


@each_network
@pytest.mark.parametrize("compact", [True, False])
def test_extracted_networks_do_not_show_it(case, compact):
    _, model, x = made(case, spare=0.5)
    train(model, 0, x)
    model.widen(0.5)
    train(model, 1, x)
    for task in (0, 1):
        plain = extract_task(model, task, compact)
        (expected,) = answers(model, [task], x)
        assert close(plain(x), expected) if compact else torch.equal(plain(x), expected)
    assert sum(p.numel() for p in extract_task(model, 0).parameters()) < sum(
        p.numel() for p in extract_task(model, 0, compact=False).parameters()
    )


def test_a_task_that_takes_nothing_is_as_small_as_the_original():
    net, model, x = made("transformer", spare=0.5)
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.where(model.task_state.base, 1.0, -1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model.end_task()
    plain = extract_task(model, 0)
    assert close(plain(x), net(x)) and sum(p.numel() for p in plain.parameters()) == sum(
        p.numel() for p in net.parameters()
    )


def test_a_task_is_forgotten_as_ever():
    _, model, x = made("convolutional", spare=0.5)
    train(model, 0, x)
    train(model, 1, x)
    known = answers(model, [1], x)
    forget_task(model, 0)
    assert same(answers(model, [1], x), known) and model.finished_tasks == (1,)
    train(model, 0, x)
    assert same(answers(model, [1], x), known)


def test_blocks_know_the_new_sizes():
    _, model, x = made("transformer", spare=0.25)
    assert "reshape" in model.blocks[0].attention.code and ", 5, " in model.blocks[0].attention.code
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model(x)
    assert seen == [(8, 6, 20)]


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf"), True, "much"])
def test_bad_shares(share):
    _, model, _ = made("small")
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="the share of features to add must be a positive number"):
        model.widen(share)
    assert same_state(model, before)


def test_not_while_a_task_is_open():
    _, model, _ = made("small")
    model.begin_task(0)
    with pytest.raises(TaskError, match="task 0 is open"):
        model.widen(0.25)


@pytest.mark.parametrize("at", ["guard_anew", "settle", "install"])
def test_interrupted_it_has_not_happened(at, monkeypatch):
    _, model, x = made("small")
    learn(model, 0)
    before, known = copy.deepcopy(model), answers(model)
    owner = type(model) if at != "install" else hatify.model.Part
    original, calls = getattr(owner, at), []

    def interrupted(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self is model:
            calls.append(at)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.widen(0.5)
    monkeypatch.undo()
    assert calls and same_state(model, before) and same(answers(model), known)
    learn(model, 1)
    learn(before, 1)
    assert same_state(model, before)


# Networks of others --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet"])
def test_timm(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3).eval()
    model = timm.create_model(f"hat_{name}", num_tasks=2, base="locked", spare=0.25, num_classes=3).eval()
    load_plain_state_dict(model, net.state_dict())
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert close(model(x), net(x))
    train(model, 0, x, steps=11)
    verify_isolation(model)


@pytest.mark.parametrize("front", FRONTS)
@settings(max_examples=4)
@given(data=st.data())
def test_generated_networks(front, data):
    generated = data.draw(networks(front))
    note(generated)
    source: random.Random = data.draw(st.randoms(use_true_random=False))
    model = hatify.hatify(generated.net, 3, generated.inputs(2), base=source.choice((None, "locked")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        for task in range(2):
            model.begin_task(task)
            on = torch.rand(model.task_state.num_slots) < 0.6
            with torch.no_grad():
                model.task_state.embeddings[task].copy_(torch.where(on, 1.0, -1.0))
            model.end_task()
        try:
            model.widen(source.choice((0.25, 1.0)))
        except HatError as refused:
            assert "no layer can be given more" in str(refused)
            return
        verify_isolation(model)
        known = [task_answers(model, task, model.example_inputs) for task in range(2)]
        model.begin_task(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in model.uses:
                    parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=1.0)
        optimizer.step()
        model.end_task()
    for task in range(2):
        assert equal(task_answers(model, task, model.example_inputs), known[task])


class Conv1D(nn.Module):
    """As Hugging Face's GPT-2 writes a linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.size()[:-1] + (self.outputs,))  # noqa: RUF005


class TiedLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.fc2(F.relu(self.fc1(self.embed(ids)))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mha = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.mha(x, x, x)[0]
        x = x + self.fc2(F.relu(self.fc1(x)))
        return self.head(self.lstm(x)[0].mean(1))


@pytest.mark.parametrize(
    ("net", "inputs", "grown"),
    [
        (nn.Sequential(Conv1D(5, 8), nn.GELU(), Conv1D(8, 12), nn.GELU(), nn.Linear(12, 3)), (4, 6, 5), "2.weight"),
        (TiedLanguage(), None, "fc1.weight"),
        (Recurrent(), (4, 6, 5), "fc1.weight"),
    ],
    ids=["conv1d", "tied", "whole modules"],
)
@pytest.mark.filterwarnings("ignore:no features are added to:hatify.HatWarning")
def test_other_ways_to_write_it(net, inputs, grown):
    x = torch.randint(11, (4, 7)) if inputs is None else torch.randn(inputs)
    before = net.eval().get_parameter(grown).numel()
    model = hatify.hatify(net, 2, (x,), base="locked", spare=0.25)
    assert close(model(x), net(x)) and model.get_parameter(grown).numel() > before
    model.begin_task(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    model.end_task()
    verify_isolation(model)


def test_masks_of_inputs_stay_what_they_are():
    _, model, x = made("small", mask_inputs=True)
    learn(model, 0)
    before = answers(model, x=x)
    inputs = model.masks(0)["x"]
    model.widen(0.5)
    assert torch.equal(model.masks(0)["x"], inputs) and all(map(close, answers(model, x=x), before))


def test_masks_that_are_learned():
    _, model, x = made("convolutional", tasks=2)
    for task in range(2):
        model.begin_task(task)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scale = hatify.MaskScale(model, steps=5)
        for _ in range(5):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64)) + model.regularization()).backward()
            optimizer.step()
            scale.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HatWarning)
            model.end_task()
        if task == 0:
            model.widen(0.5)
            known = answers(model, x=x)
    assert same(answers(model, [0], x), known)


def test_an_optimizer_that_moves_masks_goes_on():
    _, model, x = made("small")
    model.begin_task(0)
    model.regularization()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).square().mean() + model.regularization()).backward()
        optimizer.step()
    embedding = model.task_state.embeddings[0]
    momentum = optimizer.state[embedding]["momentum_buffer"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HatWarning)
        model.end_task()
    model.widen(0.5)
    model.begin_task(0)
    (model(x).square().mean() + model.regularization()).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    embedding.grad = torch.zeros_like(embedding)
    optimizer.step()
    moved = optimizer.state[embedding]["momentum_buffer"]
    assert moved.shape == embedding.shape and float(moved.sum()) == pytest.approx(0.9 * float(momentum.sum()), rel=1e-4)
