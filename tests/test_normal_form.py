"""A layer called as a module and the same layer written as a function come out as the same: masks, locks, policies."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from hatify import ConversionError
from oracles import answers, broken_promises, dependencies, leaks, locks, no_repairs, same_bits
from test_tightness import assert_tight, batches, convert, finish

# Layers written as functions, with the parameters of the modules -----------------------------------------------------


class Written(nn.Module):
    """Weight and bias of a layer; `transposed`: the weight is stored the other way round."""

    transposed = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.settings = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        weight = layer.weight.detach().clone()
        self.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight)
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())


class Linear(Written):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Cast(Written):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Keywords(Written):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.weight, bias=self.bias)


class Turned(Written):
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class TurnedByAttribute(Written):
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class TurnedByPermuting(Written):
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.unsqueeze(0).permute(0, 2, 1).squeeze(0), self.bias)


class Conv1D(Written):
    """Hugging Face's, whose weight has the shape (in, out)."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Product(Written):
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ProductTurned(Written):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight.transpose(0, 1))


class FromTheLeft(Written):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.transpose(-1, -2)).transpose(-1, -2)


class Einsum(Written):
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.weight)


class EinsumLeft(Written):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oi,bti->bto", self.weight, x)


class Kernel(Written):
    """A convolution with a kernel of one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.transpose(1, 2), self.weight[:, :, None], self.bias).transpose(1, 2)


class Conv(Written):
    def forward(self, x: Tensor) -> Tensor:
        s = self.settings
        if s["transposed"]:
            function = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[len(s["kernel_size"])]
            return function(
                x, self.weight, self.bias, s["stride"], s["padding"], s["output_padding"], s["groups"], s["dilation"]
            )
        function = {1: F.conv1d, 2: F.conv2d}[len(s["kernel_size"])]
        return function(x, self.weight, self.bias, s["stride"], s["padding"], s["dilation"], s["groups"])


class Embedding(Written):
    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight)


class Norm(nn.Module):
    """The parameters and buffers of a normalisation."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps, self.groups = norm.eps, getattr(norm, "num_groups", None)
        self.shape = getattr(norm, "normalized_shape", None)
        self.weight = None if norm.weight is None else nn.Parameter(norm.weight.detach().clone())
        bias = getattr(norm, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        for name in ("running_mean", "running_var"):
            value = getattr(norm, name, None)
            self.register_buffer(name, None if value is None else value.clone())


class LayerNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class LayerNormOfWeight(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.weight.shape, weight=self.weight, bias=self.bias)


class RMSNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class GroupNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class BatchNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class InstanceNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, None, None, self.weight, self.bias, eps=self.eps)


