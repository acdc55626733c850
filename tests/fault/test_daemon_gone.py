"""A daemon that is killed, stopped or late under its workers: a miss within the deadline, and nothing worse."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from daemon_fixtures import StartDaemon, StartWorker
from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, namespace
from kvstore.v1 import admin_pb2
from kvstore_client import (
    REJECTED,
    STORED,
    Client,
    DeadlineExceeded,
    Keys,
    KVStoreError,
    LeaseExpired,
    Match,
    Namespace,
    RejectReason,
    Unavailable,
)
from polling import eventually

BLOCKS = 16
MISS = Match(0, 0, {"hot": 0, "warm": 0, "cold": 0})
STAGING_BYTES = 4 << 20


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon()


@pytest.fixture
def space(daemon: DaemonProcess, transport: str) -> Iterator[Namespace]:
    """Of a client that raises."""
    with Client(daemon.address, transport=transport, staging_bytes=STAGING_BYTES) as client:  # type: ignore[arg-type]
        yield namespace(client, "m")


@pytest.fixture
def open_space(daemon: DaemonProcess, transport: str) -> Iterator[Namespace]:
    """Of a client that fails open."""
    options = {"transport": transport, "staging_bytes": STAGING_BYTES, "fail_open": True}
    with Client(daemon.address, **options) as client:  # type: ignore[arg-type]
        yield namespace(client, "m")


def store(daemon: DaemonProcess, space: Namespace) -> Keys:
    """A stored prefix that is also in the cold tier."""
    keys = chain(space, BLOCKS)
    assert space.put(keys, contents(keys)) == [STORED] * BLOCKS
    assert daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000)).unsaved == 0
    return keys


def every_call(space: Namespace, keys: Keys) -> dict[str, Callable[[], object]]:
    """All that asks the daemon something."""
    blocks = np.zeros((len(keys), BLOCK_NBYTES), np.uint8)
    return {
        "match": lambda: space.match(keys),
        "exists": lambda: space.exists(keys),
        "acquire": lambda: space.acquire(keys).blocks,
        "prefetch": lambda: space.prefetch(keys),
        "put": lambda: space.put(keys, blocks, timeout_s=0.3),
        "delete": lambda: space.delete(keys, timeout_s=0.3),
        "clear": lambda: space.clear(timeout_s=0.3),
    }


MISSES: dict[str, object] = {
    "match": MISS,
    "exists": [False] * BLOCKS,
    "acquire": 0,
    "prefetch": 0,
    "put": [REJECTED(RejectReason.UNAVAILABLE)] * BLOCKS,
}


def check_misses(space: Namespace, keys: Keys) -> None:
    """A fail-open client answers misses; what changes something raises all the same."""
    for name, call in every_call(space, keys).items():
        if name in MISSES:
            assert call() == MISSES[name], name
        else:
            with pytest.raises((Unavailable, DeadlineExceeded)):
                call()


# -- killed


def test_a_killed_daemon_is_an_error_that_says_so(daemon: DaemonProcess, space: Namespace) -> None:
    """Defect 14 of peers: a miss and an outage looked the same."""
    keys = store(daemon, space)
    lease = space.acquire(keys)
    daemon.kill()
    for name, call in every_call(space, keys).items():
        with pytest.raises(Unavailable):
            pytest.fail(f"{name} answered {call()}")
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((BLOCKS, BLOCK_NBYTES), np.uint8))
    lease.release()
    daemon.start()
    eventually(lambda: answers(space, keys), "the client to attach again")
    assert fetch(space, keys) == (BLOCKS, [])


def answers(space: Namespace, keys: Keys) -> bool:
    try:
        return space.match(keys).blocks == BLOCKS
    except KVStoreError:
        return False


def test_a_killed_daemon_is_a_miss_for_a_client_that_fails_open(daemon: DaemonProcess, open_space: Namespace) -> None:
    keys = store(daemon, open_space)
    lease = open_space.acquire(keys)
    daemon.kill()
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((BLOCKS, BLOCK_NBYTES), np.uint8))
    for _ in range(3):
        check_misses(open_space, keys)
    daemon.start()
    eventually(lambda: open_space.match(keys).blocks == BLOCKS, "the client to attach again by itself")
    assert fetch(open_space, keys) == (BLOCKS, [])
    more = chain(open_space, BLOCKS, seed=1)
    assert open_space.put(more, contents(more)) == [STORED] * BLOCKS


def test_a_client_that_fails_open_may_come_before_the_daemon(daemon: DaemonProcess, transport: str) -> None:
    daemon.kill()
    options = {"transport": transport, "staging_bytes": STAGING_BYTES, "fail_open": True}
    with Client(daemon.address, **options) as client:  # type: ignore[arg-type]
        space = namespace(client, "m")
        check_misses(space, chain(space, BLOCKS))
        daemon.start()

        def is_stored() -> bool:
            keys = chain(space, BLOCKS)
            return all(outcome.is_stored for outcome in space.put(keys, contents(keys)))

        eventually(is_stored, "the client to attach")
        assert fetch(space, chain(space, BLOCKS)) == (BLOCKS, [])
    with pytest.raises(Unavailable, match=r"no daemon answers at /nowhere/k\.sock\.attach"):
        Client("unix:/nowhere/k.sock")


@pytest.mark.parametrize(("transport", "fail_open"), [("auto", True), ("grpc", False)])
def test_a_daemon_killed_under_a_working_worker(
    daemon: DaemonProcess, start_worker: StartWorker, transport: str, fail_open: bool
) -> None:
    """The process lives, whatever it was doing, and works with the next daemon."""
    for verb in ("put_for_ever", "get_for_ever"):
        worker = start_worker(daemon, transport=transport, fail_open=fail_open, staging_bytes=STAGING_BYTES)
        worker.ask("put", model="m", blocks=BLOCKS)
        daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=30_000))
        other = start_worker(daemon, transport=transport, fail_open=fail_open, staging_bytes=STAGING_BYTES)
        other.ask(verb, model="m" if verb == "get_for_ever" else "puts", blocks=BLOCKS)
        daemon.kill()
        daemon.start()
        eventually(lambda worker=worker: worker.ask("get_or_error", model="m", blocks=BLOCKS) == [BLOCKS, []], "it")  # type: ignore[misc]
        other.kill()
        worker.kill()


# -- stopped, and late


def test_a_stopped_daemon_is_late_and_then_forgiven(daemon: DaemonProcess, space: Namespace) -> None:
    keys = store(daemon, space)
    daemon.pause()
    for name, call in every_call(space, keys).items():
        if name in ("delete", "clear"):
            continue  # what a stopped daemon has taken it does once it goes on
        with pytest.raises(DeadlineExceeded):
            pytest.fail(f"{name} answered {call()}")
    daemon.resume()
    eventually(lambda: answers(space, keys), "the daemon to answer")
    assert fetch(space, keys) == (BLOCKS, [])


def test_a_stopped_daemon_is_a_miss_for_a_client_that_fails_open(daemon: DaemonProcess, open_space: Namespace) -> None:
    keys = store(daemon, open_space)
    daemon.pause()
    for _ in range(2):
        for name in MISSES:
            assert every_call(open_space, keys)[name]() == MISSES[name]
    daemon.resume()
    eventually(lambda: open_space.match(keys).blocks == BLOCKS, "the daemon to answer")
    assert fetch(open_space, keys) == (BLOCKS, [])


def test_a_daemon_that_was_stopped_still_ends_in_order(daemon: DaemonProcess) -> None:
    """Regression: SIGTERM right after SIGCONT went to a thread that had woken first, and nobody ever acted on it."""
    for _ in range(3):
        daemon.pause()
        daemon.resume()
        daemon.stop()
        daemon.start()
    assert daemon.log().count("kvstore stopped") == 3


def test_late_replies_are_dropped_and_not_taken_for_others(daemon: DaemonProcess, space: Namespace) -> None:
    """Each reply carries its call's id: after a hundred late ones the next answers are still their own."""
    keys = store(daemon, space)
    for _ in range(5):
        daemon.pause()
        for blocks in range(1, 6):
            with pytest.raises(DeadlineExceeded):
                space.match(keys[:blocks], timeout_s=0.02)
        daemon.resume()
        for blocks in (BLOCKS, 3, 7):
            assert space.match(keys[:blocks], timeout_s=30).blocks == blocks
        assert space.exists(keys[:2], timeout_s=30) == [True, True]


