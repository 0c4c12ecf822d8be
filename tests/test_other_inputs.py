"""What is found out by example inputs holds for others: longer ones, other indices, other batch sizes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hatify
from oracles import difference, half_on, leaks, no_repairs

pytestmark = pytest.mark.filterwarnings("ignore::hatify.HatWarning")


class Layers(nn.Module):
    """Two layers and a head; subclasses say what happens between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(x)))


class Positions(Layers):
    """A table of positions, of which short inputs read a part."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x) + self.table[: x.shape[1]]).mean(1)


class Segments(Positions):
    """A table that is read at the indices of an input."""

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.finish(self.first(x) + self.table[i])


class SegmentsSelected(Positions):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.finish(self.first(x) + self.table.index_select(0, i))


class Chosen(Layers):
    """Features in an order that an input gives."""

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.finish(F.relu(self.first(x)).index_select(1, i))


class ChosenByItem(Layers):
    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.finish(F.relu(self.first(x))[:, i])


class Sorted(Layers):
    """Features in the order of their size."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.finish(h.gather(1, h.argsort(1)))


class Experts(Layers):
    """A mixture of experts of which each sample asks one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.router, self.how = nn.Linear(6, 4), how
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        i = self.router(x).argmax(1)
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        if self.how == "item":
            return self.finish(answers[torch.arange(x.shape[0]), i])
        if self.how == "gather":
            return self.finish(answers.gather(1, i[:, None, None].expand(-1, 1, 8)).squeeze(1))
        return self.finish(torch.take_along_dim(answers, i[:, None, None], 1).squeeze(1))


class Keywords(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.addcmul(self.first(x), tensor1=x[:, :1], tensor2=x[:, 1:2])
        return self.finish(torch.lerp(input=h, end=x[:, 2:3], weight=0.3))


class NormOfChannels(nn.Module):
    """As many positions as channels; the order of the norm comes before its dimension."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv1d(6, 8, 1), nn.Linear(8, 8), nn.Linear(8, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(F.relu(self.second(torch.linalg.vector_norm(h, 2, 1) if self.function else h.norm(2, 1))))


class FilledWithAParameter(Layers):
    """A parameter that is zero now."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x).masked_fill(x[:, :1] > 0, self.value))


class SizeAdded(Layers):
    """A number that is zero for inputs of one length only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x) + (x.shape[1] - 4)).mean(1)


class FoldedIntoBatch(nn.Module):
    """The channels of all samples in one dimension."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        n, c, height, width = h.shape
        if self.how == "softplus":
            h = F.softplus(h.reshape(n * c, height, width))
        elif self.how == "sum":
            h = h.reshape(n * c, 1, height, width) + 1
        else:
            h = F.instance_norm(h.reshape(1, n * c, height, width))
        return self.head(F.relu(self.second(h.reshape(n, c, height, width))).mean((2, 3)))


class DynamicFilters(nn.Module):
    """A convolution whose weights an input makes; the number of groups is that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.second, self.head = nn.Linear(3, 8 * 3 * 9), nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        weight = self.filters(x.mean((2, 3))).reshape(n * 8, 3, 3, 3)
        y = F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), weight, groups=n)
        return self.head(F.relu(self.second(y.reshape(n, 8, *y.shape[2:]))).mean((2, 3)))


class PaddedChannels(Layers):
    """A raw parameter of which some entries meet features, and others channels that are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.second = nn.Parameter(torch.randn(12)), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(F.pad(self.first(x), (2, 2)) + self.shift)


class MadeInForward(Layers):
    """Tensors that the forward pass makes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]) + torch.linspace(0, 1, 8))


def images(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 3, 4, 4),)


def rows(count: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, 6),)


#: Network, inputs of the conversion, and inputs that come afterwards.
CASES = {
    "positions": (Positions(), (torch.randn(2, 4, 6),), (torch.randn(3, 9, 6),)),
    "segments": (Segments(), (*rows(2), torch.tensor([0, 1])), (*rows(16), torch.arange(16))),
    "segments selected": (SegmentsSelected(), (*rows(2), torch.tensor([0, 1])), (*rows(16), torch.arange(16))),
    "chosen features": (Chosen(), (*rows(2), torch.arange(8)), (*rows(5), torch.arange(8).flip(0))),
    "features by item": (ChosenByItem(), (*rows(2), torch.arange(8)), (*rows(5), torch.arange(8).flip(0))),
    "sorted features": (Sorted(), rows(2), rows(5)),
    "experts by item": (Experts("item"), rows(1), rows(40)),
    "experts gathered": (Experts("gather"), rows(1), rows(40)),
    "experts taken": (Experts("take"), rows(1), rows(40)),
    "keywords": (Keywords(), rows(2), rows(5)),
    "norm of channels, function": (NormOfChannels(True), (torch.randn(2, 6, 8),), (torch.randn(5, 6, 8),)),
    "norm of channels, method": (NormOfChannels(False), (torch.randn(2, 6, 8),), (torch.randn(5, 6, 8),)),
    "filled with a parameter": (FilledWithAParameter(), rows(2), rows(9)),
    "size added": (SizeAdded(), (torch.randn(2, 4, 6),), (torch.randn(3, 9, 6),)),
    "folded, softplus": (FoldedIntoBatch("softplus"), images(2), images(5)),
    "folded, sum": (FoldedIntoBatch("sum"), images(2), images(5)),
    "folded, norm": (FoldedIntoBatch("norm"), images(2), images(5)),
    "dynamic filters": (DynamicFilters(), images(2), images(2)),
    "padded channels": (PaddedChannels(), rows(2), rows(5)),
    "made in forward": (MadeInForward(), rows(2), rows(5)),
}


