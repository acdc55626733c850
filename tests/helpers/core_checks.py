"""What must hold of a BlockCache after every step, whatever happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from core_world import World
from kvstore.core.block import COLD, HOT, MARKS, REFUSED, WARM, Block, Namespace, standing_in
from kvstore.core.leaf_lru import Entry, LeafLru
from kvstore.core.policy import EvictionPolicy
from kvstore.core.residency import _PASSED
from kvstore.core.slots import Slot, SlotState

FILLING, READY, RETIRING = SlotState.FILLING, SlotState.READY, SlotState.RETIRING


def check(world: World) -> None:
    """Everything."""
    check_slots(world)
    check_pins(world)
    check_copies(world)
    check_budgets(world)
    for namespace in world.cache.index.namespaces.values():
        check_tree(namespace)
    check_orphan_count(world)
    check_orders(world)


def namespaces(world: World) -> list[Namespace]:
    return list(world.cache.index.namespaces.values())


def live_blocks(world: World) -> Iterator[Block]:
    """Records that a lookup may meet."""
    for namespace in namespaces(world):
        yield from namespace.blocks.values()


def all_blocks(world: World) -> list[Block]:
    """Those and the ones that a clear has condemned, with emptied parents that wait for their children."""
    found = dict.fromkeys(live_blocks(world))
    moves = world.cache.moves
    for blocks in (*(shard.values() for shard in moves._condemned), moves._reaping):
        for block in blocks:
            above: Block | None = block
            while above is not None:
                found[above] = None
                above = above.parent
    return list(found)


def slots_of(world: World) -> list[Slot]:
    """Every slot that is not FREE."""
    return [slot for slab in world.cache.allocator.slabs() for slot in world.cache.slots.in_slab(slab.slab_id)]


def check_slots(world: World) -> None:
    """The table, the allocator and the generations in shared memory tell the same story."""
    slots, memory = slots_of(world), world.memory
    for slab in world.cache.allocator.slabs():
        held = {slot.index for slot in slots if slot.slab_id == slab.slab_id}
        assert not held & set(slab.free)
        assert len(held) == slab.used
    by_ref = {slot.ref: slot for slot in slots}
    assert len(by_ref) == len(slots)
    for slot in slots:
        readable = slot.state in (READY, RETIRING)
        assert memory.generations.get(slot.ref, 0) == (slot.generation if readable else 0)
        assert slot.pins > 0 or slot.state is not RETIRING, "a retired slot waits for nobody"
    for ref, generation in memory.generations.items():
        assert ref in by_ref or generation == 0, "a FREE slot can be read"
    assert world.cache.slots.filling == sum(slot.state is FILLING for slot in slots)
    filled = [item.slot for plan in world.plans for item in plan.items if item.slot is not None]
    filled += [block.slot for block in world.cache.reads.loads if block.slot is not None]
    filled += [load.slot for load in world.loads]
    assert Counter(filled) == Counter(slot for slot in slots if slot.state is FILLING), "one filler for each slot"
    reads = world.cache.reads
    assert set(reads.waiting) == {*reads.loads, *(load.block for load in world.loads)}
    queued: Counter[int] = Counter()
    for block, tier in reads.waiting.items():
        queued[tier] += block.namespace.block_nbytes
    assert all(queued[tier] == nbytes for tier, nbytes in reads.queued_bytes.items())


def check_pins(world: World) -> None:
    """A pin for every reader: leases, copies under way, and puts that hold their parent."""
    pins: Counter[Slot] = Counter()
    for lease in world.cache.reads.leases:
        for part in lease.parts:
            assert len(part.blocks) == len(part.slots)
            pins.update(part.slots[part.released :])
    pins.update(save.copy.slot for save in world.saves)
    pins.update(plan.held for plan in world.plans if plan.held is not None)
    for slot in slots_of(world):
        assert slot.pins == pins[slot], f"{slot.pins} pins, {pins[slot]} readers"


def check_copies(world: World) -> None:
    """A copy is where its block says, and it has that block's bytes."""
    residency, blocks = world.cache.residency, all_blocks(world)
    counted = {tier: sum(bool(block.copies & tier) for block in blocks) for tier in (HOT, WARM, COLD)}
    assert counted == {tier: count.blocks for tier, count in residency.counts.items()}
    owners: dict[Slot, Block] = {}
    for block in blocks:
        slot = block.slot
        if slot is not None:
            assert slot not in owners, "two blocks share a slot"
            owners[slot] = block
        if not block.copies & WARM:
            assert slot is None or slot.state is FILLING
            continue
        assert slot is not None
        assert slot.state is READY and slot.owner is block
        content = world.memory.contents[slot.ref]
        assert (content.digest, content.key) == (block.namespace.digest, block.key)
        assert content.checksum == block.checksum
    for slot in slots_of(world):
        if slot.state is READY:
            assert slot in owners
    for block in live_blocks(world):
        for tier in (HOT, COLD):
            if block.copies & tier and (block.namespace.digest, block.key) in world.media[tier]:
                assert world.media[tier][block.namespace.digest, block.key].epoch == block.namespace.epoch
    check_clean(world, blocks)


