"""Reading: copies that are proven, views that can be, and what ends a lease."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from derived import chain, content, contents, namespace, wrong
from kvstore_client import (
    Client,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Keys,
    KVLayout,
    LeaseExpired,
    Namespace,
    NotFound,
    TensorSpec,
    targets,
)
from kvstore_client.placement import Run
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
N = 20  # blocks, in two slabs
SOON_S = 0.05


@pytest.fixture
def keys(ns: Namespace) -> Keys:
    """Keys of N stored blocks."""
    stored = chain(ns, N)
    assert all(outcome.is_stored for outcome in ns.put(stored, contents(stored, BLOCK_NBYTES)))
    return stored


def room(blocks: int = N) -> np.ndarray:
    return np.zeros((blocks, BLOCK_NBYTES), np.uint8)


def leases_of(daemon: FakeDaemon) -> int:
    return len(daemon.store.leases)


# --- what is promised


def test_the_longest_stored_prefix(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    with ns.acquire(chain(ns, N + 5)) as lease:
        assert (lease.blocks, lease.tokens, lease.ready) == (N, N * 16, N)
        assert lease.groups[0].first == 0
        assert lease.wait() == N
        assert leases_of(daemon) == 1
    eventually(lambda: leases_of(daemon) == 0, "the release to arrive")


def test_nothing_stored_is_a_lease_on_nothing(daemon: FakeDaemon, ns: Namespace) -> None:
    with ns.acquire(chain(ns, 3)) as lease:
        assert (lease.blocks, lease.tokens, lease.ready, lease.wait()) == (0, 0, 0, 0)
        assert lease.read_into(room(3)) == 0
        lease.release_to(0)
        lease.check()
        with pytest.raises(InvalidRequest, match="zero blocks"):
            lease.handoff()
        with pytest.raises(InvalidRequest):
            lease.view(0)
    assert daemon.calls["RELEASE"] == 0


def test_no_keys_ask_nobody(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    before = daemon.calls.total()
    assert ns.acquire(keys[:0]).blocks == 0
    assert ns.match(keys[:0]).blocks == 0
    assert ns.exists(b"") == []
    assert ns.prefetch(b"") == ns.delete(b"") == 0
    assert ns.put(b"", []) == []
    assert daemon.calls.total() == before


def test_keys_as_bytes(ns: Namespace, keys: Keys) -> None:
    assert ns.acquire(bytes(keys)).blocks == N
    assert ns.match(bytes(keys[:7])).blocks == 7
    with pytest.raises(InvalidRequest, match="33 bytes"):
        ns.acquire(bytes(33))
    with pytest.raises(InvalidRequest, match="must be bytes"):
        ns.match("keys")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="65537 keys in one call; the limit is 65536"):
        ns.match(bytes(32 * 65537))


# --- read_into


@pytest.mark.parametrize("verify", [False, True])
def test_read_into_one_array(ns: Namespace, keys: Keys, verify: bool) -> None:
    with ns.acquire(keys) as lease:
        out = room()
        assert lease.read_into(out, verify=verify) == N
        assert wrong(keys, out) == []
        part = room(4)
        assert lease.read_into(part, 13, 17, verify) == 4
        assert wrong(keys[13:17], part) == []
        wide = np.zeros((N + 3, 2, 1, 16, 1, BLOCK_NBYTES // 64), np.uint16)
        assert lease.read_into(wide, stop=2) == 2
        assert wrong(keys[:2], wide[:2].view(np.uint8).reshape(2, -1)) == []
        assert not wide[2:].any()


@pytest.mark.parametrize("verify", [False, True])
def test_read_into_buffers_and_segments(ns: Namespace, keys: Keys, verify: bool) -> None:
    buffers = [bytearray(BLOCK_NBYTES) for _ in range(N)]
    pool = np.zeros((N, 2, BLOCK_NBYTES), np.uint8)
    halves = [[row[0, :5000], (row[1].ctypes.data, BLOCK_NBYTES - 5000)] for row in pool]
    with ns.acquire(keys) as lease:
        assert lease.read_into(buffers, verify=verify) == N
        assert lease.read_into(halves, verify=verify) == N
    assert all(bytes(content(key, BLOCK_NBYTES)) == buffer for key, buffer in zip(keys, buffers, strict=True))
    joined = np.concatenate([pool[:, 0, :5000], pool[:, 1, : BLOCK_NBYTES - 5000]], axis=1)
    assert wrong(keys, joined) == []


def test_blocks_that_do_not_fill_their_slot(client: Client) -> None:
    layout = KVLayout([TensorSpec("odd", "uint8", (16, 313), "token dim")])
    ns = client.namespace(model="odd", revision="", block_tokens=16, layout=layout)
    keys = chain(ns, 9)
    ns.put(keys, contents(keys, ns.block_nbytes))
    out = np.zeros((9, ns.block_nbytes), np.uint8)
    with ns.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == 9
        assert lease.tensors(3)["odd"].shape == (16, 313)
    assert wrong(keys, out) == []


def test_neighbours_are_copied_in_one_run(ns: Namespace, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = targets.HostTarget.take

    def spy(self: targets.HostTarget, run: Run, ranges: targets.Ranges) -> None:
        taken.append(run.stop - run.first)
        original(self, run, ranges)

    monkeypatch.setattr(targets.HostTarget, "take", spy)
    with ns.acquire(keys) as lease:
        lease.read_into(room())
        assert sum(taken) == N
        assert len(taken) == 2, "one copy for each of the two slabs"
        taken.clear()
        lease.read_into(room(), 3, 18)
        assert sum(taken) == 15


def test_scattered_blocks(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    """Blocks put in another order lie in another order."""
    other = namespace(client, "set", BLOCK_NBYTES, kind="set")
    keys = chain(other, N)
    for index in (3, 17, 0, 5, 4, 19, 1, 2, 18, 6, 7, 8, 16, 9, 10, 11, 15, 12, 13, 14):
        other.put(keys[index : index + 1], contents(keys[index : index + 1], BLOCK_NBYTES))
    out = room()
    with other.acquire(keys) as lease:
        assert lease.read_into(out, verify=True) == N
        assert wrong(keys, out) == []
        assert lease.read_into(out, 2, 9) == 7
        assert wrong(keys[2:9], out[:7]) == []


@pytest.mark.parametrize(
    ("out", "span", "message"),
    [
        (np.zeros((N, BLOCK_NBYTES + 1), np.uint8), (0, None), "bytes a block"),
        (np.zeros((N - 1, BLOCK_NBYTES), np.uint8), (0, None), f"it must hold at least {N}"),
        ([bytearray(BLOCK_NBYTES)] * 3, (0, 4), "at least 4"),
        (bytes(N * BLOCK_NBYTES), (0, None), "read-only"),
        (bytearray(N * BLOCK_NBYTES), (0, N + 1), rf"blocks \[0, {N + 1}\) were asked for; this lease has \[0, {N}\)"),
        (bytearray(N * BLOCK_NBYTES), (5, 4), r"\[5, 4\)"),
        (bytearray(N * BLOCK_NBYTES), (-1, 4), r"\[-1, 4\)"),
    ],
)
def test_what_read_into_refuses(
    ns: Namespace, keys: Keys, out: object, span: tuple[int, int | None], message: str
) -> None:
    with ns.acquire(keys) as lease, pytest.raises(InvalidRequest, match=message):
        lease.read_into(out, *span)


# --- expiry: never a wrong byte


def test_a_slot_reused_before_the_copy(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    lease = ns.acquire(keys)
    daemon.lose([keys[N - 1]])
    other = chain(ns, 3, seed=1)
    ns.put(other, contents(other, BLOCK_NBYTES))
    with pytest.raises(LeaseExpired, match=f"block {N - 1}"):
        lease.read_into(room())
    with pytest.raises(LeaseExpired):
        lease.read_into(room(), 0, 1)


def test_a_slot_reused_during_the_copy(
    daemon: FakeDaemon, ns: Namespace, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = targets.HostTarget.take

    def race(self: targets.HostTarget, run: Run, ranges: targets.Ranges) -> None:
        daemon.lose([keys[N - 1]])
        original(self, run, ranges)

    monkeypatch.setattr(targets.HostTarget, "take", race)
    with ns.acquire(keys) as lease, pytest.raises(LeaseExpired, match=f"block {N - 1}"):
        lease.read_into(room())


def test_readers_never_see_foreign_bytes(daemon: FakeDaemon, ns: Namespace, new_client: Callable[..., Client]) -> None:
    """One client reads while another's blocks are dropped and their slots reused, again and again."""
    writer = namespace(new_client(), "model", BLOCK_NBYTES)
    stop = threading.Event()

    def churn() -> None:
        seed = 0
        while not stop.is_set():
            mine = chain(writer, 6, seed % 5)
            writer.put(mine, contents(mine, BLOCK_NBYTES))
            daemon.lose(list(chain(writer, 6, (seed - 2) % 5)))
            seed += 1

    with ThreadPoolExecutor(1) as pool:
        churning = pool.submit(churn)
        read = 0
        until_s = time.monotonic() + 2.0
        try:
            while time.monotonic() < until_s:
                for seed in range(5):
                    wanted = chain(ns, 6, seed)
                    out = room(6)
                    try:
                        with ns.acquire(wanted, 5.0) as lease:
                            count = lease.read_into(out[: max(1, lease.blocks)])
                    except LeaseExpired:
                        continue
                    assert wrong(wanted, out[:count]) == []
                    read += count
        finally:
            stop.set()
        churning.result(30)
    assert read