# Networks ------------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """(N, L, 8) → (N, L, 3)."""

    def __init__(self, write: Callable[[nn.Module], nn.Module], bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = write(nn.Linear(8, 12, bias)), write(nn.Linear(12, 10, bias))
        self.head = write(nn.Linear(10, 3, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Images(nn.Module):
    """(N, 4, 3, 3) → (N, 3), with grouped, depthwise and transposed convolutions."""

    def __init__(self, write: Callable[[nn.Module], nn.Module], depthwise: bool = True) -> None:
        super().__init__()
        self.first = write(nn.Conv2d(4, 8, 3, padding=1))
        self.grouped = write(nn.Conv2d(8, 12, 3, padding=1, groups=2))
        self.depthwise = write(nn.Conv2d(12, 12, 3, padding=1, groups=12)) if depthwise else nn.Identity()
        self.upwards = write(nn.ConvTranspose2d(12, 8, 3, stride=2))
        self.each = write(nn.ConvTranspose2d(8, 6, 3, groups=2, bias=False))
        self.head = write(nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.tanh(self.grouped(torch.tanh(self.first(x))))))
        return self.head(torch.tanh(self.each(torch.tanh(self.upwards(x))))).mean((2, 3))


class Normed(nn.Module):
    """(N, L, 8) → (N, L, 3); a norm over features of two layers, which are added."""

    def __init__(self, norm: nn.Module, channels_first: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.norm, self.channels_first = norm, channels_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(torch.tanh(x))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else self.norm(x)
        return self.head(torch.tanh(x))


class GPT(nn.Module):
    """GPT-2's forms: positions, Conv1D with a split result, a hand-written activation, tied embeddings."""

    def __init__(self, as_functions: bool) -> None:
        super().__init__()
        layer, norm = (Conv1D, LayerNorm) if as_functions else (lambda x: x, lambda x: x)
        look_up = Embedding if as_functions else (lambda x: x)
        self.wte, self.wpe = look_up(nn.Embedding(13, 8)), look_up(nn.Embedding(6, 8))
        self.ln_1, self.ln_2, self.ln_f = norm(nn.LayerNorm(8)), norm(nn.LayerNorm(8)), norm(nn.LayerNorm(8))
        self.c_attn, self.c_proj = layer(nn.Linear(8, 24)), layer(nn.Linear(8, 8))
        self.c_fc, self.mlp_proj = layer(nn.Linear(8, 16)), layer(nn.Linear(16, 8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        q, k, v = (
            t.view(t.shape[0], t.shape[1], 2, 4).transpose(1, 2) for t in self.c_attn(self.ln_1(x)).split(8, dim=2)
        )
        weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2, -1)
        y = torch.matmul(weights, v).transpose(1, 2).contiguous()
        x = x + self.c_proj(y.view(y.shape[0], y.shape[1], 8))
        h = self.c_fc(self.ln_2(x))
        x = x + self.mlp_proj(0.5 * h * (1 + torch.tanh(h + 0.044715 * torch.pow(h, 3.0))))
        return F.linear(self.ln_f(x), self.wte.weight)


# Pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The same network with modules and with functions; `exact`: to the bit after training, too."""

    modules: Callable[[], nn.Module]
    functions: Callable[[], nn.Module]
    shape: tuple[int, ...]
    exact: bool = True


def unchanged(layer: nn.Module) -> nn.Module:
    return layer


def tokens(write: type[Written], bias: bool = True, exact: bool = False) -> Pair:
    return Pair(lambda: Tokens(unchanged, bias), lambda: Tokens(write, bias), (5, 8), exact)


def normed(make: Callable[[], nn.Module], write: type[Norm], channels_first: bool = False, exact: bool = True) -> Pair:
    return Pair(lambda: Normed(make(), channels_first), lambda: Normed(write(make()), channels_first), (5, 8), exact)


PAIRS = {
    "linear": tokens(Linear, exact=True),
    "linear, cast": tokens(Cast, exact=True),
    "linear, by name": tokens(Keywords, exact=True),
    "linear of t()": tokens(Turned),
    "linear of T": tokens(TurnedByAttribute),
    "linear of permute": tokens(TurnedByPermuting),
    "addmm": tokens(Conv1D),
    "product": tokens(Product, bias=False),
    "product with a transposed weight": tokens(ProductTurned, bias=False),
    "product from the left": tokens(FromTheLeft, bias=False),
    "einsum": tokens(Einsum, bias=False),
    "einsum from the left": tokens(EinsumLeft, bias=False),
    "kernel of one": tokens(Kernel),
    "convolutions": Pair(lambda: Images(unchanged), lambda: Images(Conv), (4, 3, 3), exact=False),
    "layer norm": normed(lambda: nn.LayerNorm(12), LayerNorm),
    "layer norm, torch's": normed(lambda: nn.LayerNorm(12), LayerNormOfWeight),
    "layer norm without parameters": normed(lambda: nn.LayerNorm(12, elementwise_affine=False), LayerNorm),
    "RMS norm": normed(lambda: nn.RMSNorm(12), RMSNorm),
    "group norm": normed(lambda: nn.GroupNorm(3, 12), GroupNorm, channels_first=True),
    "batch norm": normed(lambda: nn.BatchNorm1d(12), BatchNorm, channels_first=True),
    "instance norm": normed(lambda: nn.InstanceNorm1d(12, affine=True), InstanceNorm, channels_first=True),
}


def twins(pair: Pair, **options: Any) -> tuple[hatify.HatModel, hatify.HatModel]:
    """The network of a pair converted with modules and with functions, with the same weights."""
    models = []
    for make in (pair.modules, pair.functions):
        torch.manual_seed(0)
        net = make()
        x = torch.randn(2, *pair.shape)
        with no_repairs():
            models.append(hatify.hatify(net, 3, (x,), **options))
        assert torch.allclose(net.eval()(x), models[-1].eval()(x), atol=1e-6)
    return models[0], models[1]


def learn(model: hatify.HatModel, task: int, shape: tuple[int, ...], steps: int = 1) -> None:
    """Steps of AdamW with weight decay, with two thirds of the features on."""
    torch.manual_seed(task)
    with no_repairs():
        model.begin_task(task)
        on = torch.arange(model.task_state.num_slots) % 3 != task
        with torch.no_grad():
            model.task_state.embeddings[task].copy_(torch.where(on, 2.0, -2.0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, *shape)).square().mean().backward()
            optimizer.step()
        model.end_task()


@pytest.mark.parametrize("name", PAIRS)
def test_both_forms_have_the_same_masks_policies_and_locks(name: str) -> None:
    pair = PAIRS[name]
    by_module, by_function = twins(pair)
    assert list(by_module.plan.layout.groups.values()) == list(by_function.plan.layout.groups.values())
    counted = "num_batches_tracked"
    policies = [
        {e.name: e.policy for e in model.census if not e.name.endswith(counted)} for model in (by_module, by_function)
    ]
    assert policies[0] == policies[1]
    for task in range(2):
        for model in (by_module, by_function):
            learn(model, task, pair.shape)
        first, second = (model.masks(task) for model in (by_module, by_function))
        assert len(first) == len(second)
        assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
        assert list(second) == [f"{owner}.weight" if owner != "norm" else owner for owner in first] or "norm" in name
    assert set(by_module.uses) == set(by_function.uses)
    for task in range(2):
        first, second = (locks(model, task) for model in (by_module, by_function))
        for parameter in by_module.uses:
            expected, found = first[parameter], second[parameter]
            if expected.shape != found.shape or "einsum" in name or "product" in name or " of " in name:
                expected = expected.t() if torch.equal(expected.t(), found) else expected
            assert torch.equal(expected, found), parameter


@pytest.mark.parametrize("name", PAIRS)
def test_both_forms_answer_alike(name: str) -> None:
    pair = PAIRS[name]
    by_module, by_function = twins(pair)
    x = torch.randn(3, *pair.shape)
    for model in (by_module, by_function):
        learn(model, 0, pair.shape)
    (a,), (b,) = answers(by_module, 0, (x,)), answers(by_function, 0, (x,))
    if pair.exact:
        assert torch.equal(a, b)
    else:  # other kernels, or masks in other places while they are soft
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_what_is_written_as_functions_never_forgets(name: str) -> None:
    pair = PAIRS[name]
    _, model = twins(pair)
    x = torch.randn(3, *pair.shape)
    learn(model, 0, pair.shape, 2)
    before = answers(model, 0, (x,))
    for task in (1, 2):
        learn(model, task, pair.shape, 3)
        assert same_bits(answers(model, 0, (x,)), before)
    hatify.verify_isolation(model)
    assert leaks(model, 0, [(x,)]) == []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PAIRS)
def test_what_is_written_as_functions_locks_exactly_what_it_depends_on(name: str, seed: int) -> None:
    pair = PAIRS[name]
    torch.manual_seed(seed)
    model = convert(pair.functions(), *pair.shape)
    source = random.Random(seed)
    for task in range(2):
        finish(model, task, source, 6 if name == "group norm" else 2)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(*pair.shape)))


def test_the_forms_of_gpt_2_are_those_of_modules() -> None:
    models = []
    for as_functions in (False, True):
        torch.manual_seed(0)
        with no_repairs():
            models.append(hatify.hatify(GPT(as_functions), 3, (torch.randint(13, (2, 5)),)))
    by_module, by_function = models
    assert list(by_module.plan.layout.groups.values()) == list(by_function.plan.layout.groups.values())
    assert {e.name: e.policy for e in by_module.census} == {e.name: e.policy for e in by_function.census}
    assert {e.name: str(e.policy) for e in by_function.census}["wte.weight"] == "shared"
    for name, uses in by_module.uses.items():
        for one, other in zip(uses, by_function.uses[name], strict=True):
            turned = name.startswith("c_") or name.startswith("mlp")
            written = other.written.transpose(0, 1) if turned and other.written.ndim == 3 else other.written
            assert torch.equal(one.written, written), name
    source = random.Random(0)
    assert broken_promises(by_function, lambda n, seed: (ids(n, seed),), source) == []
    hatify.verify_isolation(by_function)


def ids(n: int, seed: int) -> Tensor:
    return torch.randint(13, (n, 5), generator=torch.Generator().manual_seed(seed))


# Several dimensions of features --------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention with one matrix for each head, by Einstein's convention, and a product with a batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 6)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(6, 2, 4)) for _ in range(3))
        self.mix, self.out = nn.Parameter(torch.randn(2, 4, 5)), nn.Parameter(torch.randn(2, 5, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = (torch.einsum("bti,ihd->bhtd", x, w) for w in (self.query, self.key, self.value))
        y = torch.tanh(F.scaled_dot_product_attention(q, k, v) @ self.mix)
        return self.head(x + torch.einsum("bhtd,hdo->bto", y, self.out))


class Experts(nn.Module):
    """(N, L, 3) → (N, L, 2), through four experts by a product of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 3, 6)), nn.Parameter(torch.randn(4, 6, 5))
        self.bias, self.head = nn.Parameter(torch.randn(4, 1, 6)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(1, -1, 3).expand(4, -1, -1)
        y = torch.bmm(torch.tanh(torch.baddbmm(self.bias, flat, self.up)), self.down)
        return self.head(torch.tanh(y.sum(0))).view(x.shape[0], x.shape[1], 2)


class EachHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.head = nn.Linear(3, 8), nn.Parameter(torch.randn(2, 4, 5)), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bthi,hio->btho", torch.tanh(self.stem(x)).unflatten(-1, (2, 4)), self.weight)
        return self.head(torch.tanh(y).flatten(-2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [Heads, Experts, EachHead])
def test_features_along_several_dimensions_are_locked_exactly(make: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    model = convert(make(), 4, 3)
    source = random.Random(seed)
    for task in range(2):
        finish(model, task, source, 2)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(4, 3)))
        assert leaks(model, task, batches(4, 3)) == []
    shared = {e.name for e in model.census if str(e.policy) == "shared"}
    assert {name for name, p in make().named_parameters() if p.ndim == 3} <= shared


# Transposed twice, tied, and read otherwise --------------------------------------------------------------------------


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.head = nn.Linear(3, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.tanh(F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())))


class AlsoAdded(nn.Module):
    """A row of a layer's weight, and its bias, are added elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
        self.other, self.last, self.head = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.weight, self.bias)) + self.bias
        y = torch.tanh(y) + self.last[0]
        return self.head(torch.tanh(F.linear(y, self.last)) + torch.tanh(self.other(y)))


class BiasOfItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.head = nn.Linear(3, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.tanh(self.stem(x)), self.weight, self.weight[0])))


