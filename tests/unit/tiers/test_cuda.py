"""The driver's calls: what is called in which order, what becomes of every failure, and that all is given back."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fake_cuda import GRANULARITY, CUresult, FakeDriver
from kvstore.protocol import cuda_copies
from kvstore.protocol.cuda_calls import CudaBroken, CudaCalls, CudaError, CudaMissing, CudaOutOfMemory, load_driver
from kvstore.protocol.cuda_copies import AsyncCopies, Direction, Rows, Run, await_event, merged
from kvstore.tiers import pinned
from kvstore.tiers.cuda import CudaDevice
from kvstore.tiers.cuda_copies import Copier
from kvstore.tiers.cuda_memory import DeviceMemory
from kvstore.tiers.memory import ArrayMemory
from kvstore.tiers.pinned import PinnedSlabs


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    made = FakeDriver()
    yield made
    assert made.leaks() == {}
    assert made.under_way() == 0
    assert made.free_bytes == made.total_bytes


@pytest.fixture
def device(driver: FakeDriver) -> Iterator[CudaDevice]:
    made = CudaDevice("cuda:0", driver)
    yield made
    made.close()


def names(driver: FakeDriver) -> list[str]:
    return [call[0] for call in driver.calls]


def test_a_failure_is_named_by_its_call_and_its_result() -> None:
    driver = FakeDriver()
    calls = CudaCalls(driver)
    driver.refuse("cuMemGetInfo", CUresult.CUDA_ERROR_NOT_SUPPORTED)
    with pytest.raises(CudaError, match=r"^cuMemGetInfo: CUDA_ERROR_NOT_SUPPORTED \(801\): in words") as caught:
        calls("cuMemGetInfo")
    assert caught.value.result == "CUDA_ERROR_NOT_SUPPORTED"
    driver.refuse("cuMemGetInfo", CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CudaOutOfMemory):
        calls("cuMemGetInfo")
    driver.refuse("cuMemGetInfo", CUresult.CUDA_ERROR_LAUNCH_FAILED)
    with pytest.raises(CudaBroken):
        calls("cuMemGetInfo")
    with pytest.raises(CudaError, match="cuFromTheFuture: this version"):
        calls("cuFromTheFuture")


def test_bindings_without_a_library_are_no_driver() -> None:
    driver = FakeDriver()

    def missing(*_: Any) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    driver.refuse("cuInit", missing)
    with pytest.raises(CudaMissing, match="dlopen libcuda"):
        CudaDevice("cuda:0", driver)


@pytest.mark.parametrize("how", [KeyError(998), ValueError("998 is not a valid CUresult")])
def test_a_result_that_only_a_newer_driver_has_is_a_failure_like_any(
    driver: FakeDriver, device: CudaDevice, how: Exception
) -> None:
    """The bindings raise where they lack a name for what the driver answered; a copy may be under way by then."""

    def strange(*_: Any) -> Any:
        raise how

    driver.refuse("cuMemGetInfo", strange)
    with pytest.raises(CudaError, match="cuMemGetInfo: cuda-bindings does not know what the driver answered: "):
        device.memory_bytes()
    copier = Copier(device)
    copying = copier.start(Direction.TO_DEVICE, [])
    driver.refuse("cuEventQuery", strange)
    with pytest.raises(CudaBroken, match="may still be under way"):
        copying.wait()
    driver.relent("cuEventQuery")
    copier.close()


def test_a_machine_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.protocol.cuda_calls.DRIVER_MODULE", "no_such_package.driver")
    with pytest.raises(CudaMissing, match="install the package cuda-bindings"):
        load_driver()


def test_opening_a_device(driver: FakeDriver) -> None:
    device = CudaDevice("cuda:0", driver)
    device.enter()
    assert device.label == "Fake GPU, CUDA 13.0"
    assert device.memory_bytes() == (driver.free_bytes, driver.total_bytes)
    device.close()
    device.close()
    assert names(driver) == [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDriverGetVersion",
        "cuDeviceGetName",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuMemGetInfo",
        "cuDevicePrimaryCtxRelease",
    ]


@pytest.mark.parametrize(("name", "why"), [("cuda:1", "sees 1 CUDA devices"), ("gpu", "no CUDA device")])
def test_a_device_that_is_not_there(driver: FakeDriver, name: str, why: str) -> None:
    with pytest.raises(CudaMissing, match=why):
        CudaDevice(name, driver)


def test_memory_is_mapped_and_given_back_in_order(driver: FakeDriver, device: CudaDevice) -> None:
    memory = DeviceMemory(device)
    assert (memory.is_exportable, memory.granularity) == (True, GRANULARITY)
    before = len(driver.calls)
    piece = memory.take(2 * GRANULARITY)
    memory.give(piece)
    assert names(driver)[before:] == [
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemUnmap",
        "cuMemAddressFree",
        "cuMemRelease",
    ]


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"])
def test_memory_that_cannot_be_had_leaves_nothing_behind(driver: FakeDriver, device: CudaDevice, call: str) -> None:
    memory = DeviceMemory(device)
    driver.refuse(call, CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(CudaOutOfMemory, match=call):
        memory.take(GRANULARITY)


def test_memory_of_a_device_without_virtual_memory(driver: FakeDriver, device: CudaDevice) -> None:
    driver.attributes = 0
    memory = DeviceMemory(device)
    piece = memory.take(512)
    with pytest.raises(CudaError, match="cannot be shared"):
        memory.export(piece)
    memory.give(piece)
    assert driver.named("cuMemCreate", "cuMemAlloc", "cuMemFree") == [("cuMemAlloc", 512), ("cuMemFree", piece.address)]


def test_another_process_may_read_an_exported_piece_and_not_write_to_it(driver: FakeDriver, device: CudaDevice) -> None:
    memory, copier = DeviceMemory(device), Copier(device)
    host = np.arange(GRANULARITY, dtype=np.uint32).view(np.uint8)[:GRANULARITY].copy()
    piece = memory.take(GRANULARITY)
    copier.start(Direction.TO_DEVICE, [Run(piece.address, host.ctypes.data, host.nbytes)]).wait()
    fd = memory.export(piece)
    assert not os.get_inheritable(fd)
    seen = memory.import_read_only(fd, GRANULARITY)
    os.close(fd)
    memory.give(piece)  # the reader's memory stays
    back = np.zeros_like(host)
    copier.start(Direction.FROM_DEVICE, [Run(back.ctypes.data, seen.address, back.nbytes)]).wait()
    assert (back == host).all()
    with pytest.raises(CudaBroken, match="ILLEGAL_ADDRESS"):
        copier.start(Direction.TO_DEVICE, [Run(seen.address, host.ctypes.data, host.nbytes)])
    memory.give(seen)
    copier.close()


def test_a_foreign_descriptor_is_refused(device: CudaDevice) -> None:
    fd = os.memfd_create("foreign")
    with pytest.raises(CudaError, match="cuMemImportFromShareableHandle"):
        DeviceMemory(device).import_read_only(fd, GRANULARITY)
    os.close(fd)


def test_runs_that_touch_on_both_sides_become_one() -> None:
    runs = [Run(0, 100, 10), Run(10, 110, 10), Run(20, 130, 10), Run(30, 140, 5), Run(36, 145, 1)]
    assert merged(runs) == [Run(0, 100, 20), Run(20, 130, 15), Run(36, 145, 1)]
    assert merged([]) == []


@pytest.mark.parametrize("batched", [True, False])
def test_many_runs_are_one_call_where_the_driver_has_it(driver: FakeDriver, device: CudaDevice, batched: bool) -> None:
    memory, copier = DeviceMemory(device), Copier(device)
    if not batched:
        driver.refuse("cuMemcpyBatchAsync", CUresult.CUDA_ERROR_NOT_SUPPORTED)
    piece = memory.take(GRANULARITY)
    host = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8)
    runs = [Run(piece.address + 512 * at, host.ctypes.data + 256 * at, 256) for at in range(16)]
    for _ in range(2):
        copier.start(Direction.TO_DEVICE, runs).wait()
    held = driver.bytes_at(piece.address, 512 * 16).reshape(16, 512)[:, :256]
    assert (held == host.reshape(16, 256)).all()
    assert len(driver.named("cuMemcpyBatchAsync")) == (2 if batched else 1), "what is not there is asked for once"
    before = len(driver.named("cuMemcpyBatchAsync"))
    copier.start(Direction.TO_DEVICE, runs, pinned=False).wait()
    assert len(driver.named("cuMemcpyBatchAsync")) == before
    copier.close()
    memory.give(piece)


@pytest.mark.parametrize("count", [2, 8])
def test_runs_that_touch_across_two_allocations_are_copied_one_by_one(
    driver: FakeDriver, device: CudaDevice, count: int
) -> None:
    """A driver lays allocations side by side and refuses a copy across their border."""
    memory, copier = DeviceMemory(device, exportable=False), Copier(device)
    pieces = [memory.take(GRANULARITY) for _ in range(count)]
    assert pieces[1].address == pieces[0].address + GRANULARITY
    host = np.random.default_rng(2).integers(0, 256, count * GRANULARITY, dtype=np.uint8)
    runs = [Run(piece.address, host.ctypes.data + at * GRANULARITY, GRANULARITY) for at, piece in enumerate(pieces)]
    copier.start(Direction.TO_DEVICE, runs).wait()
    for at, piece in enumerate(pieces):
        held = driver.bytes_at(piece.address, GRANULARITY)
        assert (held == host[at * GRANULARITY : (at + 1) * GRANULARITY]).all()
        memory.give(piece)
    copier.close()


@pytest.mark.parametrize(("height", "pitch"), [(1, 1024), (3, 1024)])
def test_rows_that_no_two_dimensional_copy_takes(
    driver: FakeDriver, device: CudaDevice, monkeypatch: pytest.MonkeyPatch, height: int, pitch: int
) -> None:
    monkeypatch.setattr(cuda_copies, "_PITCH_MAX", 512)
    memory, stream = DeviceMemory(device), device.calls("cuStreamCreate", 1)
    piece, host = memory.take(GRANULARITY), np.random.default_rng(3).integers(1, 256, (height, 256), dtype=np.uint8)
    rows = Rows(piece.address, pitch, host.ctypes.data, 256, 256, height)
    AsyncCopies(device.calls).rows(Direction.TO_DEVICE, rows, stream)
    device.calls("cuStreamSynchronize", stream)
    held = driver.bytes_at(piece.address, height * pitch).reshape(height, pitch)
    assert (held[:, :256] == host).all() and not held[:, 256:].any()
    assert driver.named("cuMemcpy2DAsync") == []
    device.calls("cuStreamDestroy", stream)
    memory.give(piece)


def test_nothing_is_there_before_the_wait_and_streams_are_used_again(driver: FakeDriver, device: CudaDevice) -> None:
    memory, copier = DeviceMemory(device), Copier(device)
    piece = memory.take(GRANULARITY)
    host = np.full(4096, 7, np.uint8)
    one = copier.start(Direction.TO_DEVICE, [Run(piece.address, host.ctypes.data, 4096)])
    two = copier.start(Direction.TO_DEVICE, [Run(piece.address + 4096, host.ctypes.data, 4096)])
    assert (driver.under_way(), int(driver.bytes_at(piece.address, 4096).max())) == (2, 0)
    one.wait()
    assert (driver.under_way(), int(driver.bytes_at(piece.address, 4096).min())) == (1, 7)
    two.wait()
    for _ in range(3):
        copier.start(Direction.FROM_DEVICE, [Run(host.ctypes.data, piece.address, 4096)]).wait()
    assert len(driver.named("cuStreamCreate")) == 2
    copier.close()
    memory.give(piece)


def test_a_copy_that_is_refused_has_ended_when_its_error_comes(driver: FakeDriver, device: CudaDevice) -> None:
    memory, copier = DeviceMemory(device), Copier(device)
    piece = memory.take(GRANULARITY)
    host = np.zeros(4096, np.uint8)
    runs = [Run(piece.address, host.ctypes.data, 512), Run(piece.address + 1024, host.ctypes.data, 512)]
    driver.refuse("cuMemcpyHtoDAsync", CUresult.CUDA_ERROR_INVALID_VALUE, after=1)
    copying = copier.start(Direction.TO_DEVICE, runs)
    assert driver.under_way() == 1
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync"):
        copying.wait()
    assert driver.under_way() == 0
    driver.relent("cuMemcpyHtoDAsync")
    copying = copier.start(Direction.TO_DEVICE, runs)
    driver.refuse("cuEventQuery", CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(CudaBroken, match="may still be under way"):
        copying.wait()
    driver.relent("cuEventQuery")
    copier._settle(copier._all[0])
    copier.close()
    memory.give(piece)


def test_a_wait_asks_until_the_copies_have_ended_and_is_bounded(driver: FakeDriver, device: CudaDevice) -> None:
    memory, copier = DeviceMemory(device), Copier(device)
    piece, host = memory.take(GRANULARITY), np.ones(512, np.uint8)
    asked = []

    def not_yet(event: int) -> Any:
        asked.append(event)
        return (CUresult.CUDA_ERROR_NOT_READY,) if len(asked) < 400 else None

    driver.refuse("cuEventQuery", not_yet)
    copier.start(Direction.TO_DEVICE, [Run(piece.address, host.ctypes.data, 512)]).wait()
    assert len(asked) == 400 and driver.bytes_at(piece.address, 512).all()
    driver.refuse("cuEventQuery", CUresult.CUDA_ERROR_NOT_READY)
    with pytest.raises(CudaBroken, match=r"have not ended within 0.01 s"):
        await_event(device.calls, copier._all[0].event, 0.01)
    driver.relent("cuEventQuery")
    copier.close()
    memory.give(piece)


def test_a_slab_is_registered_once_and_its_mapping_outlives_the_registration(
    driver: FakeDriver, device: CudaDevice
) -> None:
    slabs = ArrayMemory(8192)
    pins = PinnedSlabs(device, slabs)
    assert pins.pin(1) and pins.pin(1)
    assert driver.named("cuMemHostRegister") == [("cuMemHostRegister", slabs.array.ctypes.data, 8192, 1)]
    assert pins.pinned_bytes() == 8192
    with pytest.raises(KeyError):
        pins.pin(2)
    pins.forget(1)
    pins.forget(1)
    assert pins.pinned_bytes() == 0
    pins.pin(1)
    pins.close()
    assert len(driver.named("cuMemHostUnregister")) == 2


def test_a_slab_that_the_driver_refuses_is_used_unpinned(driver: FakeDriver, device: CudaDevice) -> None:
    driver.refuse("cuMemHostRegister", CUresult.CUDA_ERROR_NOT_SUPPORTED)
    pins = PinnedSlabs(device, ArrayMemory(8192))
    assert not pins.pin(1) and not pins.pin(1)
    assert len(driver.named("cuMemHostRegister")) == 1
    pins.close()
    assert driver.named("cuMemHostUnregister") == []


def test_a_slab_that_cannot_be_let_go_stays_mapped(
    driver: FakeDriver, device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or another mapping at its address would be copied from the pages that the driver has pinned there."""
    memory = ArrayMemory(8192)
    pins = PinnedSlabs(device, memory)
    pins.pin(1)
    mapping = weakref.ref(memory.array)
    monkeypatch.setattr(pinned._log, "disabled", True)  # a record would keep the error, and that what it is about
    driver.refuse("cuMemHostUnregister", CUresult.CUDA_ERROR_INVALID_VALUE)
    pins.forget(1)
    del memory, pins._memory
    gc.collect()
    assert mapping() is not None
    driver.relent("cuMemHostUnregister")
    driver.registered.clear()


def test_a_slab_that_is_forgotten_while_it_is_registered_is_not_left_registered(
    driver: FakeDriver, device: CudaDevice
) -> None:
    pins = PinnedSlabs(device, ArrayMemory(8192))
    begun, go_on = threading.Event(), threading.Event()

    def slowly(name: str) -> None:
        if name == "cuMemHostRegister":
            begun.set()
            assert go_on.wait(30.0)

    driver.before_call = slowly
    with ThreadPoolExecutor(2) as pool:
        pinning = pool.submit(pins.pin, 1)
        assert begun.wait(30.0)
        forgetting = pool.submit(pins.forget, 1)
        go_on.set()
        forgetting.result(30.0)
        pinning.result(30.0)
    assert driver.registered == {}
    assert pins.pinned_bytes() == 0
