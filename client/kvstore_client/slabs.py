"""The daemon's warm slabs as this process sees them: mapped read-only, lazily, and dropped when retired."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from kvstore.protocol.errors import DeadlineExceeded, ProtocolMismatch
from kvstore.protocol.frames import MAX_FDS_PER_MESSAGE
from kvstore.protocol.slab import GENERATION_BYTES, HEADER_BYTES, read_header
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np
from kvstore_client.memory import POPULATE_STEP_BYTES, map_segment, populate_read
from kvstore_client.stream import close_all

if TYPE_CHECKING:
    from numpy.typing import NDArray

STAGING_SLAB_ID = 0


class Slab:
    """One mapped slab.

    Attributes:
        slab_id: its number.
        slots: how many.
        slot_bytes: of each.
        rows: (slots, slot_bytes) bytes, read-only.
    """

    __slots__ = ("__weakref__", "_generations", "is_populated", "memory", "rows", "slab_id", "slot_bytes", "slots")

    def __init__(self, info: pb.SlabInfo, memory: NDArray[np.uint8]) -> None:
        """Check the segment against what the daemon said of it.

        Raises:
            ProtocolMismatch: it is another slab, or cut in another way.
        """
        slab_id, cut = read_header(memory.data)
        said = (info.slab_id, info.slot_bytes, info.slots, info.data_offset)
        if said != (slab_id, cut.slot_bytes, cut.slots, cut.data_offset):
            raise ProtocolMismatch(f"slab {slab_id} is not cut as announced: {cut}, announced {said}")
        self.slab_id = slab_id
        self.slots = cut.slots
        self.slot_bytes = cut.slot_bytes
        self.memory = memory
        self.rows = memory[cut.data_offset : cut.data_offset + cut.slots * cut.slot_bytes].reshape(cut.slots, -1)
        self._generations = memory.data[HEADER_BYTES : HEADER_BYTES + GENERATION_BYTES * cut.slots]
        self.is_populated = False

    def generations_of(self, slot: int, slots: int) -> bytes:
        """The generations of consecutive slots as they are now, u64 each in native order.

        The daemon changes them under our eyes, each by one aligned store; this copies them once.
        """
        return self._generations[slot * GENERATION_BYTES : (slot + slots) * GENERATION_BYTES].tobytes()


class SlabSource(Protocol):
    """Where slabs come from: the attach socket."""

    def map_slabs(self, request: pb.MapSlabsRequest, deadline_s: float) -> tuple[pb.MapSlabsResponse, list[int]]:
        """See LocalLink.map_slabs."""


class SlabCache:
    """The slabs that a session has mapped. Any thread may use it."""

    def __init__(self, link: SlabSource) -> None:
        self._link = link
        self._slabs: dict[int, Slab] = {}
        self._map_lock = threading.Lock()
        self._is_closed = False
        self._to_populate: deque[Slab] = deque()
        self._populating = threading.Lock()  # held by the one thread that does

    def __len__(self) -> int:
        return len(self._slabs)

    def get(self, slab_id: int) -> Slab | None:
        """A mapped slab; None if it is not mapped (any more)."""
        return self._slabs.get(slab_id)

    def ensure(self, slab_ids: Iterable[int], deadline_s: float) -> None:
        """Map those of the slabs that are not mapped yet and that still live.

        Raises:
            DeadlineExceeded: not in time.
            Unavailable: the session is over, or this process is out of descriptors or address space.
            ProtocolMismatch: a segment is not what the daemon said it is.
        """
        missing = [slab_id for slab_id in slab_ids if slab_id not in self._slabs]
        if not missing:
            return
        if not self._map_lock.acquire(timeout=max(deadline_s - time.monotonic(), 0)):
            raise DeadlineExceeded("another thread of this client is still mapping slabs")
        try:
            missing = [slab_id for slab_id in missing if slab_id not in self._slabs]
            for first in range(0, len(missing), MAX_FDS_PER_MESSAGE):
                self._map(missing[first : first + MAX_FDS_PER_MESSAGE], deadline_s)
        finally:
            self._map_lock.release()

    def map_staging(self, nbytes: int, deadline_s: float) -> NDArray[np.uint8]:
        """Map the session's own staging segment, writable. Raises as ensure() does."""
        reply, fds = self._link.map_slabs(pb.MapSlabsRequest(slab_ids=[STAGING_SLAB_ID]), deadline_s)
        try:
            if len(reply.slabs) != 1 or reply.slabs[0].segment_bytes < nbytes:
                raise ProtocolMismatch(f"the daemon gave {nbytes} bytes of staging and then no such segment")
            return map_segment(fds[0], nbytes, is_writable=True)
        finally:
            close_all(fds)

    def drop(self, slab_ids: Iterable[int]) -> None:
        """Forget slabs that the daemon has retired; each is unmapped when no lease and no view uses it."""
        for slab_id in slab_ids:
            self._slabs.pop(slab_id, None)

    def close(self) -> None:
        """Forget all; later calls of ensure() map nothing."""
        self._is_closed = True
        self._to_populate.clear()
        self._slabs.clear()

    def populate(self, slab: Slab) -> None:
        """Enter a slab's pages into the page table, on a background thread; never required."""
        slab.is_populated = True
        self._to_populate.append(slab)
        if self._populating.acquire(blocking=False):
            try:
                threading.Thread(target=self._populate, name="kvstore-client-populate", daemon=True).start()
            except RuntimeError:  # no thread to be had; the first reads are slower then
                self._populating.release()

    def _map(self, slab_ids: Sequence[int], deadline_s: float) -> None:
        reply, fds = self._link.map_slabs(pb.MapSlabsRequest(slab_ids=slab_ids), deadline_s)
        try:
            for info, fd in zip(reply.slabs, fds, strict=True):
                if info.slab_id in slab_ids and not self._is_closed:
                    self._slabs[info.slab_id] = Slab(info, map_segment(fd, info.segment_bytes, is_writable=False))
        finally:
            close_all(fds)

    def _populate(self) -> None:
        try:
            while self._to_populate:
                slab = self._to_populate.popleft()
                for first in range(0, slab.memory.nbytes, POPULATE_STEP_BYTES):
                    # A retired slab has no generation left. Its memory is a hole, which a read would fill again.
                    if (
                        self._is_closed
                        or not any(slab.generations_of(0, slab.slots))
                        or not populate_read(slab.memory, first)
                    ):
                        break
        except IndexError:  # close() emptied the queue meanwhile
            pass
        finally:
            self._populating.release()