@pytest.mark.parametrize("couple", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_finished_tasks_stay_for_inputs_unlike_those_of_the_conversion(name: str, couple: bool) -> None:
    net, example, probe = CASES[name]
    torch.manual_seed(0)
    model = hatify.hatify(net, 2, example, couple=couple)
    with torch.no_grad():
        assert difference(model.eval()(*probe), net.eval()(*probe)) < 1e-5
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    assert leaks(model, 0, [example, probe]) == []
    with torch.no_grad(), model.task(0):
        before = model(*probe)
    model.begin_task(1)
    half_on(model, 1, random.Random(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(*probe).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with no_repairs():
        model.end_task()
    with torch.no_grad(), model.task(0):
        assert torch.equal(model(*probe), before)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if name != "dynamic filters"])
def test_extracted_networks_answer_such_inputs_likewise(name: str, compact: bool) -> None:
    net, example, probe = CASES[name]
    torch.manual_seed(0)
    model = hatify.hatify(net, 1, example)
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    with no_repairs():
        model.end_task()
    with torch.no_grad():
        assert difference(hatify.extract_task(model, 0, compact=compact)(*probe), model(*probe)) < 1e-5


# Indices that no input gives ------------------------------------------------------------------------------------------


class Learned(Layers):
    """Features or layers that a parameter chooses, which is trained."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.other, self.how = nn.Linear(6, 8), how
        self.scores, self.route = nn.Parameter(torch.linspace(1, 0, 8)), nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        order = self.scores.argsort(descending=True)
        both = torch.stack((h, self.other(x)), 1)
        return self.finish(
            {
                "indexed": lambda: h[:, order],
                "gathered": lambda: h.gather(1, order.expand_as(h)),
                "selected": lambda: h.index_select(1, order),
                "one of two": lambda: both[:, self.route.argmax()],
            }[self.how]()
        )


@pytest.mark.parametrize("how", ["indexed", "gathered", "selected", "one of two"])
def test_indices_that_a_parameter_gives(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = hatify.hatify(Learned(how), 2, (x,))
    model.begin_task(0)
    half_on(model, 0, random.Random(3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("scores", "route")):
                parameter.copy_(parameter.flip(0))
    model.end_task()
    assert leaks(model, 0, [(x,)]) == []
    hatify.verify_isolation(model)


class Drawn(Layers):
    """Features in a random order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x)[:, torch.rand(x.shape[1] + 2).argsort()])


def test_indices_that_are_drawn_at_random() -> None:
    model = hatify.hatify(Drawn(), 2, (torch.randn(4, 6),))
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    model.end_task()
    (lock,) = [p.lock.expand(8, 8) for p in model.guard.partial if p.name == "second.weight"]
    assert torch.equal(lock, model.masks(0)["second"][:, None].expand(8, 8))  # whatever the columns read


@torch.fx.wrap
def turned_if_long(h: Tensor) -> Tensor:
    return h if h.shape[1] < 13 else h.flip(-1)


class Wrapped(Layers):
    """A function that tracing does not see into."""

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(turned_if_long(self.first(x))).mean(1)


class WrittenInTuple(Layers):
    """Writes to an element of a tuple, and takes it out again."""

    def forward(self, x: Tensor) -> Tensor:
        best = torch.max(self.first(x), 1)
        best[0].add_(1.0)
        return self.finish(best[0])


@pytest.mark.parametrize("kind", [Wrapped, WrittenInTuple])
def test_what_tracing_does_not_see(kind: type[Layers]) -> None:
    torch.manual_seed(0)
    probes = [(torch.randn(2, length, 6),) for length in (5, 12, 13, 20)]
    model = hatify.hatify(kind(), 2, probes[0])
    model.begin_task(0)
    half_on(model, 0, random.Random(0))
    model.end_task()
    assert leaks(model, 0, probes) == []
