"""The slabs as a worker sees them, for workers that cannot: mapped read-only, read by generation.

The bytes of a block are taken as an attached worker takes them (generation, copy, barrier, generation), so reading
for a remote worker needs nothing of the engine that it would not give a local one.
"""

from __future__ import annotations

import mmap
import os
import threading

from kvstore.protocol.errors import LeaseExpired, ProtocolMismatch
from kvstore.protocol.slab import GENERATION_BYTES, HEADER_BYTES, MAGIC, SlabGeometry, read_header
from kvstore.transport.engine import DataEngine, SessionView


class SlabView:
    """One mapped slab."""

    __slots__ = ("_geometry", "_memory")

    def __init__(self, memory: memoryview) -> None:
        self._geometry: SlabGeometry = read_header(memory)[1]
        self._memory = memory

    @property
    def lives(self) -> bool:
        """Whether its owner has not punched it yet."""
        return self._memory[: len(MAGIC)] == MAGIC

    def generation(self, slot: int) -> bytes:
        """A slot's generation as it is now, u64 in native order."""
        at = HEADER_BYTES + slot * GENERATION_BYTES
        return self._memory[at : at + GENERATION_BYTES].tobytes()

    def bytes_of(self, slot: int, offset: int, nbytes: int) -> memoryview:
        """A piece of a slot, where it lies."""
        at = self._geometry.offset(slot) + offset
        return self._memory[at : at + nbytes]


class SlabViews:
    """The slabs that were read so far, shared by all remote sessions: a mapping each would cost its page tables."""

    def __init__(self, engine: DataEngine) -> None:
        self._engine = engine
        self._views: dict[int, SlabView] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._views)

    def get(self, session: SessionView, slab_id: int) -> SlabView:
        """A slab that a lease of the session names.

        Raises:
            LeaseExpired: it lives no more.
        """
        view = self._views.get(slab_id)
        if view is not None:
            return view
        with self._lock:
            view = self._views.get(slab_id)
            if view is None:
                view = self._views[slab_id] = self._map(session, slab_id)
            return view

    def drop_retired(self) -> None:
        """Forget slabs that their owner has retired; each is unmapped when no reader uses it."""
        with self._lock:
            for slab_id in [slab_id for slab_id, view in self._views.items() if not view.lives]:
                del self._views[slab_id]

    def close(self) -> None:
        """Forget all."""
        with self._lock:
            self._views.clear()

    def _map(self, session: SessionView, slab_id: int) -> SlabView:
        found = self._engine.map_slabs(session, [slab_id])
        if not found:
            raise LeaseExpired(f"slab {slab_id} was retired: the lease had expired")
        info, fd = found[0]
        try:
            return SlabView(memoryview(mmap.mmap(fd, info.segment_bytes, mmap.MAP_SHARED, mmap.PROT_READ)))
        except ProtocolMismatch as error:
            raise LeaseExpired(f"slab {slab_id} was retired: the lease had expired") from error
        finally:
            os.close(fd)


def map_staging(engine: DataEngine, session: SessionView) -> memoryview:
    """The session's own staging segment, writable; empty where it has none."""
    for info, fd in engine.map_slabs(session, [0]):
        try:
            return memoryview(mmap.mmap(fd, info.segment_bytes))
        finally:
            os.close(fd)
    return memoryview(b"")
