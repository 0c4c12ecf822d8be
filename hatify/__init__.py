"""hatify: convert any PyTorch network into one that learns task after task and forgets nothing."""

from hatify.census import Census, Entry
from hatify.convert import hatify
from hatify.errors import CapacityWarning, ConversionError, HatError, HatWarning, IsolationError, TaskError
from hatify.model import HatModel
from hatify.policy import Policy
from hatify.schedule import MaskScale
from hatify.verify import verify_isolation

__all__ = [
    "CapacityWarning",
    "Census",
    "ConversionError",
    "Entry",
    "HatError",
    "HatModel",
    "HatWarning",
    "IsolationError",
    "MaskScale",
    "Policy",
    "TaskError",
    "hatify",
    "verify_isolation",
]
