"""What the engine asks of a storage medium.

Batch-only and blocking: one outcome per item, in order. A tier moves opaque bytes between slab memory and
its medium; it never evicts, counts policy or decides what to keep. Call sequence:

    write(items)   the source ranges are READY and pinned until the call returns
    read(items)    the destination ranges are FILLING and owned by this call until it returns
    delete(refs)   any time; deleting what is not there is fine; raises OSError where it is not sure
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
    lossy: str = ""  # the lossy codec that the namespace opted in to; empty: never lossy (write only)
    hits: int = 0  # uses so far (write only, kept for recovery)


class WriteResult(NamedTuple):
    """Outcome of a write, with the bytes it takes on the medium.

    `codec` is the frame's codec id. `checksum` is the xxh3-128 of what a read will give: the item's own, but for a
    copy that is `lossy`. All three are empty unless the outcome is OK, and for media that do not encode.
    """

    outcome: Outcome
    stored_bytes: int = 0
    codec: int = 0
    lossy: bool = False
    checksum: bytes = b""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """What a durable tier knows of a block after a restart.

    `checksum` is of the bytes that a read gives, so for a `lossy` copy of the decoded ones. `stored_s` is when it was
    written, in seconds of Unix time; `hits` its uses until then.
    """

    ref: BlockRef
    parent: bytes
    checksum: bytes
    nbytes: int
    stored_bytes: int
    epoch: int
    codec: int = 0
    hits: int = 0
    stored_s: int = 0
    lossy: bool = False


class CheckPage(NamedTuple):
    """A step of a walk that verifies stored blocks.

    `last` is where the next step goes on (None: nothing is left behind it). `missing` are records without a payload.
    `repaired` blocks were dropped because they were bad.
    """

    last: BlockRef | None
    checked: int = 0
    corrupt: int = 0
    missing: int = 0
    repaired: int = 0


class CompactResult(NamedTuple):
    """What a medium took on the disk before and after it was rewritten without its free space."""

    before_bytes: int
    after_bytes: int


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
        """Forget blocks.

        Raises:
            OSError: not all deletes are confirmed; ask again for the whole batch.
        """

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


class ReadAhead(Protocol):
    """A tier that can start to fetch what will be read soon; a hint that promises nothing."""

    def prefetch(self, items: Sequence[TierItem]) -> None:
        """Have the medium's bytes of these blocks read into memory, in order; returns at once."""


class Checkable(Protocol):
    """A durable tier that can be verified and rewritten while it serves."""

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        """Read and verify up to `limit` blocks behind `after`; with `repair` the bad ones are dropped.

        Raises:
            OSError: the medium cannot be used, or does not take a repair.
        """

    def compact(self) -> CompactResult:
        """Rewrite the medium without its free space; writes are BUSY meanwhile, reads go on.

        Raises:
            OSError: there is no room for the copy, or the medium fails; what was there is served as before.
        """
