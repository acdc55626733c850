"""Blocks to and from a CUDA device, on a driver whose copies run only when somebody waits for them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from derived import chain, contents, namespace, wrong
from fake_cuda import CUresult, FakeArray, FakeDriver
from kvstore_client import (
    STORED,
    Client,
    InternalError,
    InvalidRequest,
    Keys,
    KVLayout,
    LeaseExpired,
    Namespace,
    TensorSpec,
    device,
)
from kvstore_client.testing import FakeDaemon
from polling import eventually

N = 20
NBYTES = 16 << 10


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = FakeDriver()
    monkeypatch.setattr(device, "load_driver", lambda: made)
    monkeypatch.setattr(device, "_devices", {})
    yield made
    assert made.under_way() == 0, "a call returned while something was being copied"


@pytest.fixture
def keys(ns: Namespace) -> Keys:
    made = chain(ns, N)
    assert ns.put(made, contents(made, NBYTES)) == [STORED] * N
    return made


def test_one_array_on_the_device(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    out = driver.array((N, NBYTES))
    with ns.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == N
    assert wrong(keys, out.bytes().reshape(N, NBYTES)) == []
    assert len(driver.named("cuMemcpyHtoDAsync")) == 2, "one copy for each of the two slabs"


def test_a_part_of_the_blocks_to_an_array_of_the_layouts_dtype(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    out = driver.array((6, 2, NBYTES // 4), itemsize=2)
    with ns.acquire(keys) as lease:
        assert lease.read_into(out, 12, 17) == 5
    assert wrong(keys[12:17], out.bytes().reshape(6, NBYTES)[:5]) == []


def test_rows_that_lie_apart(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    out = driver.array((N, NBYTES + 512))
    out.__cuda_array_interface__.update(shape=(N, NBYTES), strides=(NBYTES + 512, 1))
    with ns.acquire(keys) as lease:
        lease.read_into(out)
    assert wrong(keys, out.bytes().reshape(N, NBYTES + 512)[:, :NBYTES]) == []
    assert driver.named("cuMemcpy2DAsync")


def test_blocks_that_do_not_fill_their_slot(driver: FakeDriver, client: Client) -> None:
    small = namespace(client, "odd", 9 * 64)
    keys = chain(small, 30)
    small.put(keys, contents(keys, 9 * 64))
    out = driver.array((30, 9 * 64))
    with small.acquire(keys) as lease:
        assert lease.read_into(out) == 30
    assert wrong(keys, out.bytes().reshape(30, -1)) == []


@pytest.mark.parametrize("pieces", [1, 4])
def test_one_array_a_block_or_a_segment(driver: FakeDriver, ns: Namespace, keys: Keys, pieces: int) -> None:
    parts = [[driver.array((NBYTES // pieces,)) for _ in range(pieces)] for _ in range(N)]
    with ns.acquire(keys) as lease:
        assert lease.read_into(parts if pieces > 1 else [block[0] for block in parts], verify=True) == N
    rows = np.stack([np.concatenate([part.bytes() for part in block]) for block in parts])
    assert wrong(keys, rows) == []


def test_slabs_are_registered_once_and_let_go_with_the_client(
    driver: FakeDriver, daemon: FakeDaemon, new_client: Callable[..., Client]
) -> None:
    client = new_client()
    space = namespace(client, "pinned", NBYTES)
    keys = chain(space, N)
    space.put(keys, contents(keys, NBYTES))
    out = driver.array((N, NBYTES))
    with space.acquire(keys) as lease:
        lease.read_into(out)
        pins = device.device(0).pins
        eventually(lambda: pins.pinned_bytes() > 0 and len(driver.registered) == 2, "both slabs to be registered")
        assert {flags for _, flags in driver.registered.values()} == {1 | 8}, "mapped for reading only"
        lease.read_into(out)
    assert len(driver.named("cuMemHostRegister")) == 2
    client.close()
    eventually(lambda: not driver.registered, "the slabs to be let go")
    assert pins.pinned_bytes() == 0


@pytest.mark.parametrize("why", ["no such memory", "refused"])
def test_what_cannot_be_registered_is_copied_all_the_same(
    driver: FakeDriver, ns: Namespace, keys: Keys, why: str
) -> None:
    if why == "refused":
        driver.refuse("cuMemHostRegister", CUresult.CUDA_ERROR_NOT_SUPPORTED)
    else:
        driver.attributes = 0
    out = driver.array((N, NBYTES))
    with ns.acquire(keys) as lease:
        for _ in range(2):
            assert lease.read_into(out, verify=True) == N
    assert driver.registered == {}
    assert wrong(keys, out.bytes().reshape(N, NBYTES)) == []


def test_a_slot_reused_while_it_is_copied(driver: FakeDriver, daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    """The generation is read after the copy has ended, not after it was begun."""

    def lose(name: str) -> None:
        if name == "cuEventQuery":
            daemon.lose([keys[N - 1]])

    driver.before_call = lose
    with ns.acquire(keys) as lease, pytest.raises(LeaseExpired, match=f"block {N - 1}"):
        lease.read_into(driver.array((N, NBYTES)))


def test_copies_come_after_the_work_that_the_memory_names(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    _, stream = driver.cuStreamCreate(0) if not driver.cuCtxSetCurrent(1000)[0] else (0, 0)
    out = driver.array((N, NBYTES), stream=stream)
    noise = np.full(N * NBYTES, 7, np.uint8)
    driver.cuMemcpyHtoDAsync(out.address, noise.ctypes.data, noise.nbytes, stream)  # a kernel that still writes there
    with ns.acquire(keys) as lease:
        lease.read_into(out)
    assert driver.under_way() == 0, "it was waited for"
    assert wrong(keys, out.bytes().reshape(N, NBYTES)) == []


def test_the_drivers_errors_are_this_packages(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    out = driver.array((N, NBYTES))
    driver.refuse("cuMemcpyHtoDAsync", CUresult.CUDA_ERROR_INVALID_VALUE)
    with ns.acquire(keys) as lease, pytest.raises(InternalError, match="cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE"):
        lease.read_into(out)
    with pytest.raises(InvalidRequest, match="there is no cuda:5"):
        device.device(5)


def test_without_the_package_it_says_what_to_install(ns: Namespace, keys: Keys, driver: FakeDriver) -> None:
    out = driver.array((N, NBYTES))
    import kvstore.protocol.cuda_calls as calls

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "load_driver", calls.load_driver)
        patch.setattr(calls, "DRIVER_MODULE", "no_such.driver")
        with ns.acquire(keys) as lease, pytest.raises(InvalidRequest, match="install the package cuda-bindings"):
            lease.read_into(out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d.array((N - 1, NBYTES)), "holds 19 blocks; it must hold at least 20"),
        (lambda d: d.array((N, NBYTES - 1)), "16383 bytes a block"),
        (lambda d: d.array((NBYTES + 1,)), "not contiguous blocks"),
        (lambda d: d.array((N, NBYTES), strides=(1, N)), "is not contiguous"),
        (lambda d: d.array((N, NBYTES // 4), itemsize=4), "items of 4 bytes"),
        (lambda d: [d.array((NBYTES,)), *[bytearray(NBYTES)] * (N - 1)], "mixes host and device"),
        (lambda d: [d.array((NBYTES - 1,))] * N, "has 16383 bytes"),
        (lambda d: [d.array((2, NBYTES // 2), strides=(NBYTES, 1))] * N, "not contiguous"),
    ],
)
def test_what_is_refused(
    driver: FakeDriver, ns: Namespace, keys: Keys, make: Callable[[FakeDriver], Any], message: str
) -> None:
    with ns.acquire(keys) as lease, pytest.raises(InvalidRequest, match=message):
        lease.read_into(make(driver))


def test_read_only_device_memory_is_not_written_to(driver: FakeDriver, ns: Namespace, keys: Keys) -> None:
    out = driver.array((N, NBYTES))
    out.__cuda_array_interface__["data"] = (out.address, True)
    with ns.acquire(keys) as lease, pytest.raises(InvalidRequest, match="read-only"):
        lease.read_into(out)


class Tensor:
    """As much of a CUDA tensor of torch as is looked at."""

    def __init__(self, array: FakeArray, shape: tuple[int, ...], itemsize: int = 2) -> None:
        self.array = array
        self.shape = shape
        self.device = SimpleNamespace(type="cuda", index=None)
        self._itemsize = itemsize

    def data_ptr(self) -> int:
        return self.array.address

    def element_size(self) -> int:
        return self._itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[axis + 1 :])) for axis in range(len(self.shape)))


def test_a_tensor_of_torch_waits_for_its_current_stream(
    driver: FakeDriver, ns: Namespace, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.cuCtxSetCurrent(1000)
    _, stream = driver.cuStreamCreate(0)
    fake_torch = SimpleNamespace(
        cuda=SimpleNamespace(current_stream=lambda ordinal: SimpleNamespace(cuda_stream=stream))
    )
    monkeypatch.setitem(sys.modules, "torch", fake_torch)
    tensor = Tensor(driver.array((N * NBYTES,)), (N, 2, NBYTES // 4))
    with ns.acquire(keys) as lease:
        assert lease.read_into(tensor) == N
    assert wrong(keys, tensor.array.bytes().reshape(N, NBYTES)) == []
    assert ("cuEventRecord", *driver.named("cuEventRecord")[0][1:]) == driver.named("cuEventRecord")[0]
    assert driver.named("cuEventRecord")[0][2] == stream


# -- put ------------------------------------------------------------------------------------------------------


def fill(driver: FakeDriver, keys: Keys) -> FakeArray:
    made = driver.array((len(keys), NBYTES))
    made.bytes()[:] = contents(keys, NBYTES).reshape(-1)
    return made


@pytest.mark.parametrize("form", ["whole", "blocks", "segments"])
def test_put_from_the_device(driver: FakeDriver, ns: Namespace, form: str) -> None:
    keys = chain(ns, N, seed=3)
    whole = fill(driver, keys)
    if form == "whole":
        blocks: Any = whole
    else:
        size = NBYTES if form == "blocks" else NBYTES // 2
        parts = [FakeArray(driver, whole.address + at * size, (size,), 1, {}) for at in range(whole.nbytes // size)]
        blocks = parts if form == "blocks" else [parts[at : at + 2] for at in range(0, len(parts), 2)]
    assert ns.put(keys, blocks) == [STORED] * N
    out = np.zeros((N, NBYTES), np.uint8)
    with ns.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == N
    assert wrong(keys, out) == []
    eventually(lambda: len(driver.registered) == 1, "the staging to be registered")
    assert {flags for _, flags in driver.registered.values()} == {1}, "mapped for writing"


def test_put_waits_for_the_event_that_it_is_given(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, N, seed=4)
    blocks = driver.array((N, NBYTES))
    made = contents(keys, NBYTES)
    driver.cuCtxSetCurrent(1000)
    (_, stream), (_, event) = driver.cuStreamCreate(0), driver.cuEventCreate(0)
    driver.cuMemcpyHtoDAsync(blocks.address, made.ctypes.data, made.nbytes, stream)  # the kernel that writes them
    driver.cuEventRecord(event, stream)
    assert ns.put(keys, blocks, after=SimpleNamespace(cuda_event=event)) == [STORED] * N
    out = np.zeros((N, NBYTES), np.uint8)
    with ns.acquire(keys) as lease:
        lease.read_into(out)
    assert wrong(keys, out) == []


def test_after_must_be_something_to_wait_for(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, 2)
    with pytest.raises(InvalidRequest, match="was never recorded"):
        ns.put(keys, driver.array((2, NBYTES)), after=SimpleNamespace(cuda_event=0))
    with pytest.raises(InvalidRequest, match="no CUDA stream or event"):
        ns.put(keys, driver.array((2, NBYTES)), after="now")
    with pytest.raises(InvalidRequest, match="blocks on a CUDA device"):
        ns.put(keys, contents(keys, NBYTES), after=SimpleNamespace(cuda_event=1))


def test_a_put_whose_copy_fails_stores_nothing_and_keeps_no_staging(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, N, seed=5)
    blocks = fill(driver, keys)
    driver.refuse("cuMemcpyDtoHAsync", CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(InternalError, match="cuMemcpyDtoHAsync"):
        ns.put(keys, blocks)
    driver.relent("cuMemcpyDtoHAsync")
    assert ns.match(keys).blocks == 0
    assert ns.put(keys, blocks) == [STORED] * N


def test_staging_for_a_device_is_pinned(driver: FakeDriver, ns: Namespace) -> None:
    keys = chain(ns, 4, seed=6)
    with ns.stage(4, device=0) as staged:
        assert staged.is_pinned
        staged.array[:] = contents(keys, NBYTES)
        assert staged.put(keys) == [STORED] * 4
    with ns.stage(4) as staged:
        assert not staged.is_pinned
    driver.refuse("cuMemHostRegister", CUresult.CUDA_ERROR_NOT_SUPPORTED)


# -- layer by layer -------------------------------------------------------------------------------------------

LAYERS = 4


@pytest.fixture
def layered(client: Client) -> Namespace:
    layout = KVLayout(
        [
            TensorSpec("kv", "bfloat16", (2, LAYERS, 16, 1, 32), "kv layer token head dim"),
            TensorSpec("index", "uint8", (16, LAYERS, 8), "token layer dim"),
        ]
    )
    return client.namespace(model="layered", revision="1", block_tokens=16, layout=layout)


def layer_bytes(rows: np.ndarray, layer: int) -> np.ndarray:
    """A plain cut of one layer out of blocks, (n, …) bytes."""
    kv = rows[:, : 2 * LAYERS * 1024].reshape(-1, 2, LAYERS, 1024)[:, :, layer].reshape(len(rows), -1)
    index = rows[:, 2 * LAYERS * 1024 :].reshape(-1, 16, LAYERS, 8)[:, :, layer].reshape(len(rows), -1)
    return np.concatenate([kv, index], axis=1)


@pytest.mark.parametrize("where", ["host", "device", "segments"])
@pytest.mark.parametrize("order", [None, [2, 0]])
def test_layers_come_one_by_one(driver: FakeDriver, layered: Namespace, where: str, order: list[int] | None) -> None:
    keys, nbytes = chain(layered, N), layered.block_nbytes
    wanted = contents(keys, nbytes)
    assert layered.put(keys, wanted) == [STORED] * N
    host = np.zeros((N, nbytes), np.uint8)
    on_device = driver.array((N, nbytes))
    cuts = [slice(0, 1000), slice(1000, 5000), slice(5000, nbytes)]
    outs = {"host": host, "device": on_device, "segments": [[row[cut] for cut in cuts] for row in host]}
    seen = []
    with layered.acquire(keys) as lease:
        for layer in lease.read_layers(outs[where], order):
            rows = on_device.bytes().reshape(N, nbytes) if where == "device" else host
            assert (layer_bytes(rows, layer) == layer_bytes(wanted, layer)).all()
            seen.append(layer)
    assert seen == (order or list(range(LAYERS)))
    left = sorted(set(range(LAYERS)) - set(seen))
    for layer in left:
        assert not layer_bytes(rows, layer).any(), "a layer that nobody asked for was copied"


def test_the_next_layer_is_copied_while_the_caller_has_this_one(driver: FakeDriver, layered: Namespace) -> None:
    keys = chain(layered, N)
    layered.put(keys, contents(keys, layered.block_nbytes))
    out = driver.array((N, layered.block_nbytes))
    with layered.acquire(keys) as lease:
        layers = lease.read_layers(out)
        next(layers)
        done = len(driver.named("cuEventQuery"))
        assert driver.under_way() > 0, "the second layer"
        assert next(layers) == 1
        assert len(driver.named("cuEventQuery")) == done + 1
        assert list(layers) == [2, 3]


def test_who_leaves_the_loop_early_leaves_nothing_under_way(driver: FakeDriver, layered: Namespace) -> None:
    keys = chain(layered, N)
    layered.put(keys, contents(keys, layered.block_nbytes))
    with layered.acquire(keys) as lease:
        for out in (driver.array((N, layered.block_nbytes)), np.zeros((N, layered.block_nbytes), np.uint8)):
            for _ in lease.read_layers(out):
                break
            assert driver.under_way() == 0


def test_later_layers_do_not_wait_for_what_the_caller_computes(driver: FakeDriver, layered: Namespace) -> None:
    """Only the first copy is ordered behind the tensor's stream: what the caller computes is to hide the next ones."""
    keys = chain(layered, N)
    layered.put(keys, contents(keys, layered.block_nbytes))
    driver.cuCtxSetCurrent(1000)
    _, stream = driver.cuStreamCreate(0)
    out = driver.array((N, layered.block_nbytes), stream=stream)
    with layered.acquire(keys) as lease:
        assert list(lease.read_layers(out)) == [0, 1, 2, 3]
    assert [call[2] for call in driver.named("cuEventRecord")].count(stream) == 1
    _, event = driver.cuEventCreate(0)
    driver.cuEventRecord(event, stream)
    before = len(driver.named("cuStreamWaitEvent"))
    with layered.acquire(keys) as lease:
        assert list(lease.read_layers(out, stream=SimpleNamespace(cuda_event=event))) == [0, 1, 2, 3]
    assert [call[2] for call in driver.named("cuStreamWaitEvent")[before:]] == [event]


