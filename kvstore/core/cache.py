"""The core as the engine sees it: takes events, returns decisions. No I/O, no threads, no clock of its own.

One BlockCache is the whole state of a daemon: namespaces and their blocks, slots, leases, budgets. It is not
thread-safe; the engine holds one lock around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.gate import BenefitGate
from kvstore.core.index import Index, split_keys
from kvstore.core.moves import Moves
from kvstore.core.puts import Puts
from kvstore.core.reads import Reads, ReadSettings
from kvstore.core.residency import Limits, Residency
from kvstore.core.slabs import SlabAllocator, SlotRef
from kvstore.core.slots import SlotTable
from kvstore.core.terms import Terms, TermsKeeper
from kvstore.protocol.errors import InvalidRequest, NotFound, QuotaExceeded
from kvstore.protocol.slab import slab_target_bytes, slot_bytes_for

NAMESPACES_MAX = 4096
"""Of a tenant: each is remembered for good, in memory and in a file that is written anew with every one."""

TIER_NAMES = {HOT: "hot", WARM: "warm", COLD: "cold"}


class NamespaceShape(NamedTuple):
    """What the core must know of a namespace."""

    tenant: str
    block_nbytes: int
    block_tokens: int
    chain: bool
    layout: str = ""
    cold_codec: str = ""


class RecoveredBlock(NamedTuple):
    """A block that a durable tier still holds after a restart."""

    key: bytes
    parent: bytes
    checksum: bytes
    stored_bytes: int
    lossy: bool = False


@dataclass(slots=True)
class CacheConfig:
    """Capacities, the lease time, and how blocks move between tiers."""

    limits: Limits
    lease_ttl_s: float = 30.0
    promote_hits: int = 2
    prefetch_share: float = 0.125  # of warm, that may hold what was loaded on hints and has not been asked for


class BlockCache:
    """All decisions of a daemon."""

    def __init__(self, config: CacheConfig, set_generation: Callable[[SlotRef, int], None]) -> None:
        """`set_generation(ref, value)` writes a slot's generation into shared memory."""
        limits = config.limits
        self.allocator = SlabAllocator(limits.warm_bytes, slab_target_bytes(limits.warm_bytes))
        self.slots = SlotTable(self.allocator, set_generation)
        self.index = Index(self._orphaned, self._childless)
        self.residency = Residency(self.index, self.slots, self.allocator, limits)
        self.puts = Puts(self.index, self.residency)
        settings = ReadSettings(config.promote_hits, int(limits.warm_bytes * config.prefetch_share))
        self.reads = Reads(self.index, self.residency, config.lease_ttl_s, settings)
        self.moves = Moves(self.residency, self.reads)
        self.gate = BenefitGate(self.index, self.residency, self.reads)
        self.terms = TermsKeeper(self.residency)
        self._namespaces_of: dict[str, int] = {}  # by tenant

    # -- namespaces -------------------------------------------------------------------------------------------

    def open_namespace(
        self, digest: bytes, shape: NamespaceShape, epoch: int = 0, terms: Terms | None = None
    ) -> Namespace:
        """The namespace, made on first use and then treated as `terms` say.

        Raises:
            InvalidRequest: not one block would fit the warm tier.
            QuotaExceeded: the tenant has too many already.
        """
        namespace = self.index.namespaces.get(digest)
        if namespace is None:
            held = self._namespaces_of.get(shape.tenant, 0)
            if held >= NAMESPACES_MAX:
                raise QuotaExceeded(
                    f"the tenant has {held} namespaces, and may have no more: what differs from request to request "
                    "belongs into the keys (extra), not into the namespace"
                )
            slot_size = slot_bytes_for(shape.block_nbytes)
            if not self._fits(slot_size):
                raise InvalidRequest(
                    f"a block of {shape.block_nbytes} bytes does not fit the warm tier of "
                    f"{self.allocator.capacity_bytes} bytes; start the daemon with a larger --warm-bytes"
                )
            namespace = Namespace(
                digest,
                shape.tenant,
                shape.block_nbytes,
                slot_size,
                shape.block_tokens,
                shape.chain,
                shape.layout,
                shape.cold_codec,
                epoch,
            )
            self.index.namespaces[digest] = namespace
            self._namespaces_of[shape.tenant] = held + 1
            if terms is not None:
                self.terms.set(namespace, terms)
        return namespace

    def namespace(self, digest: bytes, tenant: str) -> Namespace:
        """A namespace of the tenant that has been opened.

        Raises:
            NotFound: it has not, or it is another tenant's (the answer is the same).
        """
        namespace = self.index.namespaces.get(digest)
        if namespace is None or namespace.tenant != tenant:
            raise NotFound(f"unknown namespace {digest[:8].hex()}…; open it first (the daemon may have been restarted)")
        return namespace

    def delete(self, namespace: Namespace, keys: bytes) -> int:
        """Forget blocks, and in a chain what hangs on them; returns how many were stored."""
        dropped = 0
        for key in split_keys(keys):
            block = namespace.blocks.get(key)
            if block is not None:
                dropped += self.residency.forget_all(block.subtree())
        return dropped

    def clear(self, namespace: Namespace) -> int:
        """Make every block of the namespace unfindable in O(1); returns the new epoch. `moves.reap` does the rest."""
        self.moves.condemn(self.index.detach(namespace))
        return namespace.epoch

    # -- restart ----------------------------------------------------------------------------------------------

    def recover(self, namespace: Namespace, record: RecoveredBlock) -> None:
        """Enter a block found in the cold tier; `recovered` ends the series."""
        block = self.index.recover(namespace, record.key, record.parent)
        if not block.copies & COLD:
            block.checksum = record.checksum
            block.lossy = record.checksum if record.lossy else b""
            self.residency.stamp(block)
            self.residency.count_below(block, COLD, record.stored_bytes)

    def recovered(self, namespace: Namespace) -> None:
        """All records of the namespace have been entered."""
        self.index.settle(namespace)
        for block in namespace.blocks.values():  # not one by one: a leaf is known only now
            if block.copies:
                self.residency.orders.insert(block, COLD)

    def trim(self, tier: int) -> None:
        """Drop what is over the tier's capacity or over a tenant's limit: after a restart either may be smaller."""
        for namespace in list(self.residency.budgets[tier].by_namespace):
            self.residency.make_room_below(tier, namespace, 0)

    def resize(self, tier: int, capacity_bytes: int) -> None:
        """HOT or COLD has another capacity from now on; what is over it leaves, but for what is being copied."""
        self.residency.budgets[tier].capacity_bytes = capacity_bytes
        self.trim(tier)

    # -- admin ------------------------------------------------------------------------------------------------

    def evict(self, tier: int, nbytes: int) -> tuple[int, int]:
        """Drop the next victims of a tier until `nbytes` have gone; returns blocks and bytes."""
        blocks = freed = 0
        while freed < nbytes:
            before = self.residency.budgets[tier].used_bytes
            if not self._evict_one(tier):
                break
            blocks += 1
            freed += before - self.residency.budgets[tier].used_bytes
        return blocks, freed

    def find_prefix(self, prefix: bytes, tenant: str, digest: bytes, limit: int) -> list[Block]:
        """Blocks (holes too) of a tenant whose key starts with `prefix` (a byte at least), at most `limit`."""
        found: list[Block] = []
        for namespace in self.index.namespaces.values():
            if namespace.tenant != tenant or (digest and namespace.digest != digest):
                continue
            for key, block in namespace.blocks.shards[prefix[0]].items():
                if key.startswith(prefix):
                    found.append(block)
                    if len(found) == limit:
                        return found
        return found

    # -- internals --------------------------------------------------------------------------------------------

    def _evict_one(self, tier: int) -> bool:
        if tier != WARM:
            block = self.residency.oldest_below(tier)
            if block is not None:
                self.residency.evict_below(block, tier)
            return block is not None
        block = self.residency.oldest_warm()
        if block is not None:
            self.residency.evict_warm(block)
        return block is not None

    def _fits(self, slot_size: int) -> bool:
        return 2 * 4096 + slot_size <= self.allocator.capacity_bytes

    def _orphaned(self, block: Block) -> None:
        self.residency.first_out(block)

    def _childless(self, block: Block) -> None:
        self.residency.orders.offer(block)
