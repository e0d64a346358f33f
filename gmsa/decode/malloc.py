"""What glibc does with freed memory. It serves every process, so commands ask for this, not the library."""

import contextlib
import ctypes

KEPT = 1 << 30  # bytes
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt


def keep_freed_memory(kept: int = KEPT) -> None:
    """Keep freed memory instead of returning it: every layer frees and takes the same few megabytes.

    Measured on one core with the default model: compressing takes a fifth less time, which went into page faults. In
    training, which frees and takes gigabytes, a step on two cores takes two thirds of the time. A server or notebook
    that computes on the CPU may want to call this, too. Does nothing where there is no glibc.

    Args:
        kept: bytes at the heap's end that are never handed back; -1: all of it, until `return_freed_memory`.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP_THRESHOLD, KEPT)  # serve blocks up to this from the heap (2**30 is the most it takes)
        libc.mallopt(TRIM_THRESHOLD, kept)  # and hand back only what its end holds beyond this


def return_freed_memory() -> None:
    """Hand free pages back once: kept for good, a heap of ever-changing shapes fragments and grows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
