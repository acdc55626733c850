"""Which copies exist in which tier: budgets, orders, and the one place where copies come and go.

Pure bookkeeping. What must happen on a medium as a consequence is left in `deletes` (copies to delete) for the
engine to carry out; memory of warm slots is freed through the slot table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.budget import Budget
from kvstore.core.index import KEY_BYTES, Index
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import EvictionPolicy, PolicyFactory
from kvstore.core.slabs import SlabAllocator
from kvstore.core.slots import Slot, SlotState, SlotTable

BelowRef = tuple[bytes, bytes]  # namespace digest, key
ClassKey = tuple[str, int]  # tenant, slot bytes


@dataclass(slots=True)
class TierCount:
    """Counters of one tier, in blocks."""

    blocks: int = 0
    hits: int = 0
    evictions: int = 0
    writes: int = 0
    write_failures: int = 0
    corrupt: int = 0


@dataclass(slots=True)
class Limits:
    """Capacities in bytes, per tenant where configured ({tier: {tenant: bytes}}), and the order of eviction."""

    warm_bytes: int
    cold_bytes: int = 0
    hot_bytes: int = 0
    tenant_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    policy: PolicyFactory = LeafLru


class Residency:
    """Copies of blocks in hot, warm and cold."""

    def __init__(self, index: Index, slots: SlotTable, allocator: SlabAllocator, limits: Limits) -> None:
        self.index = index
        self.slots = slots
        self.allocator = allocator
        self._clock = 0  # references: blocks that were asked for or stored, whichever tier had them
        self.budgets = {
            tier: Budget(capacity, limits.tenant_bytes.get(tier, {}))
            for tier, capacity in ((HOT, limits.hot_bytes), (WARM, limits.warm_bytes), (COLD, limits.cold_bytes))
        }
        self.counts = {tier: TierCount() for tier in (HOT, WARM, COLD)}
        self.up = {HOT: False, WARM: True, COLD: False}
        self.deletes: dict[int, list[BelowRef]] = {HOT: [], COLD: []}
        self.dirty: dict[
            Block, None
        ] = {}  # in warm and not in cold (hot forgets at every restart), by put or later use
        # Warm blocks that the saver has saved ahead of what will be dropped. What was loaded from cold is clean too and
        # does not count: it is younger than the blocks that leave next.
        self.ahead_bytes = 0
        self._ahead_epoch = 1
        self.dropped_unsaved = 0
        self.raw_cold_bytes = 0
        self.pressed: dict[ClassKey, None] = {}  # classes that dropped blocks of their own for room
        self._policy = limits.policy
        self._warm_orders: dict[ClassKey, EvictionPolicy] = {}
        self._below_orders: dict[tuple[int, str], EvictionPolicy] = {}  # HOT and COLD, each by tenant
        self._spared: dict[Block, None] = {}  # cold copies passed over because their block is in warm too
        # Asked for a slab when a class has no free slot; the engine makes one at once, or says no.
        self.grow: Callable[[str, int], bool] = lambda tenant, slot_size: False
        slots.freed = self._slot_freed

    # -- uses -------------------------------------------------------------------------------------------------

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Packed keys of one prefix were found, or are about to be stored. `touch` and `stamp` come on top of it."""
        self._clock += len(keys) // KEY_BYTES
        self.warm_order(namespace).refer(namespace, keys)
        for tier in (COLD, HOT):
            order = self._below_orders.get((tier, namespace.tenant))
            if order is not None:
                order.refer(namespace, keys)

    def touch(self, block: Block, reused: bool = True) -> None:
        """Note a use of the prefix that ends with `block`; not `reused`: it must stay, and nobody has read it."""
        self.stamp(block)
        if reused:
            block.reused = True
        copies = block.copies
        if block in self.dirty:
            del self.dirty[block]
            self.dirty[block] = None
        if copies & WARM:
            self.warm_order(block.namespace).touch(block)
        for tier in (COLD, HOT):
            if copies & tier:
                self.below_order(tier, block.namespace.tenant).touch(block)

    @property
    def unsaved(self) -> int:
        """Warm blocks that cold does not have; `dirty` lists them where there is a cold tier."""
        return len(self.dirty) if self.budgets[COLD].capacity_bytes else self.counts[WARM].blocks

    def offer(self, block: Block) -> None:
        """`block` may have become free to leave."""
        copies = block.copies
        if copies & WARM:
            self.warm_order(block.namespace).offer(block)
        for tier in (HOT, COLD):
            if copies & tier:
                self.below_order(tier, block.namespace.tenant).offer(block)

    def stamp(self, block: Block) -> None:
        """Give a block its first stamp, above the orphans' 0."""
        self._clock += 1
        block.touched = self._clock

    def first_out(self, block: Block) -> None:
        """Make `block` the next to leave (orphans)."""
        block.touched = 0
        block.queued = 0  # so that it gets an entry with this stamp; an old one that is left names it once more
        self.offer(block)

    def available(self, block: Block) -> bool:
        """Whether a copy can be read now (an agent may be down)."""
        copies = block.copies
        return bool(copies & WARM) or (bool(copies & HOT) and self.up[HOT]) or (bool(copies & COLD) and self.up[COLD])

    # -- warm -------------------------------------------------------------------------------------------------

    def warm_order(self, namespace: Namespace) -> EvictionPolicy:
        """The order of the namespace's size class."""
        key = (namespace.tenant, namespace.slot_bytes)
        order = self._warm_orders.get(key)
        if order is None:
            order = self._warm_orders[key] = self._policy(WARM)
        return order

    def take(self, namespace: Namespace, wanted: int, owner: object, keys: Sequence[bytes] = ()) -> list[Slot]:
        """Up to `wanted` slots in FILLING, dropping unpinned blocks of the same size class where none is free.

        `keys`: of new blocks, one a slot: from the first on that is worth less than what would have to leave for it,
        they get none.
        """
        budget = self.budgets[WARM]
        found: list[Slot] = []
        while len(found) < wanted:
            missing = wanted - len(found)
            over = budget.missing(namespace.tenant, missing * namespace.slot_bytes)
            room = missing - -(-over // namespace.slot_bytes)
            refs = self.allocator.take(namespace.tenant, namespace.slot_bytes, room) if room > 0 else []
            found.extend(self.slots.fill(refs, owner))
            budget.add(namespace.tenant, len(refs) * namespace.slot_bytes)
            if refs or (room > 0 and self.grow(namespace.tenant, namespace.slot_bytes)):
                continue
            if not self._make_way(namespace, missing, keys[len(found) :]):
                break
        return found

    def _make_way(self, namespace: Namespace, blocks: int, keys: Sequence[bytes]) -> int:
        """Drop up to `blocks` warm blocks for as many new ones; returns how many."""
        order, allowed = self.warm_order(namespace), self._may_leave_warm
        for done in range(blocks):
            victim = order.victim(allowed)
            if victim is None and self.budgets[WARM].over_own_limit(namespace.tenant, namespace.slot_bytes):
                victim = self._oldest_of(namespace.tenant)  # what it is over by may lie in other classes
            if victim is None or (keys and not order.admits(namespace, keys[done], victim)):
                if not done:
                    order.refuse(namespace, keys)
                return done
            self.evict_warm(victim)
            self.pressed[(namespace.tenant, namespace.slot_bytes)] = None
        return blocks

    def gain_warm(self, block: Block, slot: Slot) -> None:
        """A filled slot becomes the block's warm copy."""
        self.slots.publish(slot, block)
        saved = block.copies & COLD
        block.slot = slot
        block.copies |= WARM
        self.counts[WARM].blocks += 1
        self.counts[WARM].writes += 1
        if not saved and self.budgets[COLD].capacity_bytes:  # for nothing otherwise, in 42 to 84 bytes a block
            self.dirty[block] = None
        self.warm_order(block.namespace).insert(block)
        if block.copies != WARM:  # while it was filled, the copy that it came from had to stay
            self.offer(block)

    def evict_warm(self, block: Block) -> None:
        """Drop a warm copy for room."""
        self.counts[WARM].evictions += 1
        if block.copies == WARM:
            self.dropped_unsaved += 1
            self._restart_ahead()
        self.drop_warm(block)
        self.index.lost(block)

    def drop_warm(self, block: Block) -> None:
        """The warm copy goes; readers that hold it keep their bytes until they end."""
        slot = block.slot
        assert slot is not None and block.copies & WARM
        block.copies &= ~WARM
        block.slot = None
        self.slots.retire(slot)
        self.counts[WARM].blocks -= 1
        self._no_longer_ahead(block)
        self.dirty.pop(block, None)
        if block.lossy and block.copies & COLD:
            block.checksum = block.lossy
        self.warm_order(block.namespace).remove(block)
        if block in self._spared:
            del self._spared[block]
            self.offer(block)

    def is_ahead(self, block: Block) -> bool:
        """Whether the block counts in `ahead_bytes`."""
        return block.ahead == self._ahead_epoch

    def _no_longer_ahead(self, block: Block) -> None:
        if self.is_ahead(block):
            block.ahead = 0
            self.ahead_bytes -= slot_bytes(block)

    def _restart_ahead(self) -> None:
        """An unsaved block had to go: what was saved has been used since, and does not leave next."""
        self._ahead_epoch += 1
        self.ahead_bytes = 0

    def oldest_warm(self) -> Block | None:
        """The block whose warm copy would leave next, over all size classes."""
        return _oldest(self._warm_orders.values(), self._may_leave_warm)

    def _oldest_of(self, tenant: str) -> Block | None:
        orders = [order for (owner, _), order in self._warm_orders.items() if owner == tenant]
        return _oldest(orders, self._may_leave_warm)

    def _may_leave_warm(self, block: Block) -> bool:
        slot = block.slot
        if slot is None or slot.pins or block.saving:
            return False
        return block.copies != WARM or block.below is None

    def _slot_freed(self, slot: Slot) -> None:
        slab = self.allocator.slab(slot.slab_id)
        self.budgets[WARM].remove(slab.tenant, slab.geometry.slot_bytes)

    def abandon(self, slot: Slot) -> None:
        """A filler failed."""
        self.slots.abandon(slot)

    # -- hot and cold -----------------------------------------------------------------------------------------

    def below_order(self, tier: int, tenant: str) -> EvictionPolicy:
        """The order of a tenant's blocks in HOT or COLD.

        One for each tenant, because an order drops what may not leave when it is asked.
        """
        order = self._below_orders.get((tier, tenant))
        if order is None:
            order = self._below_orders[tier, tenant] = self._policy(tier)
        return order

    def gain_below(self, block: Block, tier: int, stored_bytes: int) -> None:
        """The block has a copy in HOT or COLD that takes `stored_bytes` there."""
        assert not block.copies & tier
        if tier == COLD and block.copies & WARM:
            self.dirty.pop(block, None)
            block.ahead = self._ahead_epoch
            self.ahead_bytes += slot_bytes(block)
        block.copies |= tier
        if tier == COLD:
            block.stored_bytes = stored_bytes
            self.raw_cold_bytes += block.namespace.block_nbytes
        self.budgets[tier].add(block.namespace.tenant, stored_bytes)
        self.counts[tier].blocks += 1
        self.below_order(tier, block.namespace.tenant).insert(block)
        self.offer(block)

    def drop_below(self, block: Block, tier: int, delete: bool = True) -> None:
        """A copy in HOT or COLD goes; `delete` says that the medium still has it."""
        assert block.copies & tier
        block.copies &= ~tier
        stored = block.stored_bytes if tier == COLD else block.namespace.block_nbytes
        if tier == COLD:
            block.stored_bytes = 0
            self.raw_cold_bytes -= block.namespace.block_nbytes
        self.budgets[tier].remove(block.namespace.tenant, stored)
        self.counts[tier].blocks -= 1
        if delete:
            self.deletes[tier].append((block.namespace.digest, block.key))
        if tier == COLD and block.copies & WARM:
            self._no_longer_ahead(block)
            if not block.degraded:  # which is never encoded again
                block.lossy = b""
                self.dirty[block] = None
        if tier == COLD:
            self._spared.pop(block, None)
        self.below_order(tier, block.namespace.tenant).remove(block)

    def make_room_below(self, tier: int, tenant: str, nbytes: int, spare_warm: bool = False) -> bool:
        """Drop the oldest copies of HOT or COLD until `nbytes` fit; False where they cannot.

        `spare_warm` leaves alone what is in warm too: to save one warm block in place of another gains nothing, and
        a cold tier smaller than the warm one would be written over and over without end.
        """
        budget = self.budgets[tier]
        if not budget.fits(tenant, nbytes):
            return False  # all would leave for nothing
        while budget.missing(tenant, nbytes):
            # Over the tenant's own limit only its own blocks make room.
            block = self._victim_below(tier, tenant if budget.over_own_limit(tenant, nbytes) else None, spare_warm)
            if block is None:
                return False
            self.evict_below(block, tier)
        return True

    def _victim_below(self, tier: int, tenant: str | None, spare_warm: bool) -> Block | None:
        if not spare_warm:
            for block in self._spared:
                self.offer(block)
            self._spared.clear()
        orders = self._below_orders.items()
        chosen = [order for (kind, owner), order in orders if kind == tier and tenant in (None, owner)]
        return _oldest(
            chosen, lambda block: self._may_leave_below(block, tier) and not (spare_warm and self._spare(block))
        )

    def _spare(self, block: Block) -> bool:
        if not block.copies & WARM:
            return False
        self._spared[block] = None  # the order drops it now; it is offered again when it leaves warm
        return True

    def evict_below(self, block: Block, tier: int) -> None:
        """Drop a copy in HOT or COLD for room."""
        self.counts[tier].evictions += 1
        self.drop_below(block, tier)
        self.index.lost(block)

    def oldest_below(self, tier: int) -> Block | None:
        """The block whose copy in HOT or COLD would leave next."""
        return self._victim_below(tier, None, spare_warm=False)

    def _may_leave_below(self, block: Block, tier: int) -> bool:
        if block.saving or (block.slot is not None and block.slot.state == SlotState.FILLING):
            return False  # an agent reads or writes that very copy
        return block.copies != tier or block.below is None

    # -- all copies -------------------------------------------------------------------------------------------

    def forget(self, block: Block) -> None:
        """Drop every copy of a block that is no longer wanted (deleted, cleared)."""
        if block.copies & WARM:
            self.drop_warm(block)
        for tier in (HOT, COLD):
            if block.copies & tier:
                self.drop_below(block, tier)
        self.index.lost(block)  # an agent that still fills its slot will find a record that nobody else has

    def forget_all(self, blocks: Iterable[Block]) -> int:
        """Drop many, children before parents; returns how many had a copy."""
        dropped = 0
        for block in reversed(list(blocks)):
            dropped += bool(block.copies)
            self.forget(block)
        return dropped

    # -- slabs ------------------------------------------------------------------------------------------------

    def reclaim_slab(self, tenant: str, slot_size: int, lender: ClassKey | None = None) -> int | None:
        """Empty a slab of another class (of `lender`, if given) and start to retire it; returns its id.

        The engine unmaps it and calls `allocator.retired`. None where every such slab is in use.
        """
        for slab in self.allocator.donors(tenant, slot_size):
            if lender is not None and (slab.tenant, slab.geometry.slot_bytes) != lender:
                continue
            slots = self.slots.in_slab(slab.slab_id)
            if all(self._may_be_moved(slot) for slot in slots):
                for slot in slots:
                    if slot.state != SlotState.FREE:  # it may have gone with an earlier one's subtree
                        self._drop_with_subtree(slot)
                self.allocator.retire(slab.slab_id)
                return slab.slab_id
        return None

    def lender(self, borrower: ClassKey) -> ClassKey | None:
        """A class whose next victim has been unused for much longer than the borrower's, or None.

        Without this a class that has a slab of its own would turn it over for ever beside memory that lies idle.
        """
        now = self._clock
        ages = {}
        for key, order in self._warm_orders.items():
            victim = order.victim(self._may_leave_warm)
            if victim is not None:
                ages[key] = now - victim.touched
        mine = ages.pop(borrower, 0)
        oldest = max(ages, key=ages.__getitem__, default=None)
        # By half as much again: two equally busy classes must not pass one slab to and fro.
        return oldest if oldest is not None and ages[oldest] > 1.5 * mine else None

    def _may_be_moved(self, slot: Slot) -> bool:
        block = slot.owner
        if slot.state != SlotState.READY or slot.pins or not isinstance(block, Block) or block.saving:
            return False
        if block.copies != WARM or block.below is None:
            return True
        return not any(
            b.saving or (b.slot is not None and (b.slot.pins or b.slot.state != SlotState.READY))
            for b in block.subtree()
        )

    def _drop_with_subtree(self, slot: Slot) -> None:
        block = slot.owner
        assert isinstance(block, Block)
        if block.copies != WARM or block.below is None:
            self.evict_warm(block)
        else:
            self.dropped_unsaved += 1
            self.forget_all(block.subtree())


def _oldest(orders: Iterable[EvictionPolicy], allowed: Callable[[Block], bool]) -> Block | None:
    victims = [order.victim(allowed) for order in orders]
    return min((block for block in victims if block is not None), key=lambda block: block.touched, default=None)


def slot_bytes(block: Block) -> int:
    """Bytes that a block takes in warm."""
    return block.namespace.slot_bytes
