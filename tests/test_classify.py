"""Which policy each kind of module gets, and what users may choose instead."""

import types
import warnings

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from hatify import Census, ConversionError, hatify, verify_isolation

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

WIDTH = 6


def policies(model):
    """The policy of every parameter and buffer of the original."""
    return {entry.name: str(entry.policy) for entry in model.census}


def policy_of(model, path):
    """The policy that all parameters and buffers of a module have."""
    (policy,) = {p for name, p in policies(model).items() if name.startswith(f"{path}.") or name == path}
    return policy


def heads_of(model):
    return {name.rpartition(".")[0] for name, policy in policies(model).items() if policy == "head"}


def tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [t for o in out or () for t in tensors(o)]


def assert_sound(net, model, *inputs):
    """The model computes what the network does, and training a second task changes no bit of the first."""
    expected = tensors(net.eval()(*inputs))
    for actual, wanted in zip(tensors(model.eval()(*inputs)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    answers = []
    for task in range(2):
        model.begin_task(task)
        with torch.no_grad():
            # Half of the features, in an order without a period that a wrong index could hide behind.
            slots = torch.arange(model.task_state.num_slots)
            on = (slots * (0.618034, 0.754878)[task]) % 1 < 0.5
            model.task_state.embeddings[task].copy_(torch.where(on, 1.0, -1.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(t.float().square().mean() for t in tensors(model(*inputs))).backward()
            optimizer.step()
        model.end_task()
        with model.task(0), torch.no_grad():
            answers.append(tensors(model(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    verify_isolation(model, inputs)


class Between(nn.Module):
    """Shared layers before and behind the module under test, whose output is averaged down to features."""

    def __init__(self, before, module, features_of, features):
        super().__init__()
        self.before, self.module, self.features_of = before, module, features_of
        self.behind, self.head = nn.Linear(features, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.behind(self.features_of(self.module(self.before(x)))).tanh())


def between(module, dims=0, features=WIDTH):
    """`module` inside a network of inputs with `dims` spatial dimensions, with such inputs."""
    before = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][dims](3, WIDTH, *(1,) * bool(dims))
    first = isinstance(module, (nn.RNNBase, nn.LSTMCell))

    def features_of(x):
        x = x[0] if first else x
        return x.flatten(2).mean(2) if dims else x

    return Between(before, module, features_of, features), torch.randn(2, 3, *(4,) * dims)


def assert_features_are_followed(model):
    """The layer behind reads features that can be off, each at its own slot, so that its columns can be freed."""
    (use,) = model.uses["behind.weight"]
    assert (use.read < model.task_state.num_slots).all()
    assert use.read.unique().numel() == use.read.numel()


# Kinds of modules -----------------------------------------------------------------------------------------------------

PLAIN = {
    "Linear": lambda: (nn.Linear(WIDTH, 8), 0, 8),
    "Linear without bias": lambda: (nn.Linear(WIDTH, 8, bias=False), 0, 8),
    "Conv1d": lambda: (nn.Conv1d(WIDTH, 8, 3), 1, 8),
    "Conv2d": lambda: (nn.Conv2d(WIDTH, 8, 3), 2, 8),
    "Conv3d": lambda: (nn.Conv3d(WIDTH, 8, 3), 3, 8),
    "grouped": lambda: (nn.Conv2d(WIDTH, 9, 3, groups=3), 2, 9),
    "depthwise": lambda: (nn.Conv2d(WIDTH, 12, 3, groups=WIDTH), 2, 12),
    "circular": lambda: (nn.Conv2d(WIDTH, 8, 3, padding=1, padding_mode="circular"), 2, 8),
    "ConvTranspose1d": lambda: (nn.ConvTranspose1d(WIDTH, 8, 3), 1, 8),
    "ConvTranspose2d": lambda: (nn.ConvTranspose2d(WIDTH, 8, 3, stride=2, output_padding=1), 2, 8),
    "ConvTranspose3d": lambda: (nn.ConvTranspose3d(WIDTH, 8, 3), 3, 8),
    "grouped transpose": lambda: (nn.ConvTranspose2d(WIDTH, 8, 3, groups=2), 2, 8),
    "subclass": lambda: (type("Mine", (nn.Conv2d,), {})(WIDTH, 8, 3), 2, 8),
    "Conv2dSame": lambda: (timm.layers.Conv2dSame(WIDTH, 8, 3), 2, 8),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_plain_layers_are_shared_entry_by_entry(make):
    module, dims, features = make()
    net, x = between(module, dims, features)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") == "shared"
    assert model.masks(0)["module"].shape == (features,)
    if getattr(module, "groups", 1) != WIDTH:  # a depthwise convolution passes on the features it gets
        assert_features_are_followed(model)
    assert_sound(net, model, x)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_embeddings_are_shared(options):
    net = nn.Sequential(nn.Embedding(7, WIDTH, **options), nn.Flatten(), nn.Linear(4 * WIDTH, 2))
    x = torch.randint(7, (3, 4))
    model = hatify(net, 2, (x,))
    assert policy_of(model, "0") == "shared"
    assert_sound(net, model, x)


class Standardized(nn.Conv2d):
    """Standardises each row of its weight."""

    def forward(self, x):
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return F.conv2d(x, w.view_as(self.weight), self.bias)


class Gained(nn.Linear):
    """Has a gain for each row, besides."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.rand(self.out_features, 1) + 0.5)

    def forward(self, x):
        return F.linear(x, self.weight * self.gain, self.bias)


class Softplus(nn.Module):
    def forward(self, x):
        return F.softplus(x)


def parametrized(module, parametrization):
    parametrize.register_parametrization(module, "weight", parametrization)
    return module


def old(normalise, module, **options):
    """A module reparametrised by the deprecated functions of torch.nn.utils."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normalise(module, **options)


ROWS = {
    "own forward": lambda: (Standardized(WIDTH, 8, 3), 2, 8),
    "own parameters": lambda: (Gained(WIDTH, 8), 0, 8),
    "StdConv2d": lambda: (timm.layers.StdConv2d(WIDTH, 8, 3), 2, 8),
    "StdConv2dSame": lambda: (timm.layers.StdConv2dSame(WIDTH, 8, 3), 2, 8),
    "ScaledStdConv2d": lambda: (timm.layers.ScaledStdConv2d(WIDTH, 8, 3), 2, 8),
    "ScaledStdConv2dSame": lambda: (timm.layers.ScaledStdConv2dSame(WIDTH, 8, 3), 2, 8),
    "weight_norm": lambda: (parametrizations.weight_norm(nn.Linear(WIDTH, 8)), 0, 8),
    "weight_norm of a convolution": lambda: (parametrizations.weight_norm(nn.Conv1d(WIDTH, 8, 3)), 1, 8),
    "old weight_norm": lambda: (old(nn.utils.weight_norm, nn.Linear(WIDTH, 8)), 0, 8),
    "old weight_norm of a convolution": lambda: (old(nn.utils.weight_norm, nn.Conv2d(WIDTH, 8, 3)), 2, 8),
    "elementwise parametrization": lambda: (parametrized(nn.Linear(WIDTH, 8), Softplus()), 0, 8),
}


@pytest.mark.parametrize("make", ROWS.values(), ids=ROWS)
def test_layers_with_independent_rows_are_shared_row_by_row(make):
    module, dims, features = make()
    net, x = between(module, dims, features)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") == "row"
    assert model.masks(0)["module"].shape == (features,)
    assert_features_are_followed(model)
    assert_sound(net, model, x)


class Normalized(nn.Linear):
    """Divides its weight by the norm of the whole weight."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Counting(nn.Linear):
    """Scales its weight by a number that grows in training."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("steps", torch.ones(()))

    def forward(self, x):
        if self.training:
            self.steps.add_(1)
        return F.linear(x, self.weight / self.steps, self.bias)


class Mixing(nn.Linear):
    """Mixes its outputs."""

    def forward(self, x):
        return super().forward(x).cumsum(-1)


WHOLE = {
    "norm of the whole weight": lambda: (Normalized(WIDTH, 8), 0, 8),
    "moving buffer": lambda: (Counting(WIDTH, 8), 0, 8),
    "mixed outputs": lambda: (Mixing(WIDTH, 8), 0, 8),
    "spectral_norm": lambda: (parametrizations.spectral_norm(nn.Linear(WIDTH, 8)), 0, 8),
    "spectral_norm of a convolution": lambda: (parametrizations.spectral_norm(nn.Conv2d(WIDTH, 8, 3)), 2, 8),
    "old spectral_norm": lambda: (old(nn.utils.spectral_norm, nn.Linear(WIDTH, 8)), 0, 8),
    "orthogonal": lambda: (parametrizations.orthogonal(nn.Linear(WIDTH, 8)), 0, 8),
    "weight_norm over everything": lambda: (parametrizations.weight_norm(nn.Linear(WIDTH, 8), dim=None), 0, 8),
    "weight_norm over rows": lambda: (parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH), dim=1), 0, WIDTH),
    "weight_norm of a transpose": lambda: (
        parametrizations.weight_norm(nn.ConvTranspose2d(WIDTH, WIDTH, 3)),
        2,
        WIDTH,
    ),
    "PReLU": lambda: (nn.PReLU(), 0, WIDTH),
    "PReLU by channel": lambda: (nn.PReLU(WIDTH), 0, WIDTH),
    "LSTM": lambda: (nn.LSTM(4, 5, batch_first=True), 1, WIDTH),
    "GRU": lambda: (nn.GRU(4, 5, bidirectional=True, batch_first=True), 1, WIDTH),
    "RNN": lambda: (nn.RNN(4, 5, batch_first=True), 1, WIDTH),
    "LSTMCell": lambda: (nn.LSTMCell(WIDTH, 5), 0, 5),
    "GRUCell": lambda: (nn.GRUCell(WIDTH, 5), 0, 5),
    "TransformerEncoderLayer": lambda: (
        nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True),
        1,
        WIDTH,
    ),
    "TransformerEncoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False),
        1,
        WIDTH,
    ),
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_modules_that_act_as_a_whole_are_copied_for_each_task(make):
    module, dims, features = make()
    net, x = between(module, dims, features)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") == "per_task"
    assert_sound(net, model, x)


def test_attention_is_copied_for_each_task():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(3, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return self.head(x.mean(1))

    net, x = Net(), torch.randn(2, 5, 3)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "attention") == "per_task"
    assert_sound(net, model, x)


def test_bilinear_layers_are_copied_for_each_task():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.product = nn.Linear(3, 4), nn.Linear(3, 5), nn.Bilinear(4, 5, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.product(self.a(x), self.b(x)))

    net, x = Net(), torch.randn(2, 3)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "product") == "per_task"
    assert_sound(net, model, x)


@pytest.mark.parametrize("make", [nn.EmbeddingBag, lambda n, d: nn.Embedding(n, d, max_norm=0.5)])
def test_lookups_that_are_not_plain_are_copied_for_each_task(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = make(7, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x):
            return self.head(self.words(x).view(3, -1, WIDTH).mean(1))

    net, x = Net(), torch.randint(7, (3, 4))
    model = hatify(net, 2, (x,))
    assert policy_of(model, "words") == "per_task"
    assert_sound(net, model, x)


NORMS = {
    "BatchNorm1d": lambda: (nn.BatchNorm1d(WIDTH), 0),
    "BatchNorm2d": lambda: (nn.BatchNorm2d(WIDTH), 2),
    "BatchNorm3d": lambda: (nn.BatchNorm3d(WIDTH), 3),
    "LayerNorm": lambda: (nn.LayerNorm(WIDTH), 0),
    "GroupNorm": lambda: (nn.GroupNorm(2, WIDTH), 2),
    "InstanceNorm2d": lambda: (nn.InstanceNorm2d(WIDTH, affine=True), 2),
    "RMSNorm": lambda: (nn.RMSNorm(WIDTH), 0),
    "LayerNorm2d": lambda: (timm.layers.LayerNorm2d(WIDTH), 2),
    "BatchNormAct2d": lambda: (timm.layers.BatchNormAct2d(WIDTH), 2),
    "BatchNormAct2d with an activation that is not zero at zero": lambda: (
        timm.layers.BatchNormAct2d(WIDTH, act_layer=nn.Sigmoid),
        2,
    ),
    "subclass": lambda: (type("Mine", (nn.BatchNorm2d,), {})(WIDTH), 2),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_normalisations_are_each_tasks_own(make):
    module, dims = make()
    net, x = between(module, dims)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") == "norm"
    assert_features_are_followed(model)
    assert_sound(net, model, x)


def test_synchronised_batch_norm_is_each_tasks_own():
    net, x = between(nn.SyncBatchNorm(WIDTH), 2)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") in ("norm", "per_task")
    assert_sound(net, model, x)


def test_a_normalisation_with_a_forward_of_its_own_is_copied_for_each_task():
    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    net, x = between(Shifted(WIDTH))
    model = hatify(net, 2, (x,))
    assert policy_of(model, "module") == "per_task"
    assert_sound(net, model, x)


def forward_hook(module):
    module.register_forward_hook(lambda module, args, out: out.cumsum(-1) + 1)


def forward_pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (args[0].cumsum(-1) + 1,))


def replaced_forward(module):
    def forward(self, x):
        return type(self).forward(self, x).cumsum(-1) + 1

    module.forward = types.MethodType(forward, module)


@pytest.mark.parametrize("change", [forward_hook, forward_pre_hook, replaced_forward], ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(WIDTH, WIDTH),
        nn.ReLU,
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.BatchNorm1d(WIDTH),
        nn.Identity,
        lambda: Normalized(WIDTH, WIDTH),
    ],
    ids=["Linear", "ReLU", "LayerNorm", "BatchNorm1d", "Identity", "per task"],
)
def test_a_module_that_was_changed_from_outside_is_not_taken_for_its_kind(make, change):
    net, x = between(make())
    change(net.module)
    assert_sound(net, hatify(net, 2, (x,)), x)


def test_hooks_of_the_network_itself_are_kept():
    net, x = chain(), torch.randn(2, 3)
    net.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    net.register_forward_hook(lambda module, args, out: 2 * out)
    assert_sound(net, hatify(net, 2, (x,)), x)


def test_a_forward_replaced_on_the_network_itself_is_followed_or_refused():
    net, x = chain(), torch.randn(2, 3)
    net.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, net)
    try:
        model = hatify(net, 2, (x,))
    except ConversionError as error:
        assert "forward" in str(error)
    else:
        assert_sound(net, model, x)


def test_raw_parameters_are_masked_with_the_features_they_meet():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
            self.token, self.position = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(6, WIDTH))
            self.scale, self.temperature = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.ones(()))
            self.unread = nn.Parameter(torch.ones(2))

        def forward(self, x):
            x = torch.cat((self.token.expand(x.shape[0], -1, -1), self.stem(x)), 1) + self.position
            return self.head((x * self.scale).mean(1)) * self.temperature

    net, x = Net(), torch.randn(2, 5, 3)
    model = hatify(net, 2, (x,))
    found = policies(model)
    assert {found[name] for name in ("token", "position", "scale")} == {"masked"}
    assert found["temperature"] == "per_task" and found["unread"] == "unused"
    assert_sound(net, model, x)


