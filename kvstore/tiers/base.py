"""What the engine asks of a storage medium.

Batch-only and blocking: one outcome per item, in order. A tier moves opaque bytes between slab memory and
its medium; it never evicts, counts policy or decides what to keep. Call sequence:

    write(items)   the source ranges are READY and pinned until the call returns
    read(items)    the destination ranges are FILLING and owned by this call until it returns
    delete(refs)   any time; deleting what is not there is fine
    close()        last; idempotent

Bytes are named by SlabRange and resolved through the SlabMemory that the tier was made with, so that the same
call works in-process and across a process boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Outcome(IntEnum):
    """What became of one item; never None or bool."""

    OK = 0
    MISSING = 1  # the medium does not have it (also: its agent is gone)
    CORRUPT = 2  # it had it and the checksum failed: the copy has been dropped
    BUSY = 3  # not now; ask again
    FULL = 4  # no space on the medium


class SlabRange(NamedTuple):
    """Bytes of one block in a slab."""

    slab_id: int
    offset: int
    nbytes: int


class BlockRef(NamedTuple):
    """A block's name below the core: 32-byte namespace digest and 32-byte key."""

    namespace: bytes
    key: bytes


class TierItem(NamedTuple):
    """One block to write or to read. `checksum` is the xxh3-128 digest (16 bytes) of the raw bytes."""

    ref: BlockRef
    range: SlabRange
    checksum: bytes
    parent: bytes = b""  # empty: the root (write only, kept for recovery)
    epoch: int = 0  # of the namespace (write only, kept for recovery)
    layout: str = ""  # what the bytes are, as KVLayout.text says it (write only, a hint for the codec)


class WriteResult(NamedTuple):
    """Outcome of a write, with the bytes it takes on the medium."""

    outcome: Outcome
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What a durable tier knows of a block after a restart."""

    ref: BlockRef
    parent: bytes
    checksum: bytes
    nbytes: int
    stored_bytes: int
    epoch: int


class SlabMemory(Protocol):
    """Resolves a SlabRange to bytes, in the process that asks."""

    def view(self, place: SlabRange) -> NDArray[np.uint8]:
        """The bytes, writable, without a copy. Raises KeyError for a slab that is not mapped."""


class Tier(Protocol):
    """A spoke of the warm pool."""

    name: str
    capacity_bytes: int

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Copy blocks from slab memory to the medium; replaces an older copy."""

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Copy blocks from the medium into slab memory, each checked against its item's checksum."""

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks."""

    def stats(self) -> Mapping[str, int]:
        """Counters of the medium."""

    def close(self) -> None:
        """Release everything."""


class Scannable(Protocol):
    """A durable tier: says after a restart what it still holds."""

    def scan(self) -> Iterator[StoredRecord]:
        """Every record, in no order that the caller may rely on."""

    def flush(self) -> None:
        """Return once everything written before is durable."""
