"""The slab allocator against a plain model, in any order of steps."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.core.slabs import Slab, SlabAllocator, SlabState, SlotRef

PAGE = 4096
CAPACITY = 120 * PAGE
TARGET = 32 * PAGE

tenants = st.sampled_from(["a", "b"])
slot_sizes = st.sampled_from([PAGE, 3 * PAGE, 17 * PAGE, 50 * PAGE])
choice = st.integers(0, 10**6)


class SlabMachine(RuleBasedStateMachine):
    """`owned` is the model: who holds what. Everything else must follow from it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlabAllocator(CAPACITY, TARGET)
        self.owned: dict[SlotRef, tuple[str, int]] = {}
        self.seen_ids: set[int] = set()

    def of_state(self, state: SlabState) -> list[Slab]:
        return [slab for slab in self.pool.slabs() if slab.state is state]

    @rule(tenant=tenants, slot_bytes=slot_sizes, works=st.sampled_from([True, True, True, False, None]))
    def plan(self, tenant: str, slot_bytes: int, works: bool | None) -> None:
        room = CAPACITY - self.pool.planned_bytes
        slab = self.pool.plan(tenant, slot_bytes)
        assert (slab is None) == (room < PAGE + slot_bytes)
        if slab is None:
            return
        assert slab.slab_id not in self.seen_ids
        self.seen_ids.add(slab.slab_id)
        if works is not None:  # None: the maker takes its time
            (self.pool.made if works else self.pool.failed)(slab.slab_id)

    @precondition(lambda self: self.of_state(SlabState.MAKING))
    @rule(which=choice, works=st.booleans())
    def answer(self, which: int, works: bool) -> None:
        making = self.of_state(SlabState.MAKING)
        (self.pool.made if works else self.pool.failed)(making[which % len(making)].slab_id)

    @rule(tenant=tenants, slot_bytes=slot_sizes, count=st.integers(0, 40))
    def take(self, tenant: str, slot_bytes: int, count: int) -> None:
        there_were = self.pool.free_slots(tenant, slot_bytes)
        touched = {slab.slab_id for slab in self.of_state(SlabState.LIVE) if slab.used and slab.free}
        refs = self.pool.take(tenant, slot_bytes, count)
        assert len(refs) == min(count, there_were)
        assert len(set(refs)) == len(refs)
        assert not self.owned.keys() & set(refs)
        for ref in refs:
            slab = self.pool.slab(ref.slab_id)
            assert (slab.tenant, slab.geometry.slot_bytes) == (tenant, slot_bytes)
            assert slab.state is SlabState.LIVE
        opened = {ref.slab_id for ref in refs} - touched
        mine = [slab for slab in self.of_state(SlabState.LIVE) if slab.slab_id in touched and slab.tenant == tenant]
        assert not opened or not any(slab.free for slab in mine if slab.geometry.slot_bytes == slot_bytes)
        self.owned.update(dict.fromkeys(refs, (tenant, slot_bytes)))

    @precondition(lambda self: self.owned)
    @rule(which=choice, count=st.integers(1, 30))
    def give(self, which: int, count: int) -> None:
        for step in range(min(count, len(self.owned))):
            ref = sorted(self.owned)[(which + 7 * step) % len(self.owned)]
            del self.owned[ref]
            self.pool.give(ref)

    @precondition(lambda self: self.of_state(SlabState.LIVE))
    @rule(which=choice)
    def give_a_free_slot(self, which: int) -> None:
        live = self.of_state(SlabState.LIVE)
        slab = live[which % len(live)]
        if slab.free:
            try:
                self.pool.give(SlotRef(slab.slab_id, slab.free[which % len(slab.free)]))
            except AssertionError:
                return
            raise RuntimeError("a free slot was given back")

    @rule(tenant=tenants, slot_bytes=slot_sizes, which=st.integers(0, 3))
    def retire_a_donor(self, tenant: str, slot_bytes: int, which: int) -> None:
        donors = self.pool.donors(tenant, slot_bytes)
        assert [slab.used_bytes for slab in donors] == sorted(slab.used_bytes for slab in donors)
        assert all((slab.tenant, slab.geometry.slot_bytes) != (tenant, slot_bytes) for slab in donors)
        for slab in donors[which : which + 1]:
            used = self.pool.retire(slab.slab_id)
            assert used == sorted(ref.slot for ref in self.owned if ref.slab_id == slab.slab_id)

    @rule()
    def forget_what_is_empty(self) -> None:
        for slab in self.of_state(SlabState.RETIRING):
            if slab.used == 0:
                self.pool.retired(slab.slab_id)

    @invariant()
    def bytes_and_slots_add_up(self) -> None:
        slabs = list(self.pool.slabs())
        assert self.pool.planned_bytes == sum(slab.geometry.segment_bytes for slab in slabs) <= CAPACITY
        assert self.pool.used_bytes == sum(slot_bytes for _, slot_bytes in self.owned.values())
        for slab in slabs:
            used = {ref.slot for ref in self.owned if ref.slab_id == slab.slab_id}
            assert slab.used == len(used)
            assert slab.free == sorted(slab.free, reverse=True)
            if slab.state is not SlabState.MAKING:
                assert sorted([*slab.free, *used]) == list(range(slab.geometry.slots))

    @invariant()
    def free_slots_are_those_of_live_slabs(self) -> None:
        for tenant in ("a", "b"):
            for slot_bytes in (PAGE, 3 * PAGE, 17 * PAGE, 50 * PAGE):
                assert self.pool.free_slots(tenant, slot_bytes) == sum(
                    len(slab.free)
                    for slab in self.of_state(SlabState.LIVE)
                    if (slab.tenant, slab.geometry.slot_bytes) == (tenant, slot_bytes)
                )


SlabMachine.TestCase.settings = settings(stateful_step_count=40)
TestSlabs = SlabMachine.TestCase
