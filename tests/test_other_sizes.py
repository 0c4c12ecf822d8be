"""No conclusion rests on a size that the network leaves free: other lengths and image sizes than the example's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from hatify import agreement, convert
from hatify.free import Free
from hatify.sizes import other_sizes
from oracles import broken_promises, difference, half_on, leaks, no_repairs

pytestmark = pytest.mark.filterwarnings("ignore::hatify.HatWarning")

LENGTH, CHANNELS = 5, 8
LENGTHS = (1, 2, 3, 4, 6, 9, 12, 20)

Between = Callable[["Tokens", Tensor], Tensor]


class Tokens(nn.Module):
    """(N, L, 6) → (N, 3): a function of the features (N, L, 8) between two layers; it may use what is here."""

    def __init__(self, between: Between, reads: int = CHANNELS) -> None:
        super().__init__()
        self.first, self.near, self.far = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second, self.head, self.between = nn.Linear(reads, 8), nn.Linear(8, 3), between
        self.wide = nn.Linear(8, 96)
        for name, shape in TABLES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def twice(self, h: Tensor) -> Tensor:
        """Behind as many positions of something that is always on."""
        return torch.cat((torch.sigmoid(h.detach()) * 0 + 1, h), 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(self.between(self, self.first(x))))
        return self.head(h.mean(1) if h.ndim == 3 else h)


def cut(net: Tokens, h: Tensor) -> Tensor:
    """Two kinds of positions; with fewer than four, there is no answer."""
    h = h + 0.1 * h[:, 3:4]
    return torch.cat((net.near(h[:, :3]), h[:, 3:]), 1)


def of_two(net: Tokens, h: Tensor) -> Tensor:
    """Features in two kinds, of which a size chooses one."""
    return torch.stack((net.near(h), net.far(h)), 1)


TABLES = {"rows": (16, 8), "leading": (1, 16, 8), "heads": (2, 16, 4), "inside": (16, 2, 4), "flat": (128,)}


def in_heads(net: Tokens, h: Tensor) -> Tensor:
    v = h.view(h.shape[0], -1, 2, 4).transpose(1, 2) + net.heads[:, : h.shape[1]]
    return v.transpose(1, 2).flatten(2)


def spare(net: Tokens, h: Tensor) -> Tensor:
    """A row that short inputs do not read is added to other features."""
    return torch.cat((h + net.rows[: h.shape[1]], net.near(h) + net.rows[-1]), -1)


TOKENS: dict[str, Between | tuple[Between, int]] = {
    "rows": lambda net, h: h + net.rows[: h.shape[1]],
    "a leading one": lambda net, h: h + net.leading[:, : h.shape[1]],
    "features in two dimensions": in_heads,
    "features in two later dimensions": lambda net, h: (h.unflatten(2, (2, 4)) + net.inside[: h.shape[1]]).flatten(2),
    "a flat table, viewed": lambda net, h: h + net.flat.view(16, 8)[: h.shape[1]],
    "a flat table, cut": lambda net, h: h + net.flat[: h.shape[1] * 8].view(h.shape[1], 8),
    "arange": lambda net, h: h + net.rows[torch.arange(h.shape[1])],
    "narrow": lambda net, h: h + net.rows.narrow(0, 0, h.shape[1]),
    "the last rows": lambda net, h: h + net.rows[-h.shape[1] :],
    "the row of a size": lambda net, h: h + net.rows[h.shape[1] - 1],
    "a gate": lambda net, h: h * torch.sigmoid(net.leading[:, : h.shape[1]]),
    "a row elsewhere": (spare, 16),
    "kept": lambda net, h: torch.cat((net.near(h[:, :5]), h[:, 5:]), 1),
    "kept in front": lambda net, h: torch.cat((h[:, 5:], net.near(h[:, :5])), 1),
    "through another layer": lambda net, h: torch.cat((net.near(h[:, :5]), net.far(h[:, 5:])), 1),
    "through a sigmoid": lambda net, h: torch.cat((net.near(h[:, :5]), h[:, 5:].sigmoid()), 1),
    "shifted": lambda net, h: torch.cat((net.near(h[:, :5]), h[:, 5:] + 1), 1),
    "summed": lambda net, h: net.near(h) + h[:, 5:].sum(1, keepdim=True),
    "split": lambda net, h: torch.cat((net.near(h.tensor_split((5,), 1)[0]), h.tensor_split((5,), 1)[1]), 1),
    "padded with zeros": (lambda net, h: F.pad(h, (0, 0, 0, 12 - h.shape[1])).flatten(1), 96),
    "padded with zeros, features first": (
        lambda net, h: F.pad(h, (0, 0, 0, 12 - h.shape[1])).transpose(1, 2).flatten(1),
        96,
    ),
    "padded with ones": (lambda net, h: F.pad(h, (0, 0, 0, 12 - h.shape[1]), value=1.0).flatten(1), 96),
    "padded and cropped": (lambda net, h: F.pad(h, (0, 0, 0, 8), value=1.0)[:, :8].flatten(1), 64),
    "padded before a layer": lambda net, h: F.pad(h, (0, 0, 0, 4), value=1.0)[:, :4],
    "padded beside other features": (
        lambda net, h: F.pad(h, (0, 0, 0, 12 - h.shape[1])).flatten(1) + net.wide(h.mean(1)),
        96,
    ),
    "zeros beside other features": (
        lambda net, h: torch.cat((h, h.new_zeros(h.shape[0], 12 - h.shape[1], 8)), 1).flatten(1) + net.wide(h.mean(1)),
        96,
    ),
    "seen at some sizes": lambda net, h: torch.cat((net.near(net.twice(h)[:, :10]), net.far(net.twice(h)[:, 10:])), 1),
    "unit length, then a power": lambda net, h: (
        ((h / h.square().sum(1, keepdim=True).sqrt()).abs() + 0.1) ** (1 + (h.shape[1] - 4) / 8)
    ),
    "zeros beside": (lambda net, h: torch.cat((h, h.new_zeros(h.shape[0], 12 - h.shape[1], 8)), 1).flatten(1), 96),
    "clamped by a size": lambda net, h: h.clamp(min=(h.shape[1] - 5) / 8),
    "raised to a size": lambda net, h: h.abs() ** (h.shape[1] - 5),
    "raised to a negative power": lambda net, h: h.abs() ** -0.5,
    "divided by a size": lambda net, h: h / (h.square().sum(1, keepdim=True).sqrt() + 1) - h.sum(1, True) / h.shape[1],
    "rows by steps": lambda net, h: h + net.rows.repeat(2, 1)[: h.shape[1]].cumsum(0),
    "clamped by a size, later": lambda net, h: h.clamp(min=(h.shape[1] - 11) / 8),
    "clamped from above by a size": lambda net, h: h.clamp(max=(11 - h.shape[1]) / 4),
    "raised to a size, later": lambda net, h: h.abs() ** (12 - h.shape[1]),
    "row of a size": lambda net, h: cut(net, h)[:, h.shape[1] // 4],
    "rows up to a size": lambda net, h: cut(net, h)[:, : h.shape[1] // 4 + 1],
    "select by a size": lambda net, h: cut(net, h).select(1, h.shape[1] // 4),
    "narrow by a size": lambda net, h: cut(net, h).narrow(1, 0, h.shape[1] // 4 + 1),
    "roll by a size": lambda net, h: cut(net, h).roll(-(h.shape[1] // 4), 1)[:, 0],
    "crop by a size": lambda net, h: F.pad(cut(net, h), (0, 0, -(h.shape[1] // 4), 0))[:, 0],
    "reflected": lambda net, h: F.pad(cut(net, h).transpose(1, 2), (3, 0), "reflect").transpose(1, 2)[:, 0],
    "indices of a size": lambda net, h: cut(net, h)[
        torch.arange(h.shape[0]), torch.full((h.shape[0],), h.shape[1] // 4)
    ],
    "a quarter of the pieces": lambda net, h: cut(net, h).chunk(4, 1)[0],
    "from the end": lambda net, h: cut(net, h)[:, -4],
    "turned around": lambda net, h: cut(net, h).flip(1)[:, 0],
    "every other": lambda net, h: cut(net, h)[:, :: h.shape[1] // 5 + 1],
    "a kind by a size": lambda net, h: of_two(net, h)[:, h.shape[1] // 20],
    "a kind by a size, selected": lambda net, h: of_two(net, h).select(1, h.shape[1] // 20),
    "a kind by a size, rolled": lambda net, h: of_two(net, h).roll(h.shape[1] // 20, 1)[:, 0],
    "a kind by a size, padded": lambda net, h: F.pad(of_two(net, h), (0, 0, 0, 0, h.shape[1] // 20, 0))[:, 0],
    "features up to a size": lambda net, h: F.pad(h[..., : h.shape[1]], (0, 8))[..., :8],
    "taken from a flat table": lambda net, h: h + torch.take(net.flat, torch.arange(h.shape[1] * 8)).view(-1, 8),
    "shifted in time": lambda net, h: torch.cat(
        (F.pad(h[:, 1:, :2], (0, 0, 0, 1)), F.pad(h[:, :-1, 2:4], (0, 0, 1, 0)), h[:, :, 4:]), -1
    ),
    "one position, if it is there": lambda net, h: torch.cat((net.near(h[:, :2]), net.far(h[:, 2:])), 1)[:, 3:4],
    "one of what is stacked": lambda net, h: torch.stack((h, net.near(h)), 0).unbind(0)[h.shape[1] // 13 % 2],
    "a piece of what is stacked": lambda net, h: torch.stack((h, net.near(h)), 0).chunk(2, 0)[h.shape[1] // 13 % 2][0],
    "put together again": lambda net, h: torch.cat(cut(net, h).split(2, 1), 1)[:, -4],
    "pieces of features put together again": lambda net, h: torch.cat(h.split(4, -1), -1),
    "rolled features": lambda net, h: h.roll(h.shape[1] // 6, -1),
    "one of the pieces": lambda net, h: h.repeat(1, 1, 2).split(8, -1)[h.shape[1] // 13 % 2],
    "like another tensor": lambda net, h: h + torch.arange(8).to(h) + net.rows[0].type_as(h),
    "features first, cut": (lambda net, h: h.transpose(1, 2).flatten(1)[:, :40], 40),
    "halves": lambda net, h: h[:, : h.shape[1] // 2 + 1] * 2,
    "resized": (lambda net, h: F.adaptive_avg_pool1d(h.transpose(1, 2), 3).flatten(1), 24),
}


def make(name: str) -> Tokens:
    torch.manual_seed(0)
    entry = TOKENS[name]
    return Tokens(*entry) if isinstance(entry, tuple) else Tokens(entry)


def of_length(length: int, batch: int = 3) -> tuple[Tensor]:
    return (torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(length)),)


@pytest.mark.parametrize("couple", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_other_lengths(name: str, couple: bool) -> None:
    net = make(name).eval()
    model = hatify.hatify(net, 2, of_length(LENGTH, 2), couple=couple)
    lengths = [LENGTH, *(n for n in LENGTHS if takes(net, n))]
    assert len(lengths) > 3
    model.eval()
    for length in lengths:
        assert difference(model(*of_length(length)), net(*of_length(length))) < 1e-5
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, [of_length(length) for length in lengths]) == []


@pytest.mark.parametrize("name", ["features in two dimensions", "kept", "a flat table, viewed", "a row elsewhere"])
def test_training_at_other_lengths_changes_nothing(name: str) -> None:
    model = hatify.hatify(make(name), 3, of_length(LENGTH, 2))

    def inputs(batch: int, seed: int) -> tuple[Tensor]:
        return of_length((5, 9, 12, 3)[seed % 4], batch)

    assert broken_promises(model, inputs, random.Random(0)) == []


class Pair(nn.Module):
    """Two inputs, one of which has twice as many positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.second = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(32, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.first(x) + F.avg_pool1d(self.other(y).transpose(1, 2), 2).transpose(1, 2)
        return self.head(torch.relu(self.second(h.transpose(1, 2).flatten(1)[:, :32])))


def test_inputs_of_which_one_is_twice_as_long() -> None:
    torch.manual_seed(0)
    probes = [(torch.randn(2, n, 6), torch.randn(2, 2 * n, 6)) for n in (4, 5, 8, 12)]
    model = hatify.hatify(Pair(), 2, probes[0])
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, probes) == []


