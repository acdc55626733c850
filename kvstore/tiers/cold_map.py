"""The payloads' file as memory: where a value lies, and having its pages before anybody touches them.

A page fault on a truncated file is a SIGBUS, and one on a disk that fails too: the process dies. MADV_POPULATE_READ
answers EFAULT instead. It also takes all pages of a value in one call, without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.cold_file import EnvironmentFile
from kvstore.tiers.cold_records import INLINE_BYTES, OVERFLOW_HEADER_BYTES, PAGE_BYTES

_MADV_POPULATE_READ: Final = 22  # since Linux 5.14
_EHWPOISON: Final = 133
_PAGE_NUMBER_BYTES = 8
_KIND_AT, _OVERFLOW = 10, 4  # where a page's head says what it is

_libc = ctypes.CDLL(None, use_errno=True)  # whose calls drop the interpreter's lock
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class CutFileError(Exception):
    """The file is shorter than it must be."""


class UnreadablePagesError(Exception):
    """The disk does not give some of a value's pages."""


def page_of(value: NDArray[np.uint8]) -> int:
    """First page of a value as LMDB hands it out; 0 where it has no pages of its own."""
    if value.nbytes <= INLINE_BYTES:
        return 0
    head = ctypes.string_at(value.ctypes.data - OVERFLOW_HEADER_BYTES, OVERFLOW_HEADER_BYTES)
    return int.from_bytes(head[:_PAGE_NUMBER_BYTES], "little") if head[_KIND_AT] & _OVERFLOW else 0


class ValueMap:
    """Pages of an environment that is open. Any thread."""

    def __init__(self, file: EnvironmentFile) -> None:
        self._file = file
        self._base = 0  # where page 0 is mapped; LMDB does not say, the first value that is read does
        self._populates = True

    def learn(self, value: NDArray[np.uint8]) -> None:
        """Find out from a value of a read transaction where the file is mapped."""
        if not self._base and (page := page_of(value)):
            self._base = value.ctypes.data - OVERFLOW_HEADER_BYTES - page * PAGE_BYTES

    def advise(self, page: int, page_bytes: int) -> None:
        """Have pages read from the disk, without waiting for it."""
        os.posix_fadvise(self._file.fd, page * PAGE_BYTES, page_bytes, os.POSIX_FADV_WILLNEED)

    def populate(self, page: int, page_bytes: int) -> None:
        """Take pages; what lies there may be touched afterwards.

        Raises:
            CutFileError: the file ends before they do.
            UnreadablePagesError: the disk does not give them.
        """
        if not self._populates or not self._base:
            return  # the length of the file was checked before, which is what there is without MADV_POPULATE_READ
        if _libc.madvise(self._base + page * PAGE_BYTES, page_bytes, _MADV_POPULATE_READ) == 0:
            return
        reason = ctypes.get_errno()
        if reason == errno.EINVAL:
            self._populates = False
        elif reason in (errno.EFAULT, _EHWPOISON):
            if os.fstat(self._file.fd).st_size < page * PAGE_BYTES + page_bytes:
                raise CutFileError(f"{self._file.path} ends before page {page + page_bytes // PAGE_BYTES}")
            raise UnreadablePagesError(f"page {page} and those behind it: {os.strerror(reason)}")
