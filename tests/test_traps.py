"""The traps that implementations of hard attention are known to step into, one test or more for each.

Each test goes into the trap in the plainest way: two tasks on a network that has the feature in question, and the
first task's answers compared bit for bit. Other test files go into each of them at length.
"""

import copy
import dataclasses
import io
import math
import time

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F

from hatify import ConversionError, HatError, HatWarning, hatify, verify_isolation
from hatify.gate import gate

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*no feature is left:hatify.HatWarning")


class Block(nn.Module):
    """A layer, something, a layer, on a vector of three numbers."""

    def __init__(self, middle=None, features=6):
        super().__init__()
        self.first, self.middle = nn.Linear(3, 6), middle or nn.Identity()
        self.second, self.last = nn.Linear(features, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.second(self.middle(self.first(x))).tanh())


def begin(model, task):
    """Open a task with every second or third feature on."""
    model.begin_task(task)
    slots = torch.arange(model.task_state.num_slots)
    with torch.no_grad():
        model.task_state.embeddings[task].copy_(torch.where(slots % (2 + task) == 0, 1.0, -1.0))


def learn(model, task, *inputs, optimizer=None):
    """Learn a task with AdamW's default weight decay; what it answers in the end."""
    begin(model, task)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    model.end_task()
    return answer(model, task, *inputs)


@torch.no_grad()
def answer(model, task, *inputs):
    with model.task(task):
        return model.eval()(*inputs)


def assert_isolated(net, *inputs, **options):
    model = hatify(net, 2, inputs, s_max=10.0, **options)
    torch.testing.assert_close(answer(model, 0, *inputs), net.eval()(*inputs), rtol=1e-5, atol=1e-6)
    expected = learn(model, 0, *inputs)
    learn(model, 1, *inputs)
    assert torch.equal(answer(model, 0, *inputs), expected)
    verify_isolation(model, inputs)
    return model


# Statistics over features, and weight decay ---------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.GroupNorm(1, 6)], ids=str)
def test_trap_1_statistics_over_features_do_not_leak_later_tasks_into_earlier_ones(norm):
    assert_isolated(Block(norm), torch.randn(5, 3))


@pytest.mark.parametrize("affine", [True, False])
def test_trap_1_a_norm_of_a_task_sees_its_active_features_only(affine):
    model = hatify(Block(nn.LayerNorm(6, elementwise_affine=affine)), 1, torch.randn(2, 3), s_max=10.0)
    begin(model, 0)
    model.end_task()
    on = model.masks(0)["first"]
    seen = {}
    model.get_submodule("second").register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    x = torch.randn(2, 3)
    model(x)
    features = F.linear(x, model.get_parameter("first.weight"), model.get_parameter("first.bias"))
    torch.testing.assert_close(seen["x"][:, on], F.layer_norm(features[:, on], (int(on.sum()),)))
    assert (seen["x"][:, ~on] == 0).all()


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_trap_2_weight_decay_and_momentum_do_not_move_locked_weights(optimizer):
    x = torch.randn(5, 3)
    model = hatify(Block(), 2, (x,), s_max=10.0)
    momentum = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    one = optimizer(model.parameters(), lr=0.05, weight_decay=0.5, **momentum)
    expected = learn(model, 0, x, optimizer=one)
    learn(model, 1, x, optimizer=one)
    assert torch.equal(answer(model, 0, x), expected)


# Layers that are not what their base class is -------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, padding=1)


def image_net(middle):
    layers = [nn.Conv2d(3, 6, 3, padding=1), middle, nn.Conv2d(6, 6, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


@pytest.mark.parametrize(
    "layer",
    [
        Standardized(6, 6, 3),
        timm.layers.ScaledStdConv2d(6, 6, 3),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 3)),
    ],
    ids=["standardised", "scaled", "weight_norm", "spectral_norm"],
)
def test_trap_3_a_reparametrised_convolution_does_not_leak_through_its_free_columns(layer):
    assert_isolated(image_net(layer), torch.randn(2, 3, 6, 6))


def test_trap_4_a_zeroed_channel_is_zero_again_behind_batch_norm():
    net = image_net(nn.BatchNorm2d(6))
    nn.init.normal_(net[1].bias)
    net[1].running_mean.normal_()
    x = torch.randn(2, 3, 6, 6)
    model = assert_isolated(net, x)
    on = model.masks(0)["0"]
    seen = {}
    model.get_submodule("2").register_forward_hook(lambda module, args, out: seen.update(x=args[0]))
    answer(model, 0, x)
    assert (seen["x"][:, ~on] == 0).all() and (seen["x"][:, on] != 0).any()


# Tracing --------------------------------------------------------------------------------------------------------------