def test_a_late_put_frees_its_staging_and_spoils_nothing(daemon: DaemonProcess, transport: str) -> None:
    """The range of an unanswered put stays away from others until its reply has come, or the session ends."""
    with Client(daemon.address, transport=transport, staging_bytes=4 << 20) as client:  # type: ignore[arg-type]
        space = namespace(client, "m")
        assert space.match(chain(space, 1)).blocks == 0
        late = []
        daemon.pause()
        for seed in range(3):
            late.append(keys := chain(space, BLOCKS, seed))
            with pytest.raises(DeadlineExceeded):
                space.put(keys, contents(keys), timeout_s=0.05)
        daemon.resume()
        for seed in range(10, 40):  # ten times what staging holds
            keys = chain(space, BLOCKS, seed)
            outcomes = space.put(keys, contents(keys), timeout_s=10)
            assert all(outcome.is_stored for outcome in outcomes), outcomes
            assert fetch(space, keys) == (BLOCKS, [])
        for keys in late:
            assert fetch(space, keys)[1] == []
    assert daemon.ask("Verify", admin_pb2.VerifyRequest(tier=2)).corrupt == 0


# -- forked


def test_a_forked_client_is_dead_and_leaves_the_parents_alone(
    daemon: DaemonProcess, start_worker: StartWorker, transport: str
) -> None:
    worker = start_worker(daemon, transport=transport, staging_bytes=STAGING_BYTES)
    worker.ask("put", model="m", blocks=BLOCKS)
    worker.ask("hold", model="m", blocks=BLOCKS)
    seen = worker.ask("fork", model="m", blocks=BLOCKS)
    assert seen["old"].startswith("InvalidRequest: this client was made before fork() and belongs to the parent")
    assert json.loads(seen["fresh"]) == [BLOCKS, []], "a client of its own works in the child"
    assert json.loads(seen["parent"]) == [BLOCKS, []]
    if transport == "auto":
        assert seen["sockets"] == "0", "the child holds none of the parent's connections"
    assert worker.ask("read_held") == [BLOCKS, []], "nor has the child's end ended the parent's lease"
    assert [session.pid for session in daemon.sessions()] == [worker.pid]
