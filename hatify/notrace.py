"""What timm registers as not to be traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def timm_modules() -> tuple[type[nn.Module], ...]:
    """Its ``notrace`` modules, if timm is in use."""
    if "timm" not in sys.modules:
        return ()
    from timm.layers import get_notrace_modules

    return tuple(get_notrace_modules())


def timm_functions() -> tuple[Callable[..., Any], ...]:
    """Its ``notrace`` functions: they look at sizes, but not at values, nor at how large sizes are."""
    if "timm" not in sys.modules:
        return ()
    from timm.layers import get_notrace_functions

    return tuple(get_notrace_functions())
