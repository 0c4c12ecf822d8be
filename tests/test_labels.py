"""Support labels against brute force over Python sets."""

from __future__ import annotations

import random
from collections.abc import Iterable
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hatify.labels import (
    FIRST_RAW,
    ON,
    ZERO,
    LabelSpace,
    condensed_pair,
    connected_components,
    is_leaf,
    unexpanded,
    varying_dims,
)

FEATURES = 6
RAWS = 3

# Operands ------------------------------------------------------------------------------------------------------------


def spaces(couple: bool) -> tuple[LabelSpace, list[int]]:
    """A label space, and labels to build operands from."""
    space = LabelSpace(couple)
    features = space.feature_leaves("layer", FEATURES).tolist()
    raws = space.raw_leaves("parameter", torch.Size((RAWS,))).tolist()
    return space, [ZERO, ON, *features, *raws]


def operands(alphabet: list[int], count: int = 2) -> st.SearchStrategy[list[Tensor]]:
    """Label tensors that broadcast against each other, some dimensions being constant."""

    def build(source: random.Random) -> list[Tensor]:
        shape = [source.randint(1, 3) for _ in range(source.randint(1, 3))]
        made = []
        for _ in range(count):
            small = [source.choice((1, n)) for n in shape][source.choice((0, 0, 1)) if count > 1 else 0 :]
            numel = torch.Size(small).numel()
            labels = torch.tensor([source.choice(alphabet) for _ in range(numel)]).view(small)
            made.append(labels.expand(shape[len(shape) - len(small) :]) if source.choice((True, False)) else labels)
        return made

    return st.randoms(use_true_random=False).map(build)