class ByMode(Block):
    """A bare ``if self.training`` in the root's own forward, and functional dropout."""

    def forward(self, x):
        x = F.dropout(self.first(x), 0.5, self.training)
        if self.training:
            x = x.relu()
        return self.last(self.second(x))


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1) < 0.5) if self.training else x


@pytest.mark.parametrize("net", [ByMode(), Block(DropPath()), Block(nn.Dropout(0.5))], ids=["root", "child", "module"])
def test_trap_5_tracing_does_not_freeze_the_training_flag(net):
    x = torch.randn(5, 3)
    model = assert_isolated(net, x)
    with torch.no_grad():
        assert torch.equal(answer(model, 0, x), answer(model, 0, x))
        fresh = hatify(net, 1, (x,))
        fresh.begin_task(0)
        net.train()
        for each in (net, fresh):
            torch.manual_seed(0)
            each.result = each(x)
    assert not torch.allclose(net.result, net.eval()(x))
    torch.testing.assert_close(fresh.result, net.result)


def test_trap_6_attribute_names_belong_to_the_user():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.task, self.masks = nn.Linear(3, 6), nn.Linear(6, 6)
            self.graph, self.head = nn.Parameter(torch.rand(6)), nn.Linear(6, 2)
            self.register_buffer("census", torch.ones(6))

        def forward(self, x):
            return self.head(self.masks(self.task(x)).tanh() * self.graph + self.census)

    model = assert_isolated(Named(), torch.randn(5, 3))
    assert {"task.weight", "masks.weight", "graph"} <= model.state_dict().keys()
    assert model.masks(0).keys() >= {"task", "masks"}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: tuple


@pytest.mark.parametrize(
    "pack",
    [
        lambda y, x: {"logits": y, "features": (x,)},
        lambda y, x: (y, [x]),
        lambda y, x: Output(logits=y, features=(x,)),
    ],
    ids=["dict", "tuple", "dataclass"],
)
def test_trap_7_inputs_may_be_none_and_outputs_anything(pack):
    class Net(Block):
        def forward(self, x, bias=None, scale=2.0, *, how="plain"):
            x = self.second(self.first(x) if bias is None else self.first(x) + bias) * scale
            return pack(self.last(x.relu() if how == "relu" else x), x)

    net, x = Net().eval(), torch.randn(5, 3)
    for args, kwargs in (((x,), {}), ((x, None, 2.0), {"how": "plain"}), ((), {"x": x, "bias": None})):
        model = hatify(net, 2, (x,)).eval()
        actual, expected = model(*args, **kwargs), net(*args, **kwargs)
        assert type(actual) is type(expected)
        flat = [vars(o) if isinstance(o, Output) else o for o in (actual, expected)]
        torch.testing.assert_close(*flat)


# Divergence, copies, inplace ------------------------------------------------------------------------------------------


def test_trap_8_a_task_that_diverges_is_abandoned_without_a_trace():
    x = torch.randn(5, 3)
    model = hatify(Block(nn.BatchNorm1d(6)), 2, (x,), s_max=10.0)
    expected = learn(model, 0, x)
    state = copy.deepcopy(model.state_dict())
    begin(model, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for factor in (1.0, math.inf, math.nan):
        optimizer.zero_grad()
        (model(x * factor).square().mean()).backward()
        optimizer.step()
    assert model.get_parameter("second.weight").isnan().any()
    with pytest.raises(HatError, match="abort_task"):
        model.end_task()
    model.abort_task()
    assert torch.equal(answer(model, 0, x), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if torch.is_tensor(v))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "treat",
    [copy.deepcopy, saved, lambda model: model.double().float(), lambda model: model.requires_grad_(True)],
    ids=["deepcopy", "torch.save", "cast", "requires_grad_"],
)
def test_trap_9_locks_survive_what_is_done_to_a_model_in_mid_task(treat):
    x = torch.randn(5, 3)
    model = hatify(Block(nn.LayerNorm(6)), 2, (x,), s_max=10.0)
    expected = learn(model, 0, x)
    begin(model, 1)
    model = treat(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(answer(model, 0, x), expected)
    model.end_task()
    assert torch.equal(answer(model, 0, x), expected)
    verify_isolation(model)


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        nn.LeakyReLU(inplace=True),
        nn.SiLU(inplace=True),
        nn.Hardswish(inplace=True),
        nn.Dropout(0.1, inplace=True),
        timm.layers.BatchNormAct2d(6, act_kwargs={"inplace": True}),
    ],
    ids=lambda act: type(act).__name__,
)
def test_trap_10_an_inplace_activation_does_not_overwrite_what_backward_needs(act):
    class Net(nn.Module):
        """The activation stands behind a mask that was applied to the weight, to the output, and to a norm."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
            self.acts = nn.ModuleList(copy.deepcopy(act) for _ in range(3))
            self.scale, self.head = nn.Parameter(torch.rand(6, 1, 1)), nn.Linear(6, 2)

        def forward(self, x):
            x = self.acts[0](self.a(x)) * self.scale
            x = self.acts[1](self.bn(x))
            x = x + self.acts[2](self.b(x))
            x += 1
            return self.head(x.mean((2, 3)))

    x = torch.randn(4, 3, 3, 3)
    for shape in (x, torch.randn(2, 3, 32, 32)):
        assert_isolated(Net(), shape)


def test_trap_10_gradients_through_inplace_activations_are_those_of_the_network():
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True), nn.Linear(6, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    model = hatify(net.double(), 1, (x,))
    model.begin_task(0)
    for each in (net, model):
        each(x).square().mean().backward()
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(model.get_parameter(name).grad, net.get_parameter(name).grad)


# Raw parameters, empty masks, slow numbers, large labels --------------------------------------------------------------


class Tokens(nn.Module):
    """Class token, position embedding, a relative-position table, LayerScale, and a ParameterList."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.arange(5)[:, None] - torch.arange(5)[None] + 4)
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(8)) for _ in range(2)])
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.stem(x)), 1) + self.position
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(-1, 5, 8)
        x = x * self.scales[0] + self.proj(y) * self.scales[1]
        return self.head(x[:, 0])


