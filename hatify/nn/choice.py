"""Which task answers: one for everybody, or another one within a context, for one thread or asyncio task alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from torch import Tensor

#: What contexts have chosen, by the identity of the choice they stand in for. One variable serves all models, since
#: such a variable can be neither copied nor pickled.
_WITHIN: ContextVar[Mapping[int, tuple[int, Tensor | None]] | None] = ContextVar("hatify_task", default=None)


class Choice:
    """The task that answers, shared by everything in a model that depends on it."""

    def __init__(self, task: int = 0, of_samples: Tensor | None = None) -> None:
        self._default = task, of_samples

    @property
    def current(self) -> tuple[int, Tensor | None]:
        """The task that answers here, and the task of each sample."""
        within = _WITHIN.get()
        return self._default if within is None else within.get(id(self), self._default)

    @property
    def task(self) -> int:
        """The task that answers here."""
        return self.current[0]

    @property
    def of_samples(self) -> Tensor | None:
        """The task of each sample, int64, shape (batch,), where samples are answered by tasks of their own."""
        return self.current[1]

    def set(self, task: int, of_samples: Tensor | None = None) -> None:
        """Choose for everybody; where a context has chosen otherwise, for the rest of that context too."""
        self._default = task, of_samples
        within = _WITHIN.get()
        if within is not None and id(self) in within:
            _WITHIN.set({**within, id(self): self._default})

    def restorer(self) -> Callable[[], None]:
        """What puts back the choice as it is here and now."""
        default, within = self._default, _WITHIN.get()

        def put_back() -> None:
            self._default = default
            _WITHIN.set(within)

        return put_back

    @contextmanager
    def within(self, task: int, of_samples: Tensor | None = None) -> Iterator[None]:
        """Within the context, and in this thread or asyncio task alone, `task` answers."""
        token = _WITHIN.set({**(_WITHIN.get() or {}), id(self): (task, of_samples)})
        try:
            yield
        finally:
            # A generator may be closed in another context than it was started in, which has never heard of this.
            with suppress(ValueError):
                _WITHIN.reset(token)

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, self.current