# Parameters in several places -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.body(self.words(x)).relu())


def test_a_tied_embedding_is_shared_and_its_output_layer_unmasked():
    net, x = Tied(), torch.randint(7, (3, 4))
    model = hatify(net, 2, (x,))
    assert model.get_parameter("words.weight") is model.get_parameter("head.weight")
    assert not heads_of(model)
    assert_sound(net, model, x)
    assert model.get_parameter("words.weight") is model.get_parameter("head.weight")


class TiedByHand(Tied):
    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, x):
        return F.linear(self.body(self.words(x)).relu(), self.words.weight)


def test_an_embedding_tied_by_hand_is_shared_too():
    net, x = TiedByHand(), torch.randint(7, (3, 4))
    assert_sound(net, hatify(net, 2, (x,)), x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(self.stem(x)).relu()).tanh())


def test_a_layer_called_twice_has_one_mask_and_is_locked_for_both_calls():
    net, x = Twice(), torch.randn(2, 3)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "layer") == "shared"
    assert len(model.uses["layer.weight"]) == 2
    assert_sound(net, model, x)


def test_one_module_under_two_names_is_one_module():
    class Net(Twice):
        def __init__(self):
            super().__init__()
            self.again = self.layer

        def forward(self, x):
            return self.head(self.again(self.layer(self.stem(x)).relu()).tanh())

    net, x = Net(), torch.randn(2, 3)
    model = hatify(net, 2, (x,))
    assert model.get_submodule("again") is model.get_submodule("layer")
    assert_sound(net, model, x)


