"""What calls answer: the outcome of every block of a put, and what a match found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvstore.protocol.errors import InternalError


class PutStatus(IntEnum):
    """What became of one block; the numbers are those of the wire."""

    STORED = 1
    EXISTS = 2
    REJECTED = 3


class RejectReason(IntEnum):
    """Why a block was not stored; the numbers are those of the wire."""

    UNKNOWN = 0  # a reason that this client does not know: the daemon is newer
    NO_ROOM = 1  # nothing can be evicted now
    NO_PARENT = 2  # the block before it is not stored
    STAGING_BUSY = 3  # no staging range came free in time
    DEADLINE = 4  # the deadline passed before this block's turn
    CHECKSUM = 5  # the daemon's copy differs from the worker's checksum
    QUOTA = 6  # the tenant's budget is full of pinned blocks
    UNAVAILABLE = 7  # no daemon (said by a fail-open client)
    DRAINING = 8  # the daemon is shutting down
    CLEARED = 9  # the namespace was cleared meanwhile
    NOT_ADMITTED = 10  # worth less than what would have to leave; stored if it is put again soon


class WithheldReason(IntEnum):
    """Why blocks that are stored were not promised; the numbers are those of the wire."""

    UNKNOWN = 0  # a reason that this client does not know: the daemon is newer
    NOT_WORTH = 1  # to fetch them would take longer than to recompute them


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """What became of one block: STORED, EXISTS, or REJECTED(reason).

    Attributes:
        status: of the block.
        reason: why it was rejected; None if it was not.
    """

    status: PutStatus
    reason: RejectReason | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the daemon has the block now, from this put or an earlier one."""
        return self.status is not PutStatus.REJECTED

    def __repr__(self) -> str:
        return self.status.name if self.reason is None else f"REJECTED({self.reason.name})"


STORED = PutOutcome(PutStatus.STORED)
"""The block was not there and is now."""
EXISTS = PutOutcome(PutStatus.EXISTS)
"""The block was there already; its bytes were not looked at."""
_REJECTED = {reason: PutOutcome(PutStatus.REJECTED, reason) for reason in RejectReason}


def REJECTED(reason: RejectReason) -> PutOutcome:
    """The outcome of a block that was not stored, to compare with."""
    return _REJECTED[reason]


class Match(NamedTuple):
    """The longest stored prefix of some keys.

    Attributes:
        blocks: in the prefix.
        tokens: in the prefix.
        by_tier: blocks by the fastest tier that holds them: "hot", "warm", "cold".
        withheld: further blocks that are stored, and would not be promised.
        withheld_reason: why; None where there are none.
    """

    blocks: int
    tokens: int
    by_tier: Mapping[str, int]
    withheld: int = 0
    withheld_reason: WithheldReason | None = None


NO_MATCH = Match(0, 0, {"hot": 0, "warm": 0, "cold": 0})


def withheld_reason(withheld: int, reason: int) -> WithheldReason | None:
    """The reason of a reply that withheld so many blocks."""
    if not withheld:
        return None
    return WithheldReason(reason) if reason in WithheldReason.__members__.values() else WithheldReason.UNKNOWN


def decode(statuses: bytes, reasons: bytes) -> list[PutOutcome]:
    """The outcomes of a put from their wire form, one byte a block each.

    Raises:
        InternalError: there is a status that this protocol version does not have.
    """
    table: dict[tuple[int, int], PutOutcome] = {}
    outcomes: list[PutOutcome] = []
    for pair in zip(statuses, reasons, strict=True):
        if pair not in table:
            table[pair] = _decode_one(*pair)
        outcomes.append(table[pair])
    return outcomes


def _decode_one(status: int, reason: int) -> PutOutcome:
    if status == PutStatus.STORED:
        return STORED
    if status == PutStatus.EXISTS:
        return EXISTS
    if status != PutStatus.REJECTED:
        raise InternalError(f"the daemon answered put status {status}, which does not exist")
    return _REJECTED[RejectReason(reason) if reason in RejectReason.__members__.values() else RejectReason.UNKNOWN]
