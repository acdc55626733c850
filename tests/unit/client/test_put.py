"""Storing: honest outcomes, a pipeline, and staging ranges that nobody overwrites too early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from derived import chain, contents, fetch, namespace
from kvstore_client import (
    EXISTS,
    REJECTED,
    STORED,
    Client,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Keys,
    Namespace,
    QuotaExceeded,
    RejectReason,
    Unavailable,
)
from kvstore_client import put as put_module
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
SOON_S = 0.1


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sub-batches of two blocks, then four."""
    monkeypatch.setattr(put_module, "FIRST_SUB_BATCH_BYTES", 2 * BLOCK_NBYTES)
    monkeypatch.setattr(put_module, "SUB_BATCH_BYTES", 4 * BLOCK_NBYTES)


def data_of(keys: Keys) -> np.ndarray:
    return contents(keys, BLOCK_NBYTES)


def in_background(call: Callable[[], object]) -> Future[object]:
    """Run a call on a thread of its own."""
    done: Future[object] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except (Unavailable, DeadlineExceeded) as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


# --- outcomes


def test_stored_and_exists(ns: Namespace) -> None:
    keys = chain(ns, 6)
    assert ns.put(keys[:4], data_of(keys[:4])) == [STORED] * 4
    assert ns.put(keys, data_of(keys)) == [EXISTS] * 4 + [STORED] * 2
    assert fetch(ns, keys) == (6, [])


@pytest.mark.parametrize("kind", ["n-d", "buffers", "segments"])
def test_forms_of_blocks(ns: Namespace, kind: str) -> None:
    keys = chain(ns, 5)
    rows = data_of(keys)
    forms: dict[str, object] = {
        "n-d": rows.view(np.uint16).reshape(5, 2, 1, 16, 1, -1),
        "buffers": [bytes(row) for row in rows],
        "segments": [[row[:100], (row.ctypes.data + 100, BLOCK_NBYTES - 100)] for row in rows],
    }
    assert ns.put(keys, forms[kind]) == [STORED] * 5
    assert fetch(ns, keys) == (5, [])


def test_a_slice_names_its_parent(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 6)
    assert ns.put(keys[3:], data_of(keys[3:])) == [REJECTED(RejectReason.NO_PARENT)] * 3
    ns.put(keys[:3], data_of(keys[:3]))
    assert ns.put(keys[3:], data_of(keys[3:])) == [STORED] * 3
    assert [request.parent for request in daemon.store.puts] == [keys[2], b"", keys[2]]


def test_a_set_has_no_parents(client: Client) -> None:
    ns = namespace(client, "set", BLOCK_NBYTES, kind="set")
    keys = Keys.from_digests(bytes(range(36)) * 1 + bytes(36), size=36)
    assert ns.put(keys, data_of(keys)) == [STORED] * 2
    assert ns.exists(keys) == [True, True]
    assert ns.exists(Keys.from_digests(bytes(35) + b"x" + bytes(36), size=36)) == [False, True]


@pytest.mark.usefixtures("small_batches")
def test_what_follows_a_rejected_block_is_not_sent(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 200)
    daemon.reject(RejectReason.NO_ROOM)
    outcomes = ns.put(keys, data_of(keys))
    assert outcomes[:2] == [REJECTED(RejectReason.NO_ROOM), REJECTED(RejectReason.NO_PARENT)]
    assert set(outcomes[2:]) == {REJECTED(RejectReason.NO_PARENT)}
    assert daemon.calls["PUT"] <= put_module.MAX_IN_FLIGHT + 1


@pytest.mark.usefixtures("small_batches")
def test_a_set_goes_on_after_a_rejected_block(daemon: FakeDaemon, client: Client) -> None:
    ns = namespace(client, "set", BLOCK_NBYTES, kind="set")
    keys = chain(ns, 30)
    daemon.reject(RejectReason.NO_ROOM)
    assert ns.put(keys, data_of(keys)) == [REJECTED(RejectReason.NO_ROOM)] * 30
    assert sum(len(request.keys) for request in daemon.store.puts) == 30 * 32


