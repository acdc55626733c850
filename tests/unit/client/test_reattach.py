"""The daemon goes and comes back: leases end, calls attach again, keys stay good."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from derived import chain, contents, fetch, namespace
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import (
    STORED,
    Client,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseExpired,
    Namespace,
    ProtocolMismatch,
    Unavailable,
)
from kvstore_client.testing import FakeDaemon
from polling import eventually

BLOCK_NBYTES = 16 << 10
SOON_S = 0.1


def store(ns: Namespace, blocks: int = 5) -> None:
    keys = chain(ns, blocks)
    assert ns.put(keys, contents(keys, BLOCK_NBYTES)) == [STORED] * blocks


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no daemon answers"):
        Client(f"unix:{tmp_path}/s")


def test_a_loss_ends_leases_at_once_without_a_call(daemon: FakeDaemon, ns: Namespace) -> None:
    store(ns)
    lease = ns.acquire(chain(ns, 5))
    view = lease.view(0)
    daemon.die()
    eventually(lambda: "ended" in repr(lease), "the keeper to notice")
    out = np.zeros((5, BLOCK_NBYTES), np.uint8)
    for use in (lease.wait, lease.check, lambda: lease.read_into(out), lambda: lease.view(1), lease.handoff):
        with pytest.raises(LeaseExpired, match="session ended"):
            use()
    assert lease.ready == 0
    lease.release()
    assert view.sum() >= 0, "memory that somebody still looks at stays mapped"


def test_the_next_call_attaches_again(daemon: FakeDaemon, ns: Namespace) -> None:
    store(ns)
    keys = chain(ns, 5)
    daemon.die()
    daemon.restart()
    assert ns.match(keys).blocks == 0, "found its namespace, but not the blocks of the old daemon"
    assert ns.put(keys, contents(keys, BLOCK_NBYTES)) == [STORED] * 5
    assert fetch(ns, keys) == (5, [])
    assert daemon.calls["HELLO"] == 2


@pytest.mark.parametrize("call", ["match", "acquire", "put", "exists", "stage", "clear"])
def test_any_call_attaches_again(daemon: FakeDaemon, ns: Namespace, call: str) -> None:
    store(ns)
    keys = chain(ns, 2)
    calls: dict[str, Callable[[], object]] = {
        "match": lambda: ns.match(keys),
        "acquire": lambda: ns.acquire(keys),
        "put": lambda: ns.put(keys, contents(keys, BLOCK_NBYTES)),
        "exists": lambda: ns.exists(keys),
        "stage": lambda: ns.stage(1).close(),
        "clear": ns.clear,
    }
    daemon.die()
    daemon.restart()
    calls[call]()
    assert daemon.calls["HELLO"] == 2


def test_while_nobody_is_there_calls_are_unavailable_and_back_off(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 1)
    daemon.die()
    messages = set()
    for _ in range(20):
        with pytest.raises(Unavailable) as caught:
            ns.match(keys)
        messages.add("next attempt" in str(caught.value))
    assert messages == {True, False}
    daemon.restart()

    def found() -> bool:
        try:
            return ns.match(keys).blocks == 0
        except Unavailable:
            return False

    eventually(found, "the client to attach again")


def test_many_threads_attach_once(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 1)
    daemon.die()
    daemon.restart()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: ns.match(keys, 5.0).blocks, range(8))) == [0] * 8
    assert daemon.calls["HELLO"] == 2


def test_a_call_is_not_repeated_for_ever(daemon: FakeDaemon, ns: Namespace) -> None:
    """A daemon that dies of every call gets it twice at most."""
    keys = chain(ns, 1)
    before = daemon.calls["MATCH"]
    original = daemon.store.match

    def die(*_arguments: object) -> object:
        for served in daemon._served:
            served.close()
        return original(pb.MatchRequest(namespace=ns.digest, keys=bytes(keys)))

    daemon.store.match = die  # type: ignore[method-assign,assignment]
    with pytest.raises(Unavailable):
        ns.match(keys, 5.0)
    assert daemon.calls["MATCH"] == before + 2


def test_an_adopt_is_not_repeated(daemon: FakeDaemon, ns: Namespace) -> None:
    daemon.die()
    daemon.restart()
    with pytest.raises(Unavailable):
        ns.adopt(b"token")
    assert daemon.calls["ADOPT"] == 0


def test_a_hung_daemon_costs_the_deadline(daemon: FakeDaemon, ns: Namespace) -> None:
    keys = chain(ns, 1)
    daemon.hang()
    for call in (
        lambda: ns.match(keys, SOON_S),
        lambda: ns.acquire(keys, SOON_S),
        lambda: ns.exists(keys, SOON_S),
        lambda: ns.prefetch(keys, SOON_S),
        lambda: ns.adopt(b"token", SOON_S),
        lambda: ns.delete(keys, SOON_S),
        lambda: ns.clear(SOON_S),
        lambda: ns.connection.run(lambda session, deadline_s: None, SOON_S) or ns.match(keys, SOON_S),
    ):
        with pytest.raises(DeadlineExceeded):
            call()
    daemon.resume()
    assert ns.match(keys, 5.0).blocks == 0


def test_a_daemon_of_another_version(daemon: FakeDaemon) -> None:
    daemon.protocol_version = 9
    with pytest.raises(ProtocolMismatch, match="protocol 9"):
        Client(daemon.address)


def test_a_daemon_that_computes_another_digest(daemon: FakeDaemon, client: Client) -> None:
    session = client._connection._session
    assert session is not None
    session.tenant = "somebody else"
    with pytest.raises(InternalError, match="names this namespace"):
        namespace(client, "model", BLOCK_NBYTES)


def test_keys_meet_between_clients_of_a_tenant(ns: Namespace, new_client: Callable[..., Client]) -> None:
    store(ns)
    other = namespace(new_client(), "model", BLOCK_NBYTES)
    assert other.digest == ns.digest
    assert fetch(other, chain(other, 5)) == (5, [])
    stranger = namespace(new_client(), "model", BLOCK_NBYTES, salt="secret")
    assert stranger.match(chain(stranger, 5)).blocks == 0
    assert stranger.match(chain(other, 5)).blocks == 0


def test_a_closed_client(daemon: FakeDaemon, client: Client, ns: Namespace) -> None:
    store(ns)
    lease = ns.acquire(chain(ns, 5))
    client.close()
    client.close()
    for call in (client.ping, ns.clear, lambda: ns.match(chain(ns, 1)), lambda: namespace(client, "x", BLOCK_NBYTES)):
        with pytest.raises(InvalidRequest, match="closed"):
            call()
    with pytest.raises(LeaseExpired):
        lease.wait()
    eventually(lambda: not daemon.store.sessions, "the daemon to notice")


def test_a_namespace_or_a_lease_keeps_its_client_attached(daemon: FakeDaemon) -> None:
    ns = namespace(Client(daemon.address), "model", BLOCK_NBYTES)
    store(ns)
    lease = ns.acquire(chain(ns, 5))
    del ns
    assert lease.read_into(np.zeros((5, BLOCK_NBYTES), np.uint8)) == 5
    del lease
    eventually(lambda: not daemon.store.sessions, "the session to end")


def test_a_client_that_is_dropped_detaches(daemon: FakeDaemon) -> None:
    client = Client(daemon.address)
    ns = namespace(client, "model", BLOCK_NBYTES)
    store(ns)
    lease = ns.acquire(chain(ns, 5))
    assert len(daemon.store.sessions) == 1
    del client, ns, lease
    eventually(lambda: not daemon.store.sessions, "the session to end")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transport": "tcp"}, "transport is 'tcp'"),
        ({"name": "x" * 129}, "at most 128 bytes"),
        ({"staging_bytes": -1}, "staging_bytes is -1"),
        ({"address": "host:1"}, "not a Unix socket"),
    ],
)
def test_what_the_constructor_refuses(daemon: FakeDaemon, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Client(**{"address": daemon.address, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"kind": "tree"}, "kind is 'tree'"),
        ({"model": "x" * 70_000}, "model has 70000 bytes"),
        ({"modell": "typo"}, "modell"),
        ({"revision": None}, "revision must be a string"),
        ({"shard": {"tp": (2, 2)}}, "shard axis 'tp'"),
    ],
)
def test_what_namespace_refuses(client: Client, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        namespace(client, **{"model": "model", "block_nbytes": BLOCK_NBYTES, **fields})  # type: ignore[arg-type]


def test_namespace_says_what_is_missing(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="revision"):
        client.namespace(model="m", block_tokens=16)  # type: ignore[typeddict-item]


def test_a_loss_is_noticed_behind_answers_that_nobody_read(daemon: FakeDaemon, ns: Namespace) -> None:
    """The answer to a release lies in the socket when the daemon dies."""
    store(ns)
    held = ns.acquire(chain(ns, 5))
    ns.acquire(chain(ns, 5)).release()
    eventually(lambda: daemon.calls["RELEASE"] == 1, "the release to arrive")
    daemon.die()
    eventually(lambda: "ended" in repr(held), "the keeper to notice", 3.0)
