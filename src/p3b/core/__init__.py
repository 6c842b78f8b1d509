"""Pure mathematics of the method: tensors in, values out. Nothing here knows a module, a file or a process group."""

from p3b.core import allocation, masks, schedule

__all__ = ["allocation", "masks", "schedule"]
