"""Ranges of the staging segment: who may write where, until the daemon has copied it out.

A range that a Put names stays taken until the answer has arrived, however late, or the session ends: before that
the daemon may be reading it. A range whose Put was answered too late is *suspect*, and the next Put from it must
carry checksums, so that a daemon which reads it at the wrong moment notices.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kvstore.protocol.slab import PAGE_BYTES, align_up
from kvstore_client._lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PUMP_EVERY_S = 0.005


class Range(NamedTuple):
    """Bytes of the staging segment."""

    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        """Offset of the byte after the last one."""
        return self.offset + self.nbytes


class RangeSet:
    """Disjoint ranges in order; neighbours are joined. A few dozen at most, so a list is the fastest structure."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []

    def add(self, fresh: Range) -> None:
        """Put a range in; what of it is in already stays once."""
        kept: list[Range] = []
        for held in self._ranges:
            if held.stop < fresh.offset or fresh.stop < held.offset:
                kept.append(held)
            else:
                first = min(held.offset, fresh.offset)
                fresh = Range(first, max(held.stop, fresh.stop) - first)
        self._ranges = sorted([*kept, fresh])

    def remove(self, gone: Range) -> None:
        """Take a range out; what of it is not in is no matter."""
        kept: list[Range] = []
        for held in self._ranges:
            before = Range(held.offset, min(held.stop, gone.offset) - held.offset)
            first = max(held.offset, gone.stop)
            after = Range(first, held.stop - first)
            kept.extend(part for part in (before, after) if part.nbytes > 0)
        self._ranges = kept

    def touches(self, other: Range) -> bool:
        """Whether a byte of `other` is in."""
        return any(held.offset < other.stop and other.offset < held.stop for held in self._ranges)

    def first_fit(self, nbytes: int) -> Range | None:
        """The first place for so many bytes; None if no range is that long."""
        return next((Range(held.offset, nbytes) for held in self._ranges if held.nbytes >= nbytes), None)


class Staging:
    """The staging segment of one session. Any thread may use it.

    Attributes:
        memory: the segment's bytes, writable.
    """

    def __init__(self, memory: NDArray[np.uint8], pump: Callable[[], None]) -> None:
        """Make the whole segment free.

        Args:
            memory: the mapped segment.
            pump: takes in answers that have arrived: a range may come free by one that nobody waits for.
        """
        self.memory = memory
        self._pump = pump
        self._changed = threading.Condition()
        self._free = RangeSet()
        self._free.add(Range(0, memory.nbytes // PAGE_BYTES * PAGE_BYTES))
        self._suspect = RangeSet()

    @property
    def nbytes(self) -> int:
        """Size of the segment."""
        return self.memory.nbytes

    def take(self, nbytes: int, deadline_s: float) -> Range | None:
        """A free range of whole pages for so many bytes; None if none came free in time (0: do not wait)."""
        size = align_up(max(nbytes, 1), PAGE_BYTES)
        while True:
            with self._changed:
                place = self._free.first_fit(size)
                if place is not None:
                    self._free.remove(place)
                    return place
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or size > self.memory.nbytes:
                    return None
                self._changed.wait(min(remaining_s, _PUMP_EVERY_S))
            self._pump()

    def give(self, place: Range, *, is_suspect: bool = False) -> None:
        """Make a range free again.

        Args:
            place: from take().
            is_suspect: its Put was answered after the caller had given up.
        """
        with self._changed:
            if is_suspect:
                self._suspect.add(place)
            self._free.add(place)
            self._changed.notify_all()

    def is_suspect(self, place: Range) -> bool:
        """Whether the next Put from this range needs checksums."""
        with self._changed:
            return self._suspect.touches(place)

    def clear_suspicion(self, place: Range) -> None:
        """A Put with checksums from this range was answered in time."""
        with self._changed:
            self._suspect.remove(place)

    def rows(self, place: Range, count: int, stride: int, nbytes: int) -> NDArray[np.uint8]:
        """(count, nbytes) bytes at the front of a range, one row every `stride` bytes."""
        return self.memory[place.offset : place.offset + count * stride].reshape(count, stride)[:, :nbytes]
