"""Schedules of the mask scale s: Equations 4 and 6."""

from __future__ import annotations

import math
from collections.abc import Callable

from hatify.model import HatModel


def linear(progress: float, s_max: float) -> float:
    """Equation 4: from 1/s_max to s_max."""
    return 1 / s_max + (s_max - 1 / s_max) * progress


def cosine(progress: float, s_max: float) -> float:
    """Equation 6: from s_max down to nearly 0 and back, never below 1/s_max."""
    return max(s_max / 2 * (1 + math.cos(2 * math.pi * progress)), 1 / s_max)


def exponential(progress: float, s_max: float) -> float:
    """From 1/s_max to s_max by equal factors."""
    return float(s_max ** (2 * progress - 1))


def constant(progress: float, s_max: float) -> float:
    """s_max throughout."""
    return s_max


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "linear": linear,
    "cosine": cosine,
    "exponential": exponential,
    "constant": constant,
}


class MaskScale:
    """Sets a model's mask scale s for every batch, in periods of `steps` batches (usually one epoch).

    Args:
        model: the converted model; its ``s_max`` bounds the scale.
        steps: batches per period, at least 1. After the last one, the next period begins.
        schedule: ``"cosine"`` (Eq. 6), ``"linear"`` (Eq. 4), ``"exponential"``, ``"constant"``, or a function of
            (progress in [0, 1], s_max).

    The scale of the first batch is set on construction; call `step` after every batch.

    Raises:
        ValueError: `steps` is not positive or `schedule` is unknown.
    """

    def __init__(self, model: HatModel, steps: int, schedule: str | Callable[[float, float], float] = "cosine") -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {schedule!r}; choose from {', '.join(map(repr, SCHEDULES))}")
        self.model = model
        self.steps = steps
        self.schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.batch = 0
        self._apply()

    def step(self) -> None:
        """Move on to the next batch."""
        self.batch = (self.batch + 1) % self.steps
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """What is needed to go on in the middle of a period."""
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.batch = state["batch"]
        self._apply()

    def _apply(self) -> None:
        progress = self.batch / (self.steps - 1) if self.steps > 1 else 1.0
        self.model.mask_scale = self.schedule(progress, self.model.s_max)
