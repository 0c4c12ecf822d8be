"""Whether tensors have been written to, found out at almost no cost."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Stamps:
    """A cheap look at whether tensors have been written to.

    In place, by their versions; in other memory, by their addresses; through ``data``, which leaves no trace, by one
    entry of each: what writes to all of a tensor moves that one, too.
    """

    def __init__(self, tensors: Iterable[Tensor], probes: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.probes: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for probe in probes:
            self.probes.setdefault((probe.dtype, probe.device), []).append(probe)
        self.values = [torch.stack(same_kind) for same_kind in self.probes.values()]
        self.places = [t.data_ptr() for t in self.tensors]
        self.versions = [t._version for t in self.tensors]

    def renew(self, held: Container[int]) -> None:
        """Take the tensors with the identities `held` as they are for untouched."""
        self.versions = [t._version if id(t) in held else v for t, v in zip(self.tensors, self.versions, strict=True)]

    def are_valid(self, look_inside: bool) -> bool:
        """Whether nothing seems to have been written to; looking inside makes a GPU wait."""
        if [t._version for t in self.tensors] != self.versions or [t.data_ptr() for t in self.tensors] != self.places:
            return False
        return all(
            torch.equal(torch.stack(same_kind), value)
            for same_kind, value in zip(self.probes.values(), self.values, strict=True)
            if look_inside or value.device.type == "cpu"
        )


class Samples:
    """One entry of each of several tensors, and what it holds: a change shows of which nobody has a copy."""

    def __init__(self, places: Iterable[tuple[str, Tensor, int]]) -> None:
        found = [(name, tensor, index, entry(tensor, index).clone()) for name, tensor, index in places]
        self.places = [place for place in found if bool(torch.isfinite(place[3]))]
        self.stamps: Stamps | None = self._stamped()

    def _stamped(self) -> Stamps:
        return Stamps((t for _, t, *_ in self.places), (entry(t, index) for _, t, index, _ in self.places))

    def look_at(self, tensors: Mapping[str, Tensor]) -> None:
        """Look at the tensors of these names from now on; what they are to hold stays."""
        self.places = [(name, tensors[name], index, value) for name, _, index, value in self.places]
        self.stamps = None

    def changed(self, look_inside: bool) -> list[str]:
        """The names of the tensors that hold something else; looking inside in any case makes a GPU wait."""
        if self.stamps is not None and self.stamps.are_valid(look_inside):
            return []
        found = [name for name, t, index, value in self.places if not torch.equal(entry(t, index), value)]
        if not found:
            self.stamps = self._stamped()
        return found


def entry(tensor: Tensor, index: int) -> Tensor:
    """One entry of a tensor, by its number in row-major order, in the tensor's own memory: shape ()."""
    entry = tensor.detach()
    for size, place in zip(tensor.shape, torch.unravel_index(torch.tensor(index), tensor.shape), strict=True):
        entry = entry.select(0, int(place) % size)
    return entry


def can_be_looked_at() -> bool:
    """Whether tensors can be looked at: not while a call is recorded or tried out on tensors without values."""
    recorded = torch.jit.is_tracing() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    return not recorded and _get_current_dispatch_mode() is None