class Queries(nn.Module):
    """Learned queries, whose scores only weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.head = nn.Linear(3, 6), nn.Linear(3, 5), nn.Linear(5, 2)
        self.queries = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.queries @ self.key(x).transpose(-1, -2)).softmax(-1)
        return self.head(torch.tanh(weights @ self.value(x)))


class ResidualSum(nn.Module):
    """An activation in the bias's place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.head = nn.Linear(3, 6), nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x)).view(-1, 6)
        return self.head(torch.tanh(torch.addmm(y, y, self.weight)).view(x.shape[0], -1, 6))


class Vector(nn.Module):
    """One sample at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6, 6))
        self.bias, self.third, self.head = (
            nn.Parameter(torch.randn(6)),
            nn.Parameter(torch.randn(5, 6)),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(torch.mv(self.first, x[0, 0]))
        y = torch.tanh(torch.addmv(self.bias, self.second, y))
        return self.head(torch.tanh(self.third @ y)) + 0 * x.sum()


class Spread(nn.Module):
    """Einstein's convention spreads dimensions of size 1, of a weight and of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(10, 2)
        self.summing, self.each = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(2, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        first = torch.einsum("bti,io->bto", y, self.summing)
        second = torch.einsum("bthi,hio->btho", y.unsqueeze(-2), self.each).sum(-2)
        return self.head(torch.tanh(torch.cat((first, second), -1)))


class TiedWithBias(nn.Module):
    """An output that shares its weight with the input, and has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.inner = (
            nn.Parameter(torch.randn(6, 3)),
            nn.Parameter(torch.randn(3)),
            nn.Linear(6, 6),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.inner(torch.tanh(F.linear(x, self.weight)))), self.weight.t(), self.bias)


class OneOutput(nn.Module):
    """A weight without rows, and one whose dtype alone is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.row, self.head = nn.Linear(3, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 2)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(torch.tanh(self.stem(x)).type_as(self.weight), self.weight.mT)
        return self.head(torch.tanh(y)) * F.linear(torch.tanh(y), self.row).unsqueeze(-1)


class SharedBiases(nn.Module):
    """Two outputs whose biases are those of other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.bias = (
            nn.Linear(3, 6),
            nn.Parameter(torch.randn(6, 6)),
            nn.Parameter(torch.randn(6)),
        )
        self.first, self.second = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(torch.tanh(self.stem(x)), self.weight, self.bias))
        return F.linear(y, self.first, self.bias) + F.linear(y, self.second, self.stem.bias)


class ScaledNorm(nn.Module):
    """A norm whose weight is computed, and one whose weight follows from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.weight, self.gain = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(self.stem(x), (6,), self.weight * self.gain, self.gain)
        return self.head(torch.tanh(F.rms_norm(y, (6,), 1 + torch.tanh(self.scale(x.mean((0, 1)))))))


OTHERS = [
    ScaledNorm,
    SharedBiases,
    OneOutput,
    Spread,
    TiedWithBias,
    Tied,
    AlsoAdded,
    BiasOfItself,
    Queries,
    ResidualSum,
    Vector,
    Heads,
    Experts,
    EachHead,
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("couple", [True, False])
def test_other_ways_of_using_a_weight_never_leak(make: Callable[[], nn.Module], couple: bool, seed: int) -> None:
    torch.manual_seed(seed)
    with no_repairs():
        model = hatify.hatify(make(), 3, (torch.randn(2, 4, 3),), couple=couple)

    def inputs(n: int, seed: int) -> tuple[Tensor]:
        return (torch.randn(n, 4, 3, generator=torch.Generator().manual_seed(seed)),)

    assert broken_promises(model, inputs, random.Random(seed)) == []
    for task in model.finished_tasks:
        assert leaks(model, task, [inputs(2, 7)]) == []
        plain = hatify.extract_task(model, task)
        torch.testing.assert_close(plain(*inputs(3, 7)), answers(model, task, inputs(3, 7))[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_that_is_also_transposed_is_locked_for_both_ways(seed: int) -> None:
    torch.manual_seed(seed)
    model = convert(Tied(), 3)
    assert {"weight", "weight#2"} <= set(model.masks(0))
    source = random.Random(seed)
    for task in range(2):
        finish(model, task, source)
    for task in range(2):
        assert_tight(model, task, dependencies(model, task, batches(3)))


def test_a_tied_output_is_shared_and_its_bias_is_each_tasks_own() -> None:
    model = hatify.hatify(TiedWithBias(), 2, (torch.randn(2, 4, 3),))
    policies = {e.name: str(e.policy) for e in model.census}
    assert policies["weight"] == "shared" and policies["bias"] == "head" and "bias" not in model.uses


def test_scores_of_learned_queries_get_no_masks() -> None:
    model = hatify.hatify(Queries(), 2, (torch.randn(2, 4, 3),))
    assert list(model.masks(0)) == ["key", "value", "queries"]
    assert {e.name: str(e.policy) for e in model.census}["queries"] == "masked"


def test_the_weight_of_an_embedding_that_rescales_is_no_layer() -> None:
    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.embedding(ids, self.weight, max_norm=1.0))

    with pytest.raises(ConversionError, match="writes to this parameter in place"):
        hatify.hatify(Rescaled(), 2, (torch.randint(5, (2, 3)),))


# At random -----------------------------------------------------------------------------------------------------------

W = 6  # features
#: What a step may do with x (N, L, W), a matrix, a vector, and the network's other parameters.
STEPS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda net, x, w, b: F.linear(x, w, b),
    "transposed": lambda net, x, w, b: F.linear(x, w.t()),
    "addmm": lambda net, x, w, b: torch.addmm(b, x.reshape(-1, W), w).view(x.shape),
    "product": lambda net, x, w, b: x @ w,
    "einsum": lambda net, x, w, b: torch.einsum("bti,io->bto", x, w),
    "left": lambda net, x, w, b: (w @ x.transpose(1, 2)).transpose(1, 2),
    "heads": lambda net, x, w, b: torch.einsum("bthi,hio->btho", x.unflatten(-1, (2, 3)), net.heads).flatten(-2),
    "batch": lambda net, x, w, b: (x.unflatten(-1, (2, 3)).transpose(1, 2) @ net.heads).transpose(1, 2).flatten(-2),
    "table": lambda net, x, w, b: x + F.embedding(torch.arange(x.shape[1]) % W, w),
    "row": lambda net, x, w, b: x + w[0],
    "scale": lambda net, x, w, b: x * b,
    "module": lambda net, x, w, b: net.layer(x),
    "module's weight": lambda net, x, w, b: F.linear(x, net.layer.weight, net.layer.bias),
    "module's weight, transposed": lambda net, x, w, b: F.linear(x, net.layer.weight.t(), b),
    "grouped": lambda net, x, w, b: F.conv1d(x.transpose(1, 2), net.grouped, b, groups=2).transpose(1, 2),
    "depthwise": lambda net, x, w, b: F.conv1d(x.transpose(1, 2), net.each, b, 1, 1, 1, W).transpose(1, 2),
    "upwards": lambda net, x, w, b: F.conv_transpose1d(x.transpose(1, 2), net.grouped, b, groups=2).transpose(1, 2),
    "layer norm": lambda net, x, w, b: F.layer_norm(x, (W,), b),
    "RMS norm": lambda net, x, w, b: F.rms_norm(x, (W,), b),
    "group norm": lambda net, x, w, b: F.group_norm(x.transpose(1, 2), 2, b).transpose(1, 2),
    "batch norm": lambda net, x, w, b: F.batch_norm(
        x.transpose(1, 2), net.mean, net.variance, b, None, net.training
    ).transpose(1, 2),
}


class AtRandom(nn.Module):
    """Steps that share few parameters, so that each is used in several ways."""

    mean: Tensor
    variance: Tensor

    def __init__(self, source: random.Random) -> None:
        super().__init__()
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(W, W) / 2) for _ in range(source.choice((1, 2)))])
        self.vectors = nn.ParameterList([nn.Parameter(torch.randn(W) / 2) for _ in range(2)])
        self.heads, self.grouped = nn.Parameter(torch.randn(2, 3, 3) / 2), nn.Parameter(torch.randn(W, 3, 1))
        self.each, self.stem, self.layer = nn.Parameter(torch.randn(W, 1, 3)), nn.Linear(3, W), nn.Linear(W, W)
        self.register_buffer("mean", torch.zeros(W))
        self.register_buffer("variance", torch.ones(W))
        self.steps = [
            (
                source.choice(tuple(STEPS)),
                source.randrange(len(self.matrices)),
                source.randrange(2),
                source.random() < 0.5,
            )
            for _ in range(source.choice((3, 4, 5)))
        ]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, matrix, vector, residual in self.steps:
            y = STEPS[kind](self, x, self.matrices[matrix], self.vectors[vector])
            x = x + torch.tanh(y) if residual and y.shape == x.shape else y
        return x


