"""What the process does with memory that tensors on a CPU have freed."""

from __future__ import annotations

import ctypes

# The numbers of two parameters of mallopt (glibc's malloc.h), and their highest value.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HIGHEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next tensors. Returns whether this could be set: only glibc has it.

    By default glibc returns large blocks to the system at once, so that every pass of a model takes page faults for the
    same memory again, which costs a sixth of a chunk's time in bfloat16. With this setting the process stays as large
    as it has ever been. PyTorch's guide to performance on CPUs recommends other allocators for the same reason.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # A TypeError comes from Windows, which has no handle of the process.
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _HIGHEST)) and bool(mallopt(_TRIM_THRESHOLD, _HIGHEST))
