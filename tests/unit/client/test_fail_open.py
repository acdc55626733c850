"""fail_open: a daemon that is gone, late or broken is a miss, and a mistake is still a mistake."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from derived import chain, contents, fetch, namespace
from kvstore.protocol.errors import InternalError, InvalidRequest, PermissionDenied, Unavailable
from kvstore_client import REJECTED, STORED, Client, DeadlineExceeded, LeaseExpired, Namespace, RejectReason
from kvstore_client.breaker import FAILURES_TO_OPEN, Breaker
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
SOON_S = 0.05
UNAVAILABLE = REJECTED(RejectReason.UNAVAILABLE)


@pytest.fixture
def open_client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.address, fail_open=True, staging_bytes=1 << 20) as client:
        yield client


@pytest.fixture
def open_ns(open_client: Client) -> Namespace:
    return namespace(open_client, "model", BLOCK_NBYTES)


def check_misses(ns: Namespace, timeout_s: float = SOON_S) -> None:
    keys = chain(ns, 3)
    rows = contents(keys, BLOCK_NBYTES)
    assert ns.match(keys, timeout_s).blocks == 0
    assert ns.exists(keys, timeout_s) == [False] * 3
    assert ns.prefetch(keys, timeout_s) == 0
    with ns.acquire(keys, timeout_s) as lease:
        assert (lease.blocks, lease.tokens, lease.read_into(np.empty_like(rows))) == (0, 0, 0)
    assert ns.adopt(b"token", timeout_s).blocks == 0
    assert ns.put(keys, rows, timeout_s) == [UNAVAILABLE] * 3
    with ns.stage(3, timeout_s) as buffers:
        buffers.array[:] = rows
        assert buffers.put(keys, timeout_s) == [UNAVAILABLE] * 3


def is_open(client: Client) -> bool:
    return client._connection.breaker_is_open


def test_gone(daemon: FakeDaemon, open_client: Client, open_ns: Namespace) -> None:
    daemon.die()
    for _ in range(3):
        check_misses(open_ns)
    assert is_open(open_client)
    daemon.restart()
    eventually(lambda: not is_open(open_client), "a probe to find the daemon")
    keys = chain(open_ns, 3)
    assert open_ns.put(keys, contents(keys, BLOCK_NBYTES)) == [STORED] * 3
    assert fetch(open_ns, keys) == (3, [])


def test_late(daemon: FakeDaemon, open_client: Client, open_ns: Namespace) -> None:
    daemon.hang()
    check_misses(open_ns)
    assert is_open(open_client)
    asked = daemon.calls["MATCH"]
    for _ in range(100):
        open_ns.match(chain(open_ns, 1))
    assert daemon.calls["MATCH"] == asked, "nobody is asked while it is open"
    daemon.resume()
    eventually(lambda: not is_open(open_client), "a probe to be answered")
    assert open_ns.put(chain(open_ns, 1), contents(chain(open_ns, 1), BLOCK_NBYTES))[0].is_stored


def test_broken(daemon: FakeDaemon, open_ns: Namespace) -> None:
    daemon.failure = InternalError("a defect")
    check_misses(open_ns)


def test_never_there(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Client(str(path), fail_open=True) as client:
        ns = namespace(client, "model", BLOCK_NBYTES)
        check_misses(ns)
        with FakeDaemon(path):
            eventually(lambda: not is_open(client), "a probe to find the daemon")
            keys = chain(ns, 3)
            assert ns.put(keys, contents(keys, BLOCK_NBYTES)) == [STORED] * 3
            assert fetch(ns, keys) == (3, [])


def test_mistakes_are_never_hidden(daemon: FakeDaemon, open_client: Client, open_ns: Namespace) -> None:
    daemon.die()
    check_misses(open_ns)
    check_misses(open_ns)
    assert is_open(open_client)
    keys = chain(open_ns, 3)
    with pytest.raises(InvalidRequest):
        open_ns.match(bytes(31))
    with pytest.raises(InvalidRequest):
        open_ns.put(keys, np.zeros((4, BLOCK_NBYTES), np.uint8))
    with pytest.raises(InvalidRequest):
        open_ns.stage(0)
    with pytest.raises(InvalidRequest):
        open_client.namespace(model="", revision="", block_tokens=1, layout=open_ns.spec.layout)


def test_what_the_daemon_refuses_is_raised(daemon: FakeDaemon, open_client: Client, open_ns: Namespace) -> None:
    for failure in (InvalidRequest("no"), PermissionDenied("not yours")):
        daemon.failure = failure
        with pytest.raises(type(failure)):
            open_ns.match(chain(open_ns, 1))
    assert not is_open(open_client)


def test_changes_raise(daemon: FakeDaemon, open_client: Client, open_ns: Namespace) -> None:
    """A clear that silently did not happen would serve the KV of old weights."""
    daemon.die()
    for call in (open_ns.clear, lambda: open_ns.delete(chain(open_ns, 1)), open_client.ping, open_client.stats):
        with pytest.raises(Unavailable):
            call()


def test_a_put_keeps_what_is_known(daemon: FakeDaemon, open_ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_client.put.FIRST_SUB_BATCH_BYTES", BLOCK_NBYTES)
    monkeypatch.setattr("kvstore_client.put.SUB_BATCH_BYTES", BLOCK_NBYTES)
    keys = chain(open_ns, 8)
    original = daemon.store.put

    def hang_at_the_fourth(*arguments: object) -> object:
        if len(daemon.store.puts) == 3:
            daemon.running.clear()
            daemon.running.wait()
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(daemon.store, "put", hang_at_the_fourth)
    outcomes = open_ns.put(keys, contents(keys, BLOCK_NBYTES), 0.5)
    assert outcomes == [STORED] * 3 + [UNAVAILABLE] * 5
    daemon.resume()


def test_a_read_that_cannot_wait_longer_is_shorter(daemon: FakeDaemon, open_ns: Namespace) -> None:
    keys = chain(open_ns, 5)
    open_ns.put(keys, contents(keys, BLOCK_NBYTES))
    daemon.chill(keys[3:])
    out = np.zeros((5, BLOCK_NBYTES), np.uint8)
    with open_ns.acquire(keys) as lease:
        assert lease.blocks == 5
        assert lease.read_into(out, timeout_s=SOON_S) == 3
        with pytest.raises(DeadlineExceeded):
            lease._claim.session.is_fail_open = False  # type: ignore[union-attr]
            lease.read_into(out, timeout_s=SOON_S)


def test_a_lease_never_turns_into_something_else(daemon: FakeDaemon, open_ns: Namespace) -> None:
    keys = chain(open_ns, 2)
    open_ns.put(keys, contents(keys, BLOCK_NBYTES))
    lease = open_ns.acquire(keys)
    daemon.die()
    eventually(lambda: lease.ready == 0, "the loss to be noticed")
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((2, BLOCK_NBYTES), np.uint8))


def test_a_daemon_without_memory_for_staging_still_serves_reads(
    daemon: FakeDaemon, ns: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvstore_client import QuotaExceeded

    keys = chain(ns, 2)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    original = daemon.store.attach_staging

    def refuse(session: object, nbytes: int) -> None:
        if nbytes:
            raise QuotaExceeded("no staging left")
        original(session, nbytes)  # type: ignore[arg-type]

    monkeypatch.setattr(daemon.store, "attach_staging", refuse)
    with pytest.raises(QuotaExceeded):
        Client(daemon.address)
    with Client(daemon.address, fail_open=True) as client:
        reader = namespace(client, "model", BLOCK_NBYTES)
        assert fetch(reader, keys) == (2, [])
        assert reader.put(keys, contents(keys, BLOCK_NBYTES)) == [REJECTED(RejectReason.QUOTA)] * 2


# --- the breaker by itself


def test_breaker_opens_after_failures_in_a_row() -> None:
    breaker = Breaker(lambda: None)
    error = Unavailable("gone")
    for _ in range(3):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed(error)
        breaker.succeeded()
    assert not breaker.is_open
    breaker.stop()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(error)
    assert not breaker.is_open, "nobody would close it any more"


def test_breaker_probes_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore_client.breaker.FIRST_PROBE_S", 0.001)
    monkeypatch.setattr("kvstore_client.breaker.MAX_PROBE_S", 0.001)
    probes: list[int] = []
    answers = threading.Event()

    def probe() -> None:
        probes.append(threading.get_ident())
        if not answers.is_set():
            raise Unavailable("gone")

    breaker = Breaker(probe)
    for _ in range(10 * FAILURES_TO_OPEN):
        breaker.failed(Unavailable("gone"))
    eventually(lambda: len(probes) > 3, "probes")
    assert breaker.is_open
    answers.set()
    eventually(lambda: not breaker.is_open, "the breaker to close")
    assert len(set(probes)) == 1