@pytest.mark.parametrize("seed", range(24))
def test_parameters_used_in_several_ways_never_leak(seed: int) -> None:
    source = random.Random(seed)
    torch.manual_seed(seed)
    # As many positions as features, so that products from the left fit, too.
    net, x = AtRandom(source), torch.randn(2, W, 3)
    with no_repairs():
        model = hatify.hatify(net, 2, (x,), couple=source.random() < 0.7)
    torch.testing.assert_close(model.eval()(x), net.eval()(x), rtol=1e-3, atol=1e-4)

    def inputs(n: int, seed: int) -> tuple[Tensor]:
        return (torch.randn(n, W, 3, generator=torch.Generator().manual_seed(seed)),)

    assert broken_promises(model, inputs, source, smallest_batch=2) == [], net.steps
    for task in model.finished_tasks:
        assert leaks(model, task, [inputs(3, 9)]) == [], net.steps


# Heads ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [Linear, Turned, Conv1D])
def test_a_head_written_as_a_function_is_one_per_task(write: type[Written]) -> None:
    with no_repairs():
        model = hatify.hatify(Tokens(write), 2, (torch.randn(2, 5, 8),))
    policies = {e.name: str(e.policy) for e in model.census}
    assert policies["head.weight"] == policies["head.bias"] == "head"
    assert {"head.weight.0", "head.weight.1", "head.bias.0"} <= {name for name, _ in model.named_parameters()}
    learn(model, 0, (5, 8))
    model.add_tasks(1)
    assert model.get_parameter("head.weight.2").shape == model.get_parameter("head.weight.0").shape
    with pytest.raises(ConversionError, match=r"head\.weight.*num_classes.*written as a function.*module"):
        hatify.hatify(Tokens(write), 2, (torch.randn(2, 5, 8),), num_classes=4)