def test_layers_that_share_a_weight_are_locked_for_both():
    class Net(Twice):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(WIDTH, WIDTH)
            self.other.weight = self.layer.weight

        def forward(self, x):
            return self.head(self.other(self.layer(self.stem(x)).relu()).tanh())

    net, x = Net(), torch.randn(2, 3)
    model = hatify(net, 2, (x,))
    assert len(model.uses["layer.weight"]) == 2
    assert_sound(net, model, x)


def test_a_layer_tied_to_one_that_is_copied_is_copied_with_it():
    class Net(Twice):
        def __init__(self):
            super().__init__()
            self.other = Normalized(WIDTH, WIDTH)
            self.other.weight = self.layer.weight

        def forward(self, x):
            return self.head(self.other(self.layer(self.stem(x)).relu()).tanh())

    net, x = Net(), torch.randn(2, 3)
    model = hatify(net, 2, (x,))
    assert policies(model)["layer.weight"] == policies(model)["other.weight"] == "per_task"
    for task in range(2):
        assert model.get_submodule("layer")[task].weight is model.get_submodule("other")[task].weight
    assert_sound(net, model, x)


def test_a_copied_parameter_that_is_also_read_directly_is_refused():
    class Net(Twice):
        def __init__(self):
            super().__init__()
            self.layer = Normalized(WIDTH, WIDTH)

        def forward(self, x):
            return self.head(F.linear(self.layer(self.stem(x)), self.layer.weight))

    with pytest.raises(ConversionError, match=r"layer.*read directly.*policies"):
        hatify(Net(), 2, (torch.randn(2, 3),))


