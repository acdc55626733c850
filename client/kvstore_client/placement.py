"""Where the blocks of a lease lie, and whether they may be read there now.

A block is readable once the generation of its slot, in the slab's header, is the promised one. All checks are
done for whole ranges, one numpy operation a slab.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.protocol.errors import InternalError, LeaseExpired
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np
from kvstore_client.slabs import Slab, SlabCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKSUM_BYTES = 16
NO_CHECKSUM = bytes(CHECKSUM_BYTES)


class _Part(NamedTuple):
    """The blocks that lie in one slab."""

    slab: Slab
    blocks: NDArray[np.intp] | None  # their indexes, ascending; None: all blocks of the placement
    slots: NDArray[np.intp]
    generations: NDArray[np.uint64]


class Run(NamedTuple):
    """Consecutive blocks in consecutive slots of one slab."""

    slab: Slab
    slot: int
    first: int
    blocks: int


class Placement:
    """The blocks of one group of a lease, counted from 0 for the first one listed.

    Attributes:
        count: how many.
        checksums: xxh3-128 of each, 16 bytes, all zero where not known.
    """

    __slots__ = ("_generations", "_ids", "_parts", "_slabs", "_slots", "checksums", "count")

    def __init__(self, message: pb.LeaseGroup) -> None:
        """Take the arrays of the reply; find_slabs() must follow.

        Raises:
            InternalError: the daemon listed arrays of different length.
        """
        self._ids = np.frombuffer(message.slab_ids, "<u4")
        self._slots = np.frombuffer(message.slots, "<u4").astype(np.intp)
        self._generations = np.frombuffer(message.generations, "<u8")
        self.checksums = message.checksums
        self.count = len(self._ids)
        self._parts: Sequence[_Part] = ()
        self._slabs: dict[int, Slab] = {}
        if not len(self._slots) == len(self._generations) == self.count:
            raise InternalError("the daemon listed slabs, slots and generations of different length")

    def slab_ids(self) -> set[int]:
        """The slabs that hold the blocks."""
        return set(self._ids.tolist())

    def find_slabs(self, slabs: SlabCache, block_nbytes: int) -> None:
        """Look up the mapped slabs; blocks in one that lives no more are never readable.

        Raises:
            InternalError: the daemon named a slot that its slab does not have, or that is too small for a block.
        """
        ids = self.slab_ids()
        parts: list[_Part] = []
        for slab_id in ids:
            slab = slabs.get(slab_id)
            if slab is None:
                continue
            blocks = None if len(ids) == 1 else np.flatnonzero(self._ids == slab_id)
            slots, generations = self._slots, self._generations
            if blocks is not None:
                slots, generations = slots[blocks], generations[blocks]
            if int(slots.max()) >= len(slab.rows) or slab.rows.shape[1] < block_nbytes:
                raise InternalError(f"the daemon named slot {slots.max()} of slab {slab_id}: {slab.rows.shape}")
            parts.append(_Part(slab, blocks, slots, generations))
        self._slabs = {part.slab.slab_id: part.slab for part in parts}
        self._parts = parts

    def drop(self) -> None:
        """Let go of the slabs, so that they can be unmapped; nothing is readable then."""
        self._parts = ()
        self._slabs = {}

    def readable_to(self, start: int, stop: int) -> int:
        """The end of the longest run of readable blocks from `start`, at most `stop`."""
        parts = self._parts
        if len(parts) == 1 and parts[0].blocks is None:
            part = parts[0]
            good = part.slab.generations[part.slots[start:stop]] == part.generations[start:stop]
        else:
            good = np.zeros(stop - start, np.bool_)
            for part in parts:
                assert part.blocks is not None
                first, last = np.searchsorted(part.blocks, (start, stop))
                same = part.slab.generations[part.slots[first:last]] == part.generations[first:last]
                good[part.blocks[first:last] - start] = same
        return stop if good.all() else start + int(good.argmin())

    def is_reused(self, block: int) -> bool:
        """Whether the slot of a block that is not readable already belongs to another one: it cannot come back."""
        slab = self._slabs.get(int(self._ids[block]))
        return slab is None or int(slab.generations[self._slots[block]]) not in (0, int(self._generations[block]))

    def row(self, block: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of one block where they lie, read-only.

        Raises:
            LeaseExpired: drop() has been called.
        """
        return self._slab_of(block).rows[self._slots[block], :nbytes]

    def slabs(self) -> list[Slab]:
        """The slabs in which the blocks lie."""
        return [part.slab for part in self._parts]

    def runs(self, start: int, stop: int) -> list[Run]:
        """Blocks [start, stop) as runs that one copy can take.

        Raises:
            LeaseExpired: drop() has been called.
        """
        slots, ids = self._slots[start:stop], self._ids[start:stop]
        breaks = np.flatnonzero((slots[1:] != slots[:-1] + 1) | (ids[1:] != ids[:-1])) + 1
        edges = [0, *breaks.tolist(), stop - start]
        runs: list[Run] = []
        for first, last in itertools.pairwise(edges):
            runs.append(Run(self._slab_of(start + first), int(slots[first]), first, last - first))
        return runs

    def checksum(self, block: int) -> bytes | None:
        """xxh3-128 of a block's raw bytes; None if the daemon did not know it."""
        found = self.checksums[block * CHECKSUM_BYTES : (block + 1) * CHECKSUM_BYTES]
        return found if len(found) == CHECKSUM_BYTES and found != NO_CHECKSUM else None

    def _slab_of(self, block: int) -> Slab:
        slab = self._slabs.get(int(self._ids[block]))
        if slab is None:  # another thread ended the lease, or lost the session, after readable_to() was asked
            raise LeaseExpired("the lease ended while it was read")
        return slab