def test_a_head_written_as_a_function_can_be_named_or_shared() -> None:
    x = torch.randn(2, 5, 8)
    named = hatify.hatify(Tokens(Linear), 2, (x,), heads="head.weight")
    assert {e.name: str(e.policy) for e in named.census}["head.weight"] == "head"
    shared = hatify.hatify(Tokens(Linear), 2, (x,), heads=None)
    assert {e.name: str(e.policy) for e in shared.census}["head.weight"] == "shared"
    with pytest.raises(ConversionError, match=r"no module 'tail\.weight'"):
        hatify.hatify(Tokens(Linear), 2, (x,), heads="tail.weight")


# Saved, extracted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["addmm", "convolutions", "layer norm, torch's", "batch norm", "group norm", "RMS norm"]
)
def test_what_is_written_as_functions_is_saved_and_extracted(name: str, tmp_path: Any) -> None:
    pair = PAIRS[name]
    _, model = twins(pair)
    for task in range(2):
        learn(model, task, pair.shape)
    x = torch.randn(3, *pair.shape)
    hatify.save(model, tmp_path / "saved")
    again = hatify.load(tmp_path / "saved", pair.functions())
    assert again.plan.to_data()[0] == model.plan.to_data()[0]
    for task in range(2):
        assert same_bits(answers(model, task, (x,)), answers(again, task, (x,)))
        plain = hatify.extract_task(model, task)
        torch.testing.assert_close(plain(x), answers(model, task, (x,))[0], rtol=1e-4, atol=1e-5)


