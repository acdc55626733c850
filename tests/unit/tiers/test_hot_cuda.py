"""The hot tier's own promises, on a driver whose copies run only when somebody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fake_cuda import GRANULARITY, CUresult, FakeDriver
from kvstore.protocol.cuda_calls import CudaBroken, CudaError, CudaOutOfMemory
from kvstore.tiers.base import Outcome, SlabMemory, TierItem
from kvstore.tiers.conformance import Rig
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.cuda_memory import DeviceMemory
from kvstore.tiers.device_slabs import DeviceSlabs
from kvstore.tiers.hot_cuda import HotCuda
from kvstore.tiers.memory import ArrayMemory

PATIENCE_S = 30.0
BLOCK = 64 << 10


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    made = FakeDriver(16 << 20)
    yield made
    assert made.leaks() == {}
    assert made.free_bytes == made.total_bytes


def hot_rig(driver: FakeDriver, capacity_bytes: int = 4 << 20) -> Rig:
    def make(memory: SlabMemory, capacity: int) -> HotCuda:
        assert isinstance(memory, ArrayMemory)
        return HotCuda(CudaDevice("cuda:0", driver), capacity, memory)

    return Rig(make, capacity_bytes)


def tier_of(rig: Rig) -> HotCuda:
    assert isinstance(rig.tier, HotCuda)
    return rig.tier


@pytest.mark.parametrize("where", ["write", "read"])
def test_a_batch_is_one_set_of_copies_and_one_wait(driver: FakeDriver, where: str) -> None:
    with hot_rig(driver) as rig:
        items = [rig.block(number) for number in range(8)]
        if where == "write":
            rig.store(items)
        else:
            rig.store(items)
            before = len(driver.named("cuEventQuery"))
            targets = [item._replace(range=rig.memory.reserve(BLOCK)._replace(nbytes=BLOCK)) for item in items]
            assert rig.tier.read(targets) == [Outcome.OK] * 8
            assert len(driver.named("cuEventQuery")) == before + 1
            return
        # Neighbours in the slab and on the device: one copy of 512 KiB.
        assert [call[3] for call in driver.named("cuMemcpyHtoDAsync")] == [8 * BLOCK]
        assert len(driver.named("cuEventQuery")) == 1


def test_all_memory_is_taken_at_the_start_and_less_is_less(driver: FakeDriver) -> None:
    with hot_rig(driver, 8 << 20) as rig:
        assert driver.free_bytes == 8 << 20
        assert rig.tier.stats()["capacity_bytes"] == 8 << 20
    driver.refuse("cuMemCreate", CUresult.CUDA_ERROR_OUT_OF_MEMORY, after=3)
    with hot_rig(driver, 8 << 20) as rig:
        assert rig.tier.capacity_bytes == 3 << 20
        items = [rig.block(number) for number in range(60)]
        assert rig.write(items).count(Outcome.OK) == 48
        assert rig.fetch(items)[:48] == [Outcome.OK] * 48


def test_a_device_without_room_for_one_slab_is_no_tier(driver: FakeDriver) -> None:
    driver.refuse("cuMemCreate", CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CudaOutOfMemory, match="not even one slab"):
        hot_rig(driver)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemSetAccess"])
def test_memory_that_must_not_be_shared_is_taken_all_the_same(driver: FakeDriver, call: str) -> None:
    """A device may claim what a container or a hypervisor forbids; what was taken until then is given back."""
    driver.refuse(call, CUresult.CUDA_ERROR_NOT_SUPPORTED, after=1)
    with hot_rig(driver) as rig:
        assert driver.total_bytes - driver.free_bytes == 4 << 20
        items = [rig.block(number) for number in range(20)]
        rig.store(items)
        assert rig.fetch(items) == [Outcome.OK] * 20
        assert len(driver.named("cuMemAlloc")) == rig.tier.stats()["slabs"]


def test_a_device_that_refuses_all_memory_is_no_tier_and_keeps_none(driver: FakeDriver) -> None:
    driver.refuse("cuMemCreate", CUresult.CUDA_ERROR_NOT_SUPPORTED)
    driver.refuse("cuMemAlloc", CUresult.CUDA_ERROR_NOT_SUPPORTED, after=2)
    with pytest.raises(CudaError, match="cuMemAlloc"):
        hot_rig(driver)


def test_a_slab_that_the_driver_does_not_take_back_is_nobodys_error() -> None:
    driver = FakeDriver(16 << 20)
    with hot_rig(driver) as rig:
        items = [rig.block(number) for number in range(60)]
        rig.store(items)
        tier_of(rig).resize(2 << 20)
        driver.refuse("cuMemUnmap", CUresult.CUDA_ERROR_INVALID_VALUE)
        rig.tier.delete([item.ref for item in items])
        driver.relent("cuMemUnmap")
        assert rig.tier.stats()["slabs"] * tier_of(rig)._slabs.slab_bytes == 2 << 20
        rig.store(items[:20])
        assert rig.fetch(items[:20]) == [Outcome.OK] * 20
    assert driver.total_bytes - driver.free_bytes == 2 << 20, "what it did not take back, and no more"


def test_a_block_that_was_damaged_on_the_device_is_corrupt_and_dropped(driver: FakeDriver) -> None:
    with hot_rig(driver) as rig:
        item, other = rig.block(1), rig.block(2)
        rig.store([item, other])
        address = tier_of(rig)._held[item.ref].slot.address
        driver.bytes_at(address, BLOCK)[100] ^= 1
        assert rig.fetch([item, other]) == [Outcome.CORRUPT, Outcome.OK]
        assert rig.fetch([item]) == [Outcome.MISSING]


def test_a_copy_that_the_driver_refuses_is_busy_and_costs_nothing(driver: FakeDriver) -> None:
    with hot_rig(driver) as rig:
        items = [rig.block(number) for number in range(3)]
        driver.refuse("cuMemcpyHtoDAsync", CUresult.CUDA_ERROR_INVALID_VALUE)
        assert rig.write(items) == [Outcome.BUSY] * 3
        driver.relent("cuMemcpyHtoDAsync")
        rig.store(items)
        driver.refuse("cuMemcpyDtoHAsync", CUresult.CUDA_ERROR_INVALID_VALUE)
        assert rig.tier.read(items) == [Outcome.BUSY] * 3
        driver.relent("cuMemcpyDtoHAsync")
        assert rig.fetch(items) == [Outcome.OK] * 3
        assert rig.tier.stats()["copy_errors"] == 6
        rig.tier.delete([item.ref for item in items])
        assert rig.tier.stats()["whole_slabs"] == rig.tier.stats()["slabs"], "a slot was not given back"


def test_a_broken_device_ends_the_process_instead_of_answering(driver: FakeDriver) -> None:
    rig = hot_rig(driver)
    rig.store([rig.block(1)])
    driver.refuse("cuEventQuery", CUresult.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(CudaBroken):
        rig.tier.read([rig.target(rig.block(1))])
    driver.relent("cuEventQuery")
    copier = tier_of(rig)._copier
    copier._settle(copier._all[0])
    rig.tier.close()


def test_a_slot_is_not_given_away_while_it_is_read(driver: FakeDriver) -> None:
    """A block is deleted while its copy to the host is under way: what is stored next must not land in its slot."""
    with hot_rig(driver, GRANULARITY) as rig, ThreadPoolExecutor(1) as pool:
        item, next_one = rig.block(1), rig.block(2)
        rig.store([item])
        reading, go_on = threading.Event(), threading.Event()

        def hold(name: str) -> None:
            if name == "cuEventQuery":
                driver.before_call = lambda name: None
                reading.set()
                assert go_on.wait(PATIENCE_S)

        driver.before_call = hold
        result = pool.submit(rig.fetch, [item])
        assert reading.wait(PATIENCE_S)
        rig.tier.delete([item.ref])
        assert rig.write([next_one]) == [Outcome.FULL]
        go_on.set()
        assert result.result(PATIENCE_S) == [Outcome.OK]
        rig.store([next_one])


def test_copies_of_several_calls_are_under_way_at_once_in_both_directions(driver: FakeDriver) -> None:
    with hot_rig(driver) as rig, ThreadPoolExecutor(4) as pool:
        stored = [rig.block(number) for number in range(2)]
        fresh = [rig.block(number) for number in range(10, 12)]
        rig.store(stored)
        targets = [rig.target(item) for item in stored]
        meeting = threading.Barrier(4)

        def meet(name: str) -> None:
            if name == "cuEventRecord":
                meeting.wait(PATIENCE_S)

        driver.before_call = meet
        calls = [pool.submit(rig.tier.read, [target]) for target in targets]
        writes = [pool.submit(rig.write, [item]) for item in fresh]
        assert [call.result(PATIENCE_S) for call in calls] == [[Outcome.OK]] * 2
        assert [call.result(PATIENCE_S) for call in writes] == [[Outcome.OK]] * 2
        driver.before_call = lambda name: None
        assert len(driver.named("cuStreamCreate")) == 4
        assert rig.fetch(fresh) == [Outcome.OK] * 2


def test_a_slab_that_goes_is_unregistered_before_it_is_unmapped(driver: FakeDriver) -> None:
    with hot_rig(driver) as rig:
        item = rig.block(1)
        rig.store([item])
        assert list(driver.registered) == [rig.memory.array.ctypes.data]
        tier_of(rig).slab_unmapped(rig.memory.slab_id)
        assert driver.registered == {}
        assert rig.fetch([item]) == [Outcome.OK], "it is registered again at its next use"
        assert rig.tier.stats()["pinned_bytes"] == rig.memory.array.nbytes


def test_shrinking_moves_blocks_together_and_growing_takes_what_there_is(driver: FakeDriver) -> None:
    """32 blocks lie in two of eight slabs; half of each goes, and what is left fits one."""
    with hot_rig(driver, 8 << 20) as rig:
        tier = tier_of(rig)
        items = [rig.block(number) for number in range(32)]
        rig.store(items)
        assert tier.resize(1 << 20) == 1 << 20
        assert driver.free_bytes == 14 << 20, "there is no room to move to yet: blocks keep their slabs"
        assert rig.fetch(items) == [Outcome.OK] * 32
        tier.delete([item.ref for item in items[::2]])
        assert tier.stats()["slabs"] == 1, "moved on the device, when statistics are asked for"
        assert driver.free_bytes == 15 << 20
        assert driver.named("cuMemcpyDtoDAsync", "cuMemcpyBatchAsync")
        assert rig.fetch(items[1::2]) == [Outcome.OK] * 16
        assert tier.resize(64 << 20) == 16 << 20
        assert driver.free_bytes == 0
        assert rig.write([rig.block(number) for number in range(100, 120)]) == [Outcome.OK] * 20
        assert rig.fetch(items[1::2]) == [Outcome.OK] * 16


def test_a_block_that_is_read_is_not_moved_and_its_slab_waits(driver: FakeDriver) -> None:
    with hot_rig(driver, 2 * GRANULARITY) as rig, ThreadPoolExecutor(1) as pool:
        tier = tier_of(rig)
        one, two = rig.block(1), rig.block(2)
        rig.store([one, two])
        rig.tier.delete([two.ref])
        reading, go_on = threading.Event(), threading.Event()

        def hold(name: str) -> None:
            if name == "cuEventQuery":
                driver.before_call = lambda name: None
                reading.set()
                assert go_on.wait(PATIENCE_S)

        driver.before_call = hold
        result = pool.submit(rig.fetch, [one])
        assert reading.wait(PATIENCE_S)
        tier._slabs._retiring.add(tier._held[one.ref].slot.slab)
        tier.stats()
        assert driver.named("cuMemcpyDtoDAsync") == []
        go_on.set()
        assert result.result(PATIENCE_S) == [Outcome.OK]
        assert tier.stats()["slabs"] == 1
        assert rig.fetch([one]) == [Outcome.OK]


def test_growing_back_before_a_slab_has_gone_keeps_it(driver: FakeDriver) -> None:
    with hot_rig(driver, 4 << 20) as rig:
        items = [rig.block(number) for number in range(64)]
        rig.store(items)
        assert tier_of(rig).resize(2 << 20) == 2 << 20
        assert tier_of(rig).resize(4 << 20) == 4 << 20
        assert rig.fetch(items) == [Outcome.OK] * 64
        rig.tier.delete([items[0].ref])
        rig.store([rig.block(100)])
        assert rig.tier.stats()["slabs"] == 8


def test_memory_moves_to_the_size_that_is_used(driver: FakeDriver) -> None:
    device = CudaDevice("cuda:0", driver)
    slabs = DeviceSlabs(DeviceMemory(device), 4 * GRANULARITY)
    small = [slabs.take(4096) for _ in range(64)]
    assert None not in small and slabs.take(4096) is None and slabs.take(GRANULARITY) is None
    assert len({slot.address for slot in small if slot}) == 64
    for slot in small[:16]:
        assert slot is not None
        slabs.give(slot)
    large = slabs.take(GRANULARITY)
    assert large is not None and slabs.take(4096) is None
    assert slabs.take(GRANULARITY + 1) is None, "a block that is larger than a slab never fits"
    slabs.close()
    device.close()


@pytest.mark.parametrize(("capacity_mib", "slab_mib"), [(1, 0.125), (256, 32), (1024, 64), (4096, 128), (65536, 512)])
def test_slabs_are_larger_in_a_larger_tier(driver: FakeDriver, capacity_mib: int, slab_mib: float) -> None:
    device = CudaDevice("cuda:0", driver)
    memory = DeviceMemory(device)
    driver.refuse("cuMemCreate", CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CudaOutOfMemory, match=f"one slab of {int(slab_mib * (1 << 20))} bytes"):
        DeviceSlabs(memory, capacity_mib << 20)
    device.close()


def test_a_block_that_is_larger_than_a_slab_pushes_nobody_out(driver: FakeDriver) -> None:
    with hot_rig(driver, 4 << 20) as rig:
        assert rig.write([rig.block(1, nbytes=(512 << 10) + 1)]) == [Outcome.BUSY]
        assert rig.tier.stats()["too_large"] == 1


def test_what_a_cut_slab_cannot_use_is_not_counted_as_capacity(driver: FakeDriver) -> None:
    device = CudaDevice("cuda:0", driver)
    slabs = DeviceSlabs(DeviceMemory(device), 4 * GRANULARITY)
    slabs.take(40 << 10)
    assert slabs.capacity_bytes == 3 * GRANULARITY + (40 << 10)
    slabs.close()
    device.close()


def test_a_read_of_another_content_is_missing_and_of_no_slab_busy(driver: FakeDriver) -> None:
    with hot_rig(driver) as rig:
        item = rig.block(1)
        rig.store([item])
        other: TierItem = item._replace(checksum=bytes(16))
        assert rig.fetch([other, item]) == [Outcome.MISSING, Outcome.OK]
