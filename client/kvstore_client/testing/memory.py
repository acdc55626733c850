"""The fake daemon's own side of shared memory: slabs and staging segments in sealed memfds."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
from numpy.typing import NDArray

from kvstore.protocol.slab import GENERATION_BYTES, HEADER_BYTES, SlabGeometry, write_header
from kvstore.v1 import kvstore_pb2 as pb

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Segment:
    """A sealed memfd, mapped writable here.

    Attributes:
        fd: to pass on; read-only where the receiver must not write.
        memory: its bytes.
    """

    def __init__(self, nbytes: int, *, is_shared_writable: bool) -> None:
        fd = os.memfd_create("kvstore-fake", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        os.fchmod(fd, 0o600)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)
        if is_shared_writable:
            self.fd = fd
        else:
            self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(fd)

    def close(self) -> None:
        """Close the descriptor; the memory goes when the last mapping does."""
        os.close(self.fd)


class FakeSlab:
    """A slab with its free slots."""

    def __init__(self, slab_id: int, geometry: SlabGeometry) -> None:
        self.slab_id = slab_id
        self.geometry = geometry
        self.segment = Segment(geometry.segment_bytes, is_shared_writable=False)
        memory = self.segment.memory
        write_header(memory.data, slab_id, geometry)
        self.generations = memory[HEADER_BYTES : HEADER_BYTES + GENERATION_BYTES * geometry.slots].view(np.uint64)
        self.free = list(range(geometry.slots - 1, -1, -1))

    def row(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of one slot."""
        first = self.geometry.offset(slot)
        return self.segment.memory[first : first + nbytes]

    def info(self) -> pb.SlabInfo:
        """What MapSlabs says of it."""
        cut = self.geometry
        return pb.SlabInfo(
            slab_id=self.slab_id,
            segment_bytes=cut.segment_bytes,
            slot_bytes=cut.slot_bytes,
            slots=cut.slots,
            data_offset=cut.data_offset,
        )


class SlotPool:
    """Slots of all size classes, within a budget. The store's lock guards it."""

    def __init__(self, warm_bytes: int, slab_bytes: int) -> None:
        self.slabs: dict[int, FakeSlab] = {}
        self._warm_bytes = warm_bytes
        self._slab_bytes = slab_bytes
        self._generation = 0
        self._next_id = 1

    def take(self, slot_bytes: int) -> tuple[FakeSlab, int] | None:
        """A free slot; None if the budget is used up."""
        for slab in self.slabs.values():
            if slab.geometry.slot_bytes == slot_bytes and slab.free:
                return slab, slab.free.pop()
        geometry = SlabGeometry.for_class(slot_bytes, self._slab_bytes)
        used = sum(slab.geometry.segment_bytes for slab in self.slabs.values())
        if used + geometry.segment_bytes > self._warm_bytes:
            return None
        slab = FakeSlab(self._next_id, geometry)
        self._next_id += 1
        self.slabs[slab.slab_id] = slab
        return slab, slab.free.pop()

    def give(self, slab: FakeSlab, slot: int) -> None:
        """Free a slot; nobody may read it from now on."""
        slab.generations[slot] = 0
        slab.free.append(slot)

    def new_generation(self) -> int:
        """A number never used before."""
        self._generation += 1
        return self._generation

    def retire(self, slab_id: int) -> None:
        """Take a slab away for good; its slots are no longer free."""
        slab = self.slabs.pop(slab_id)
        slab.generations[:] = 0
        slab.segment.close()

    def close(self) -> None:
        """Close every descriptor."""
        for slab_id in list(self.slabs):
            self.slabs.pop(slab_id).segment.close()