# Heads ----------------------------------------------------------------------------------------------------------------


class End(nn.Module):
    """A body, and an end made of output layers `a` and `b`."""

    def __init__(self, end, layer=None):
        super().__init__()
        self.body = nn.Conv2d(3, WIDTH, 3)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.a, self.b = layer or nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)
        self.inner = nn.Linear(4, 4)
        self.end = end

    def forward(self, x):
        return self.end(self, self.norm(self.body(x)).relu())


def pooled(x):
    return x.mean((2, 3))


CONV = "Conv2d"
ENDS = {
    "linear": (lambda n, x: n.a(pooled(x)), {"a"}),
    "softmax": (lambda n, x: n.a(pooled(x)).softmax(-1), {"a"}),
    "log_softmax": (lambda n, x: F.log_softmax(n.a(pooled(x)), dim=1), {"a"}),
    "sigmoid": (lambda n, x: torch.sigmoid(n.a(pooled(x))), {"a"}),
    "relu": (lambda n, x: F.relu(n.a(pooled(x))), {"a"}),
    "dropout": (lambda n, x: F.dropout(n.a(pooled(x)), 0.0, n.training), {"a"}),
    "squeezed": (lambda n, x: n.a(pooled(x).unsqueeze(1)).squeeze(1), {"a"}),
    "scaled": (lambda n, x: n.a(pooled(x)) / 10.0, {"a"}),
    "normalised": (lambda n, x: F.normalize(n.a(pooled(x)), dim=-1), {"a"}),
    "clamped": (lambda n, x: n.a(pooled(x)).clamp(-5, 5), {"a"}),
    "float": (lambda n, x: n.a(pooled(x)).float(), {"a"}),
    "sliced": (lambda n, x: n.a(pooled(x))[:, :3], {"a"}),
    "over positions": (lambda n, x: n.a(x.flatten(2).transpose(1, 2)).mean(1), {"a"}),
    "two in a tuple": (lambda n, x: (n.a(pooled(x)), n.b(pooled(x))), {"a", "b"}),
    "two in a dict": (lambda n, x: {"class": n.a(pooled(x)), "box": n.b(pooled(x)).sigmoid()}, {"a", "b"}),
    "two averaged": (lambda n, x: (n.a(pooled(x)) + n.b(pooled(x))) / 2, {"a", "b"}),
    "two joined": (lambda n, x: torch.cat((n.a(pooled(x)), n.b(pooled(x))), 1), {"a", "b"}),
    "with features": (lambda n, x: (n.a(pooled(x)), x), {"a"}),
    "also a feature": (lambda n, x: (lambda y: (y, n.inner(y)))(n.a(pooled(x))), {"inner"}),
    "one behind another": (lambda n, x: n.inner(n.a(pooled(x)).relu()), {"inner"}),
    "residual": (lambda n, x: (lambda y: y + n.inner(y))(n.a(pooled(x))), set()),
    "features": (lambda n, x: pooled(x), set()),
    "input too": (lambda n, x: n.a(pooled(x)) + n.b(pooled(x)) * pooled(x).mean(), set()),
}