def test_verify_notices_a_wrong_copy(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    (namespace_of_daemon,) = daemon.store.namespaces.values()
    block = namespace_of_daemon.blocks[keys[4]]
    assert block.slab is not None
    block.slab.row(block.slot, 1)[0] ^= 1
    with ns.acquire(keys) as lease:
        assert lease.read_into(room()) == N
        with pytest.raises(InternalError, match="block 4 differs"):
            lease.read_into(room(), verify=True)


def test_an_unknown_checksum_is_not_verified(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    (namespace_of_daemon,) = daemon.store.namespaces.values()
    namespace_of_daemon.blocks[keys[4]].checksum = bytes(16)
    with ns.acquire(keys) as lease:
        assert lease.read_into(room(), verify=True) == N


# --- loading


def test_a_cold_block_is_waited_for(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    daemon.chill(keys[15:])
    with ns.acquire(keys) as lease:
        assert (lease.blocks, lease.ready) == (N, 15)
        assert lease.wait(15) == 15
        assert daemon.calls["WAIT"] == 0, "what is readable needs no question"
        assert lease.wait(16, SOON_S) == 15
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: (lease.read_into(out := room()), out))
            eventually(lambda: daemon.calls["WAIT"] >= 2, "the reader to wait")
            daemon.load()
            count, out = reading.result(30)
        assert (count, wrong(keys, out)) == (N, [])
        assert lease.ready == N


def test_read_into_is_bounded(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    daemon.chill(keys[15:])
    with ns.acquire(keys) as lease:
        with pytest.raises(DeadlineExceeded, match="block 15 was not loaded"):
            lease.read_into(room(), timeout_s=SOON_S)
        assert lease.read_into(room(15), 0, 15) == 15


def test_lost_blocks_shorten_the_lease(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    daemon.chill(keys[15:])
    with ns.acquire(keys) as lease:
        daemon.lose([keys[17]])
        assert lease.wait(N, SOON_S) == 15
        assert (lease.blocks, lease.tokens) == (17, 17 * 16)
        daemon.load()
        out = room()
        assert lease.read_into(out) == 17
        assert wrong(keys[:17], out[:17]) == []
        with pytest.raises(InvalidRequest):
            lease.read_into(out, 0, N)


def test_blocks_lost_while_read_into_waits(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    daemon.chill(keys[15:])
    with ns.acquire(keys) as lease, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lease.read_into, room())
        eventually(lambda: daemon.calls["WAIT"] >= 1, "the reader to wait")
        daemon.lose(keys[15:])
        assert reading.result(30) == 15


def test_wait_refuses_what_was_never_promised(ns: Namespace, keys: Keys) -> None:
    with ns.acquire(keys) as lease:
        for stop in (N + 1, -1):
            with pytest.raises(InvalidRequest, match=f"given for {N} blocks"):
                lease.wait(stop)


def test_a_lease_that_the_daemon_forgot(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    daemon.chill(keys[15:])
    with ns.acquire(keys) as lease:
        daemon.store.leases.clear()
        with pytest.raises(LeaseExpired, match="has ended"):
            lease.wait(N)
        with pytest.raises(LeaseExpired):
            lease.read_into(room(), 0, 1)


# --- views


def test_view_and_check(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    with ns.acquire(keys) as lease:
        assert (lease.view(3) == content(keys[3], BLOCK_NBYTES)).all()
        lease.check()
        daemon.lose([keys[19]])
        lease.check()  # not one that was viewed
        daemon.lose([keys[3]])
        with pytest.raises(LeaseExpired, match="block 3"):
            lease.check()


def test_view_waits_and_is_bounded(
    daemon: FakeDaemon, ns: Namespace, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_client.reading.READ_TIMEOUT_S", SOON_S)
    daemon.chill([keys[19]])
    with ns.acquire(keys) as lease:
        with pytest.raises(DeadlineExceeded):
            lease.view(19)
        daemon.load()
        assert (lease.view(19) == content(keys[19], BLOCK_NBYTES)).all()
        for block in (-1, N):
            with pytest.raises(InvalidRequest):
                lease.view(block)
    daemon.chill([keys[19]])
    with ns.acquire(keys) as lease:
        daemon.lose([keys[19]])
        with pytest.raises(LeaseExpired, match="lost"):
            lease.view(19)


def test_tensors(client: Client) -> None:
    layout = KVLayout(
        [
            TensorSpec("k", "bfloat16", (16, 4), "token dim"),
            TensorSpec("v", "float8_e4m3", (16, 3), "token dim"),
            TensorSpec("scale", "float32", (2,), "part"),
        ]
    )
    ns = client.namespace(model="tensors", revision="", block_tokens=16, layout=layout)
    keys = chain(ns, 2)
    data = contents(keys, ns.block_nbytes)
    ns.put(keys, data)
    with ns.acquire(keys) as lease:
        found = lease.tensors(1)
        assert {name: (str(each.dtype), each.shape) for name, each in found.items()} == {
            "k": ("uint16", (16, 4)),
            "v": ("uint8", (16, 3)),
            "scale": ("float32", (2,)),
        }
        for each, first in zip(found.values(), layout.offsets, strict=True):
            assert each.tobytes() == data[1, first : first + each.nbytes].tobytes()
        with pytest.raises(InvalidRequest, match="framework is 'jax'"):
            lease.tensors(1, "jax")  # type: ignore[arg-type]
        lease.check()


def test_tensors_of_torch(client: Client) -> None:
    torch = pytest.importorskip("torch")
    layout = KVLayout([TensorSpec("k", "bfloat16", (16, 4), "token dim"), TensorSpec("v", "float8_e5m2", (8,), "x")])
    ns = client.namespace(model="torch", revision="", block_tokens=16, layout=layout)
    keys = chain(ns, 1)
    data = contents(keys, ns.block_nbytes)
    ns.put(keys, data)
    lease = ns.acquire(keys)
    found = lease.tensors(0, "torch")
    assert (found["k"].dtype, tuple(found["k"].shape)) == (torch.bfloat16, (16, 4))
    assert found["v"].dtype == torch.float8_e5m2
    lease.check()
    client.close()
    gc.collect()
    assert bytes(found["k"].view(torch.uint8).flatten().tolist()) == data[0, :128].tobytes(), "keeps its slab mapped"


# --- the end


def test_release_to_gives_the_front_back(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    with ns.acquire(keys) as lease:
        lease.release_to(0)
        assert daemon.calls["RELEASE"] == 0, "upto 0 would be the whole lease"
        lease.release_to(5)
        lease.release_to(3)
        eventually(lambda: daemon.calls["RELEASE"] == 1, "the release to arrive")
        assert next(iter(daemon.store.leases.values())).released == 5
        with pytest.raises(InvalidRequest, match=rf"this lease has \[5, {N}\)"):
            lease.read_into(room())
        out = room(15)
        assert lease.read_into(out, 5) == 15
        assert wrong(keys[5:], out) == []
        assert lease.ready == N
        with pytest.raises(InvalidRequest):
            lease.release_to(N + 1)
        lease.release_to(N)


def test_a_released_lease_is_over(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    lease = ns.acquire(keys)
    lease.view(0)
    lease.release()
    lease.release()
    for use in (lease.wait, lease.check, lease.handoff, lambda: lease.read_into(room()), lambda: lease.view(0)):
        with pytest.raises(LeaseExpired, match="released"):
            use()
    with pytest.raises(LeaseExpired):
        lease.release_to(1)
    assert lease.ready == 0
    eventually(lambda: leases_of(daemon) == 0, "the release to arrive")
    assert daemon.calls["RELEASE"] == 1


def test_a_lease_that_is_dropped_is_released(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    lease = ns.acquire(keys)
    assert leases_of(daemon) == 1
    del lease
    gc.collect()
    ns.acquire(keys).release()  # releases go out with the next one, or by the keeper
    eventually(lambda: leases_of(daemon) == 0, "the release to arrive")


def test_releases_beyond_the_limit_of_calls_in_flight_go_out_later(
    daemon: FakeDaemon, ns: Namespace, keys: Keys
) -> None:
    leases = [ns.acquire(keys[:1]) for _ in range(100)]
    daemon.hang()
    for lease in leases:
        lease.release()
    daemon.resume()
    eventually(lambda: leases_of(daemon) == 0, "every release to arrive")


def test_handoff_and_adopt(daemon: FakeDaemon, ns: Namespace, keys: Keys, new_client: Callable[..., Client]) -> None:
    lease = ns.acquire(keys)
    token = lease.handoff()
    with pytest.raises(LeaseExpired, match="handed off"):
        lease.read_into(room())
    lease.release()
    worker = namespace(new_client(), "model", BLOCK_NBYTES)
    with worker.adopt(token) as adopted:
        out = room()
        assert (adopted.blocks, adopted.tokens, adopted.read_into(out)) == (N, N * 16, N)
        assert wrong(keys, out) == []
    with pytest.raises(NotFound):
        worker.adopt(token)
    with pytest.raises(InvalidRequest, match="token"):
        worker.adopt(b"")
    eventually(lambda: leases_of(daemon) == 0, "the release to arrive")


def test_a_lease_on_another_namespace_cannot_be_adopted(
    daemon: FakeDaemon, client: Client, ns: Namespace, keys: Keys, new_client: Callable[..., Client]
) -> None:
    stranger = namespace(new_client(), "other", BLOCK_NBYTES)
    with pytest.raises(InvalidRequest, match="first for the namespace"):
        stranger.adopt(ns.acquire(keys).handoff())
    known = namespace(client, "other", BLOCK_NBYTES)
    with pytest.raises(InvalidRequest, match="not on this namespace"):
        known.adopt(ns.acquire(keys).handoff())
    eventually(lambda: leases_of(daemon) == 0, "both to be given back")


# --- several namespaces


def test_one_lease_on_several_namespaces(daemon: FakeDaemon, client: Client, ns: Namespace, keys: Keys) -> None:
    """A prefix of 20 blocks of 16 tokens, and a checkpoint every 64 tokens up to 256."""
    state = namespace(client, "state", 4096, block_tokens=64, kind="set")
    states = state.keys(list(range(64 * 4)))
    state.put(states, contents(states, 4096))
    lease = client.acquire([(ns, keys, "prefix"), (state, states, "last")])
    with lease:
        assert (lease.blocks, lease.tokens, lease.ready) == (16, 256, 16)
        blocks, last = lease.groups
        assert (last.first, last.blocks, last.ready) == (3, 4, 4)
        out = room(16)
        assert blocks.read_into(out) == 16
        assert wrong(keys[:16], out) == []
        checkpoint = np.zeros((1, 4096), np.uint8)
        assert last.read_into(checkpoint) == 1
        assert wrong(states[3:], checkpoint) == []
        assert (last.view(3) == checkpoint[0]).all()
        lease.check()
    daemon.chill([states[3]])
    with client.acquire([(ns, keys, "prefix"), (state, states, "last")]) as lease:
        assert lease.ready == 3, "position 3 of the state is not readable yet"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lease.wait)
            eventually(lambda: daemon.calls["WAIT"] >= 1, "the wait to arrive")
            daemon.load()
            assert waiting.result(30) == 16


def test_all_or_nothing(client: Client, ns: Namespace, keys: Keys) -> None:
    empty = namespace(client, "empty", BLOCK_NBYTES)
    lease = client.acquire([(ns, keys, "prefix"), (empty, chain(empty, 5), "prefix")])
    assert (lease.blocks, [group.blocks for group in lease.groups]) == (0, [0, 0])
    assert client.acquire([(ns, keys, "prefix"), (empty, b"", "prefix")]).blocks == 0


def test_what_client_acquire_refuses(
    client: Client, ns: Namespace, keys: Keys, new_client: Callable[..., Client]
) -> None:
    with pytest.raises(InvalidRequest, match="at least one"):
        client.acquire([])
    with pytest.raises(InvalidRequest, match="mode is 'first'"):
        client.acquire([(ns, keys, "first")])  # type: ignore[list-item]
    with pytest.raises(InvalidRequest, match="of this client"):
        new_client().acquire([(ns, keys, "prefix")])


# --- replies that make no sense


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: setattr(group, "slots", group.slots[:-4]), "different length"),
        (lambda group: setattr(group, "block_nbytes", 1), "blocks of 1 bytes"),
        (lambda group: setattr(group, "slots", b"\xff\xff\0\0" * N), "slot 65535 of slab"),
    ],
)
def test_a_reply_that_makes_no_sense_is_a_defect_and_gives_the_lease_back(
    daemon: FakeDaemon,
    ns: Namespace,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[..., None],
    message: str,
) -> None:
    original = daemon.store.acquire

    def changed(*arguments: object) -> object:
        reply = original(*arguments)  # type: ignore[arg-type]
        change(reply.groups[0])
        return reply

    monkeypatch.setattr(daemon.store, "acquire", changed)
    with pytest.raises(InternalError, match=message):
        ns.acquire(keys)
    monkeypatch.undo()
    gc.collect()
    ns.acquire(keys).release()
    eventually(lambda: leases_of(daemon) == 0, "the release to arrive")


def test_a_lease_that_is_granted_too_late_is_given_back(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    """Nobody calls again, and it would stay pinned as long as the session lives."""
    daemon.hang()
    with pytest.raises(DeadlineExceeded):
        ns.acquire(keys, SOON_S)
    assert leases_of(daemon) == 0
    daemon.resume()
    eventually(lambda: daemon.calls["RELEASE"] == 1, "the release to arrive")
    eventually(lambda: leases_of(daemon) == 0, "the release to be handled")


def test_an_adopted_lease_that_comes_too_late_is_given_back(daemon: FakeDaemon, ns: Namespace, keys: Keys) -> None:
    token = ns.acquire(keys).handoff()
    daemon.hang()
    with pytest.raises(DeadlineExceeded):
        ns.adopt(token, SOON_S)
    daemon.resume()
    eventually(lambda: daemon.calls["RELEASE"] == 1, "the release to arrive")
    eventually(lambda: leases_of(daemon) == 0, "the release to be handled")
