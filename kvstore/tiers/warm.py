"""The warm pool: slabs of shared memory, the hub that every other medium copies to and from.

It is addressable rather than a spoke: nobody calls write or read on it, everybody gets views. It knows segments
and generations; which slot holds what is the core's business.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.protocol.slab import SlabGeometry, generations, write_header
from kvstore.tiers.base import SlabRange
from kvstore.tiers.segment import Segment


class SlabInfo(NamedTuple):
    """Geometry of a slab as a worker must know it; in bytes but `slots`."""

    slab_id: int
    segment_bytes: int
    slot_bytes: int
    slots: int
    data_offset: int


class _Slab:
    __slots__ = ("generations", "geometry", "populated", "segment")

    def __init__(self, slab_id: int, geometry: SlabGeometry) -> None:
        self.geometry = geometry
        self.segment = Segment(f"kvtier-slab-{slab_id}", geometry.segment_bytes)
        memory = self.segment.memory()
        write_header(memory, slab_id, geometry)
        self.generations = generations(memory, geometry.slots)
        self.populated = False


class WarmPool:
    """All slabs. make, populate and drop run outside the request path; view and set_generation are cheap."""

    name = "warm"

    def __init__(self, capacity_bytes: int, lock_pages: bool = True) -> None:
        """`capacity_bytes` is kept by whoever plans slabs; `lock_pages`: try to mlock them."""
        self.capacity_bytes = capacity_bytes
        self._slabs: dict[int, _Slab] = {}
        self._lock_pages = lock_pages
        self.lock_state = "pages not locked yet"
        self.populated_bytes = 0

    def make(self, slab_id: int, geometry: SlabGeometry) -> None:
        """Make a slab without touching its pages. Raises OSError where the machine refuses."""
        self._slabs[slab_id] = _Slab(slab_id, geometry)

    def populate(self, slab_id: int) -> None:
        """Take a slab's pages, and lock them where permitted. Safe beside its use.

        Raises:
            MemoryError: there are not enough pages.
        """
        slab = self._slabs.get(slab_id)
        if slab is None or slab.populated:
            return
        if self._lock_pages:
            refused = slab.segment.lock()
            self.lock_state = f"not mlocked: {refused}" if refused else "mlocked"
            self._lock_pages = not refused
        slab.segment.populate()
        slab.populated = True
        self.populated_bytes += slab.geometry.segment_bytes

    def drop(self, slab_id: int) -> None:
        """Give a slab's memory back at once, whoever still maps it."""
        slab = self._slabs.pop(slab_id)
        if slab.populated:
            self.populated_bytes -= slab.geometry.segment_bytes
        try:
            slab.segment.punch()
        finally:
            slab.segment.close()

    def set_generation(self, slab_id: int, slot: int, value: int) -> None:
        """Publish (or with 0 withdraw) a slot."""
        self._slabs[slab_id].generations[slot] = value

    def range_of(self, slab_id: int, slot: int, nbytes: int) -> SlabRange:
        """Where the first `nbytes` of a slot lie."""
        return SlabRange(slab_id, self._slabs[slab_id].geometry.offset(slot), nbytes)

    def view(self, place: SlabRange) -> NDArray[np.uint8]:
        """The bytes, writable, without a copy."""
        return self._slabs[place.slab_id].segment.array[place.offset : place.offset + place.nbytes]

    def info(self, slab_id: int) -> tuple[SlabInfo, int] | None:
        """Geometry and a read-only descriptor (the pool's own) of a slab, or None where it has gone."""
        slab = self._slabs.get(slab_id)
        if slab is None:
            return None
        shape = slab.geometry
        info = SlabInfo(slab_id, shape.segment_bytes, shape.slot_bytes, shape.slots, shape.data_offset)
        return info, slab.segment.read_only_fd()

    def writable_fd(self, slab_id: int) -> tuple[int, int] | None:
        """A duplicate of the owner's descriptor for an agent (the caller closes it), and the segment's size."""
        slab = self._slabs.get(slab_id)
        return None if slab is None else (os.dup(slab.segment.fd), slab.geometry.segment_bytes)

    def slab_ids(self) -> list[int]:
        """The slabs that live."""
        return list(self._slabs)

    def close(self) -> None:
        """Drop every slab."""
        for slab_id in list(self._slabs):
            self.drop(slab_id)