@pytest.mark.parametrize(("end", "expected"), ENDS.values(), ids=ENDS)
def test_output_layers_are_found(end, expected):
    net, x = End(end), torch.randn(2, 3, 6, 6)
    model = hatify(net, 2, (x,))
    assert heads_of(model) == expected
    assert_sound(net, model, x)


FULLY_CONVOLUTIONAL = {
    "pooled": lambda n, x: F.adaptive_avg_pool2d(n.a(x), 1).flatten(1),
    "mean": lambda n, x: n.a(x).mean((2, 3)),
    "dense": lambda n, x: n.a(x),
    "resized": lambda n, x: F.interpolate(n.a(x), scale_factor=2, mode="bilinear"),
    "view": lambda n, x: n.a(x).view(x.shape[0], -1),
    "view of its own size": lambda n, x: (lambda y: y.view(y.size(0), -1))(n.a(x)),
}


@pytest.mark.parametrize("end", FULLY_CONVOLUTIONAL.values(), ids=FULLY_CONVOLUTIONAL)
def test_convolutions_are_output_layers_too(end):
    net, x = End(end, nn.Conv2d(WIDTH, 4, 1)), torch.randn(2, 3, 6, 6)
    model = hatify(net, 2, (x,))
    assert heads_of(model) == {"a"}
    assert_sound(net, model, x)


