"""Raw memory: mapping it, viewing it by address, locking it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np

# (address, bytes) of some memory.
Place = tuple[int, int]
_MADV_WIPEONFORK = 18  # asm-generic/mman-common.h; the module mmap does not name it


def map_memory(nbytes: int) -> mmap.mmap:
    """Map `nbytes` of private memory filled with zeros, at least one byte, in huge pages where the system allows."""
    # Shared memory would count as page cache, and would not get huge pages.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # fewer page faults; not available everywhere
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def memory_at(place: Place) -> np.ndarray:
    """Return a view of the memory at `place`, uint8 [bytes].

    The view does not keep the memory alive; its owner must.
    """
    address, nbytes = place
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)


def keep_from_forks(memory: mmap.mmap) -> None:
    """Give a forked child zeros in place of this memory, where the system can; no page is shared with the child.

    A direct read into a page that parent and child share could end in the child's copy of it: see open(2), O_DIRECT.
    """
    with contextlib.suppress(OSError, ValueError):
        memory.madvise(_MADV_WIPEONFORK)


def address_of(array: np.ndarray) -> int:
    """Return the address of an array's first byte."""
    address: int = array.__array_interface__["data"][0]
    return address


def lock_in_memory(address: int, nbytes: int) -> bool:
    """Lock memory so that it is not swapped out; return whether the system allowed it."""
    try:
        return bool(ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(nbytes)) == 0)
    except (OSError, AttributeError):
        return False