def check_media(world: World) -> None:
    """Once nothing is under way, each medium holds what the index says: no more, no less. For media without faults."""
    assert not world.saves and not world.cache.moves._condemned
    for tier in (HOT, COLD):
        names = {(block.namespace.digest, block.key) for block in live_blocks(world) if block.copies & tier}
        assert names == world.media[tier].keys()
        for block in live_blocks(world):
            if block.copies & tier:
                assert world.media[tier][block.namespace.digest, block.key].checksum == block.checksum


def check_clean(world: World, blocks: list[Block]) -> None:
    """What is saved and what is not."""
    residency = world.cache.residency
    warm = [block for block in blocks if block.copies & WARM]
    unsaved = [block for block in warm if not block.copies & COLD and not block.degraded]
    saved_later = {block for block in unsaved if not block.spare & REFUSED}
    assert set(residency.dirty) == (saved_later if residency.budgets[COLD].capacity_bytes else set())
    leaving = [block for block in warm if block.spare & WARM]
    counted = [block for block in leaving if block.hits >= _PASSED]
    assert residency.leaving_bytes == sum(block.namespace.slot_bytes for block in counted)
    assert set(residency.urgent) == {block for block in leaving if block in residency.dirty}
    assert all(block.copies & WARM for block in blocks if block.spare & REFUSED)
    cold = [block for block in blocks if block.copies & COLD]
    assert residency.raw_cold_bytes == sum(block.namespace.block_nbytes for block in cold)


def check_budgets(world: World) -> None:
    """Every byte is counted once, for its tenant, and within the limits."""
    residency, blocks = world.cache.residency, all_blocks(world)
    warm: Counter[str] = Counter()
    for slot in slots_of(world):
        slab = world.cache.allocator.slab(slot.slab_id)
        warm[slab.tenant] += slab.geometry.slot_bytes
    hot = Counter[str]()
    cold = Counter[str]()
    for block in blocks:
        hot[block.namespace.tenant] += block.namespace.block_nbytes * bool(block.copies & HOT)
        cold[block.namespace.tenant] += block.stored_bytes
        assert block.copies & COLD or block.stored_bytes == 0
    for save in world.saves:  # room is kept for what is on its way
        (hot if save.tier == HOT else cold)[save.copy.block.namespace.tenant] += save.copy.block.namespace.block_nbytes
    for tier, expected in ((HOT, hot), (WARM, warm), (COLD, cold)):
        budget = residency.budgets[tier]
        assert budget.by_tenant == {tenant: nbytes for tenant, nbytes in expected.items() if nbytes}
        assert budget.used_bytes == sum(expected.values()) <= budget.capacity_bytes
        for tenant, limit in budget.tenant_limits.items():
            assert budget.by_tenant.get(tenant, 0) <= limit
        by_tenant = Counter[str]()
        for namespace, nbytes in budget.by_namespace.items():
            by_tenant[namespace.tenant] += nbytes
        assert by_tenant == budget.by_tenant
    assert world.cache.allocator.used_bytes == residency.budgets[WARM].used_bytes