ACTIVATION_MODULES = [
    nn.Softmax(-1),
    nn.LogSoftmax(-1),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ReLU(),
    nn.Flatten(),
    nn.Identity(),
    nn.Dropout(0.1),
    nn.Unflatten(1, (2, 2)),
]


@pytest.mark.parametrize("module", ACTIVATION_MODULES, ids=lambda m: type(m).__name__)
def test_modules_behind_the_output_layer_do_not_hide_it(module):
    net = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4), module)
    assert heads_of(hatify(net, 2, (torch.randn(2, 3),))) == {"2"}


def test_a_network_of_one_layer_is_a_head():
    net, x = nn.Linear(3, 2), torch.randn(2, 3)
    net = nn.Sequential(net)
    model = hatify(net, 2, (x,))
    assert heads_of(model) == {"0"}
    assert_sound(net, model, x)


def test_a_bare_layer_converts():
    net, x = nn.Linear(3, 2), torch.randn(2, 3)
    assert_sound(net, hatify(net, 2, (x,)), x)


def test_an_output_layer_of_another_kind_is_each_tasks_own():
    x, head = torch.randn(2, 3, 6, 6), parametrizations.weight_norm(nn.Linear(WIDTH, 4))
    net = End(lambda n, x: n.a(pooled(x)), head)
    model = hatify(net, 2, (x,))
    assert policy_of(model, "a") == "head"
    assert_sound(net, model, x)


def test_heads_can_be_named():
    net, x = End(lambda n, x: n.inner(n.a(pooled(x)).relu())), torch.randn(2, 3, 6, 6)
    for heads in ("a", ["a"], {"a"}, ("a",), iter(["a"])):
        model = hatify(net, 2, (x,), heads=heads)
        assert heads_of(model) == {"a"}
        assert policy_of(model, "inner") == "shared"
    assert_sound(net, model, x)
    model = hatify(net, 2, (x,), heads=["a", "inner"])
    assert heads_of(model) == {"a", "inner"}
    assert_sound(net, model, x)


def test_without_heads_the_output_layer_carries_a_mask():
    net, x = End(lambda n, x: n.a(pooled(x))), torch.randn(2, 3, 6, 6)
    model = hatify(net, 2, (x,), heads=None)
    assert not heads_of(model) and policy_of(model, "a") == "shared"
    assert model.masks(0)["a"].shape == (4,)
    assert_sound(net, model, x)


def test_an_unknown_head_is_refused_with_the_last_layers():
    net, x = End(lambda n, x: n.a(pooled(x))), torch.randn(2, 3, 6, 6)
    with pytest.raises(ConversionError, match=r"heads.*'classifier'.*norm"):
        hatify(net, 2, (x,), heads="classifier")


