"""Which copies exist in which tier: budgets, orders, and the one place where copies come and go.

Pure bookkeeping. What must happen on a medium as a consequence is left in `deletes` (copies to delete) for the
engine to carry out; memory of warm slots is freed through the slot table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstore.core.admission import Admission
from kvstore.core.block import COLD, HOT, PREFETCHED, REFUSED, REUSED, SAVING, WARM, Block, Namespace
from kvstore.core.budget import Budget
from kvstore.core.fair import payers
from kvstore.core.index import KEY_BYTES, Index
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.lending import ClassKey, Lending
from kvstore.core.orders import Orders
from kvstore.core.policy import PolicyFactory
from kvstore.core.slabs import SlabAllocator
from kvstore.core.slots import Owner, Slot, SlotState, SlotTable

_ANY_AGE = 1 << 62
_DEMAND_FADES = 64  # calls
_PASSED = 1 << 16  # hits: more than any number that has to be reached

BelowRef = tuple[bytes, bytes]  # namespace digest, key


@dataclass(slots=True)
class TierCount:
    """Counters of one tier, in blocks."""

    blocks: int = 0
    hits: int = 0
    evictions: int = 0
    writes: int = 0
    promotions: int = 0  # blocks that earned a place here by hits in a slower tier
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
    cold_bytes_per_day: int = 0  # that may be written to cold; 0: no limit


class Taken(NamedTuple):
    """Slots in FILLING. `refused`: there could be more, but the new blocks are not worth what would have to leave."""

    slots: list[Slot]
    refused: bool = False
    settled: int = 1 << 62


class Residency:
    """Copies of blocks in hot, warm and cold."""

    def __init__(self, index: Index, slots: SlotTable, allocator: SlabAllocator, limits: Limits) -> None:
        self.index = index
        self.slots = slots
        self.allocator = allocator
        self.admission = Admission(limits.cold_bytes_per_day)
        self.clock = 0  # references: blocks that were asked for or stored, whichever tier had them
        self.budgets = {
            tier: Budget(capacity, limits.tenant_bytes.get(tier, {}))
            for tier, capacity in ((HOT, limits.hot_bytes), (WARM, limits.warm_bytes), (COLD, limits.cold_bytes))
        }
        self.counts = {tier: TierCount() for tier in (HOT, WARM, COLD)}
        self.up = {HOT: False, WARM: True, COLD: False}
        self.deletes: dict[int, list[BelowRef]] = {HOT: [], COLD: []}
        # In warm and not in cold (hot forgets at every restart), by put or later use.
        self.dirty: dict[Block, None] = {}
        self.urgent: dict[Block, None] = {}  # those of them that leave next
        self.demand_bytes = 0  # of the largest calls of late, for slots in warm
        # Of warm blocks on their way out. What was loaded for one use is as free to go, and does not count: more often
        # than not a lease has it.
        self.leaving_bytes = 0
        self.dropped_unsaved = 0
        self.prefetched_bytes = 0  # loaded, or loading, on hints that nobody has followed up yet
        self.raw_cold_bytes = 0
        self.pressed: dict[ClassKey, None] = {}  # classes that dropped blocks of their own for room
        self.orders = Orders(limits.policy)
        self.lending = Lending(self)
        self._spared: dict[Block, None] = {}  # cold copies passed over because they were saved ahead
        # Asked for a slab when a class has no free slot; the engine makes one at once, or says no.
        self.grow: Callable[[str, int], bool] = lambda tenant, slot_size: False
        slots.freed = self._slot_freed

    # -- uses -------------------------------------------------------------------------------------------------

    def refer(self, namespace: Namespace, keys: bytes) -> None:
        """Packed keys of one prefix were found, or are about to be stored. `touch` and `stamp` come on top of it."""
        self.clock += len(keys) // KEY_BYTES
        self.orders.refer(namespace, keys)

    def touch(self, block: Block, reused: bool = True) -> None:
        """Note a use of the prefix that ends with `block`; not `reused`: it must stay, and nobody has read it."""
        self.stamp(block)
        if block in self.dirty:
            del self.dirty[block]
            self.dirty[block] = None
        if reused:
            self._reuse(block)
        self.orders.touch(block)

    def _reuse(self, block: Block | None) -> None:
        """A block was used again, and what it hangs on with it: up to where that is known already."""
        while block is not None and not block.marks & REUSED:
            block.marks |= REUSED
            block = block.parent

    @property
    def unsaved(self) -> int:
        """Warm blocks that cold does not have; `dirty` lists them where there is a cold tier."""
        return len(self.dirty) if self.budgets[COLD].capacity_bytes else self.counts[WARM].blocks

    def stamp(self, block: Block) -> None:
        """Give a block its first stamp, above the orphans' 0."""
        self.clock += 1
        block.touched = self.clock

    def first_out(self, block: Block) -> None:
        """Make `block` the next to leave (orphans)."""
        block.touched = 0
        block.queued = 0  # so that it gets an entry with this stamp; an old one that is left names it once more
        self.orders.offer(block)

    def available(self, block: Block) -> bool:
        """Whether a copy can be read now (an agent may be down)."""
        copies = block.copies
        return bool(copies & WARM) or (bool(copies & HOT) and self.up[HOT]) or (bool(copies & COLD) and self.up[COLD])

    # -- warm -------------------------------------------------------------------------------------------------

    def take(
        self, namespace: Namespace, wanted: int, owner: Owner, keys: Sequence[bytes] = (), older_than: int = _ANY_AGE
    ) -> Taken:
        """Up to `wanted` slots in FILLING, dropping unpinned blocks of the same size class where none is free.

        `keys`: of new blocks, one a slot: from the first on that is worth less than what would have to leave for it,
        they get none. `older_than`: only blocks that were last used before this stamp may leave.
        """
        budget = self.budgets[WARM]
        self.demand_bytes = max(wanted * namespace.slot_bytes, self.demand_bytes - self.demand_bytes // _DEMAND_FADES)
        found: list[Slot] = []
        settled, putting = 1 << 62, bool(keys)
        while len(found) < wanted:
            missing = wanted - len(found)
            over = budget.missing(namespace, missing * namespace.slot_bytes)
            room = missing - -(-over // namespace.slot_bytes)
            refs = self.allocator.take(namespace.tenant, namespace.slot_bytes, room) if room > 0 else []
            found.extend(self.slots.fill(refs, owner))
            budget.add(namespace, len(refs) * namespace.slot_bytes)
            if refs or (room > 0 and self.grow(namespace.tenant, namespace.slot_bytes)):
                continue
            made, refused = self._make_way(namespace, missing, keys[len(found) :], older_than, putting)
            if made:
                continue
            if not refused or not keys or not self.up[COLD]:
                return Taken(found, refused, settled)
            settled, keys = len(found), ()
        return Taken(found, settled=settled)

    def _make_way(
        self, namespace: Namespace, blocks: int, keys: Sequence[bytes], older_than: int, putting: bool
    ) -> tuple[int, bool]:
        """Drop up to `blocks` warm blocks for as many new ones; returns how many, and whether a new one was refused."""
        orders, allowed, place = self.orders, self.may_leave_warm, (namespace.tenant, namespace.slot_bytes)
        for done in range(blocks):
            own = self.budgets[WARM].over_namespace_limit(namespace, (done + 1) * namespace.slot_bytes)
            victim = (orders.own_victim if own else orders.victim)(namespace, WARM, allowed)
            if victim is None and self.budgets[WARM].over_tenant_limit(namespace, namespace.slot_bytes) and not own:
                # What it is over by may lie in other classes.
                victim = orders.oldest(WARM, allowed, (namespace.tenant,))
            refused = victim is not None and (
                (bool(keys) and not orders.admits(namespace, keys[done], victim, WARM))
                # What passes through, or is loaded, does not push out what is of higher priority for long.
                or (victim.level > namespace.level and (putting or not victim.spare & WARM))
            )
            if victim is None and older_than == _ANY_AGE and self.lending.force(namespace, own):
                continue
            if victim is None or refused or victim.touched >= older_than:
                if keys and not done:
                    orders.of(namespace, WARM).refuse(namespace, keys)
                return done, refused
            self.evict_warm(victim)
            self.pressed[place] = None
        return blocks, False

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
        if block.spare & WARM:
            if block.hits >= _PASSED:
                self._count_leaving(block, 1)
            if block in self.dirty:
                self.urgent[block] = None
        self.orders.insert(block, WARM)
        above = block.parent
        while above is not None and above.spare & WARM and not block.spare & WARM:  # it cannot leave before its child
            self.settle_warm(above)
            above = above.parent
        if block.copies != WARM:  # while it was filled, the copy that it came from had to stay
            self.orders.offer(block)

    def foresee(self, block: Block) -> None:
        """Its slot is being filled on a hint."""
        block.spare |= PREFETCHED
        self.prefetched_bytes += block.namespace.slot_bytes

    def fetched(self, block: Block) -> bool:
        """Somebody came for the block, or it is not there any more; returns whether it was loaded on a hint."""
        foreseen = bool(block.spare & PREFETCHED)
        if foreseen:
            block.spare &= ~PREFETCHED
            self.prefetched_bytes -= block.namespace.slot_bytes
        return foreseen

    def settle_warm(self, block: Block) -> None:
        """A block has earned its place, or stays after all; the copy that it has below is the first to go there."""
        self.set_leaving(block, leaving=False)
        block.hits = 0
        if block.copies & COLD:
            self.orders.set_spare(block, COLD, spare=True)
        if block.spare & REFUSED:
            block.spare &= ~REFUSED
            self.dirty[block] = None

    def _clean(self, block: Block) -> None:
        """It need not be saved."""
        self.dirty.pop(block, None)
        self.urgent.pop(block, None)

    def set_leaving(self, block: Block, leaving: bool) -> None:
        """Say whether its warm copy, or the one that is being loaded, is among the first to go."""
        if (block.spare & WARM != 0) == leaving:
            return
        self.orders.set_spare(block, WARM, leaving)
        if block.copies & WARM:
            if block.hits >= _PASSED:
                self._count_leaving(block, 1 if leaving else -1)
            self.urgent.pop(block, None)
            if leaving and block in self.dirty:
                self.urgent[block] = None

    def _count_leaving(self, block: Block, blocks: int) -> None:
        namespace = block.namespace
        self.leaving_bytes += blocks * namespace.slot_bytes
        namespace.leaving_bytes += blocks * namespace.slot_bytes

    def sentence(self, block: Block) -> None:
        """Its warm copy is the next to leave, after it was saved. A hit until then brings it back."""
        block.hits = _PASSED
        if block.spare & REFUSED:  # by a budget that may have recovered since
            block.spare &= ~REFUSED
            self.dirty[block] = None
        self.set_leaving(block, leaving=True)

    def evict_warm(self, block: Block) -> None:
        """Drop a warm copy for room."""
        self.counts[WARM].evictions += 1
        if block.spare & REFUSED:
            self.admission.left(block)
        elif block.copies == WARM:
            self.dropped_unsaved += 1
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
        self._clean(block)
        if block.lossy and block.copies & COLD:
            block.checksum = block.lossy
        self.orders.remove(block, WARM)
        if block.spare & WARM and block.hits >= _PASSED:
            self._count_leaving(block, -1)
        if block.hits >= _PASSED or not block.spare & WARM:
            block.hits = 0
        if block.spare & PREFETCHED:
            self.fetched(block)
        block.spare &= ~(WARM | REFUSED)
        if block.spare & COLD:
            self.orders.set_spare(block, COLD, spare=False)
        if block in self._spared:
            del self._spared[block]
            self.orders.offer(block)

    def pass_through(self, block: Block) -> None:
        """A new block that is not worth a place in warm, and is about to get its slot: it waits to be saved.

        A second use is enough for a place.
        """
        block.spare |= WARM
        block.hits = _PASSED

    def reconsider(self, block: Block | None) -> None:
        """What hangs on these blocks is saved: they must be as well, whatever was said of them."""
        while block is not None and block.spare & REFUSED:
            block.spare &= ~REFUSED
            self.dirty[block] = None
            if block.spare & WARM:
                self.urgent[block] = None
            block = block.parent

    def refuse_save(self, block: Block) -> None:
        """It is not worth a write: it may be dropped as it is, unless it is used again."""
        self._clean(block)
        block.spare |= REFUSED

    def oldest_warm(self) -> Block | None:
        """The block whose warm copy would leave next, over all size classes."""
        return self.orders.oldest(WARM, self.may_leave_warm)

    def may_leave_warm(self, block: Block) -> bool:
        """Whether nothing holds its warm copy."""
        slot = block.slot
        if slot is None or slot.pins or block.marks & SAVING:
            return False
        return block.copies != WARM or block.below is None

    def _slot_freed(self, slot: Slot) -> None:
        namespace = slot.owner.namespace
        self.budgets[WARM].remove(namespace, namespace.slot_bytes)

    def abandon(self, slot: Slot) -> None:
        """A filler failed."""
        self.slots.abandon(slot)

    # -- hot and cold -----------------------------------------------------------------------------------------

    def gain_below(self, block: Block, tier: int, stored_bytes: int) -> None:
        """The block has a copy in HOT or COLD that takes `stored_bytes` there."""
        if tier == COLD and block.copies & WARM:
            self._clean(block)
        self.count_below(block, tier, stored_bytes)
        self.orders.insert(block, tier)
        if block.copies != tier:  # it may leave another tier now
            self.orders.offer(block)

    def count_below(self, block: Block, tier: int, stored_bytes: int) -> None:
        """As gain_below, but for the order, into which it must be inserted before anything else happens."""
        assert not block.copies & tier
        block.copies |= tier
        if tier == COLD:
            block.stored_bytes = stored_bytes
            self.raw_cold_bytes += block.namespace.block_nbytes
        self.budgets[tier].add(block.namespace, stored_bytes)
        self.counts[tier].blocks += 1

    def drop_below(self, block: Block, tier: int, delete: bool = True) -> None:
        """A copy in HOT or COLD goes; `delete` says that the medium still has it."""
        assert block.copies & tier
        block.copies &= ~tier
        stored = block.stored_bytes if tier == COLD else block.namespace.block_nbytes
        if tier == COLD:
            block.stored_bytes = 0
            self.raw_cold_bytes -= block.namespace.block_nbytes
        self.budgets[tier].remove(block.namespace, stored)
        self.counts[tier].blocks -= 1
        if delete:
            self.deletes[tier].append((block.namespace.digest, block.key))
        if tier == COLD and block.copies & WARM and not block.degraded:  # which is never encoded again
            block.lossy = b""
            self.dirty[block] = None
            if block.spare & WARM:
                self.urgent[block] = None
        if tier == COLD:
            self._spared.pop(block, None)
        self.orders.remove(block, tier)
        block.spare &= ~tier

    def admits_below(self, block: Block) -> bool:
        """Whether the block is worth a place in cold, where its order says so once that is full."""
        budget, namespace = self.budgets[COLD], block.namespace
        if block.reused or not budget.missing(namespace, namespace.block_nbytes):
            return True  # as long as there is room the drive is written once, and second uses may come late
        if not self.admission.admits_first_use():
            return False
        own = budget.over_namespace_limit(namespace, namespace.block_nbytes)
        victim = self._victim_below(COLD, namespace if own else (namespace.tenant,), spare_ahead=True)
        if victim is None or self.orders.admits(namespace, block.key, victim, COLD):
            return True
        self.orders.of(namespace, COLD).refuse(namespace, (block.key,))
        self.admission.counts.refused_order += 1
        return False

    def make_room_below(self, tier: int, namespace: Namespace, nbytes: int, spare_ahead: bool = False) -> bool:
        """Drop copies of HOT or COLD until `nbytes` fit; False where they cannot.

        `spare_ahead` leaves alone what was saved while it is in warm still: to save one warm block in place of another
        gains nothing, and a cold tier smaller than the warm one would be written over and over without end.
        """
        budget, tenant = self.budgets[tier], namespace.tenant
        while budget.missing(namespace, nbytes):
            if not budget.fits(namespace, nbytes):
                return False  # all would leave for nothing
            # Over a limit of its own only its own blocks make room.
            asked: list[Namespace | tuple[str]] = [(tenant,)]
            if budget.over_namespace_limit(namespace, nbytes):
                asked = [namespace]
            elif not budget.over_tenant_limit(namespace, nbytes):
                asked = [(payer,) for payer in payers(budget.by_tenant, budget.capacity_bytes, tenant, nbytes)]
            for payer in asked:
                block = self._victim_below(tier, payer, spare_ahead)
                if block is not None:
                    self.evict_below(block, tier)
                    break
            else:
                return False
        return True

    def _victim_below(self, tier: int, of: Namespace | Collection[str] | None, spare_ahead: bool) -> Block | None:
        """The next to leave of a namespace, of some tenants, or of all."""
        if not spare_ahead:
            for block in self._spared:
                self.orders.offer(block)
            self._spared.clear()

        def allowed(block: Block) -> bool:
            return self._may_leave_below(block, tier) and not (spare_ahead and self._spare(block))

        if isinstance(of, Namespace):
            return self.orders.own_victim(of, tier, allowed)
        return self.orders.oldest(tier, allowed, of)

    def _spare(self, block: Block) -> bool:
        if not block.copies & WARM or block.spare & COLD:
            return False
        self._spared[block] = None  # the order drops it now; it is offered again when it leaves warm
        return True

    def evict_below(self, block: Block, tier: int) -> None:
        """Drop a copy in HOT or COLD for room."""
        self.counts[tier].evictions += 1
        self.drop_below(block, tier)
        self.index.lost(block)

    def oldest_below(self, tier: int, of: Namespace | None = None) -> Block | None:
        """The block whose copy in HOT or COLD would leave next; `of`: one that has to make room for itself."""
        return self._victim_below(tier, of, spare_ahead=False)

    def _may_leave_below(self, block: Block, tier: int) -> bool:
        slot = block.slot
        if block.marks & SAVING or (slot is not None and slot.state is SlotState.FILLING):
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