class Brute:
    """Union-find over leaves, and what a label means: the set of classes one of which must be on; None: always on."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def root(self, leaf: int) -> int:
        while self.parent.get(leaf, leaf) != leaf:
            leaf = self.parent[leaf]
        return leaf

    def join(self, a: int, b: int) -> None:
        self.parent[max(self.root(a), self.root(b))] = min(self.root(a), self.root(b))


def truth(space: LabelSpace, labels: Tensor, on: dict[int, bool]) -> Tensor:
    """Whether each element may be non-zero when exactly the leaves in `on` that are True are on."""

    def one(label: int) -> bool:
        return label == ON or (label != ZERO and any(on[leaf] for leaf in space.members(label)))

    return torch.tensor([one(label) for label in labels.reshape(-1).tolist()]).view(labels.shape)


def assignment(space: LabelSpace, source: random.Random) -> dict[int, bool]:
    """Leaves are on or off at random, coupled ones alike."""
    first = space.features["layer"].first
    leaves = [*range(first, first + FEATURES), *range(FIRST_RAW, FIRST_RAW + RAWS)]
    classes = space.classes()
    position = torch.tensor([leaf if leaf < FIRST_RAW else leaf - FIRST_RAW + classes.features for leaf in leaves])
    roots = classes.root[position].tolist()
    drawn: dict[int, bool] = {}
    return {
        leaf: drawn.setdefault(root, source.choice((True, False))) for leaf, root in zip(leaves, roots, strict=True)
    }


sources = st.randoms(use_true_random=False)

# Combinations --------------------------------------------------------------------------------------------------------


@given(st.data(), st.booleans(), sources)
def test_a_sum_is_on_wherever_a_term_is(data: st.DataObject, couple: bool, source: random.Random) -> None:
    space, alphabet = spaces(couple)
    a, b = data.draw(operands(alphabet))
    result = space.either(a, b)
    assert result.shape == torch.broadcast_shapes(a.shape, b.shape)
    for _ in range(4):
        on = assignment(space, source)
        terms = truth(space, a, on) | truth(space, b, on)
        assert (truth(space, result, on) >= terms).all()


@given(st.data(), sources)
def test_a_sum_of_coupled_features_is_on_only_where_a_term_is(data: st.DataObject, source: random.Random) -> None:
    space, alphabet = spaces(couple=True)
    a, b = data.draw(operands(alphabet))
    result = space.either(a, b)
    for _ in range(4):
        on = assignment(space, source)
        assert torch.equal(truth(space, result, on), truth(space, a, on) | truth(space, b, on))


@given(st.data(), sources)
def test_a_sum_of_uncoupled_features_is_on_only_where_a_term_is(data: st.DataObject, source: random.Random) -> None:
    space, alphabet = spaces(couple=False)
    a, b, c = data.draw(operands([label for label in alphabet if label < FIRST_RAW], 3))
    result = space.either(space.either(a, b), c)
    for _ in range(4):
        on = assignment(space, source)
        terms = truth(space, a, on) | truth(space, b, on) | truth(space, c, on)
        assert torch.equal(truth(space, result, on), terms)
    first = space.features["layer"].first
    assert torch.equal(space.classes().root[first : first + FEATURES], torch.arange(first, first + FEATURES))


@given(st.data(), st.booleans(), sources)
def test_a_product_is_on_wherever_both_factors_are(data: st.DataObject, couple: bool, source: random.Random) -> None:
    space, alphabet = spaces(couple)
    a, b = data.draw(operands(alphabet))
    result = space.both(a, b)
    assert result.shape == torch.broadcast_shapes(a.shape, b.shape)
    for _ in range(4):
        on = assignment(space, source)
        factors = truth(space, a, on) & truth(space, b, on)
        found = truth(space, result, on)
        assert (found >= factors).all()
        assert (found <= truth(space, a, on) | truth(space, b, on)).all()
        if couple:
            assert torch.equal(found, factors)


@given(st.data(), st.booleans(), st.booleans())
def test_exactly_the_features_that_meet_are_coupled(data: st.DataObject, couple: bool, product: bool) -> None:
    space, alphabet = spaces(couple)
    a, b = data.draw(operands(alphabet))
    (space.both if product else space.either)(a, b)
    brute = Brute()
    for x, y in zip(*(t.reshape(-1).tolist() for t in torch.broadcast_tensors(a, b)), strict=True):
        # Without coupling only raw parameters take over the mask of what they meet.
        if min(x, y) > ON and (couple or max(x, y) >= FIRST_RAW):
            brute.join(x, y)
    _check_classes(space, brute)


def _check_classes(space: LabelSpace, brute: Brute) -> None:
    first = space.features["layer"].first
    leaves = [*range(first, first + FEATURES), *range(FIRST_RAW, FIRST_RAW + RAWS)]
    expected = [root if (root := brute.root(leaf)) < FIRST_RAW else ON for leaf in leaves]
    assert space.classes().of(torch.tensor(leaves)).tolist() == expected


def test_labels_of_constants_name_no_class() -> None:
    space, _ = spaces(couple=True)
    assert space.classes().of(torch.tensor([ZERO, ON])).tolist() == [ZERO, ON]


def test_leaves_are_the_same_at_each_call() -> None:
    space = LabelSpace(couple=True)
    first, other = space.feature_leaves("a", 3), space.feature_leaves("b", 2)
    assert torch.equal(space.feature_leaves("a", 3), first)
    assert torch.equal(space.raw_leaves("p", torch.Size((2, 2))), space.raw_leaves("p", torch.Size((2, 2))))
    distinct = torch.cat((first, other, space.raw_leaves("p", torch.Size((2, 2))).flatten()))
    assert distinct.unique().numel() == distinct.numel()
    assert is_leaf(distinct).all()


@given(st.data())
def test_sets_of_the_same_features_have_one_name(data: st.DataObject) -> None:
    space, alphabet = spaces(couple=False)
    features = [label for label in alphabet if ON < label < FIRST_RAW]
    order = data.draw(st.permutations(features[:4]))
    together = torch.tensor(ZERO)
    for label in order:
        together = space.either(together, torch.tensor(label))
    again = torch.tensor(ZERO)
    for label in sorted(order):
        again = space.either(again, torch.tensor(label))
    assert together == again
    assert space.members(int(together)) == frozenset(order)


def test_a_raw_parameter_that_meets_a_set_of_features_is_on() -> None:
    space, alphabet = spaces(couple=False)
    a, b = (torch.tensor([label]) for label in alphabet[2:4])
    raw = torch.tensor([FIRST_RAW])
    assert space.either(space.either(a, b), raw).tolist() == [ON]


# Reductions ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.booleans(), sources)
def test_a_reduction_is_on_wherever_something_reduced_is(
    data: st.DataObject, couple: bool, source: random.Random
) -> None:
    space, alphabet = spaces(couple)
    (labels,) = data.draw(operands(alphabet, 1))
    dims = data.draw(st.sets(st.integers(0, labels.ndim - 1), min_size=1))
    signed = [d - labels.ndim if source.choice((True, False)) else d for d in dims]
    result = space.merge(labels, signed)
    assert result.shape == torch.Size(1 if d in dims else n for d, n in enumerate(labels.shape))
    for _ in range(4):
        on = assignment(space, source)
        anything = _any(truth(space, labels, on), dims)
        found = truth(space, result, on)
        assert (found >= anything).all()
        if couple:
            assert torch.equal(found, anything)


def _any(values: Tensor, dims: Iterable[int]) -> Tensor:
    for d in dims:
        values = values.any(d, keepdim=True)
    return values


@given(st.data())
def test_a_reduction_couples_what_it_brings_together(data: st.DataObject) -> None:
    space, alphabet = spaces(couple=True)
    (labels,) = data.draw(operands(alphabet, 1))
    dims = sorted(data.draw(st.sets(st.integers(0, labels.ndim - 1), min_size=1)))
    space.merge(labels, dims)
    brute = Brute()
    kept = [d for d in range(labels.ndim) if d not in dims]
    columns = labels.permute(*kept, *dims).reshape(-1, torch.Size(labels.shape[d] for d in dims).numel())
    for column in columns.tolist():
        leaves = [label for label in column if label > ON]
        # Beside something that is always on, a feature decides nothing, and is left alone.
        for leaf in leaves if ON not in column else ():
            brute.join(leaves[0], leaf)
    _check_classes(space, brute)


# Structure -----------------------------------------------------------------------------------------------------------


def with_runs(source: random.Random, shape: list[int], alphabet: list[int]) -> Tensor:
    """Labels with runs of equal slices along a dimension."""
    dim = source.randrange(len(shape))
    short = [source.randint(1, 3) if d == dim else n for d, n in enumerate(shape)]
    labels = torch.tensor([source.choice(alphabet) for _ in range(torch.Size(short).numel())]).view(short)
    repeats = [1 if i else shape[dim] - short[dim] + 1 for i in range(short[dim])]
    source.shuffle(repeats)
    return labels.repeat_interleave(torch.tensor(repeats), dim)


@given(st.booleans(), sources)
def test_runs_of_equal_slices_change_nothing(couple: bool, source: random.Random) -> None:
    shape = [source.randint(3, 12) for _ in range(source.randint(1, 3))]
    found = []
    seed = source.random()
    for many in (0, 1 << 40):
        own = random.Random(seed)
        space, alphabet = spaces(couple)
        a, b = (with_runs(own, shape, alphabet) for _ in range(2))
        with mock.patch("hatify.labels._MANY", many):
            results = space.either(a, b), space.both(a, b)
            space.meet(a, b)
        found.append((*results, space.classes().root))
    assert all(map(torch.equal, *found))


@given(sources)
def test_runs_are_found_and_undone(source: random.Random) -> None:
    shape = [source.randint(12, 20), source.randint(12, 20)]
    a, b = (with_runs(source, shape, [ZERO, ON, 2, 3]) for _ in range(2))
    with mock.patch("hatify.labels._MANY", 0):
        small_a, small_b, spread = condensed_pair(a, b)
    assert torch.equal(spread(small_a).expand(shape), a) and torch.equal(spread(small_b).expand(shape), b)


@given(operands([ZERO, ON, 2, 3], 1))
def test_compact_labels_expand_to_the_original(labels: list[Tensor]) -> None:
    (original,) = labels
    small = unexpanded(original)
    assert torch.equal(small.expand(original.shape), original)
    for d, n in enumerate(original.shape):
        constant = all(torch.equal(original.select(d, 0), original.select(d, i)) for i in range(n))
        assert small.shape[d] == (1 if constant else n)
        assert (d in varying_dims(original)) == (not constant)


@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=15))
def test_components_are_those_of_union_find(count: int, edges: list[tuple[int, int]]) -> None:
    edges = [(a % count, b % count) for a, b in edges]
    brute = Brute()
    for a, b in edges:
        brute.join(a, b)
    tensor = torch.tensor(edges, dtype=torch.int64).view(-1, 2).T
    assert connected_components(count, tensor).tolist() == [brute.root(i) for i in range(count)]


def test_components_of_a_long_path_are_found() -> None:
    order = torch.randperm(1000)
    assert connected_components(1000, torch.stack((order[:-1], order[1:]))).eq(0).all()
