"""Metered counts, Throttled waits, Faulty fails as told; whatever else is asked goes to the tier inside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvstore.tiers.base import Outcome, SlabMemory, Tier
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.conformance import Rig
from kvstore.tiers.host import HostMemoryTier
from kvstore.tiers.wrappers import Fault, FaultPlan, Faulty, Metered, ScriptedFaults, SeededFaults, Throttled

OK, MISSING, CORRUPT, BUSY, FULL = Outcome


def host(memory: SlabMemory, capacity_bytes: int) -> Tier:
    return HostMemoryTier(capacity_bytes, memory)


def ticking(*times_ns: int) -> Iterator[int]:
    yield from times_ns


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


def test_metered_counts_calls_blocks_bytes_and_time() -> None:
    ticks = ticking(0, 50, 100, 130, 200, 270)
    with Rig(lambda memory, size: Metered(host(memory, size), lambda: next(ticks))) as rig:
        items = [rig.block(1, 1000), rig.block(2, 500)]
        rig.store(items)
        assert rig.fetch([items[0], rig.block(3)]) == [OK, MISSING]
        assert rig.fetch(items) == [OK, OK]
        stats = rig.tier.stats()
    wanted = {
        "write_calls": 1,
        "write_blocks": 2,
        "write_ok": 2,
        "write_bytes": 1500,
        "write_ns": 50,
        "write_ns_max": 50,
    }
    wanted |= {"read_calls": 2, "read_blocks": 4, "read_ok": 3, "read_bytes": 2500, "read_ns": 100, "read_ns_max": 70}
    assert {name: stats[name] for name in wanted} == wanted
    assert stats["blocks"] == 2, "the inner tier's counters are there too"


def test_throttled_waits_for_its_own_size() -> None:
    time = FakeTime()
    with Rig(lambda memory, size: Throttled(host(memory, size), 1000.0, time.sleep, time.clock)) as rig:
        item = rig.block(1, 500)
        rig.store([item])
        assert rig.fetch([item, item]) == [OK, OK]
        rig.fetch([])
        rig.tier.delete([item.ref])
    assert time.slept == pytest.approx([0.5, 1.0])


def test_throttled_batches_queue_behind_each_other() -> None:
    """Two threads at once: the second waits for the first one's bytes as well."""
    slept: list[float] = []
    with Rig(lambda memory, size: Throttled(host(memory, size), 1000.0, slept.append, lambda: 5.0)) as rig:
        rig.store([rig.block(1, 500)])
        rig.store([rig.block(2, 250)])
    assert slept == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize("rate", [0, -1.0])
def test_throttled_needs_a_rate(rate: float) -> None:
    with Rig(host) as rig, pytest.raises(ValueError, match="above 0"):
        Throttled(rig.tier, rate)


def faulty_rig(plan: FaultPlan) -> Rig:
    return Rig(lambda memory, size: Faulty(host(memory, size), memory, plan))


def test_scripted_faults_hit_the_named_operation_in_order() -> None:
    plan = ScriptedFaults("read", [None, Fault.MISSING, Fault.CORRUPT, Fault.BUSY, None])
    with faulty_rig(plan) as rig:
        items = [rig.block(number) for number in range(5)]
        rig.store(items)
        assert rig.fetch(items) == [OK, MISSING, CORRUPT, BUSY, OK]
        assert rig.fetch(items) == [OK] * 5, "the script is over"


def test_a_write_that_fails_stores_nothing() -> None:
    plan = ScriptedFaults("write", [Fault.FULL, None, Fault.BUSY, Fault.FLIP])
    with faulty_rig(plan) as rig:
        items = [rig.block(number) for number in range(4)]
        assert rig.write(items) == [FULL, OK, BUSY, OK]
        assert rig.fetch(items) == [MISSING, OK, MISSING, OK]


def test_a_flipped_byte_says_ok_and_fails_its_checksum() -> None:
    with faulty_rig(ScriptedFaults("read", [Fault.FLIP, Fault.FLIP])) as rig:
        item = rig.block(1)
        rig.store([item])
        target = rig.target(item)
        assert rig.tier.read([target, rig.target(rig.block(2))]) == [OK, MISSING]
        assert block_checksum(rig.memory.view(target.range)) != item.checksum
        assert rig.fetch([item]) == [OK], "the tier's own copy is whole"


def test_seeded_faults_repeat() -> None:
    rates = {Fault.BUSY: 0.2, Fault.CORRUPT: 0.1}
    with Rig(host) as rig:
        item = rig.block(1)
    drawn = [[SeededFaults(7, rates)] for _ in range(2)]
    runs = [[plan.next_fault("read", item) for _ in range(1000)] for (plan,) in drawn]
    assert runs[0] == runs[1]
    assert 150 < runs[0].count(Fault.BUSY) < 250
    assert 60 < runs[0].count(Fault.CORRUPT) < 140
    assert runs[0] != [SeededFaults(8, rates).next_fault("read", item) for _ in range(1000)]


def test_rates_add_up_to_one_at_most() -> None:
    with pytest.raises(ValueError, match="more than 1"):
        SeededFaults(1, {Fault.BUSY: 0.6, Fault.FULL: 0.5})


def test_wrappers_nest_and_show_what_is_inside() -> None:
    with Rig(host) as rig:
        tier = Metered(Throttled(Faulty(rig.tier, rig.memory, SeededFaults(0, {})), 1e12))
        assert (tier.name, tier.capacity_bytes) == (rig.tier.name, rig.tier.capacity_bytes)
        assert isinstance(tier.inner, Throttled)
        assert isinstance(tier.inner.inner, Faulty)
        assert tier.inner.inner.inner is rig.tier