@pytest.mark.parametrize("bad", [0, -1, True, 2.5, [2, 3, 4], [2, 0], [2], ["2", "3"], []])
def test_numbers_of_classes_must_be_positive_and_one_per_task(bad):
    net = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    with pytest.raises(ValueError, match="num_classes"):
        hatify(net, 2, (torch.randn(2, 3),), num_classes=bad)


def test_numbers_of_classes_may_be_any_iterable():
    net = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model = hatify(net, 2, (torch.randn(2, 3),), num_classes=(n for n in (2, 3)))
    assert [head.out_features for head in model.get_submodule("2")] == [2, 3]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutional_heads_can_be_resized(dims, transposed):
    names = [[nn.Conv1d, nn.Conv2d, nn.Conv3d], [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]]
    options = {"stride": 2, "output_padding": 1} if transposed else {"stride": 2, "padding": 1, "dilation": 2}
    head = names[transposed][dims - 1](WIDTH, 4, 3, bias=False, **options)
    net = nn.Sequential(names[0][dims - 1](3, WIDTH, 1), nn.ReLU(), head)
    x = torch.randn(2, 3, *(6,) * dims)
    model = hatify(net, 2, (x,), num_classes=[3, 5]).eval()
    for task, classes in enumerate((3, 5)):
        with model.task(task):
            assert model(x).shape == (2, classes, *net(x).shape[2:])
    assert model.get_submodule("2")[1].bias is None


def test_resized_heads_need_a_head():
    net, x = End(lambda n, x: pooled(x)), torch.randn(2, 3, 6, 6)
    with pytest.raises(ConversionError, match=r"num_classes.*heads="):
        hatify(net, 2, (x,), num_classes=3)


def test_resized_heads_need_a_head_of_a_plain_kind():
    net = nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), parametrizations.weight_norm(nn.Linear(WIDTH, 4)))
    with pytest.raises(ConversionError, match=r"^2: .*number of classes.*heads="):
        hatify(net, 2, (torch.randn(2, 3),), num_classes=3)


# What users may choose ------------------------------------------------------------------------------------------------


def chain():
    return nn.Sequential(
        nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
    )


@pytest.mark.parametrize("policy", ["shared", "row", "unmasked", "per_task", "head"])
def test_every_selectable_policy_is_sound_for_a_plain_layer(policy):
    net, x = chain(), torch.randn(2, 3)
    model = hatify(net, 2, (x,), policies={"2": policy})
    assert policy_of(model, "2") == policy
    assert {e.reason for e in model.census if e.name.startswith("2.")} == {"chosen by the user"}
    assert_sound(net, model, x)


def test_an_override_wins_over_a_head():
    net, x = chain(), torch.randn(2, 3)
    for policy in ("shared", "unmasked", "per_task"):
        model = hatify(net, 2, (x,), policies={"4": policy})
        assert policy_of(model, "4") == policy
        assert_sound(net, model, x)


def test_a_whole_block_may_be_copied_for_each_task():
    net, x = nn.Sequential(nn.Linear(3, 3), chain(), nn.Linear(4, 2)), torch.randn(2, 3)
    model = hatify(net, 2, (x,), policies={"1": "per_task"})
    assert policy_of(model, "1") == "per_task"
    assert_sound(net, model, x)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"2": "frozen"}, r"policies\['2'\].*'frozen'.*'shared', 'row', 'unmasked', 'head', 'per_task'"),
        ({"2": "norm"}, r"policies\['2'\].*'norm' cannot be chosen.*'shared'"),
        ({"layer": "shared"}, r"policies\['layer'\].*no such module"),
        ({"3": "shared"}, r"policies\['3'\].*LayerNorm.*'per_task'"),
        ({"1": "row"}, r"policies\['1'\]"),
    ],
)
def test_policies_that_cannot_hold_are_refused(chosen, message):
    with pytest.raises(ConversionError, match=message):
        hatify(chain(), 2, (torch.randn(2, 3),), policies=chosen)


def test_single_entries_of_a_reparametrised_layer_cannot_be_locked():
    net, x = between(Standardized(WIDTH, 8, 3), 2, 8)
    for policy in ("shared", "unmasked"):
        with pytest.raises(ConversionError, match=r"policies\['module'\].*Standardized.*'row' or 'per_task'"):
            hatify(net, 2, (x,), policies={"module": policy})


