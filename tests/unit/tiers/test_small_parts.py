"""The small parts under the tiers: memory, gate, tally, records, and the host tier's own promises."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kvstore.tiers.base import BlockRef, Outcome, SlabMemory, SlabRange, StoredRecord, Tier
from kvstore.tiers.cold_records import (
    PAGE_BYTES,
    RECORD_BYTES,
    Totals,
    entry_key,
    footprint_bytes,
    pack_record,
    payload_bytes,
    unpack_record,
)
from kvstore.tiers.conformance import Rig
from kvstore.tiers.gate import Gate
from kvstore.tiers.host import HostMemoryTier
from kvstore.tiers.memory import ArrayMemory
from kvstore.tiers.tally import Tally


def test_memory_hands_out_ranges_once_and_views_without_a_copy() -> None:
    memory = ArrayMemory(100, slab_id=3)
    first, second = memory.reserve(10), memory.reserve(10, align=64)
    assert (first, second) == (SlabRange(3, 0, 10), SlabRange(3, 64, 10))
    memory.view(second)[:] = 9
    assert memory.array[64:74].tolist() == [9] * 10
    with pytest.raises(ValueError, match="do not fit"):
        memory.reserve(27)
    assert memory.reserve(26).offset == 74


@pytest.mark.parametrize(
    "place", [SlabRange(4, 0, 1), SlabRange(3, -1, 2), SlabRange(3, 99, 2), SlabRange(3, 5, -1), SlabRange(3, 101, 0)]
)
def test_memory_outside_of_the_slab_is_not_mapped(place: SlabRange) -> None:
    with pytest.raises(KeyError):
        ArrayMemory(100, slab_id=3).view(place)


def test_gate_lets_nobody_in_once_closed() -> None:
    gate = Gate()
    with gate.inside() as first, gate.inside() as second:
        assert (first, second) == (True, True)
        assert gate.close(0.0) is False
        with gate.inside() as third:
            assert third is False
    assert gate.close(0.0) is True


def test_gate_closes_when_the_last_one_leaves() -> None:
    gate, inside, leave = Gate(), threading.Event(), threading.Event()

    def stay() -> None:
        with gate.inside():
            inside.set()
            assert leave.wait(30)

    with ThreadPoolExecutor(2) as pool:
        staying = pool.submit(stay)
        assert inside.wait(30)
        closing = pool.submit(gate.close, 30.0)
        leave.set()
        assert closing.result(30) is True
        staying.result(30)


def test_tally_counts_from_many_threads_and_knows_its_names() -> None:
    tally = Tally(("a", "b"))
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(lambda: [tally.add("a") for _ in range(1000)]) for _ in range(4)]:
            future.result(30)
    tally.high("b", 5)
    tally.high("b", 3)
    assert tally.snapshot() == {"a": 4000, "b": 5}
    with pytest.raises(KeyError):
        tally.add("c")


def record(parent: bytes, *, lossy: bool = False) -> StoredRecord:
    ref = BlockRef(b"n" * 32, b"k" * 32)
    return StoredRecord(ref, parent, b"c" * 16, 2 << 20, 12345, 2**63, 65_535, 2**32 - 1, 2**40, lossy)


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("parent", [b"", bytes(32), b"p" * 32])
def test_record_round_trip(parent: bytes, lossy: bool) -> None:
    whole = record(parent, lossy=lossy)
    data = pack_record(whole, page=2**40)
    assert len(data) == RECORD_BYTES
    assert unpack_record(entry_key(whole.ref), data) == (whole, 2**40)


def test_more_uses_than_a_record_can_count_are_as_many_as_it_can() -> None:
    often = replace(record(b""), hits=2**40)
    assert unpack_record(entry_key(often.ref), pack_record(often)).record.hits == 2**32 - 1


def test_every_flipped_bit_of_a_record_and_of_its_key_is_noticed() -> None:
    entry = entry_key(record(b"").ref)
    whole = bytearray(entry + pack_record(record(b"")))
    for bit in range(8 * len(whole)):
        whole[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unpack_record(bytes(whole[:64]), bytes(whole[64:]))
        whole[bit // 8] ^= 1 << bit % 8
    for cut in range(RECORD_BYTES):
        with pytest.raises(ValueError):
            unpack_record(bytes(whole[:64]), bytes(whole[64 : 64 + cut]))


def test_totals() -> None:
    totals = Totals().plus(100, 60).plus(50, 40)
    assert totals.minus(100, 60) == Totals(1, 50, 40)
    assert totals.minus(1000, 1000) == Totals(1, 0, 0)
    assert Totals.unpack(totals.pack()) == totals
    assert Totals.unpack(None) == Totals(0, 0, 0)
    with pytest.raises(ValueError, match="totals of 3 bytes"):
        Totals.unpack(b"abc")


def test_the_pages_of_a_payload_follow_from_its_footprint() -> None:
    for nbytes in (1, 1966):
        assert payload_bytes(footprint_bytes(nbytes)) == 0, "in a leaf page"
    for nbytes in (1967, 4080, 4081, 100_000):
        assert payload_bytes(footprint_bytes(nbytes)) == -(-(nbytes + 16) // PAGE_BYTES) * PAGE_BYTES


def test_footprint_is_in_pages_and_never_too_small() -> None:
    assert footprint_bytes(PAGE_BYTES - 16) < 2 * PAGE_BYTES < footprint_bytes(PAGE_BYTES - 15) < 3 * PAGE_BYTES
    sizes = [footprint_bytes(nbytes) for nbytes in range(0, 20_000, 7)]
    assert all(size > nbytes for size, nbytes in zip(sizes, range(0, 20_000, 7), strict=True))


def host(memory: SlabMemory, capacity_bytes: int) -> Tier:
    return HostMemoryTier(capacity_bytes, memory)


def test_host_tier_fills_to_the_last_byte() -> None:
    with Rig(host, capacity_bytes=1000) as rig:
        assert rig.write([rig.block(1, 600), rig.block(2, 401), rig.block(3, 400)]) == [
            Outcome.OK,
            Outcome.FULL,
            Outcome.OK,
        ]
        rig.store([rig.block(1, 600, version=1)])
        assert rig.tier.stats()["raw_bytes"] == 1000
        assert rig.write([rig.block(1, 601)]) == [Outcome.FULL]
        assert rig.fetch([rig.block(1, 600, version=1)]) == [Outcome.OK], "a copy that does not fit replaces nothing"


def test_host_tier_notices_its_own_memory_failing() -> None:
    with Rig(host) as rig:
        item = rig.block(1)
        rig.store([item])
        assert isinstance(rig.tier, HostMemoryTier)
        rig.tier._held[item.ref].data[5] ^= 1
        assert rig.fetch([item]) == [Outcome.CORRUPT]
        assert rig.fetch([item]) == [Outcome.MISSING]
        assert rig.tier.stats()["raw_bytes"] == 0
