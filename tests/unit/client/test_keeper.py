"""The background thread: renews while leases are held and nobody calls, and only then."""

from __future__ import annotations

import threading
import time

import pytest

from derived import chain, contents, namespace
from kvstore_client import Client, Namespace
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10


def keepers() -> int:
    return sum(thread.name == "kvstore-client-keeper" for thread in threading.enumerate())


@pytest.fixture
def impatient(daemon: FakeDaemon) -> Namespace:
    daemon.renew_every_s = 0.02
    client = Client(daemon.address, staging_bytes=1 << 20)
    ns = namespace(client, "model", BLOCK_NBYTES)
    keys = chain(ns, 3)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    return ns


def test_it_starts_with_the_first_lease_and_ends_with_the_session(daemon: FakeDaemon, ns: Namespace) -> None:
    before = keepers()
    keys = chain(ns, 3)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    assert keepers() == before
    ns.acquire(keys).release()
    ns.acquire(keys).release()
    assert keepers() == before + 1
    daemon.die()
    eventually(lambda: keepers() == before, "the thread to end")


def test_it_renews_only_while_leases_are_held(daemon: FakeDaemon, impatient: Namespace) -> None:
    with impatient.acquire(chain(impatient, 3)):
        eventually(lambda: daemon.calls["RENEW"] >= 3, "renewals")
    session = impatient.connection._session
    assert session is not None
    eventually(lambda: not daemon.store.leases, "the release")
    eventually(lambda: session.lease_count == 0, "the count")
    # From now on only to hear of retired slabs, six times as seldom.
    before, began_s = daemon.calls["RENEW"], time.monotonic()
    time.sleep(0.3)
    assert daemon.calls["RENEW"] - before <= (time.monotonic() - began_s) / (0.02 * 6) + 1
    session.close()


def test_calls_are_signs_of_life_enough(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    """With the usual five seconds nothing is renewed in a short test."""
    keys = chain(ns, 3)
    ns.put(keys, contents(keys, BLOCK_NBYTES))
    with ns.acquire(keys):
        for _ in range(10):
            ns.match(keys)
    assert daemon.calls["RENEW"] == 0


def test_it_sends_the_release_of_a_dropped_lease(daemon: FakeDaemon, impatient: Namespace) -> None:
    lease = impatient.acquire(chain(impatient, 3))
    assert lease.blocks == 3
    del lease
    eventually(lambda: not daemon.store.leases, "the release, without another call")
    session = impatient.connection._session
    assert session is not None
    session.close()
