"""Mask-carrying layers against their originals, and what their entries connect against one perturbation at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hatify.nn.layers import LAYERS, HatLayer, family_of

Make = Callable[[], nn.Module]

LINEAR = {
    "Linear": lambda: nn.Linear(5, 4),
    "Linear without bias": lambda: nn.Linear(5, 4, bias=False),
}
CONVOLUTIONS = {
    "Conv1d": lambda: nn.Conv1d(3, 4, 2),
    "Conv1d dilated, strided": lambda: nn.Conv1d(2, 3, 3, stride=2, dilation=2, padding=2),
    "Conv1d grouped": lambda: nn.Conv1d(4, 6, 2, groups=2),
    "Conv2d": lambda: nn.Conv2d(3, 4, (2, 3), padding=1),
    "Conv2d without bias": lambda: nn.Conv2d(2, 3, 2, bias=False),
    "Conv2d circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "Conv2d reflected": lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"),
    "Conv2d grouped": lambda: nn.Conv2d(6, 4, 2, groups=2),
    "Conv2d depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "Conv2d depthwise, multiplied": lambda: nn.Conv2d(3, 6, 2, groups=3),
    "Conv3d": lambda: nn.Conv3d(2, 3, 2),
    "Conv3d grouped": lambda: nn.Conv3d(4, 4, (1, 2, 1), groups=2),
}
TRANSPOSED = {
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(3, 4, 2),
    "ConvTranspose1d grouped": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 2, stride=2, padding=1, output_padding=1),
    "ConvTranspose2d without bias": lambda: nn.ConvTranspose2d(3, 2, 2, bias=False),
    "ConvTranspose2d grouped": lambda: nn.ConvTranspose2d(6, 4, 2, groups=2),
    "ConvTranspose2d depthwise": lambda: nn.ConvTranspose2d(4, 4, 2, groups=4),
    "ConvTranspose2d depthwise, multiplied": lambda: nn.ConvTranspose2d(2, 6, 2, groups=2),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 3, 2),
    "ConvTranspose3d grouped": lambda: nn.ConvTranspose3d(4, 2, 2, groups=2),
}
EMBEDDINGS = {
    "Embedding": lambda: nn.Embedding(5, 4),
    "Embedding with padding": lambda: nn.Embedding(5, 4, padding_idx=1),
}
CONTRACTING = {**LINEAR, **CONVOLUTIONS, **TRANSPOSED}
BIASED = {name: make for name, make in CONTRACTING.items() if "without bias" not in name}
EVERY = {**CONTRACTING, **EMBEDDINGS}
MASK = torch.tensor([1.0, 0.0, 0.25, 1.0, 0.0, 1.0], dtype=torch.float64)


def build(make: Make) -> tuple[nn.Module, type[HatLayer]]:
    """A layer in double precision, and its family."""
    layer = make().double()
    family = family_of(layer)
    assert family is not None
    return layer, family


def example(layer: nn.Module, batch: int = 2) -> Tensor:
    """A batch of inputs, larger than any kernel."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (batch, 7))
    if isinstance(layer, nn.Linear):
        return torch.randn(batch, layer.in_features, dtype=torch.float64)
    return torch.randn(batch, layer.in_channels, *(6,) * len(layer.kernel_size), dtype=torch.float64)


def masked_layer(layer: nn.Module, fold: bool) -> nn.Module:
    """A copy of `layer` that carries masks."""
    carrying = copy.deepcopy(layer)
    LAYERS[type(layer)].adopt(carrying, fold)
    return carrying


def along(mask: Tensor, dim: int) -> Tensor:
    """`mask` in the shape that broadcasts along `dim`, a negative one."""
    return mask.view(-1, *(1,) * (-1 - dim))


parametrized = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
contracting = pytest.mark.parametrize("make", CONTRACTING.values(), ids=CONTRACTING.keys())


def test_every_family_is_tested() -> None:
    assert {type(make()) for make in EVERY.values()} == set(LAYERS)


# Forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
@parametrized
def test_a_mask_multiplies_the_output_features(make: Make, fold: bool) -> None:
    layer, family = build(make)
    x = example(layer)
    _, written = family.dims(layer)
    mask = MASK[: family.features(layer)]
    expected = layer(x) * along(mask, written)
    assert expected.shape[written] == family.features(layer)
    torch.testing.assert_close(masked_layer(layer, fold)(x, mask=mask), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fold", [False, True])
@parametrized
def test_features_that_are_off_are_zero_and_masks_of_ones_change_nothing(make: Make, fold: bool) -> None:
    layer, family = build(make)
    x = example(layer)
    carrying = masked_layer(layer, fold)
    _, written = family.dims(layer)
    off = carrying(x, mask=torch.zeros_like(MASK[: family.features(layer)]))
    assert off.eq(0).all()
    assert torch.equal(carrying(x, mask=torch.ones_like(MASK[: family.features(layer)])), layer(x))
    assert torch.equal(carrying(x), layer(x))


@pytest.mark.parametrize("fold", [False, True])
@contracting
def test_a_single_sample_without_a_batch_is_masked_alike(make: Make, fold: bool) -> None:
    layer, family = build(make)
    x = example(layer, batch=1)[0]
    mask = MASK[: family.features(layer)]
    expected = layer(x) * along(mask, family.dims(layer)[1])
    torch.testing.assert_close(masked_layer(layer, fold)(x, mask=mask), expected, rtol=1e-12, atol=1e-14)


def test_linear_layers_mask_the_last_of_many_dimensions() -> None:
    layer = nn.Linear(3, 4)
    x = torch.randn(2, 5, 6, 3)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for fold in (False, True):
        torch.testing.assert_close(masked_layer(layer, fold)(x, mask=mask), layer(x) * mask)


@pytest.mark.parametrize("fold", [False, True])
@parametrized
def test_gradients_of_features_that_are_off_are_zero(make: Make, fold: bool) -> None:
    layer, family = build(make)
    mask = (MASK[: family.features(layer)] > 0).double()
    entries = family.entries(layer, mask.bool().unsqueeze(-1), None)
    carrying = masked_layer(layer, fold)
    y = carrying(example(layer), mask=mask)
    (torch.randn_like(y) * y).sum().backward()
    for name, (on, _) in entries.items():
        if getattr(layer, name) is not None:
            gradient = getattr(carrying, name).grad
            assert gradient[~on.squeeze(-1).expand(gradient.shape)].eq(0).all()
            assert gradient.ne(0).any()


@pytest.mark.parametrize("fold", [False, True])
@parametrized
def test_a_mask_of_another_precision_does_not_change_the_dtype(make: Make, fold: bool) -> None:
    layer, family = make(), family_of(make())
    assert family is not None
    x = example(layer)
    x = x.float() if x.is_floating_point() else x
    y = masked_layer(layer, fold)(x, mask=MASK[: family.features(layer)])
    assert y.dtype == torch.float32


def test_an_output_size_reaches_the_transposed_convolution() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    x = torch.randn(1, 2, 4, 4)
    mask = torch.tensor([1.0, 0.0, 1.0])
    y = masked_layer(layer, False)(x, mask=mask, output_size=(10, 10))
    torch.testing.assert_close(y, layer(x, output_size=(10, 10)) * mask.view(3, 1, 1))


@parametrized
def test_adoption_keeps_parameters_and_their_names(make: Make) -> None:
    layer = make()
    before = dict(layer.named_parameters())
    LAYERS[type(layer)].adopt(layer, False)
    after = dict(layer.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


# Entries -------------------------------------------------------------------------------------------------------------


def slots(count: int) -> Tensor:
    return torch.arange(count).unsqueeze(-1)


@contracting
def test_entries_name_the_one_output_and_the_one_input_that_an_entry_connects(make: Make) -> None:
    layer, family = build(make)
    read_dim, written_dim = family.dims(layer)
    inputs = example(layer).shape[read_dim]
    outputs = family.features(layer)
    entries = family.entries(layer, slots(outputs), slots(inputs))
    writes, reads = (t.squeeze(-1).expand(layer.weight.shape) for t in entries["weight"])
    # Sample i has input feature i only.
    x = example(layer, inputs)
    only = torch.zeros_like(x)
    for i in range(inputs):
        only[i] = x[i] * along(torch.eye(inputs, dtype=x.dtype)[i], read_dim)
    before = layer(only)
    flat = layer.weight.data.view(-1)
    for index in range(flat.numel()):
        kept = flat[index].item()
        flat[index] = kept + 1.0
        change = (layer(only) - before).abs().movedim(written_dim, 1).reshape(inputs, outputs, -1).amax(-1)
        flat[index] = kept
        connected = torch.zeros(inputs, outputs, dtype=torch.bool)
        connected[reads.reshape(-1)[index], writes.reshape(-1)[index]] = True
        assert torch.equal(change > 1e-12, connected)


@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED.keys())
def test_a_bias_entry_writes_one_output_and_reads_nothing(make: Make) -> None:
    layer, family = build(make)
    outputs = family.features(layer)
    writes, reads = family.entries(layer, slots(outputs), slots(example(layer).shape[family.dims(layer)[0]]))["bias"]
    assert reads is None
    x = torch.zeros_like(example(layer))
    before = layer(x)
    for index in range(outputs):
        with torch.no_grad():
            layer.bias[index] += 1
            change = (layer(x) - before).abs().movedim(family.dims(layer)[1], 0).flatten(1).amax(1)
            layer.bias[index] -= 1
        assert (change > 0.5).nonzero().flatten().tolist() == [writes.squeeze(-1)[index]]


@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_an_embedding_entry_writes_its_column(make: Make) -> None:
    layer, family = build(make)
    writes, reads = family.entries(layer, slots(layer.embedding_dim), None)["weight"]
    assert reads is None
    everything = torch.arange(layer.num_embeddings)
    before = layer(everything)
    for row in range(layer.num_embeddings):
        for column in range(layer.embedding_dim):
            with torch.no_grad():
                layer.weight[row, column] += 1
                changed = (layer(everything) != before).any(0)
                layer.weight[row, column] -= 1
            assert changed.nonzero().flatten().tolist() == [writes.squeeze(-1).expand(layer.weight.shape)[row, column]]


@contracting
def test_entries_of_features_with_several_slots_keep_them_all(make: Make) -> None:
    layer, family = build(make)
    outputs, inputs = family.features(layer), example(layer).shape[family.dims(layer)[0]]
    single = family.entries(layer, slots(outputs), slots(inputs))["weight"]
    double = family.entries(
        layer, torch.stack((torch.arange(outputs), torch.arange(outputs) + 100), 1), slots(inputs).expand(-1, 3)
    )["weight"]
    assert torch.equal(double[0][..., :1], single[0])
    assert torch.equal(double[0][..., 1:], single[0] + 100)
    assert torch.equal(double[1], single[1].expand_as(double[1]))


# Heads ---------------------------------------------------------------------------------------------------------------


@parametrized
def test_a_resized_layer_differs_in_nothing_but_its_number_of_outputs(make: Make) -> None:
    layer, family = build(make)
    outputs = family.features(layer) * 2
    fresh = family.resized(layer, outputs)
    assert type(fresh) is type(layer)
    x = example(layer)
    shape = list(layer(x).shape)
    shape[family.dims(layer)[1]] = outputs
    y = fresh(x)
    assert list(y.shape) == shape
    assert y.dtype == torch.float64
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in layer.named_parameters()]


@parametrized
def test_the_example_input_is_accepted(make: Make) -> None:
    layer, family = make(), family_of(make())
    assert family is not None
    y = layer(family.example_input(layer))
    assert y.shape[family.dims(layer)[1]] == family.features(layer)


def test_subclasses_belong_to_the_family_of_their_base_and_others_to_none() -> None:
    class Special(nn.Conv2d):
        pass

    assert family_of(Special(1, 1, 1)) is LAYERS[nn.Conv2d]
    assert family_of(nn.ReLU()) is None
    assert family_of(nn.BatchNorm2d(3)) is None
