"""Which features share a mask, and which each layer is found to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import hatify
from hatify import Policy
from hatify.classify import classify
from hatify.free import Free
from hatify.labels import FIRST_LEAF, ON, ZERO, LabelSpace
from hatify.ops import Findings
from hatify.support import SupportInterpreter, analyse, positional
from networks import Attention, ClassToken, PositionMixer, PreNorm, SqueezeExcite, image, tokens

DRAWS = 48


def signatures(model: hatify.HatModel) -> dict[str, list[tuple[bool, ...]]]:
    """For each masked layer or parameter and each feature: when it is on, over random embeddings.

    Two features with the same signature share a mask (or 48 coins fell alike).
    """
    drawn = []
    for _ in range(DRAWS):
        with torch.no_grad():
            model.task_state.embeddings[0].copy_(torch.randn(model.task_state.num_slots))
        drawn.append(model.masks(0))
    return {
        owner: [tuple(column) for column in torch.stack([masks[owner].reshape(-1) for masks in drawn], 1).tolist()]
        for owner in drawn[0]
    }


def converted(net: nn.Module, *inputs: Tensor, **options: Any) -> hatify.HatModel:
    return hatify.hatify(net, 1, inputs, **options)


def disjoint(a: list[tuple[bool, ...]], b: list[tuple[bool, ...]]) -> bool:
    return not set(a) & set(b)


def distinct(features: list[tuple[bool, ...]]) -> bool:
    return len(set(features)) == len(features)


# Features that meet --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + x)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), Block(6), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )


def test_a_residual_stream_has_one_mask() -> None:
    found = signatures(converted(resnet(), torch.randn(2, 3, 6, 6)))
    assert found["0"] == found["1.conv2"] == found["2.conv2"]
    assert disjoint(found["0"], found["1.conv1"])
    assert disjoint(found["0"], found["2.conv1"])
    assert disjoint(found["1.conv1"], found["2.conv1"])
    assert all(distinct(features) for features in found.values())


def test_without_coupling_every_layer_has_a_mask_of_its_own() -> None:
    found = signatures(converted(resnet(), torch.randn(2, 3, 6, 6), couple=False))
    layers = ["0", "1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    together = [feature for layer in layers for feature in found[layer]]
    assert distinct(together)


def test_a_projection_shortcut_shares_the_mask_of_the_sum() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shortcut, self.head = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.body(x) + self.shortcut(x)))

    found = signatures(converted(Projected(), torch.randn(2, 4)))
    assert found["body"] == found["shortcut"]
    assert distinct(found["body"])


def test_channels_of_zeros_are_coupled_to_nothing() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide, self.head = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.narrow(x)
            return self.head(F.pad(x, (0, 2)) + self.wide(F.relu(x)))

    found = signatures(converted(Padded(), torch.randn(2, 3)))
    assert found["wide"][:4] == found["narrow"]
    assert disjoint(found["wide"][4:], found["narrow"])
    assert distinct(found["wide"])


def test_a_gate_shares_the_mask_of_what_it_gates() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.gate, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.value(x) * torch.sigmoid(self.gate(x)))

    found = signatures(converted(Gated(), torch.randn(2, 4)))
    assert found["value"] == found["gate"]
    assert distinct(found["value"])


def test_halves_that_are_multiplied_are_coupled_pairwise() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.head = nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            value, gate = self.both(x).chunk(2, -1)
            return self.head(value * F.silu(gate))

    (features,) = (
        found for name, found in signatures(converted(Halves(), torch.randn(2, 4))).items() if name == "both"
    )
    assert features[:3] == features[3:]
    assert distinct(features[:3])


@pytest.mark.parametrize("convolutional", [True, False])
def test_squeeze_and_excitation_keeps_the_mask_of_its_channels(convolutional: bool) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), SqueezeExcite(image(6, 4, 4), convolutional), nn.Flatten(), nn.Linear(96, 2)
    )
    found = signatures(converted(net, torch.randn(2, 3, 4, 4)))
    assert found["0"] == found["1.expand"]
    assert disjoint(found["0"], found["1.reduce"])
    assert distinct(found["0"])


def test_a_class_token_and_position_embeddings_share_the_mask_of_the_patches() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6), ClassToken(tokens(5, 6), "parameter"), nn.Linear(6, 3), nn.Flatten(), nn.Linear(18, 2)
    )
    model = converted(net, torch.randn(2, 5, 4))
    found = signatures(model)
    assert found["0"] == found["1.token"] == found["1.position"]
    assert distinct(found["0"])
    assert disjoint(found["0"], found["2"])
    policies = {entry.name: entry.policy for entry in model.census}
    assert policies["1.token"] == policies["1.position"] == Policy.MASKED


def test_a_position_table_shares_the_mask_of_the_patches() -> None:
    net = nn.Sequential(
        nn.Linear(4, 6), ClassToken(tokens(5, 6), "table"), nn.Linear(6, 3), nn.Flatten(), nn.Linear(18, 2)
    )
    found = signatures(converted(net, torch.randn(2, 5, 4)))
    assert found["0"] == found["1.table"] == found["1.token"]
    assert distinct(found["0"])


def test_a_depthwise_convolution_keeps_the_mask_of_its_input() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1),
        nn.Conv2d(4, 8, 1, groups=4), nn.Flatten(), nn.Linear(72, 2),
    )  # fmt: skip
    found = signatures(converted(net, torch.randn(2, 3, 3, 3)))
    assert found["0"] == found["1"]
    assert disjoint(found["1"], found["3"])
    assert found["4"] == [feature for feature in found["3"] for _ in range(2)]
    assert distinct(found["0"]) and distinct(found["3"])


def test_a_grouped_convolution_has_a_mask_of_its_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Flatten(), nn.Linear(24, 2))
    found = signatures(converted(net, torch.randn(2, 3, 2, 2)))
    assert distinct([*found["0"], *found["1"]])


@pytest.mark.parametrize("how", ["sdpa", "matmul"])
@pytest.mark.parametrize("separate", [True, False])
def test_queries_and_keys_share_a_mask_and_values_have_their_own(how: str, separate: bool) -> None:
    signal = tokens(5, 6)
    attention = Attention(signal, heads=2, how=how, separate=separate, normed=False, biased=False)
    net = nn.Sequential(
        nn.Linear(4, 6), PreNorm(signal, attention, nn.LayerNorm(6), False), nn.Flatten(), nn.Linear(30, 2)
    )
    found = signatures(converted(net, torch.randn(2, 5, 4)))
    if separate:
        q, k, v = found["1.inner.query"], found["1.inner.key"], found["1.inner.value"]
    else:
        qkv = found["1.inner.qkv"]
        q, k, v = qkv[:6], qkv[6:12], qkv[12:]
    assert q == k
    assert distinct([*q, *v, *found["0"]])
    assert found["0"] == found["1.inner.proj"]


@pytest.mark.parametrize("as_tokens", [True, False])
def test_a_mixer_of_positions_leaves_the_channels_apart(as_tokens: bool) -> None:
    if as_tokens:
        net = nn.Sequential(
            nn.Linear(4, 6),
            PositionMixer(5, True),
            nn.Linear(6, 7),
            PositionMixer(5, True),
            nn.Flatten(),
            nn.Linear(35, 2),
        )
        found = signatures(converted(net, torch.randn(2, 5, 4)))
    else:
        net = nn.Sequential(
            nn.Conv2d(3, 6, 1), PositionMixer(4, False), nn.Conv2d(6, 7, 1), PositionMixer(4, False), nn.Flatten(), nn.Linear(28, 2)
        )  # fmt: skip
        found = signatures(converted(net, torch.randn(2, 3, 2, 2)))
    assert distinct([*found["0"], *found["2"]])


def test_a_layer_that_is_called_twice_reads_its_own_features_under_one_mask() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.again(torch.tanh(self.again(self.first(x)))))

    model = converted(Recurrent(), torch.randn(2, 4))
    assert len(model.uses["again.weight"]) == 2
    assert all(distinct(features) for features in signatures(model).values())


def test_a_concatenation_couples_nothing() -> None:
    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(torch.cat((self.b(x), self.a(x)), -1)))

    model = converted(Concatenated(), torch.randn(2, 4))
    found = signatures(model)
    assert distinct([*found["a"], *found["b"], *found["c"]])
    # What the third layer reads is, in this order, what the second and the first wrote.
    (use,) = model.uses["c.weight"]
    written = torch.cat((model.uses["b.weight"][0].written, model.uses["a.weight"][0].written)).reshape(-1)
    assert torch.equal(use.read.reshape(-1), written)


def test_a_scale_per_channel_is_masked_like_the_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 6, 1), nn.Parameter(torch.ones(6, 1, 1))
            self.shift = nn.Parameter(torch.zeros(1, 6, 1, 1))
            self.head = nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.scale * self.conv(x) + self.shift).flatten(1))

    model = converted(Scaled(), torch.randn(2, 3, 2, 2))
    found = signatures(model)
    assert found["conv"] == found["scale"] == found["shift"]
    policies = {entry.name: entry.policy for entry in model.census}
    assert policies["scale"] == policies["shift"] == Policy.MASKED


def test_a_parameter_without_features_is_copied_for_each_task() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.temperature, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(())), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.layer(x) * self.temperature))

    model = hatify.hatify(Tempered(), 3, torch.randn(2, 3))
    (entry,) = (entry for entry in model.census if entry.name == "temperature")
    assert entry.policy is Policy.PER_TASK
    assert {"temperature.0", "temperature.1", "temperature.2"} <= {name for name, _ in model.named_parameters()}


# What layers read ----------------------------------------------------------------------------------------------------


def reads(net: nn.Module, x: Tensor, couple: bool = True) -> tuple[dict[str, list[Tensor]], LabelSpace]:
    """The labels each weighted layer of `net` reads."""
    graph = fx.Tracer().trace(net)
    space, findings = analyse(net, (graph,), [(x,)], Free(), classify(net, (graph,), None, {}), couple)
    return findings.reads, space


def leaves(space: LabelSpace, owner: str) -> list[int]:
    first = space.features[owner].first
    return list(range(first, first + space.features[owner].count))


def test_inputs_are_always_on() -> None:
    found, _ = reads(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    assert found["0"][0].tolist() == [ON] * 3


def test_flattened_positions_keep_the_label_of_their_channel() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    found, space = reads(net, torch.randn(2, 3, 6, 6))
    assert found["5"][0].tolist() == [leaf for leaf in leaves(space, "0") for _ in range(4)]


def test_pixel_shuffle_moves_labels_with_their_channels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1))
    found, space = reads(net, torch.randn(2, 3, 4, 4))
    assert found["2"][0].tolist() == [leaf for leaf in leaves(space, "0") for _ in range(4)]
    back = nn.Sequential(nn.Conv2d(3, 20, 1), nn.PixelShuffle(2), nn.Conv2d(5, 2, 1))
    found, space = reads(back, torch.randn(2, 3, 4, 4))
    # Four channels come to lie at four positions of one: they are read by one input and so coupled.
    roots = space.classes().of(torch.tensor(leaves(space, "0"))).view(5, 4)
    assert (roots == roots[:, :1]).all()
    assert roots.unique().numel() == 5


def test_channels_are_not_coupled_for_a_layer_that_reads_few_of_many() -> None:
    found, space = reads(
        nn.Sequential(nn.Conv2d(3, 48, 1), nn.PixelShuffle(4), nn.Conv2d(3, 2, 1)), torch.randn(2, 3, 4, 4)
    )
    assert found["2"][0].tolist() == [ON, ON, ON]
    assert space.classes().of(torch.tensor(leaves(space, "0"))).unique().numel() == 48


def test_layers_that_only_weigh_heads_have_a_copy_per_task() -> None:
    class TalkingHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.before, self.after = nn.Linear(6, 24), nn.Linear(4, 4), nn.Linear(4, 4)
            self.proj = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4).unbind(0)
            logits = self.before((q @ k.transpose(-1, -2)).permute(0, 2, 3, 1))
            weights = self.after(logits.permute(0, 3, 1, 2).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))

    def policies(**options: Any) -> dict[str, str]:
        census = converted(TalkingHeads(), torch.randn(2, 5, 6), **options).census
        return {e.name.split(".")[0]: str(e.policy) for e in census if e.name.endswith(".weight")}

    assert policies() == {"qkv": "shared", "before": "per_task", "after": "per_task", "proj": "head"}
    assert policies(policies={"before": "shared"})["before"] == "shared"


def test_a_class_token_is_coupled_with_the_patches_at_a_normalisation() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(4, 6), nn.Linear(4, 6)
            self.norm, self.mlp = nn.LayerNorm(6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(torch.cat((self.first(x[:, :1]), self.rest(x[:, 1:])), 1))).relu()

    found, space = reads(Tokens(), torch.randn(2, 3, 4))
    classes = space.classes()
    first, rest = (classes.of(torch.tensor(leaves(space, name))).tolist() for name in ("first", "rest"))
    assert first == rest == classes.of(found["mlp"][0]).tolist()


def test_zero_channels_are_read_as_zero() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(F.pad(self.a(x), (1, 1))))

    found, space = reads(Padded(), torch.randn(2, 3))
    assert found["b"][0].tolist() == [ZERO, *leaves(space, "a"), ZERO]


def test_an_operation_that_does_not_keep_zero_is_masked_again() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(x)))

    found, space = reads(Bounded(), torch.randn(2, 3))
    assert found["b"][0].tolist() == leaves(space, "a")


def test_a_functional_layer_masks_its_bias_once() -> None:
    model = converted(nn.Linear(5, 3), torch.randn(2, 5), heads=None)
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.tensor([0.5, -0.5, 0.0]))
    model.mask_scale = 2.0
    expected = torch.sigmoid(2 * model.task_state.embeddings[0]) * model.bias
    torch.testing.assert_close(model(torch.zeros(1, 5))[0], expected)


def test_a_condition_gets_no_mask() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x.masked_fill(x < 0, 0.0) / x)

    model = hatify.hatify(Filled(), 2, (torch.randn(2, 4),))
    condition = next(node for node in model.graph.nodes if node.name == "lt")
    assert [user.target for user in condition.users] == ["masked_fill"]
    model.begin_task(0)
    model(torch.randn(2, 4)).sum().backward()


def test_without_coupling_a_sum_is_read_as_a_set() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    found, space = reads(Sum(), torch.randn(2, 3), couple=False)
    members = [space.members(label) for label in found["c"][0].tolist()]
    assert members == [frozenset(pair) for pair in zip(leaves(space, "a"), leaves(space, "b"), strict=True)]


def test_what_is_not_understood_is_on() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sort(self.a(x), dim=-1)[0])

    found, _ = reads(Sorted(), torch.randn(2, 3))
    assert found["b"][0].tolist() == [ON] * 4


def test_softmax_over_features_is_on() -> None:
    found, _ = reads(nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)), torch.randn(2, 3))
    assert found["2"][0].tolist() == [ON] * 4


# The analysis itself -------------------------------------------------------------------------------------------------


def test_the_example_of_the_interpreter_holds() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    graph = fx.Tracer().trace(net)
    space, findings = LabelSpace(couple=True), Findings()
    SupportInterpreter(net, graph, classify(net, (graph,), "auto", {}), space, findings).run(torch.randn(2, 4))
    found = [(node.name, masked.labels.tolist()) for node, (masked,) in findings.asked.items()]
    assert found == [("_0", [FIRST_LEAF, FIRST_LEAF + 1, FIRST_LEAF + 2])]


def test_the_analysis_leaves_buffers_modes_and_the_random_state_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.head(F.dropout(self.norm(self.layer(x)), 0.5, self.training))

    net = Counting().train()
    net.head.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    hatify.hatify(net, 2, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), heads=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and net.norm.training and not net.head.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_labels_of_a_layers_output_cost_one_number_per_channel() -> None:
    sizes = []

    class Measured(SupportInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            labels = self.labels.get(n)
            if isinstance(labels, Tensor):
                sizes.append((labels.shape, labels.untyped_storage().nbytes() // labels.element_size()))
            return value

    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.ReLU()
    )
    graph = fx.Tracer().trace(net)
    Measured(net, graph, classify(net, (graph,), None, {}), LabelSpace(True), Findings()).run(torch.randn(2, 3, 32, 32))
    assert len(sizes) >= 6
    assert all(stored <= 8 for _, stored in sizes)


def test_inputs_are_put_in_the_order_of_the_graph() -> None:
    class Several(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: float = 2.0) -> Tensor:
            return a - b * c

    graph = fx.Tracer().trace(Several())
    one, two = torch.ones(1), torch.zeros(1)
    assert positional(graph, (one, two)) == (one, two, 2.0)
    assert positional(graph, {"b": two, "a": one}) == (one, two, 2.0)