def test_a_block_taken_back_between_two_layers(driver: FakeDriver, daemon: FakeDaemon, layered: Namespace) -> None:
    keys = chain(layered, N)
    layered.put(keys, contents(keys, layered.block_nbytes))
    with layered.acquire(keys) as lease:
        layers = lease.read_layers(driver.array((N, layered.block_nbytes)))
        next(layers)
        daemon.lose([keys[N - 1]])
        with pytest.raises(LeaseExpired):
            list(layers)


def test_layers_wait_for_blocks_that_are_loaded(daemon: FakeDaemon, layered: Namespace) -> None:
    keys = chain(layered, N)
    layered.put(keys, contents(keys, layered.block_nbytes))
    daemon.chill(list(keys))
    out = np.zeros((N, layered.block_nbytes), np.uint8)
    with layered.acquire(keys) as lease:
        result: Future[list[int]] = Future()
        thread = threading.Thread(target=lambda: result.set_result(list(lease.read_layers(out))))
        thread.start()
        daemon.load()
        assert result.result(30.0) == [0, 1, 2, 3]
        thread.join()
    assert wrong(keys, out) == []


def test_a_layout_without_layers_counts_its_tensors(client: Client) -> None:
    layout = KVLayout([TensorSpec(f"layer {at}", "float16", (2, 16, 1, 32), "kv token head dim") for at in range(3)])
    space = client.namespace(model="tensors", revision="1", block_tokens=16, layout=layout)
    keys = chain(space, 2)
    wanted = contents(keys, layout.nbytes)
    space.put(keys, wanted)
    out = np.zeros((2, layout.nbytes), np.uint8)
    with space.acquire(keys) as lease:
        layers = lease.read_layers(out)
        assert next(layers) == 0
        assert (out[:, :2048] == wanted[:, :2048]).all()
        assert list(layers) == [1, 2]
        with pytest.raises(InvalidRequest, match=r"layers \[3\] were asked for; the layout has 3"):
            lease.read_layers(out, [3])
    assert list(space.acquire(chain(space, 2, seed=9)).read_layers(out)) == [], "a lease on nothing"
