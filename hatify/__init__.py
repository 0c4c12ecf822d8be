"""hatify: convert any PyTorch network into one that learns task after task and forgets nothing."""

from hatify.census import Census, Entry
from hatify.convert import hatify
from hatify.errors import (
    CapacityWarning,
    CheckpointError,
    ConversionError,
    HatError,
    HatWarning,
    IsolationError,
    TaskError,
)
from hatify.extract import extract_task
from hatify.forget import forget_task
from hatify.model import HatModel
from hatify.policy import Policy
from hatify.saving import load, save
from hatify.schedule import MaskScale
from hatify.verify import verify_isolation
from hatify.weights import load_plain_state_dict

__all__ = [
    "CapacityWarning",
    "Census",
    "CheckpointError",
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
    "forget_task",
    "hatify",
    "load",
    "load_plain_state_dict",
    "save",
    "verify_isolation",
]
