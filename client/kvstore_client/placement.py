"""Where the blocks of a lease lie, and whether they may be read there now.

A block is readable once the generation of its slot, in the slab's header, is the promised one. Blocks that lie one
after the other form a *run*: one comparison of bytes proves it and one copy takes it. Fresh blocks are usually a
single run; at worst every block is one, which costs little beside copying it.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from kvstore.protocol.errors import InternalError, LeaseExpired
from kvstore.protocol.slab import GENERATION_BYTES
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import np
from kvstore_client.slabs import Slab, SlabCache

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHECKSUM_BYTES = 16
NO_CHECKSUM = bytes(CHECKSUM_BYTES)


class Run(NamedTuple):
    """Consecutive blocks in consecutive slots of one slab."""

    slab: Slab
    slot: int
    first: int
    stop: int
    generations: bytes

    def cut(self, start: int, stop: int) -> Run:
        """The part of it within blocks [start, stop)."""
        first, last = max(start, self.first), min(stop, self.stop)
        skipped = first - self.first
        promised = self.generations[skipped * GENERATION_BYTES : (last - self.first) * GENERATION_BYTES]
        return Run(self.slab, self.slot + skipped, first, last, promised)

    def readable_to(self) -> int:
        """The end of its leading readable blocks."""
        slots = self.stop - self.first
        found = self.slab.generations_of(self.slot, slots)
        if found == self.generations:
            return self.stop
        pairs = zip(array("Q", found), array("Q", self.generations), strict=True)
        return self.first + next(i for i, (seen, promised) in enumerate(pairs) if seen != promised)


class Placement:
    """The blocks of one group of a lease. Blocks are named by their index into the asked keys.

    Attributes:
        first: the first block listed.
        stop: the index after the last block; blocks that are lost cut it.
    """

    __slots__ = ("_firsts", "_message", "_runs", "first", "stop")

    def __init__(self, message: pb.LeaseGroup) -> None:
        """Take a reply's group; find_slabs() must follow.

        Raises:
            InternalError: the daemon listed arrays of different length.
        """
        count = len(message.slab_ids) // 4
        if (len(message.slots), len(message.generations)) != (count * 4, count * GENERATION_BYTES):
            raise InternalError("the daemon listed slabs, slots and generations of different length")
        self._message = message
        self._runs: Sequence[Run] = ()
        self._firsts: Sequence[int] = ()
        self.first: int = message.first_block
        self.stop = self.first + count

    @property
    def block_nbytes(self) -> int:
        """Bytes of one block."""
        return self._message.block_nbytes

    @property
    def lossy(self) -> frozenset[int]:
        """The blocks that come from a lossy copy."""
        marks = self._message.lossy
        return frozenset(self.first + i for i, mark in enumerate(marks) if mark) if marks else frozenset()

    def find_slabs(self, slabs: SlabCache, block_nbytes: int, deadline_s: float) -> None:
        """Look up the slabs, mapping what is not mapped yet; blocks in one that lives no more are never readable.

        Raises:
            InternalError: the daemon named a slot that its slab does not have, or that is too small for a block.
            KVStoreError: as SlabCache.ensure() does.
        """
        message = self._message
        if message.block_nbytes != block_nbytes:
            raise InternalError(f"the daemon has blocks of {message.block_nbytes} bytes, this namespace {block_nbytes}")
        ids, slots = _numbers("I", message.slab_ids), _numbers("I", message.slots)
        slabs.ensure(set(ids), deadline_s)
        generations = message.generations
        if sys.byteorder == "big":
            generations = _numbers("Q", generations).tobytes()
        runs: list[Run] = []
        for i, j in itertools.pairwise(_edges(ids, slots)):
            slab = slabs.get(ids[i])
            if slab is None:
                continue
            if slots[i] + j - i > slab.slots or slab.slot_bytes < block_nbytes:
                raise InternalError(
                    f"the daemon placed blocks of {block_nbytes} bytes up to slot {slots[i] + j - i - 1} of slab "
                    f"{ids[i]}, which has {slab.slots} slots of {slab.slot_bytes}"
                )
            promised = generations[i * GENERATION_BYTES : j * GENERATION_BYTES]
            runs.append(Run(slab, slots[i], self.first + i, self.first + j, promised))
        self._firsts = [run.first for run in runs]
        self._runs = runs

    def drop(self) -> None:
        """Let go of the slabs, so that they can be unmapped; nothing is readable then."""
        self._runs = self._firsts = ()

    def note_ready(self, stop: int) -> None:
        """The daemon says that blocks before `stop` are readable. Where they lie in shared memory, that says it."""

    def cut(self, stop: int) -> None:
        """Blocks from `stop` on will never be readable."""
        self.stop = max(min(self.stop, stop), self.first)

    def ready_from(self, start: int) -> int:
        """The end of the run of readable blocks that begins at `start`, or at the first block listed."""
        start = max(start, self.first)
        return self.readable_to(start, self.stop) if start < self.stop else self.stop

    def readable_to(self, start: int, stop: int) -> int:
        """The end of the readable blocks that begin at `start`, at most `stop`."""
        done = start
        for run in self.runs(start, stop):
            if run.first != done:  # what lies between is in a slab that lives no more
                return done
            done = run.readable_to()
            if done != run.stop:
                return done
        return done

    def is_reused(self, block: int) -> bool:
        """Whether the slot of a block that is not readable already belongs to another one: it cannot come back."""
        runs = self.runs(block, block + 1)
        return not runs or runs[0].slab.generations_of(runs[0].slot, 1) not in (
            bytes(GENERATION_BYTES),
            runs[0].generations,
        )

    def runs(self, start: int, stop: int) -> Sequence[Run]:
        """Blocks [start, stop) as runs; those in slabs that live no more are missing, and all are after drop()."""
        runs, firsts = self._runs, self._firsts
        if len(runs) == 1 and runs[0].first == start and runs[0].stop == stop:
            return runs
        if start >= stop:
            return ()
        found = runs[max(0, bisect.bisect_right(firsts, start) - 1) : bisect.bisect_left(firsts, stop)]
        return [
            run if start <= run.first and run.stop <= stop else run.cut(start, stop)
            for run in found
            if run.stop > start
        ]

    def row(self, block: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of one block where they lie, read-only.

        Raises:
            LeaseExpired: drop() has been called.
        """
        runs = self.runs(block, block + 1)
        if not runs:
            raise LeaseExpired("the lease ended while it was read")
        return runs[0].slab.rows[runs[0].slot, :nbytes]

    def checksum(self, block: int) -> bytes | None:
        """xxh3-128 of a block's raw bytes; None if the daemon did not know it."""
        at = (block - self.first) * CHECKSUM_BYTES
        found = self._message.checksums[at : at + CHECKSUM_BYTES]
        return found if len(found) == CHECKSUM_BYTES and found != NO_CHECKSUM else None


def _numbers(kind: str, raw: bytes) -> array[int]:
    numbers = array(kind, raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _edges(ids: array[int], slots: array[int]) -> list[int]:
    """Where runs begin, and where the last one ends."""
    count = len(ids)
    if count < 2:
        return [0, count] if count else [0]
    where, which = np.frombuffer(slots, np.uint32), np.frombuffer(ids, np.uint32)
    breaks = (where[1:] != where[:-1] + 1) | (which[1:] != which[:-1])
    return [0, *(np.flatnonzero(breaks) + 1).tolist(), count]