def check_tree(namespace: Namespace) -> None:
    """Parents and children agree, a stored prefix has no holes, and nothing is kept that nobody needs."""
    for name, block in namespace.blocks.items():
        assert block.key == name and block.namespace is namespace
        children = list(block.children())
        assert all(child.parent is block for child in children)
        assert len(set(children)) == len(children)
        parent = block.parent
        if parent is not None:
            assert block in list(parent.children())
            assert namespace.blocks.get(parent.key) is parent, "a block hangs on a record that is gone"
        assert block.copies or block.slot is not None or children, "a record without copies or children"
        if not namespace.chain:
            assert parent is None and not children and not block.orphan
        elif parent is not None:
            assert block.orphan == (parent.orphan or not parent.copies), "orphan: a hole is above it"
            assert block.orphan or block.depth == parent.depth + 1
        else:
            assert not block.orphan or not block.copies, "an orphan hangs on a hole"


def check_orphan_count(world: World) -> None:
    assert world.cache.index.orphans == sum(block.orphan for block in all_blocks(world))


def check_orders(world: World) -> None:
    """Whatever may leave a tier has an entry in its order, or room could never be made of it."""
    residency = world.cache.residency
    for block in all_blocks(world):
        for tier in (HOT, WARM, COLD):
            if not block.copies & tier or any(child.copies & tier for child in block.children()):
                continue
            free = residency.may_leave_warm(block) if tier == WARM else residency._may_leave_below(block, tier)
            spared = tier == COLD and block in residency._spared
            mark = MARKS[tier][standing_in(block, tier)]
            assert not free or block.queued & mark or spared, "it may leave, and no order has it"
    check_entries(world)


def check_entries(world: World) -> None:
    """Each order has the blocks that say so, and knows how many stand there; each block stands where it should."""
    held = Counter[int]()
    entered: dict[int, set[Block]] = {}
    orders: dict[int, EvictionPolicy] = {}
    blocks = every_block(world)
    for block in blocks:
        for tier in (HOT, WARM, COLD):
            if block.copies & tier:
                order = block.namespace.orders[MARKS[tier][standing_in(block, tier)]]
                held[id(order)] += 1
        for mark, order in block.namespace.orders.items():
            orders[id(order)] = order
            if id(order) not in entered:
                entered[id(order)] = {entry[2] for entry in entries_of(order)}
            assert not block.queued & mark or block in entered[id(order)], "a mark without an entry"
    for number, order in orders.items():
        assert order._live == held[number], "an order has lost count"  # type: ignore[attr-defined]


def every_block(world: World) -> list[Block]:
    """Also what was cleared and is not emptied yet."""
    condemned = [block for shard in world.cache.moves._condemned for block in shard.values()]
    return list(dict.fromkeys([*all_blocks(world), *condemned, *world.cache.moves._reaping]))


def entries_of(order: EvictionPolicy) -> list[Entry]:
    """Entries of a leaf-lru or an adaptive order."""
    return order._heap if isinstance(order, LeafLru) else [*order._once, *order._again]  # type: ignore[attr-defined]


def check_nothing_left(world: World) -> None:
    """After everything has ended and gone."""
    residency = world.cache.residency
    assert slots_of(world) == []
    assert [b.used_bytes for b in residency.budgets.values()] == [0, 0, 0]
    assert [b.by_tenant for b in residency.budgets.values()] == [{}, {}, {}]
    assert [b.by_namespace for b in residency.budgets.values()] == [{}, {}, {}]
    assert residency.leaving_bytes == residency.prefetched_bytes == residency.raw_cold_bytes == 0
    assert not residency.dirty
    assert all(not namespace.blocks for namespace in namespaces(world))
    assert world.cache.index.orphans == 0
    assert not world.cache.reads.loads
    leases = world.cache.reads.leases
    assert not (len(leases) or leases._by_session or leases._tokens or leases._seen)
