"""Priority, time to live, limits and pins, from the worker and from kvctl, in a real daemon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, contents, fetch, namespace
from kvstore.protocol.errors import InvalidRequest, NotFound, Unavailable
from kvstore.v1 import admin_pb2, types_pb2
from kvstore_client import STORED, Client, Keys, Namespace
from polling import eventually

WARM_BLOCKS = 200


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(warm_bytes=str(WARM_BLOCKS * (BLOCK_NBYTES + 4096)), cold_bytes="0", policy="leaf-lru")


@pytest.fixture
def client(daemon: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(daemon.address, transport=transport, staging_bytes=16 << 20) as made:  # type: ignore[arg-type]
        yield made


def store(space: Namespace, blocks: int, seed: int = 0, pin: bool = False) -> Keys:
    keys = chain(space, blocks, seed)
    assert space.put(keys, contents(keys), pin=pin) == [STORED] * blocks
    return keys


def terms_of(daemon: DaemonProcess, space: Namespace) -> types_pb2.NamespaceTerms:
    known = daemon.ask("ListNamespaces", admin_pb2.ListNamespacesRequest()).namespaces
    found: types_pb2.NamespaceTerms = next(item.terms for item in known if item.namespace == space.digest)
    return found


def treat(daemon: DaemonProcess, space: Namespace, **said: int) -> types_pb2.NamespaceTerms:
    terms = types_pb2.NamespaceTerms(**said)  # type: ignore[arg-type]
    answer: types_pb2.NamespaceTerms = daemon.ask(
        "SetTerms", admin_pb2.SetTermsRequest(namespace=space.digest, terms=terms)
    ).terms
    return answer


def attach_again(client: Client) -> None:
    def answered() -> bool:
        with contextlib.suppress(Unavailable):
            return client.ping() > 0
        return False

    eventually(answered, "the client to attach again")


def test_a_pinned_prefix_outlives_a_flood(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "pins")
    pinned = store(space, 60, pin=True)
    other = store(space, 20, seed=1)
    for seed in range(2, 12):
        store(space, 50, seed)
    assert fetch(space, pinned) == (60, [])
    assert space.match(other).blocks == 0
    last = bytes(pinned)[-32:]
    assert daemon.ask("InspectBlock", admin_pb2.InspectBlockRequest(key=last)).blocks[0].pinned
    assert daemon.ask("Pin", admin_pb2.PinRequest(key=last[:6], unpin=True)).key == last
    for seed in range(12, 20):
        store(space, 50, seed)
    assert space.match(pinned).blocks == 0


def test_staged_buffers_can_be_pinned(client: Client) -> None:
    space = namespace(client, "staged")
    keys = chain(space, 8)
    with space.stage(8) as buffers:
        buffers.array[:] = contents(keys)
        assert buffers.put(keys, pin=True) == [STORED] * 8
    for seed in range(1, 10):
        store(space, 50, seed)
    assert fetch(space, keys) == (8, [])


def test_a_pin_names_one_block_that_is_there(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "pins")
    key = bytes(store(space, 1))
    with pytest.raises(NotFound, match="no block here"):
        daemon.ask("Pin", admin_pb2.PinRequest(key=bytes(32)))
    daemon.ask("Pin", admin_pb2.PinRequest(key=key, namespace=space.digest))
    with pytest.raises(NotFound, match="no block here"):
        daemon.ask("Pin", admin_pb2.PinRequest(key=key, namespace=bytes(32)))


def test_priorities(client: Client) -> None:
    low = namespace(client, "batch", priority="low")
    high = namespace(client, "chat", priority="high")
    kept = store(high, 100)
    store(low, 80)
    for seed in range(1, 8):
        store(low, 50, seed)
    assert fetch(high, kept) == (100, [])


def test_blocks_expire(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "short", ttl_s=2.0)
    keys = store(space, 20)
    other = namespace(client, "long")
    kept = store(other, 20)
    eventually(lambda: daemon.tier("warm").blocks == 20, "the blocks to expire")
    assert space.match(keys).blocks == 0
    assert fetch(other, kept) == (20, [])
    assert daemon.stats().counters["expired_blocks"] == 20
    store(space, 20)


def test_a_limit_is_kept(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "limited")
    assert treat(daemon, space, warm_bytes=30 * BLOCK_NBYTES).warm_bytes == 30 * BLOCK_NBYTES
    other = namespace(client, "other")
    kept = store(other, 20)
    for seed in range(20):
        store(space, 25, seed)
    held = {
        item.namespace: item.warm_bytes
        for item in daemon.ask("ListNamespaces", admin_pb2.ListNamespacesRequest()).namespaces
    }
    assert 25 * BLOCK_NBYTES <= held[space.digest] <= 30 * BLOCK_NBYTES
    assert held[other.digest] >= 20 * BLOCK_NBYTES
    assert fetch(other, kept) == (20, [])


def test_what_is_not_said_stays_as_it_was(daemon: DaemonProcess, client: Client) -> None:
    space = namespace(client, "terms", priority="high")
    treat(daemon, space, ttl_ms=5000)
    expected = types_pb2.NamespaceTerms(priority=types_pb2.PRIORITY_HIGH, ttl_ms=5000)
    assert terms_of(daemon, space) == expected
    with Client(daemon.address) as second:
        assert terms_of(daemon, namespace(second, "terms")) == expected
        namespace(second, "terms", priority="low")
    expected.priority = types_pb2.PRIORITY_LOW
    assert terms_of(daemon, space) == expected


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"priority": 9}, "priority is 9"),
        ({"ttl_ms": 1 << 60}, "ttl_ms is"),
        ({"warm_bytes": 5}, "one block takes"),
        ({"cold_bytes": BLOCK_NBYTES - 1}, "one block takes"),
    ],
)
def test_terms_that_cannot_be(daemon: DaemonProcess, client: Client, said: dict[str, int], words: str) -> None:
    space = namespace(client, "terms", priority="high")
    with pytest.raises(InvalidRequest, match=words):
        treat(daemon, space, **said)
    assert terms_of(daemon, space) == types_pb2.NamespaceTerms(priority=types_pb2.PRIORITY_HIGH)
    with pytest.raises(NotFound):
        daemon.ask("SetTerms", admin_pb2.SetTermsRequest(namespace=bytes(32)))


def test_terms_survive_a_kill(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(warm_bytes="32MiB", cold_bytes="64MiB")
    with Client(daemon.address, staging_bytes=16 << 20) as client:
        space = namespace(client, "kept", priority="low", ttl_s=3.0)
        treat(daemon, space, cold_bytes=10 * BLOCK_NBYTES)
        before = terms_of(daemon, space)
        for seed in range(3):
            store(space, 10, seed)
        daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=10_000))
        daemon.kill()
        daemon.start()
        attach_again(client)
        assert terms_of(daemon, space) == before
        assert daemon.tier("cold").used_bytes <= 10 * BLOCK_NBYTES
        eventually(lambda: daemon.tier("cold").blocks == 0, "what was recovered to expire")


def test_terms_hold_after_a_restart_without_a_cold_tier(daemon: DaemonProcess, client: Client) -> None:
    """Regression: they were applied where cold blocks were recovered only, and listed all the same."""
    space = namespace(client, "kept", ttl_s=2.0)
    store(space, 2)
    daemon.kill()
    daemon.start()
    attach_again(client)
    store(space, 20)
    eventually(lambda: daemon.tier("warm").blocks == 0, "the blocks to expire")


def test_an_operators_word_outlasts_a_restart(daemon: DaemonProcess, client: Client) -> None:
    """Regression: a worker that attached again said once more what it had said at first."""
    space = namespace(client, "kept", priority="low")
    treat(daemon, space, priority=types_pb2.PRIORITY_HIGH)
    daemon.kill()
    daemon.start()
    attach_again(client)
    store(space, 2)
    assert terms_of(daemon, space) == types_pb2.NamespaceTerms(priority=types_pb2.PRIORITY_HIGH)


def test_a_full_cold_limit_costs_no_other_namespace_its_blocks(start_daemon: StartDaemon) -> None:
    """Regression: the last flush ended at the first batch of blocks for which their own namespace had no room."""
    daemon = start_daemon(warm_bytes="64MiB", cold_bytes="256MiB")
    client = daemon.client(staging_bytes=16 << 20)
    other, limited = namespace(client, "other"), namespace(client, "limited")
    treat(daemon, limited, cold_bytes=2 * BLOCK_NBYTES)
    kept = store(other, 60)
    for seed in range(3):
        store(limited, 50, seed)
    daemon.stop()
    daemon.start()
    attach_again(client)
    assert fetch(other, kept) == (60, [])
