"""What hatify raises and warns with."""


def listed(names: list[str], kind: str = "", most: int = 5) -> str:
    """The first few of many names, for a message: ``a, b and 3 more layers``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more {kind}".rstrip() if names[most:] else "")


class HatError(RuntimeError):
    """Base class of every error hatify raises on purpose."""


class ConversionError(HatError):
    """A network cannot be converted; the message names the module, what was found, and what to do."""


class TaskError(HatError):
    """Tasks were begun, ended, selected or trained in an order that cannot be right."""


class IsolationError(HatError):
    """A finished task's outputs would change, or have changed."""


class CheckpointError(HatError, ValueError):
    """A checkpoint cannot be read, does not fit the network, or cannot be written; the message names the file."""


class HatWarning(UserWarning):
    """Something a user should know about that does not stop the work."""


class CapacityWarning(HatWarning):
    """A layer has no feature left that is free of finished tasks: a new task can reuse them, but not change them."""
