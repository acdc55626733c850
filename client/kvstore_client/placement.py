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
    """The blocks that lie in one slab, counted from the first one listed."""

    slab: Slab
    blocks: NDArray[np.intp] | None  # ascending; None: all
    slots: NDArray[np.intp]
    generations: NDArray[np.uint64]


class Run(NamedTuple):
    """Consecutive blocks in consecutive slots of one slab."""

    slab: Slab
    slot: int
    first: int
    blocks: int


class Placement:
    """The blocks of one group of a lease. Blocks are named by their index into the asked keys.

    Attributes:
        first: the first block listed.
        stop: the index after the last block; blocks that are lost cut it.
    """

    __slots__ = ("_block_nbytes", "_checksums", "_generations", "_ids", "_parts", "_slabs", "_slots", "first", "stop")

    def __init__(self, message: pb.LeaseGroup) -> None:
        """Take the arrays of the reply; find_slabs() must follow.

        Raises:
            InternalError: the daemon listed arrays of different length.
        """
        self._ids = np.frombuffer(message.slab_ids, "<u4")
        self._slots = np.frombuffer(message.slots, "<u4").astype(np.intp)
        self._generations = np.frombuffer(message.generations, "<u8")
        self._checksums = message.checksums
        self._block_nbytes = message.block_nbytes
        self._parts: Sequence[_Part] = ()
        self._slabs: dict[int, Slab] = {}
        count = len(self._ids)
        self.first = message.first_block
        self.stop = self.first + count
        if not len(self._slots) == len(self._generations) == count:
            raise InternalError("the daemon listed slabs, slots and generations of different length")

    def slab_ids(self) -> set[int]:
        """The slabs that hold the blocks."""
        return set(self._ids.tolist())

    def find_slabs(self, slab_ids: set[int], slabs: SlabCache, block_nbytes: int) -> None:
        """Look up the mapped slabs; blocks in one that lives no more are never readable.

        Args:
            slab_ids: from slab_ids().
            slabs: of the session.
            block_nbytes: size of a block.

        Raises:
            InternalError: the daemon named a slot that its slab does not have, or that is too small for a block.
        """
        if self._block_nbytes != block_nbytes:
            raise InternalError(f"the daemon has blocks of {self._block_nbytes} bytes, this namespace {block_nbytes}")
        parts: list[_Part] = []
        for slab_id in slab_ids:
            slab = slabs.get(slab_id)
            if slab is None:
                continue
            blocks, slots, generations = None, self._slots, self._generations
            if len(slab_ids) > 1:
                blocks = np.flatnonzero(self._ids == slab_id)
                slots, generations = slots[blocks], generations[blocks]
            if int(slots.max()) >= slab.slots or slab.slot_bytes < block_nbytes:
                raise InternalError(
                    f"the daemon placed blocks of {block_nbytes} bytes in slot {slots.max()} of slab {slab_id}, "
                    f"which has {slab.slots} slots of {slab.slot_bytes}"
                )
            parts.append(_Part(slab, blocks, slots, generations))
        self._slabs = {part.slab.slab_id: part.slab for part in parts}
        self._parts = parts

    def drop(self) -> None:
        """Let go of the slabs, so that they can be unmapped; nothing is readable then."""
        self._parts = ()
        self._slabs = {}

    def cut(self, stop: int) -> None:
        """Blocks from `stop` on will never be readable."""
        self.stop = max(min(self.stop, stop), self.first)

    def ready_from(self, start: int) -> int:
        """The end of the run of readable blocks that begins at `start`, or at the first block listed."""
        start = max(start, self.first)
        return self.readable_to(start, self.stop) if start < self.stop else self.stop

    def readable_to(self, start: int, stop: int) -> int:
        """The end of the run of readable blocks that begins at `start`, at most `stop`."""
        parts = self._parts
        a, b = start - self.first, stop - self.first
        if len(parts) == 1 and parts[0].blocks is None:
            part = parts[0]
            good = part.slab.generations[part.slots[a:b]] == part.generations[a:b]
        else:
            good = np.zeros(b - a, np.bool_)
            for part in parts:
                assert part.blocks is not None
                i, j = np.searchsorted(part.blocks, (a, b))
                good[part.blocks[i:j] - a] = part.slab.generations[part.slots[i:j]] == part.generations[i:j]
        return stop if good.all() else start + int(good.argmin())

    def is_reused(self, block: int) -> bool:
        """Whether the slot of a block that is not readable already belongs to another one: it cannot come back."""
        at = block - self.first
        slab = self._slabs.get(int(self._ids[at]))
        return slab is None or int(slab.generations[self._slots[at]]) not in (0, int(self._generations[at]))

    def row(self, block: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of one block where they lie, read-only.

        Raises:
            LeaseExpired: drop() has been called.
        """
        at = block - self.first
        return self._slab_of(at).rows[self._slots[at], :nbytes]

    def slabs(self) -> list[Slab]:
        """The slabs in which the blocks lie."""
        return [part.slab for part in self._parts]

    def runs(self, start: int, stop: int) -> list[Run]:
        """Blocks [start, stop) as runs that one copy can take.

        Raises:
            LeaseExpired: drop() has been called.
        """
        a, b = start - self.first, stop - self.first
        slots = self._slots[a:b]
        breaks = slots[1:] != slots[:-1] + 1
        if len(self._slabs) > 1:
            breaks |= self._ids[a + 1 : b] != self._ids[a : b - 1]
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), b - a] if b - a > 1 and breaks.any() else [0, b - a]
        return [Run(self._slab_of(a + i), int(slots[i]), start + i, j - i) for i, j in itertools.pairwise(edges)]

    def checksum(self, block: int) -> bytes | None:
        """xxh3-128 of a block's raw bytes; None if the daemon did not know it."""
        at = (block - self.first) * CHECKSUM_BYTES
        found = self._checksums[at : at + CHECKSUM_BYTES]
        return found if len(found) == CHECKSUM_BYTES and found != NO_CHECKSUM else None

    def _slab_of(self, at: int) -> Slab:
        slab = self._slabs.get(int(self._ids[at]))
        if slab is None:  # another thread ended the lease, or lost the session, after readable_to() was asked
            raise LeaseExpired("the lease ended while it was read")
        return slab
