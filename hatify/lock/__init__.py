"""What finished tasks own, and how it is kept."""

from hatify.lock.entries import locked_entries, named_tensors, owned_by_tasks
from hatify.lock.guard import Guard
from hatify.lock.policy import Hard, LockPolicy

__all__ = ["Guard", "Hard", "LockPolicy", "locked_entries", "named_tensors", "owned_by_tasks"]
