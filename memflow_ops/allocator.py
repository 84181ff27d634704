"""How the process keeps memory that tensors on a CPU have freed."""

from __future__ import annotations

import ctypes

# Of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets the process keep freed memory for its next tensors; False where that is not to be set (glibc alone has it).

    By default glibc gives large blocks back at once, so that every pass takes page faults for the same memory again: a
    sixth of a chunk's time in bfloat16. The process then stays as large as it has been. What PyTorch's guide to
    performance on CPUs wants other allocators for.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no handle of the process
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _MOST)) and bool(mallopt(_TRIM_THRESHOLD, _MOST))
