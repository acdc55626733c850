"""The warm slabs as an agent sees them: mapped on command, resolved by number."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvstore.protocol.errors import InvalidRequest, NotFound
from kvstore.tiers.base import SlabMemory, SlabRange

_CHUNK_BYTES = 256 << 10
_MADV_POPULATE_WRITE = 23  # since Linux 5.14

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedSlabs(SlabMemory):
    """The SlabMemory of an agent; safe to use from any thread.

    A mapping ends when it is unmapped and the last view of it is gone, so a view never points at unmapped memory.
    """

    def __init__(self) -> None:
        self.on_unmap: Callable[[int], None] = (
            _nothing  # told of a slab before it goes: a driver may have registered it
        )
        self._lock = threading.Lock()
        self._slabs: dict[int, NDArray[np.uint8]] = {}
        self._touched: dict[int, bytearray] = {}  # by chunk: whether this process has its pages

    def map(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        """Map a segment read-write; the caller keeps `fd` and may close it afterwards.

        Raises:
            InvalidRequest: the number is taken, or the file is shorter than `segment_bytes` (a touch behind its
                end would be SIGBUS).
            OSError: the kernel refuses the mapping.
        """
        have = os.fstat(fd).st_size
        if not 0 < segment_bytes <= have:
            raise InvalidRequest(f"slab {slab_id}: segment of {segment_bytes} bytes in a file of {have} bytes")
        with self._lock:
            if slab_id in self._slabs:
                raise InvalidRequest(f"slab {slab_id} is mapped already")
            segment = mmap.mmap(fd, segment_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._slabs[slab_id] = np.frombuffer(segment, np.uint8)
            self._touched[slab_id] = bytearray(-(-segment_bytes // _CHUNK_BYTES))

    def unmap(self, slab_id: int) -> None:
        """Drop a slab; the pages go with the last view of it.

        Raises:
            NotFound: no such slab.
        """
        self.on_unmap(slab_id)
        with self._lock:
            if self._slabs.pop(slab_id, None) is None:
                raise NotFound(f"slab {slab_id} is not mapped")
            del self._touched[slab_id]

    def check(self, place: SlabRange) -> None:
        """Refuse a range that leaves its slab. A slab that is not mapped is the tier's to answer, block by block.

        Raises:
            InvalidRequest: the range is empty or not wholly inside its slab.
        """
        slab = self._slabs.get(place.slab_id)
        if slab is not None and not _inside(place, slab):
            raise InvalidRequest(f"slab {place.slab_id}: {place.nbytes} bytes at {place.offset} of {slab.size}")

    def view(self, place: SlabRange) -> NDArray[np.uint8]:
        """The bytes of a range, writable, without a copy.

        Raises:
            KeyError: no such slab, or the range is not wholly inside it.
        """
        slab = self._slabs[place.slab_id]
        if not _inside(place, slab):
            raise KeyError(place)
        self._touch(place, slab)
        return slab[place.offset : place.offset + place.nbytes]

    def segment(self, slab_id: int) -> NDArray[np.uint8]:
        """Every byte of a slab, writable, without a copy. Raises KeyError for one that is not mapped."""
        return self._slabs[slab_id]

    def close(self) -> None:
        """Drop every slab; idempotent."""
        with self._lock:
            self._slabs.clear()
            self._touched.clear()

    def _touch(self, place: SlabRange, slab: NDArray[np.uint8]) -> None:
        """Map the pages of a range at its first use: one call where each page would be a fault of its own."""
        touched = self._touched[place.slab_id]
        first, stop = place.offset // _CHUNK_BYTES, -(-(place.offset + place.nbytes) // _CHUNK_BYTES)
        if touched.find(0, first, stop) < 0:
            return
        start, end = first * _CHUNK_BYTES, min(stop * _CHUNK_BYTES, slab.size)
        _libc.madvise(slab.ctypes.data + start, end - start, _MADV_POPULATE_WRITE)  # where it cannot, pages fault
        touched[first:stop] = b"\1" * (stop - first)


def _nothing(_slab_id: int) -> None:
    return


def _inside(place: SlabRange, slab: NDArray[np.uint8]) -> bool:
    return place.nbytes > 0 and 0 <= place.offset <= slab.size - place.nbytes