def test_trap_11_tokens_positions_tables_and_parameter_lists_are_weights_too():
    model = assert_isolated(Tokens(), torch.randn(3, 4, 3))
    policies = {e.name: str(e.policy) for e in model.census}
    assert {policies[name] for name in ("token", "position", "scales.0", "scales.1")} == {"masked"}
    assert policies["table"] == "per_task"


@pytest.mark.parametrize("middle", [nn.Tanh, lambda: nn.BatchNorm1d(6), lambda: nn.LayerNorm(6)])
def test_trap_12_a_mask_that_is_off_altogether_keeps_one_feature_and_warns(middle):
    x = torch.randn(5, 3)
    model = hatify(Block(middle()), 2, (x,))
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(-1 - torch.rand(model.task_state.num_slots))
    with pytest.warns(HatWarning, match="every feature off"):
        model.end_task()
    assert all(mask.sum() == 1 for mask in model.masks(0).values())
    y = answer(model, 0, x)
    assert y.isfinite().all()
    # A single feature has nothing left once its own mean is taken off.
    assert torch.equal(y[0], y[1]) == isinstance(middle(), nn.LayerNorm)
    verify_isolation(model)


def test_trap_13_no_gate_is_a_subnormal_number():
    a = gate(torch.linspace(-6, 6, 2001), torch.tensor(50.0), 400.0)
    assert torch.sigmoid(torch.tensor(50.0 * -2)) < torch.finfo(torch.float32).tiny
    assert ((a == 0) | (a >= 2.0**-24)).all() and (a == 0).any()


def test_trap_13_a_step_with_steep_gates_makes_no_subnormal_activations():
    seen = []
    model = hatify(Block(), 1, torch.randn(2, 3))
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.linspace(-2.1, 2, model.task_state.num_slots))
    model.mask_scale = 50.0
    for name in ("second", "last"):
        target = model.get_submodule(name)
        target.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    model(torch.randn(50, 3))
    values = torch.cat([x.flatten() for x in seen])
    assert not ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("batch", [1, 256])
def test_trap_14_labels_do_not_grow_with_images_or_batches(batch):
    layers = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(6):
        layers += [nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(batch, 3, 2, 2)
    start = time.process_time()
    hatify(net, 2, (x,))
    assert time.process_time() - start < 2


def test_trap_14_large_embeddings_and_position_tables_are_analysed_in_seconds():
    class Language(nn.Module):
        def __init__(self, vocabulary=5000, width=512, length=256):
            super().__init__()
            self.words = nn.Embedding(vocabulary, width)
            self.position = nn.Parameter(torch.zeros(1, length, width))
            self.fc = nn.Linear(width, width)
            self.head = nn.Linear(width, vocabulary, bias=False)

        def forward(self, ids):
            x = self.words(ids) + self.position
            return self.head(x + self.fc(x).relu())

    net = Language()
    start = time.process_time()
    hatify(net, 1, (torch.zeros(1, 256, dtype=torch.int64),))
    assert time.process_time() - start < 5


def test_networks_that_cannot_be_converted_say_where_and_what_to_do():
    class Branching(Block):
        def forward(self, x):
            return self.last(self.second(self.first(x))) if x.mean() > 0 else x

    with pytest.raises(ConversionError, match=r"Branching.*test_traps\.py:\d+.*policies"):
        hatify(Branching(), 2, torch.randn(2, 3))
