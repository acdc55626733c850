"""transport="grpc": the same client over the public API."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from derived import chain, contents, fetch, wrong
from kvstore_client import (
    EXISTS,
    STORED,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    LeaseExpired,
    Namespace,
    NotFound,
    Unavailable,
)
from kvstore_client import put as put_module
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
SOON_S = 0.2


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon(warm_bytes=64 << 20, slab_bytes=256 << 10, with_grpc=True) as running:
        yield running


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.address, transport="grpc", staging_bytes=4 << 20) as attached:
        yield attached


def test_everything_once(daemon: FakeDaemon, client: Client, ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(put_module, "FIRST_SUB_BATCH_BYTES", 2 * BLOCK_NBYTES)
    monkeypatch.setattr(put_module, "SUB_BATCH_BYTES", 4 * BLOCK_NBYTES)
    keys = chain(ns, 20)
    rows = contents(keys, BLOCK_NBYTES)
    assert client.ping() > 0
    assert ns.put(keys[:10], rows[:10]) == [STORED] * 10
    with ns.stage(10) as buffers:
        buffers.array[:] = rows[10:]
        assert buffers.put(keys[10:], 20.0) == [STORED] * 10
    assert ns.put(keys[:2], rows[:2], 20.0) == [EXISTS] * 2
    assert (ns.match(keys, 5.0).blocks, ns.exists(keys, 5.0)) == (20, [True] * 20)
    daemon.chill(keys[15:])
    assert ns.prefetch(keys, 5.0) == 5
    out = np.zeros((20, BLOCK_NBYTES), np.uint8)
    with ns.acquire(keys, 5.0) as lease:
        assert lease.wait(20, 0.1) == 15
        threading.Timer(0.05, daemon.load).start()
        assert lease.read_into(out, verify=True, timeout_s=30.0) == 20
        assert wrong(keys, out) == []
        lease.release_to(3)
        token = lease.handoff(5.0)
    with ns.adopt(token, 5.0) as adopted:
        assert adopted.blocks == 20
    eventually(lambda: not daemon.store.leases, "the release to arrive")
    assert ns.delete(keys[19:], 5.0) == 1
    assert ns.clear(5.0) == 1
    assert ns.match(keys, 5.0).blocks == 0


def test_errors_are_mapped(daemon: FakeDaemon, ns: Namespace) -> None:
    with pytest.raises(NotFound, match="no lease was handed off"):
        ns.adopt(b"token", 5.0)
    daemon.failure = InvalidRequest("wrong: ü")
    with pytest.raises(InvalidRequest, match="wrong: ü"):
        ns.match(chain(ns, 1), 5.0)


def test_deadlines(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 2)
    daemon.hang()
    with pytest.raises(DeadlineExceeded):
        ns.match(keys, SOON_S)
    with pytest.raises(DeadlineExceeded):
        ns.match(keys, 0.0)
    with pytest.raises(DeadlineExceeded):
        ns.put(keys, contents(keys, BLOCK_NBYTES), SOON_S)
    daemon.resume()
    eventually(lambda: all(outcome.is_stored for outcome in ns.put(keys, contents(keys, BLOCK_NBYTES), 5.0)), "a put")


def test_the_daemon_comes_back(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 3)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    lease = ns.acquire(keys, 5.0)
    daemon.die()
    eventually(lambda: lease.ready == 0, "the loss to be noticed")
    with pytest.raises(LeaseExpired):
        lease.wait()
    daemon.restart()

    def found() -> bool:
        try:
            return ns.match(keys, 5.0).blocks == 0
        except (Unavailable, DeadlineExceeded):
            return False

    eventually(found, "the client to attach again")
    assert ns.put(keys, contents(keys, BLOCK_NBYTES), 5.0) == [STORED] * 3
    assert fetch(ns, keys) == (3, [])


def test_stats_of_either_transport(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    keys = chain(ns, 3)
    ns.put(keys, contents(keys, BLOCK_NBYTES), 5.0)
    with Client(daemon.address) as local:
        for each in (client, local):
            stats = each.stats()
            assert stats["tiers"]["warm"]["blocks"] == 3
            assert stats["health"] == "serving"
            assert stats["counters"] == {}


def test_stats_without_grpc_are_unavailable() -> None:
    with FakeDaemon() as daemon, Client(daemon.address) as client, pytest.raises(Unavailable):
        client.stats(1.0)
