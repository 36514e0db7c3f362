"""What large bodies took goes back to the kernel once it is free."""

from __future__ import annotations

import ctypes
from typing import Final

# Of <malloc.h>.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3


def give_memory_back() -> None:
    """Large blocks go back to the kernel when they are freed, with glibc; nothing without it.

    Of itself glibc raises both thresholds with the blocks it sees freed, up to 32 and 64 MiB:
    after bodies of such sizes, at once and some for long, a server kept a gigabyte.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 24)