def test_weights_of_the_original_are_loaded_onto_functions_too() -> None:
    net = PAIRS["layer norm"].functions()
    model = hatify.hatify(PAIRS["layer norm"].functions(), 2, (torch.randn(2, 5, 8),))
    hatify.load_plain_state_dict(model, net.state_dict())
    x = torch.randn(3, 5, 8)
    assert torch.equal(model.eval()(x), hatify.hatify(net, 2, (x,)).eval()(x))


def test_asking_for_a_size_does_not_move_running_statistics() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(3, 6), BatchNorm(nn.BatchNorm1d(6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.stem(x))
            return self.head(y + x if y.shape == x.shape else y)

    net, x = Asking().train(), torch.randn(4, 3)
    model = hatify.hatify(net, 2, (x,))
    assert torch.equal(model.eval()(x), net.eval()(x))


class NormAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 12), nn.Linear(12, 2)
        self.weight, self.bias = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.stem(x), (12,), self.weight, self.bias))


def test_statistics_of_a_functional_norm_are_those_of_the_active_features() -> None:
    torch.manual_seed(0)
    net = NormAlone().double()
    x = torch.randn(4, 3).double()
    model = hatify.hatify(net, 2, (x,))
    finish(model, 0, random.Random(0))
    on = model.masks(0)["stem"]
    assert 2 <= int(on.sum()) < 12
    normal = F.layer_norm(net.stem(x)[:, on], (int(on.sum()),), net.weight[on], net.bias[on])
    expected = F.linear(normal, net.head.weight[:, on], net.head.bias)
    torch.testing.assert_close(answers(model, 0, (x,))[0], expected)
    assert [str(model.census[i].policy) for i in range(len(model.census)) if model.census[i].name == "weight"] == [
        "norm"
    ]
