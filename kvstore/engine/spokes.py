"""The media around the warm pool, and which slabs their agents know."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvstore.core.block import COLD, Block
from kvstore.core.slots import Slot
from kvstore.engine.agent_tier import PendingWrite, Settle
from kvstore.tiers.base import BlockRef, CheckPage, CompactResult, Outcome, StoredRecord, Tier, TierItem
from kvstore.tiers.warm import WarmPool


class AgentedTier(Tier, Protocol):
    """A tier behind an agent: it maps slabs by id, and may be down for a while."""

    @property
    def state(self) -> str:
        """ok, starting, or down and why."""

    @property
    def restarts(self) -> int:
        """How many agents have been replaced."""

    @property
    def device(self) -> str:
        """Where the bytes are, for people."""

    def begin_write(self, items: Sequence[TierItem]) -> PendingWrite | None:
        """Send blocks to be stored; None while the agent is down."""

    def read(self, items: Sequence[TierItem], settle: Settle | None = None) -> list[Outcome]:
        """Fill slots; `settle` hears of each at once, but for those that went with their agent or were refused."""

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks. Raises KVStoreError where that is not confirmed."""

    def resize(self, capacity_bytes: int) -> int:
        """Be of another size; the capacity from now on. Raises KVStoreError where that cannot be."""

    def map_slab(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        """Let the agent (and its successors) map a slab."""

    def unmap_slab(self, slab_id: int) -> None:
        """The slab has gone."""


class DurableTier(AgentedTier, Protocol):
    """An agented tier that finds its blocks again after a restart. All of these raise KVStoreError where it fails."""

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record behind `after`, ordered by namespace and key."""

    def flush(self) -> None:
        """Return once everything written before is durable."""

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        """Read and verify up to `limit` blocks behind `after`; drop the bad ones if `repair`."""

    def compact(self) -> CompactResult:
        """Rewrite the medium without its free space."""


@dataclass(slots=True)
class _Spoke:
    """`lock` is held while the agent is told of a slab: it must know one before a frame names it."""

    medium: AgentedTier
    mapped: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Spokes:
    """One medium a tier (HOT, COLD), each with a lock of its own: a slow agent must not hold up the other's tier."""

    def __init__(self, pool: WarmPool) -> None:
        self._pool = pool
        self._spokes: dict[int, _Spoke] = {}

    def attach(self, tier: int, medium: AgentedTier) -> None:
        """Add a medium, before its first use."""
        self._spokes[tier] = _Spoke(medium)

    def get(self, tier: int) -> AgentedTier | None:
        """The medium of a tier, if there is one."""
        spoke = self._spokes.get(tier)
        return None if spoke is None else spoke.medium

    def media(self) -> Mapping[int, AgentedTier]:
        """All of them, by tier."""
        return {tier: spoke.medium for tier, spoke in self._spokes.items()}

    def items(self, tier: int, batch: Sequence[tuple[Block, Slot]]) -> list[TierItem]:
        """Blocks and slots as the tier is to be told of them; from now on its agent knows their slabs.

        Raises:
            KVStoreError: the agent cannot map a slab.
            OSError: no descriptor is left.
        """
        self._map(self._spokes[tier], {slot.slab_id for _, slot in batch})
        return [self._item(tier, block, slot) for block, slot in batch]

    def checksum(self, tier: int, block: Block) -> bytes:
        """Of the bytes that a copy of the block in `tier` gives; of its own bytes where it has none there."""
        return block.lossy or block.checksum if tier == COLD else block.checksum

    def slab_dropped(self, slab_id: int) -> None:
        """A slab has been retired: agents unmap it."""
        for spoke in self._spokes.values():
            with spoke.lock:
                if slab_id in spoke.mapped:
                    spoke.mapped.discard(slab_id)
                    spoke.medium.unmap_slab(slab_id)

    def _item(self, tier: int, block: Block, slot: Slot) -> TierItem:
        namespace = block.namespace
        above = block.parent  # read once: a delete may unlink it at any moment
        return TierItem(
            BlockRef(namespace.digest, block.key),
            self._pool.range_of(slot.slab_id, slot.index, namespace.block_nbytes),
            self.checksum(tier, block),
            above.key if above is not None else b"",
            block.epoch,
            namespace.layout,
            namespace.cold_codec if tier == COLD else "",
            block.hits,
        )

    def _map(self, spoke: _Spoke, slab_ids: set[int]) -> None:
        if slab_ids <= spoke.mapped:  # a slab that is in use is not dropped meanwhile
            return
        with spoke.lock:
            for slab_id in slab_ids - spoke.mapped:
                found = self._pool.writable_fd(slab_id)
                if found is not None:
                    _pass_fd(spoke.medium, slab_id, found)
                    spoke.mapped.add(slab_id)


def _pass_fd(medium: AgentedTier, slab_id: int, found: tuple[int, int]) -> None:
    fd, nbytes = found
    try:
        medium.map_slab(slab_id, fd, nbytes)
    finally:
        os.close(fd)
