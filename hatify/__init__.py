"""hatify: convert any PyTorch network into one that learns task after task and forgets nothing."""

from hatify.census import Census, Entry
from hatify.convert import hatify
from hatify.errors import ConversionError, HatError, HatWarning, IsolationError, TaskError
from hatify.extract import extract_task
from hatify.model import HatModel
from hatify.policy import Policy
from hatify.schedule import MaskScale
from hatify.verify import verify_isolation

__all__ = [
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
    "extract_task",
    "hatify",
    "verify_isolation",
]
