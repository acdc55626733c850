"""Shared memory by address: map, populate and unmap segments.

Python's own mmap keeps a duplicate of the descriptor for as long as the mapping lives (before 3.13): at 64 MiB a
slab a large warm tier would use up a process's 1,024 descriptors. Here the mapping alone remains.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import TYPE_CHECKING

from kvstore.protocol.errors import ProtocolMismatch, Unavailable
from kvstore_client._lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

POPULATE_STEP_BYTES = 8 << 20
_MADV_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_segment(fd: int, nbytes: int, *, is_writable: bool) -> NDArray[np.uint8]:
    """Map a segment as bytes; it is unmapped when the last array over it is gone. The descriptor may be closed.

    Raises:
        ProtocolMismatch: the segment is shorter than that, so reading it would be a SIGBUS.
        Unavailable: the kernel refuses the mapping.
    """
    size = os.fstat(fd).st_size
    if nbytes < 1 or size < nbytes:
        raise ProtocolMismatch(f"a shared segment of {size} bytes was announced with {nbytes}")
    access = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    address = _libc.mmap(None, nbytes, access, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise Unavailable(f"cannot map {nbytes} bytes of shared memory: {os.strerror(ctypes.get_errno())}")
    owner = bytes_at(address, nbytes)
    # Not at exit: a daemon thread may still be copying, and the kernel unmaps anyway.
    weakref.finalize(owner, _libc.munmap, address, nbytes).atexit = False
    array = np.frombuffer(memoryview(owner), np.uint8)
    array.flags.writeable = is_writable
    return array


def bytes_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The bytes at an address, as an object with the buffer protocol; nothing keeps the memory alive."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def populate_read(array: NDArray[np.uint8], first: int) -> bool:
    """Enter the pages of one step of a mapping into the page table; False if the kernel cannot.

    The first read of a page costs a fault: reads of pages not entered yet ran at 0.31 of the others. The GIL is
    free meanwhile. In steps, as one call for 2 GiB stalled the other threads for seconds.

    Args:
        array: a whole mapping from map_segment().
        first: where the step begins, a multiple of POPULATE_STEP_BYTES.
    """
    nbytes = min(POPULATE_STEP_BYTES, array.nbytes - first)
    return bool(_libc.madvise(array.ctypes.data + first, nbytes, _MADV_POPULATE_READ) == 0)
