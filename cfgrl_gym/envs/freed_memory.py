"""Giving memory that was freed back to the system."""

import ctypes


def give_back_freed_memory() -> None:
    """Do so where the C library can (glibc's `malloc_trim`); elsewhere nothing.

    glibc keeps freed blocks for itself, scattered ones for ever: a process that closes a simulator
    and builds another, over and over, would slowly grow by what lies in between.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
