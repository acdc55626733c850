"""The record of one block, and the namespace it lives in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntFlag
from typing import TYPE_CHECKING

from kvstore.core.slots import Slot

if TYPE_CHECKING:
    from kvstore.core.policy import EvictionPolicy


class Copies(IntFlag):
    """Which tiers hold a complete copy of a block."""

    NONE = 0
    HOT = 1
    WARM = 2
    COLD = 4


# Plain ints: IntFlag arithmetic costs 20 times an int's, and these are tested for every block of every lease.
HOT, WARM, COLD = int(Copies.HOT), int(Copies.WARM), int(Copies.COLD)

REFUSED = 16  # in `spare` beside the tiers: it is not to be saved to cold
PREFETCHED = 8  # in `spare` beside the tiers: its warm copy was loaded on a hint, and nobody has come for it yet

# Who leaves first, see core.orders: the lowest.
SPARE, LOW, NORMAL, HIGH, PINNED = range(5)

# The usual level has the lowest bits: numbers up to 256 are no objects of their own in memory.
_UNITS = (8, 64, 1, 512, 4096)  # by level


class Block:
    """One immutable, content-addressed block.

    A record without copies is a *hole*: a block that was lost, or never seen after a restart, while children of
    it are still stored. Those children are *orphans* and count as absent until the hole is filled again.

    Children form an intrusive doubly linked list of siblings: most blocks have one child, and a set per block
    would be the largest part of the index.
    """

    __slots__ = (
        "checksum",
        "copies",
        "depth",
        "epoch",
        "first_child",
        "hits",
        "key",
        "level",
        "lossy",
        "namespace",
        "next_sibling",
        "orphan",
        "parent",
        "prev_sibling",
        "queued",
        "reused",
        "saving",
        "slot",
        "spare",
        "stored_bytes",
        "touched",
    )

    def __init__(self, namespace: Namespace, key: bytes, parent: Block | None) -> None:
        self.namespace = namespace
        self.key = key
        self.epoch = namespace.epoch  # a clear does not change it: saved bytes must never be taken for newer ones
        self.checksum = b""  # of the bytes that a reader gets now
        self.lossy = b""  # of the cold copy's bytes, where that is a lossy one
        self.copies = 0  # HOT | WARM | COLD
        self.slot: Slot | None = None  # FILLING while it loads, READY while WARM
        self.stored_bytes = 0  # on the cold medium
        self.touched = 0  # stamp of the last use
        self.queued = 0  # marks of the orders that have an entry for this block
        self.level = namespace.level
        self.spare = 0  # tiers whose copy leaves before all others
        self.reused = False  # used after it was stored, or back soon after it left; of a leaf: what hangs on it counts
        self.saving = False  # an agent is copying it to the cold tier
        self.hits = 0
        self.orphan = False
        self.parent: Block | None = None
        self.depth = 0
        self.first_child: Block | None = None
        self.next_sibling: Block | None = None
        self.prev_sibling: Block | None = None
        if parent is not None:
            self.link(parent)

    def link(self, parent: Block) -> None:
        """Become a child of `parent`."""
        self.parent = parent
        self.depth = parent.depth + 1
        self.next_sibling = parent.first_child
        if parent.first_child is not None:
            parent.first_child.prev_sibling = self
        parent.first_child = self

    def unlink(self) -> None:
        """Leave the parent's list of children."""
        if self.parent is None:
            return
        if self.prev_sibling is None:
            self.parent.first_child = self.next_sibling
        else:
            self.prev_sibling.next_sibling = self.next_sibling
        if self.next_sibling is not None:
            self.next_sibling.prev_sibling = self.prev_sibling
        self.parent = self.next_sibling = self.prev_sibling = None

    @property
    def top(self) -> Block:
        """The farthest ancestor that has a record, itself if it has no parent."""
        block = self
        while block.parent is not None:
            block = block.parent
        return block

    def stands(self, tier: int, mark: int) -> bool:
        """Whether it belongs into the order of a tier that has this mark."""
        level = SPARE if self.spare & tier else self.level
        return bool(self.copies & tier) and tier * _UNITS[level] == mark

    def children(self) -> Iterator[Block]:
        """The direct children, newest first."""
        child = self.first_child
        while child is not None:
            following = child.next_sibling
            yield child
            child = following

    def subtree(self) -> list[Block]:
        """This block and everything that hangs on it, parents before children."""
        found = [self]
        for block in found:  # grows while it is walked
            found.extend(block.children())
        return found

    @property
    def degraded(self) -> bool:
        """Whether the bytes that a reader gets now went through a lossy copy."""
        return bool(self.lossy) and self.lossy == self.checksum

    @property
    def present(self) -> bool:
        """Whether a lookup may find it."""
        return bool(self.copies) and not self.orphan


@dataclass(slots=True, eq=False)
class Namespace:
    """All blocks that can meet. `blocks` also has holes and orphans."""

    digest: bytes
    tenant: str
    block_nbytes: int
    slot_bytes: int
    block_tokens: int
    chain: bool
    layout: str = ""
    cold_codec: str = ""  # a lossy one that its owner asked for; empty: none
    epoch: int = 0
    level: int = NORMAL  # of its new blocks: LOW, NORMAL or HIGH
    blocks: dict[bytes, Block] = field(default_factory=dict)
    orders: dict[int, EvictionPolicy] = field(default_factory=dict)  # those that its blocks stand in, by mark
    salt: int = field(init=False)  # tells equal keys of two namespaces apart; its lowest eight bits are 0

    def __post_init__(self) -> None:
        self.salt = int.from_bytes(self.digest[:8], "little") & ~0xFF


def level_of(block: Block, tier: int) -> int:
    """The level at which it stands in a tier."""
    return SPARE if block.spare & tier else block.level


def mark_of(tier: int, level: int) -> int:
    """The bit of a tier and level in `queued`."""
    return tier * _UNITS[level]
