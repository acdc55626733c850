"""What becomes of memory that a device may still copy to or from, where a worker is interrupted or cannot tell."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from derived import chain, contents, wrong
from fake_cuda import CUresult, CUstreamCaptureMode, FakeArray, FakeDriver
from kvstore_client import STORED, InternalError, InvalidRequest, Keys, Namespace, device
from polling import eventually

N = 8
NBYTES = 16 << 10


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = FakeDriver()
    monkeypatch.setattr(device, "load_driver", lambda: made)
    monkeypatch.setattr(device, "_devices", {})
    yield made
    assert made.under_way() == 0


def fill(driver: FakeDriver, keys: Keys) -> FakeArray:
    made = driver.array((len(keys), NBYTES))
    made.bytes()[:] = contents(keys, NBYTES).reshape(-1)
    return made


class Interrupted(BaseException):
    """What a handler of a signal raises."""


def interrupt_once(driver: FakeDriver, call: str) -> None:
    calls = []

    def interrupt(name: str) -> None:
        if name == call and not calls:
            calls.append(name)
            raise Interrupted

    driver.before_call = interrupt


@pytest.mark.parametrize("call", ["cuEventQuery", "cuEventRecord"])
def test_an_interrupted_read_leaves_nothing_under_way(driver: FakeDriver, ns: Namespace, call: str) -> None:
    """Whoever catches it gives the tensor's memory to others."""
    keys = chain(ns, N)
    ns.put(keys, contents(keys, NBYTES))
    out = driver.array((N, NBYTES))
    with ns.acquire(keys) as lease:
        interrupt_once(driver, call)
        with pytest.raises(Interrupted):
            lease.read_into(out)
        assert driver.under_way() == 0
        assert lease.read_into(out) == N
    assert wrong(keys, out.bytes().reshape(N, NBYTES)) == []


def test_an_interrupted_put_gives_staging_back_only_after_the_copy(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, N)
    blocks = fill(driver, keys)
    interrupt_once(driver, "cuEventQuery")
    with pytest.raises(Interrupted):
        ns.put(keys, blocks)
    assert driver.under_way() == 0
    assert ns.put(keys, blocks) == [STORED] * N


def test_what_a_device_may_still_write_to_is_used_for_nothing_else(
    driver: FakeDriver, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy to staging that ends after all must not land in a block of another put."""
    monkeypatch.setattr(device, "_WAIT_S", 0.05)
    stuck, keys = chain(ns, N, seed=1), chain(ns, N, seed=2)
    blocks = fill(driver, stuck)
    driver.refuse("cuEventQuery", CUresult.CUDA_ERROR_NOT_READY)
    with pytest.raises(InternalError, match="have not ended within"):
        ns.put(stuck, blocks)
    driver.relent("cuEventQuery")

    assert driver.under_way() == 1
    with ns.stage(N) as staged:
        staged.array[:] = contents(keys, NBYTES)
        for stream in [call[-1] for call in driver.named("cuMemcpy2DAsync", "cuMemcpyDtoHAsync")]:
            driver.cuCtxSetCurrent(1000)
            driver.cuStreamSynchronize(stream)
        assert driver.under_way() == 0
        assert staged.put(keys) == [STORED] * N
    out = np.zeros((N, NBYTES), np.uint8)
    with ns.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == N
    assert wrong(keys, out) == []
    assert ns.match(stuck).blocks == 0


def test_memory_of_a_copy_that_may_go_on_outlives_its_owner(
    driver: FakeDriver, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_WAIT_S", 0.05)
    keys = chain(ns, N)
    ns.put(keys, contents(keys, NBYTES))
    out = driver.array((N, NBYTES))
    address, memory = out.address, weakref.ref(out)
    driver.refuse("cuEventQuery", CUresult.CUDA_ERROR_NOT_READY)
    with ns.acquire(keys) as lease, pytest.raises(InternalError, match="have not ended within"):
        lease.read_into(out)
    driver.relent("cuEventQuery")
    del out
    gc.collect()
    assert memory() is not None
    for stream in {call[-1] for call in driver.named("cuMemcpy2DAsync", "cuMemcpyHtoDAsync")}:
        driver.cuStreamSynchronize(stream)
    assert wrong(keys, driver.bytes_at(address, N * NBYTES).reshape(N, NBYTES)) == []


def test_threads_that_pin_first_at_once_start_one_thread(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them could let go of memory before they register it, and the driver would keep pages of an old mapping."""
    made = []

    class Thread(threading.Thread):
        def __init__(self, **arguments: Any) -> None:
            time.sleep(0.02)  # so that all of them see that there is none
            super().__init__(**arguments)
            made.append(self)

    pins = device.device(0).pins
    began = threading.Barrier(8)
    arrays = [np.zeros(64 << 10, np.uint8) for _ in range(8)]

    def pin(array: np.ndarray) -> None:
        began.wait(30.0)
        pins.want(array, array)

    threads = [threading.Thread(target=pin, args=(array,)) for array in arrays]
    monkeypatch.setattr(threading, "Thread", Thread)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    eventually(lambda: len(driver.registered) == 8, "all to be registered")
    assert [thread.name for thread in made] == ["kvstore-client-pins"]


def test_memory_that_stays_registered_stays_mapped(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        pass

    pins, holder, array = device.device(0).pins, Holder(), np.zeros(64 << 10, np.uint8)
    assert pins.await_pinned(holder, array, 30.0)
    mapping = weakref.ref(array)
    monkeypatch.setattr(device._log, "disabled", True)  # a record would keep the error, and that what it is about
    driver.refuse("cuMemHostUnregister", CUresult.CUDA_ERROR_INVALID_VALUE)
    del array, holder
    gc.collect()
    eventually(lambda: driver.named("cuMemHostUnregister"), "the driver to be asked")
    other = np.zeros(64, np.uint8)
    pins.await_pinned(other, other, 30.0)  # the job before it has ended
    gc.collect()
    assert mapping() is not None
    assert pins.pinned_bytes() > 0


def test_a_graph_that_another_thread_captures_is_not_spoilt(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, N)
    blocks, out = fill(driver, keys), driver.array((N, NBYTES))
    driver.capturing = 1
    assert ns.put(keys, blocks) == [STORED] * N
    with ns.acquire(keys) as lease:
        assert lease.read_into(out) == N
    eventually(lambda: len(driver.registered) >= 2, "staging and a slab to be registered")
    assert driver.spoilt_by == []
    assert driver._current.mode == CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL, "the caller's thread is as it was"
    driver.capturing = None


def test_what_is_being_captured_cannot_be_waited_for(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, N)
    ns.put(keys, contents(keys, NBYTES))
    driver.cuCtxSetCurrent(1000)
    _, stream = driver.cuStreamCreate(0)
    out = driver.array((N, NBYTES), stream=stream)
    driver.capturing = stream
    with ns.acquire(keys) as lease, pytest.raises(InvalidRequest, match="outside of the capture"):
        lease.read_into(out)
    assert driver.named("cuEventRecord") == []
    driver.capturing = None
