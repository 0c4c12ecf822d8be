"""Which features of a layer's input and output the entries of its weight connect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Connection:
    """Where features lie in the weight of a layer, in its input and in its output.

    A dimension of the weight that both sides have, as each head's own matrix has, is among the written ones and among
    those read. Features along several dimensions are numbered in the order in which the dimensions are named.

    Attributes:
        written: dimensions of the weight along which the entries write other features.
        read: those along which they read other features; none: the layer looks up.
        out: where the written features lie in the output, in ascending order.
        input: where the features that are read lie in the input, in ascending order.
        groups: with more than one, the weight's dimension 0 holds all features of its side, one group behind the other,
            and dimension 1 those of one group.
    """

    written: tuple[int, ...]
    read: tuple[int, ...]
    out: tuple[int, ...]
    input: tuple[int, ...]
    groups: int = 1

    def count(self, dims: tuple[int, ...], shape: Sequence[int]) -> int:
        """How many features lie along `dims`, `written` or `read`, of a weight of this shape."""
        return math.prod(shape[d] for d in dims) * (self.groups if dims == (1,) else 1)

    def entries(self, shape: Sequence[int], written: Tensor, read: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What each entry of a weight of this shape writes and reads (None: what is always on).

        Args:
            shape: the weight's.
            written: of the output features, shape (O, …).
            read: of the input features, shape (I, …).

        Returns:
            The same for entries, broadcastable to (\\*shape, …).
        """
        no_read = read is None or not self.read
        return self._placed(self.written, shape, written), None if no_read else self._placed(self.read, shape, read)

    def _placed(self, dims: tuple[int, ...], shape: Sequence[int], features: Tensor | None) -> Tensor:
        """`features` (N, …) along `dims` of the weight."""
        assert features is not None
        rest = features.shape[1:]
        if self.groups > 1 and dims == (1,):
            # Each row has the features of its own group beside it.
            features = features.reshape(self.groups, -1, *rest).repeat_interleave(shape[0] // self.groups, 0)
            dims = (0, 1)
        features = features.reshape(*(shape[d] for d in dims), *rest)
        order = sorted(range(len(dims)), key=dims.__getitem__)
        features = features.permute(*order, *range(len(dims), features.ndim))
        return features.reshape(*(size if d in dims else 1 for d, size in enumerate(shape)), *rest)


@dataclass(frozen=True)
class WeightedCall:
    """A call of a weighted layer.

    Attributes:
        owner: what its features are named after: the module, or the weight of a layer written as a function.
        weight: the name of the weight.
        bias: the name of the bias, one entry for each output feature; None if there is none, or if it is no parameter
            that is read as it is.
        input: the node of the activation, or what else is given.
        connection: which features the weight's entries connect.
        shape: the weight's.
        added: of a function, the node of the bias, whatever it is.
    """

    owner: str
    weight: str
    bias: str | None
    input: Any
    connection: Connection
    shape: tuple[int, ...]
    added: Any = None

    @property
    def features(self) -> int:
        """How many output features there are."""
        return self.connection.count(self.connection.written, self.shape)
