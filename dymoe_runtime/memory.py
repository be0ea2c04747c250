"""Memory by its address: mapped, and what is in it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np

# Address and bytes of memory.
Place = tuple[int, int]


def map_memory(nbytes: int) -> mmap.mmap:
    """Memory of this process alone, zeros, in large pages where the system has them; at least a byte."""
    # What is shared counts as cache, and has no large pages.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # fewer page faults; not everywhere to be had
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def memory_at(place: Place) -> np.ndarray:
    """uint8 [bytes], which whoever made the memory must keep."""
    address, nbytes = place
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


def address_of(array: np.ndarray) -> int:
    """Where the memory of an array begins."""
    address: int = array.__array_interface__["data"][0]
    return address


def lock_in_memory(address: int, nbytes: int) -> bool:
    """Keep so many bytes from being swapped out; False where the system does not allow it."""
    try:
        return ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) == 0
    except (OSError, AttributeError):
        return False