def test_a_full_store_says_which_blocks_it_has(daemon: FakeDaemon) -> None:
    with FakeDaemon(warm_bytes=600 << 10, slab_bytes=256 << 10) as tiny, Client(tiny.address) as client:
        ns = namespace(client, "model", BLOCK_NBYTES)
        keys = chain(ns, 50)
        outcomes = ns.put(keys, data_of(keys))
        stored = outcomes.count(STORED)
        assert 0 < stored < 50
        assert outcomes[stored] == REJECTED(RejectReason.NO_ROOM)
        assert fetch(ns, keys) == (stored, [])


# --- what is refused before anything is sent


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (np.zeros((4, BLOCK_NBYTES), np.uint8), "blocks holds 4 blocks; it must hold 3"),
        (np.zeros((2, BLOCK_NBYTES), np.uint8), "blocks holds 2 blocks; it must hold 3"),
        (np.zeros((3, BLOCK_NBYTES - 2), np.uint8), f"a block of this namespace has {BLOCK_NBYTES}"),
        (np.zeros((3, BLOCK_NBYTES // 4), np.float32), "dtype float32, the layout bfloat16"),
        ([bytes(BLOCK_NBYTES)] * 4, "holds 4 blocks"),
        ("abc", "is a str"),
    ],
)
def test_what_put_refuses(daemon: FakeDaemon, ns: Namespace, blocks: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ns.put(chain(ns, 3), blocks)
    assert daemon.calls["PUT"] == 0


def test_put_refuses_keys_that_are_no_keys(ns: Namespace) -> None:
    with pytest.raises(InvalidRequest, match="31 bytes"):
        ns.put(bytes(31), np.zeros((1, BLOCK_NBYTES), np.uint8))


# --- the pipeline


@pytest.mark.usefixtures("small_batches")
def test_sub_batches_overlap_and_stay_in_order(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 60)
    with ns.stage(1):  # maps the staging segment
        pass
    daemon.hang()
    putting = in_background(lambda: ns.put(keys, data_of(keys), 30.0))
    eventually(lambda: daemon.calls["PUT"] >= 3, "several sub-batches to be in flight")
    daemon.resume()
    assert putting.result(30) == [STORED] * 60
    sent = daemon.store.puts
    assert b"".join(request.keys for request in sent) == bytes(keys)
    assert [request.parent for request in sent[1:]] == [request.keys[-32:] for request in sent[:-1]]
    assert [len(request.keys) // 32 for request in sent[:3]] == [2, 4, 4]


def test_more_than_staging_holds(daemon: FakeDaemon, new_client: Callable[..., Client]) -> None:
    ns = namespace(new_client(staging_bytes=10 * BLOCK_NBYTES), "model", BLOCK_NBYTES)
    keys = chain(ns, 100)
    assert ns.put(keys, data_of(keys)) == [STORED] * 100
    assert fetch(ns, keys) == (100, [])


@pytest.mark.usefixtures("small_batches")
def test_puts_of_many_threads_share_the_staging(ns: Namespace) -> None:
    def store(seed: int) -> bool:
        keys = chain(ns, 40, seed)
        return ns.put(keys, data_of(keys), 30.0) == [STORED] * 40 and fetch(ns, keys) == (40, [])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(store, range(6)))


def test_staging_is_mapped_once_and_only_for_puts(daemon: FakeDaemon, ns: Namespace) -> None:
    ns.match(chain(ns, 1))
    assert daemon.calls["MAP_SLABS"] == 0
    for seed in range(3):
        keys = chain(ns, 1, seed)
        ns.put(keys, data_of(keys))
    assert daemon.calls["MAP_SLABS"] == 1


def test_a_session_without_staging(daemon: FakeDaemon, new_client: Callable[..., Client]) -> None:
    reader = namespace(new_client(staging_bytes=0), "model", BLOCK_NBYTES)
    keys = chain(reader, 1)
    with pytest.raises(QuotaExceeded, match="0 bytes of staging"):
        reader.put(keys, data_of(keys))
    daemon.staging_bytes_max = 4096
    small = namespace(new_client(), "model", BLOCK_NBYTES)
    with pytest.raises(QuotaExceeded, match=f"a block of {BLOCK_NBYTES} bytes does not fit into the 4096 bytes"):
        small.put(keys, data_of(keys))
    with pytest.raises(QuotaExceeded):
        small.stage(1)
    tolerant = namespace(new_client(fail_open=True), "model", BLOCK_NBYTES)
    assert tolerant.put(keys, data_of(keys)) == [REJECTED(RejectReason.QUOTA)]
    with tolerant.stage(1) as buffers:
        assert buffers.put(keys) == [REJECTED(RejectReason.QUOTA)]


# --- deadlines, quarantine, checksums


def free_bytes(client: Client) -> int:
    """Staging that could be taken now, in one piece."""
    session = client._connection._session
    assert session is not None
    staging = session._staging
    assert staging is not None
    size = staging.nbytes
    while size and (place := staging.take(size, 0.0)) is None:
        size -= 4096
    if size:
        staging.give(place)  # type: ignore[arg-type]
    return size


def test_a_range_stays_quarantined_until_the_late_answer(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    keys = chain(ns, 4)
    ns.put(keys, data_of(keys))
    whole = free_bytes(client)
    other = chain(ns, 4, seed=1)
    daemon.hang()
    with pytest.raises(DeadlineExceeded):
        ns.put(other, data_of(other), SOON_S)
    quarantined = whole - free_bytes(client)
    assert quarantined >= 4 * BLOCK_NBYTES
    daemon.resume()
    eventually(lambda: len(daemon.store.puts) == 2, "the late put to be handled")
    eventually(lambda: ns.match(keys, 5.0) and free_bytes(client) == whole, "the late answer to free the range")
    # Its next put carries checksums, once.
    again = chain(ns, 4, seed=2)
    rows = data_of(again)
    assert ns.put(again, rows) == [STORED] * 4
    assert daemon.store.puts[-1].checksums == b"".join(xxhash.xxh3_128(row).digest() for row in rows)
    last = chain(ns, 4, seed=3)
    ns.put(last, data_of(last))
    assert daemon.store.puts[-1].checksums == b""
    assert fetch(ns, again) == (4, [])


def test_no_staging_in_time_is_staging_busy(daemon: FakeDaemon, new_client: Callable[..., Client]) -> None:
    client = new_client(staging_bytes=2 * BLOCK_NBYTES)
    ns = namespace(client, "model", BLOCK_NBYTES)
    keys = chain(ns, 2)
    with ns.stage(2):
        assert ns.put(keys, data_of(keys), SOON_S) == [REJECTED(RejectReason.STAGING_BUSY)] * 2
    assert ns.put(keys, data_of(keys)) == [STORED] * 2
    daemon.hang()
    other = chain(ns, 2, seed=1)
    with pytest.raises(DeadlineExceeded):
        ns.put(other, data_of(other), SOON_S)
    assert ns.put(other, data_of(other), SOON_S) == [REJECTED(RejectReason.STAGING_BUSY)] * 2, (
        "all of it is quarantined"
    )
    daemon.resume()
    eventually(lambda: all(outcome.is_stored for outcome in ns.put(other, data_of(other), 5.0)), "staging to come free")
    assert fetch(ns, other) == (2, [])


def test_a_deadline_that_passes_on_the_way_is_said_by_block(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 3)
    ns.put(keys[:1], data_of(keys[:1]))
    daemon.latency_s = 0.19
    outcomes = ns.put(keys, data_of(keys), 0.2)
    assert outcomes == [EXISTS] + [REJECTED(RejectReason.DEADLINE)] * 2


def test_an_answer_of_the_wrong_size_is_a_defect(
    daemon: FakeDaemon, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstore.v1 import kvstore_pb2 as pb

    monkeypatch.setattr(daemon.store, "put", lambda *_: pb.PutResponse(statuses=b"\x01", reasons=b"\x00"))
    keys = chain(ns, 2)
    with pytest.raises(InternalError, match="1 outcomes for 2 blocks"):
        ns.put(keys, data_of(keys))


def test_an_error_answer_frees_the_range(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    keys = chain(ns, 2)
    ns.put(keys[:1], data_of(keys[:1]))
    whole = free_bytes(client)
    daemon.failure = InvalidRequest("no")
    with pytest.raises(InvalidRequest, match="no"):
        ns.put(keys, data_of(keys))
    daemon.failure = None
    assert free_bytes(client) == whole
    assert ns.put(keys, data_of(keys)) == [EXISTS, STORED]


# --- stage


def test_staged_buffers_need_no_copy(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    keys = chain(ns, 3)
    rows = data_of(keys)
    with ns.stage(3) as buffers:
        assert (len(buffers), buffers.array.shape, buffers[1].flags.c_contiguous) == (3, (3, BLOCK_NBYTES), True)
        session = client._connection._session
        assert session is not None
        assert session._staging is not None
        assert np.shares_memory(buffers.array, session._staging.memory)
        for buffer, row in zip(buffers, rows, strict=True):
            buffer[:] = row
        assert buffers.put(keys[:2]) == [STORED] * 2
        assert buffers.put(bytes(keys[:2])) == [EXISTS] * 2
        with pytest.raises(InvalidRequest, match="4 keys for 3 staged buffers"):
            buffers.put(chain(ns, 4))
        assert buffers.put(keys[:0]) == []
        buffers.array[0] = rows[2]
        assert buffers.put(keys[2:]) == [STORED], "filled and put again"
    with pytest.raises(InvalidRequest, match="inside the stage"):
        buffers.put(keys)
    assert fetch(ns, keys) == (3, [])


def test_staged_ranges_come_back(client: Client, ns: Namespace) -> None:
    with ns.stage(1):
        pass
    whole = free_bytes(client)
    for _ in range(3):
        with ns.stage(100):
            assert free_bytes(client) < whole
    assert free_bytes(client) == whole


def test_what_stage_refuses(ns: Namespace) -> None:
    for wrong in (0, -1, "3"):
        with pytest.raises(InvalidRequest, match="at least 1"):
            ns.stage(wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"at most {(4 << 20) // BLOCK_NBYTES} blocks"):
        ns.stage(10_000)


def test_stage_without_room_in_time_is_private_memory(daemon: FakeDaemon, ns: Namespace) -> None:
    most = (4 << 20) // BLOCK_NBYTES
    keys = chain(ns, 2)
    with ns.stage(most) as all_of_it, ns.stage(2, SOON_S) as buffers:
        assert not np.shares_memory(buffers.array, all_of_it.array)
        buffers.array[:] = data_of(keys)
        assert buffers.put(keys, SOON_S) == [REJECTED(RejectReason.STAGING_BUSY)] * 2
        all_of_it.close()
        assert buffers.put(keys) == [STORED] * 2
    assert fetch(ns, keys) == (2, [])


def test_a_staged_put_without_an_answer_quarantines_its_range(
    daemon: FakeDaemon, client: Client, ns: Namespace
) -> None:
    with ns.stage(1):
        pass
    whole = free_bytes(client)
    keys = chain(ns, 2)
    with ns.stage(2) as buffers:
        buffers.array[:] = data_of(keys)
        daemon.hang()
        with pytest.raises(DeadlineExceeded):
            buffers.put(keys, SOON_S)
        with pytest.raises(InvalidRequest, match="not answered in time"):
            buffers.put(keys, SOON_S)
    assert free_bytes(client) < whole
    daemon.resume()
    eventually(lambda: ns.match(keys, 5.0) and free_bytes(client) == whole, "the late answer to free it")


def test_staged_buffers_outlive_their_session(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 2)
    with ns.stage(2) as buffers:
        buffers.array[:] = data_of(keys)
        daemon.die()
        daemon.restart()
        eventually(lambda: buffers.staged is not None and not buffers.staged.is_usable(), "the loss")
        assert buffers.put(keys) == [STORED] * 2
    assert fetch(ns, keys) == (2, [])