SQUARE = {
    "spectral_norm": lambda: (parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), 0),
    "norm of the whole weight": lambda: (Normalized(WIDTH, WIDTH), 0),
    "mixed outputs": lambda: (Mixing(WIDTH, WIDTH), 0),
    "transposed convolution": lambda: (nn.ConvTranspose2d(WIDTH, WIDTH, 3), 2),
    "grouped transposed convolution": lambda: (nn.ConvTranspose2d(WIDTH, WIDTH, 3, groups=2), 2),
}


@pytest.mark.parametrize("make", SQUARE.values(), ids=SQUARE)
def test_rows_are_not_locked_where_outputs_do_not_have_rows_of_their_own(make):
    module, dims = make()
    net, x = between(module, dims)
    with pytest.raises(ConversionError, match=r"policies\['module'\].*per_task"):
        hatify(net, 2, (x,), policies={"module": "row"})


def test_rows_of_an_embedding_are_not_its_features():
    net = nn.Sequential(nn.Embedding(WIDTH, WIDTH), nn.Flatten(), nn.Linear(4 * WIDTH, 2))
    with pytest.raises(ConversionError, match=r"policies\['0'\].*'shared'"):
        hatify(net, 2, (torch.randint(WIDTH, (3, 4)),), policies={"0": "row"})


# The census -----------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each policy."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.std = Standardized(WIDTH, WIDTH, 1)
        self.act = nn.PReLU()
        self.scale = nn.Parameter(torch.ones(WIDTH, 1, 1))
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.fc.weight
        self.head = nn.Linear(WIDTH, 2)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x):
        x = pooled(self.act(self.std(self.bn(self.conv(x)))) * self.scale)
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.head(self.tied(self.fc(x - self.mean).relu() + self.shift))


@pytest.fixture(scope="module")
def everything():
    net, x = Everything(), torch.randn(2, 3, 6, 6)
    return net, x, hatify(net, 2, (x,))


def test_the_census_lists_every_parameter_and_buffer_once(everything):
    net, _, model = everything
    listed = [(e.name, e.kind, e.shape) for e in model.census]
    expected = [
        (name, kind, tuple(value.shape))
        for kind, named in (
            ("parameter", net.named_parameters(remove_duplicate=False)),
            ("buffer", net.named_buffers(remove_duplicate=False)),
        )
        for name, value in named
    ]
    assert sorted(listed) == sorted(expected)


def test_the_census_says_what_happens_to_each(everything):
    found = policies(everything[2])
    assert found == {
        "scale": "masked",
        "conv.weight": "shared",
        "conv.bias": "shared",
        "bn.weight": "norm",
        "bn.bias": "norm",
        "std.weight": "row",
        "std.bias": "row",
        "act.weight": "per_task",
        "fc.weight": "shared",
        "fc.bias": "shared",
        "tied.weight": "shared",
        "tied.bias": "shared",
        "head.weight": "head",
        "head.bias": "head",
        "unused.weight": "unused",
        "unused.bias": "unused",
        "shift": "constant",
        "mean": "per_task",
        "hidden": "unused",
        "bn.running_mean": "norm",
        "bn.running_var": "norm",
        "bn.num_batches_tracked": "norm",
    }


def test_every_policy_at_once_is_sound(everything):
    net, x = Everything(), everything[1]
    assert_sound(net, hatify(net, 2, (x,)), x)


def test_the_census_prints_as_a_table(everything):
    census = everything[2].census
    assert isinstance(census, Census)
    lines = str(census).splitlines()
    for entry in census:
        assert any(
            line.split()[:3] == [entry.name, entry.kind, str(entry.policy)] and line.endswith(entry.reason)
            for line in lines
        )
    assert lines[-1] == census.summary()


def test_the_summary_counts_elements(everything):
    census = everything[2].census
    counts = dict(part.split(": ") for part in census.summary().split(", "))
    for policy, count in counts.items():
        expected = sum(torch.Size(e.shape).numel() for e in census if str(e.policy) == policy)
        assert int(count.replace(",", "")) == expected


def test_the_reason_names_the_kind_of_module(everything):
    reasons = {e.name: e.reason for e in everything[2].census}
    assert "Conv2d" in reasons["conv.weight"]
    assert "Standardized" in reasons["std.weight"]
    assert "PReLU" in reasons["act.weight"]
    assert reasons["tied.weight"] == "the same tensor as fc.weight"