class First(nn.Module):
    """(L, 6), unbatched, or (L, N, 6) with a mask (N, L): the first dimension is that of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.second, self.head = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.first(x)
        h = h if mask is None else h.masked_fill(mask.t()[..., None], 0.0)
        h = torch.cat((h, self.last(h.mean(0, keepdim=True))), 0)
        return self.head(torch.relu(self.second(h[-1 - x.shape[0] // 7])))


@pytest.mark.parametrize("masked", [False, True])
def test_positions_first(masked: bool) -> None:
    torch.manual_seed(0)

    def inputs(length: int) -> tuple[Tensor, ...]:
        return (torch.randn(length, 2, 6), torch.rand(2, length) > 0.7) if masked else (torch.randn(length, 6),)

    model = hatify.hatify(First(), 2, inputs(5))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, [inputs(n) for n in (5, 3, 8, 12, 15)]) == []


@torch.fx.wrap
def of_five_or_twelve(x: Tensor) -> Tensor:
    if x.shape[1] not in (5, 12):
        raise ValueError("neither 5 nor 12")
    return x


class Odd(nn.Module):
    """(N, L, 6), or one in a list, → (N, 3) for 5 or 12 positions: no size that is tried is taken."""

    def __init__(self, listed: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.listed = listed

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(of_five_or_twelve(x[0] if self.listed else x))
        return self.head(torch.relu(self.second(h)).mean(1))


def test_a_size_that_was_not_seen_to_be_free_is_checked() -> None:
    net = Odd().eval()
    model = hatify.hatify(net, 1, of_length(5, 2)).eval()
    assert model.plan.fixed == {"x": (((-2, 5), (-1, 6)),)}
    net(*of_length(12)), model(*of_length(5))
    with pytest.raises(hatify.HatError, match=r"x has 12 along dimension -2, where .* with 5 and was not seen to take"):
        model(*of_length(12))
    model.begin_task(0)
    model.end_task()
    plain = hatify.extract_task(model, 0)
    plain(*of_length(5))
    with pytest.raises(AssertionError, match=r"the sizes of x from dimension -2 on is \(5, 6\)"):
        plain(*of_length(12))
    other = hatify.hatify(net, 1, of_length(12, 2)).eval()
    assert difference(other(*of_length(12)), net(*of_length(12))) < 1e-5


def test_sizes_within_containers_are_checked() -> None:
    model = hatify.hatify(Odd(listed=True), 1, ([*of_length(5, 2)],)).eval()
    model([*of_length(5)])
    with pytest.raises(hatify.HatError, match="x has 12 along dimension -2"):
        model([*of_length(12)])


def test_long_inputs() -> None:
    torch.manual_seed(0)
    net = Tokens(lambda net, h: h.transpose(1, 2).flatten(1)[:, :560], 560)
    model = hatify.hatify(net, 2, of_length(70))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, [of_length(n) for n in (70, 71, 80, 140)]) == []


@torch.no_grad()
def takes(net: nn.Module, length: int) -> bool:
    try:
        return bool(torch.isfinite(net(*of_length(length))).all())
    except (RuntimeError, IndexError):
        return False


def test_what_short_inputs_lack_is_told_by_longer_ones() -> None:
    model = hatify.hatify(Tokens(lambda net, h: net.near(h[:, 1:] - h[:, :-1])), 2, of_length(LENGTH))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    model.end_task()
    masks = model.masks(0)
    (lock,) = [p.lock.expand(8, 8) for p in model.guard.partial if p.name == "near.weight"]
    assert torch.equal(lock, masks["near"][:, None] & masks["first"])


def test_a_loop_over_pieces_of_which_there_may_be_more_is_guarded() -> None:
    net = Tokens(lambda net, h: torch.cat([net.near(piece) for piece in h.split(2, 1)], 1)).eval()
    model = hatify.hatify(net, 2, of_length(LENGTH)).eval()
    assert difference(model(*of_length(6)), net(*of_length(6))) < 1e-5
    with pytest.raises(hatify.HatError, match="traced where a size or condition is 3, but this input makes it 5"):
        model(*of_length(9))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", TOKENS)
def test_extracted_networks_take_other_lengths(name: str, compact: bool) -> None:
    net = make(name).eval()
    model = hatify.hatify(net, 1, of_length(LENGTH, 2))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    plain = hatify.extract_task(model, 0, compact=compact)
    for length in [LENGTH, *(n for n in LENGTHS if takes(net, n))]:
        with torch.no_grad():
            assert difference(plain(*of_length(length)), model(*of_length(length))) < 1e-5


def test_what_is_empty_at_every_size_is_extracted() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.near, self.head = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 1), nn.Linear(40, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.head(torch.cat((self.near(h[:, :, :5]), h[:, :, 5:]), 2).flatten(1))

    model = hatify.hatify(Fixed(), 1, (torch.randn(2, 3, 5),))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    x = torch.randn(3, 3, 5)
    with torch.no_grad():
        assert difference(hatify.extract_task(model, 0)(x), model(x)) < 1e-5


class Pictures(nn.Module):
    """(N, 3, H, W) → (N, 3), likewise."""

    def __init__(self, between: Callable[[Pictures, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.near, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head, self.between = nn.Linear(8, 3), between
        self.table = nn.Parameter(torch.randn(8, 12, 12))
        self.last = nn.Parameter(torch.randn(12, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.between(self, self.first(x)))).mean((2, 3)))


PICTURES: dict[str, Callable[[Pictures, Tensor], Tensor]] = {
    "cropped": lambda net, h: h + net.table[:, : h.shape[2], : h.shape[3]],
    "cropped, features last": lambda net, h: (
        h + net.last[: h.shape[2], : h.shape[3]].permute(2, 0, 1)
    ),
    "resized": lambda net, h: h + F.interpolate(net.table[None], h.shape[2:]),
    "kept": lambda net, h: torch.cat((net.near(h[:, :, :5]), h[:, :, 5:]), 2),
    "summed": lambda net, h: net.near(h) + h[:, :, 5:].sum((2, 3), keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_other_image_sizes(name: str) -> None:
    torch.manual_seed(0)
    net = Pictures(PICTURES[name]).eval()
    probes = [(torch.randn(2, 3, *edges),) for edges in ((5, 5), (3, 4), (9, 6), (12, 12))]
    model = hatify.hatify(net, 2, probes[0])
    model.eval()
    for inputs in probes:
        assert difference(model(*inputs), net(*inputs)) < 1e-5
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, probes) == []


def test_a_table_that_says_nothing_of_its_rest_is_copied_for_each_task() -> None:
    census = {e.name: e for e in hatify.hatify(make("a flat table, viewed"), 2, of_length(LENGTH)).census}
    assert census["flat"].policy is hatify.Policy.PER_TASK and "read parts" in census["flat"].reason
    census = {e.name: e for e in hatify.hatify(make("features in two dimensions"), 2, of_length(LENGTH)).census}
    assert census["heads"].policy == "masked"


# The sizes that are tried --------------------------------------------------------------------------------------------


def shapes(accepts: Callable[[tuple[Tensor, ...]], bool], *inputs: Tensor, batches: tuple[int, ...] = ()) -> list:
    return [[tuple(t.shape) for t in found] for found in other_sizes(accepts, inputs, batches)]


def test_free_sizes_are_changed_together_and_fixed_ones_stay() -> None:
    found = shapes(lambda x: x[0].shape[1] == 3, torch.zeros(2, 3, 6, 8))
    assert found == [[(3, 3, 12, 16)], [(1, 3, 5, 7)], [(2, 3, 1, 1)]]


def test_large_images_are_made_smaller_if_they_can_be() -> None:
    assert shapes(lambda x: x[0].shape[1] == 3, torch.zeros(2, 3, 224, 224)) == [[(1, 3, 112, 112)]]
    found = shapes(lambda x: x[0].shape[1] == 3 and x[0].shape[2] % 32 == 0, torch.zeros(2, 3, 224, 224))
    assert found == [[(1, 3, 192, 112)]]
    assert shapes(lambda x: x[0].shape[1] >= 70 and x[0].shape[2] == 6, torch.zeros(2, 70, 6))[-1] == [(1, 71, 6)]


@pytest.mark.parametrize("edge", [98, 518])
def test_edges_that_have_to_be_multiples_of_a_patch(edge: int) -> None:
    found = shapes(lambda x: x[0].shape[2] == x[0].shape[3] and x[0].shape[2] % 14 == 0, torch.zeros(1, 1, edge, edge))
    assert any(x.shape[2] != edge for (x,) in [[torch.zeros(shape) for shape in shapes_] for shapes_ in found])


#: What the sizes of two inputs have to do with each other.
RELATED = {
    "equal": (lambda a, b: a[1:] == b[1:] and a[1] <= 6 and a[0] == b[0], (2, 5), (2, 5)),
    "twice": (lambda a, b: 2 * a[1] == b[1] and a[2] == b[2] == 6, (2, 4, 6), (2, 8, 6)),
    "one more": (lambda a, b: a[1] + 1 == b[1], (2, 4), (2, 5)),
    "squared": (lambda a, b: a[1] ** 2 == b[1] and a[2] == 6, (2, 5, 6), (2, 25)),
    "length first": (lambda a, b: a[:2] == b[::-1] and a[2] == 6, (5, 2, 6), (2, 5)),
    "a graph": (lambda a, b: a[0] == b[0] == b[1] and a[1] == 6, (5, 6), (5, 5)),
    "a pyramid": (
        lambda a, b, c: a[1] == b[1] == c[1] == 3 and a[2:] == tuple(2 * n for n in b[2:]) == tuple(4 * n for n in c[2:]),
        (2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 2, 2),
    ),
    "the first dimension alone": (lambda a: a[1] == 6, (5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATED)
def test_sizes_that_depend_on_each_other_are_changed_together(name: str) -> None:
    takes_shapes, *given = RELATED[name]
    found = shapes(lambda x: takes_shapes(*(tuple(t.shape) for t in x)), *(torch.zeros(shape) for shape in given))
    fixed = {"a pyramid": 3, "equal": 0}.get(name, 6)
    for i, shape in enumerate(given):
        for d, size in enumerate(shape):
            varied = {each[i][d] for each in found} - {size}
            assert bool(varied) == (size != fixed), (i, d)
    assert any(sum(map(math.prod, each)) > sum(map(math.prod, given)) for each in found)


def test_batches_and_indices() -> None:
    ids = torch.tensor([[3, 1], [4, 1]])
    seen = list(other_sizes(lambda x: x[0].shape[1] == 2, (ids,), (3,)))
    assert [len(x) for (x,) in seen] == [4, 1, 3] and seen[2][0].tolist() == [[3, 1], [4, 1], [3, 1]]
    assert shapes(lambda x: False, torch.zeros(2, 3)) == [] and shapes(lambda x: True, torch.tensor(1.0)) == []


# The experiment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["features in two dimensions", "kept"])
def test_verify_isolation_finds_what_only_other_lengths_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An analysis that looks at the example's size alone, and at the entries of tables that it reads.
    monkeypatch.setattr(convert, "accepted_sizes", lambda net, graphs, inputs: ([inputs], Free()))
    monkeypatch.setattr(agreement, "continuation", lambda labels, known: labels)
    monkeypatch.setattr("hatify.support._unseen", lambda call: call.operation.labels(call))
    model = hatify.hatify(make(name), 2, of_length(LENGTH))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    model.end_task()
    assert leaks(model, 0, [of_length(LENGTH)]) == [] and leaks(model, 0, [of_length(9)]) != []
    with pytest.raises(hatify.IsolationError, match=r"task 0: .* of .*weight, for inputs of shape \(4, 10, 6\)"):
        hatify.verify_isolation(model)


def test_verify_isolation_asks_batches_of_one_and_three(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hatify.hatify(make("rows"), 2, of_length(LENGTH, 2))
    model.begin_task(0)
    model.end_task()
    asked = set()
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (asked.add(tuple(x.shape)), forward(self, x))[1])
    model.task_state.register_forward_hook(lambda *_: None)
    hatify.verify_isolation(model)
    assert {shape[0] for shape in asked} >= {1, 2, 3}
