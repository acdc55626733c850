"""A sealed memory segment that this process owns and lets others map.

A memfd of mode 0600, sealed against shrinking and growing, so that no peer can turn a mapping into SIGBUS by
truncating it. Not sealed with F_SEAL_FUTURE_WRITE: a restarted agent could then never map it for writing, nor
could the owner punch holes. Peers that must not write get a descriptor that was reopened read-only.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_POPULATE_WRITE = 23
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
# While pages are taken the kernel holds the address space's lock, and a thread that then grows the heap waits for it
# with the GIL held: steps of 8 MiB stalled every thread for 2 to 12 ms, again and again.
_POPULATE_STEP_BYTES = 256 << 10
_MLOCK_ONFAULT = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mlock2.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Segment:
    """Shared memory of a fixed size, mapped for writing here."""

    def __init__(self, name: str, nbytes: int) -> None:
        """Make the segment; its pages are taken at first touch (see populate).

        Raises:
            OSError: no memory or no descriptors.
        """
        self.nbytes = nbytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self.fd, 0o600)
            os.ftruncate(self.fd, nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self.fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(self.fd)
            raise
        self.array: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._read_only_fd = -1

    def read_only_fd(self) -> int:
        """A descriptor that allows reading only; the segment's own, closed with it."""
        if self._read_only_fd < 0:
            self._read_only_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        return self._read_only_fd

    def memory(self) -> memoryview:
        """The whole segment, writable."""
        return memoryview(self._map)

    def populate(self) -> bool:
        """Take every page now, without changing a byte; False where the kernel cannot (before Linux 5.14).

        Raises:
            MemoryError: there are not enough pages.
        """
        address = self.array.ctypes.data
        for start in range(0, self.nbytes, _POPULATE_STEP_BYTES):
            step = min(_POPULATE_STEP_BYTES, self.nbytes - start)
            # Through ctypes, which drops the GIL; mmap.madvise keeps it.
            if _libc.madvise(address + start, step, _MADV_POPULATE_WRITE) != 0:
                reason = ctypes.get_errno()
                if reason == errno.EINVAL:
                    return False
                raise MemoryError(f"cannot populate {self.nbytes} bytes: {os.strerror(reason)}")
        return True

    def lock(self) -> str:
        """Lock the pages into RAM as they are taken, so before populate; returns why not, or an empty string.

        To lock pages that are there already takes the address space's lock for writing for as long as that lasts.
        """
        if _libc.mlock2(self.array.ctypes.data, self.nbytes, _MLOCK_ONFAULT) == 0:
            return ""
        return os.strerror(ctypes.get_errno())

    def punch(self) -> None:
        """Give every page back at once, also from under peers that still map it: they read zeros from now on."""
        if _libc.fallocate(self.fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, 0, self.nbytes) != 0:
            raise OSError(ctypes.get_errno(), "cannot punch a hole")

    def close(self) -> None:
        """Close the descriptors. The mapping goes with the last array over it. Idempotent."""
        for fd in (self.fd, self._read_only_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self._read_only_fd = -1
