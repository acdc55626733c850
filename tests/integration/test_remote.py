"""Workers over TCP: the same client, the same bytes, and nobody let in who is not known."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import xxhash

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, chain, content, contents, fetch, namespace, wrong
from kvstore.cli.admin_client import AdminClient
from kvstore.protocol import convert
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import (
    EXISTS,
    REJECTED,
    STORED,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    Keys,
    LeaseExpired,
    Namespace,
    PermissionDenied,
    QuotaExceeded,
    RejectReason,
    Unauthenticated,
    Unavailable,
)
from polling import eventually
from remote_fixtures import Certificates, Remote

Start = Callable[..., Remote]


@pytest.fixture
def remote(remote_served: DaemonProcess, certificates: Certificates) -> Iterator[Remote]:
    """Ways into the daemon that the tests of this module share: each takes a model's name of its own."""
    made = Remote(remote_served, certificates)
    yield made
    made.close()


def stored(space: Namespace, count: int, seed: int = 0) -> Keys:
    """Keys of a prefix that has just been stored."""
    keys = chain(space, count, seed)
    assert space.put(keys, contents(keys, space.block_nbytes), timeout_s=30) == [STORED] * count
    return keys


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code()


# The same client


@pytest.mark.parametrize("tokens", [False, True], ids=["mutual TLS", "tokens"])
def test_every_verb_works_as_on_the_same_host(start_remote: Start, tokens: bool) -> None:
    remote = start_remote(tokens=tokens)
    client = remote.client()
    space = namespace(client, "verbs")
    keys = chain(space, 40)
    assert space.put(keys, contents(keys)) == [STORED] * 40
    assert space.put(keys[:2], contents(keys[:2])) == [EXISTS] * 2
    assert (space.match(keys).blocks, space.exists(keys[38:])) == (40, [True, True])
    assert fetch(space, keys) == (40, [])
    assert space.prefetch(keys) == 0, "all of it is warm"
    with space.acquire(keys) as lease:
        assert (lease.blocks, lease.ready, lease.wait()) == (40, 40, 40)
        middle = np.zeros((5, BLOCK_NBYTES), np.uint8)
        assert lease.read_into(middle, 10, 15, verify=True) == 5
        assert wrong(keys[10:15], middle) == []
        lease.release_to(20)
        with pytest.raises(InvalidRequest, match=r"this lease has \[20, 40\)"):
            lease.read_into(middle, 10, 15)
    assert space.delete(keys[30:]) == 10
    assert space.match(keys).blocks == 30
    space.clear()
    assert space.match(keys).blocks == 0
    assert client.ping() > 0
    assert client.stats()["health"] == "serving"


def test_what_one_stores_the_other_reads_over_tcp_and_in_shared_memory(start_remote: Start) -> None:
    tenants = {"default": {"sans": ["spiffe://test/red"], "uids": [os.getuid()]}}
    remote = start_remote(tenants=tenants)
    near, far = namespace(remote.daemon.client(), "both"), namespace(remote.client(), "both")
    mine, theirs = chain(near, 20, 1), chain(far, 20, 2)
    assert near.put(mine, contents(mine)) == far.put(theirs, contents(theirs)) == [STORED] * 20
    for space in (near, far):
        assert fetch(space, mine) == fetch(space, theirs) == (20, [])


@pytest.mark.parametrize("block_nbytes", [64, 4160, 256 << 10, 2 << 20, 5 << 20])
def test_blocks_of_any_size(remote: Remote, block_nbytes: int) -> None:
    space = namespace(remote.client(), "sizes", block_nbytes)
    keys = stored(space, 7)
    assert fetch(space, keys) == (7, [])


def test_segments_of_the_callers_own(remote: Remote) -> None:
    space = namespace(remote.client(), "segments")
    keys = chain(space, 3)
    rows = contents(keys)
    cuts = [0, 1, 4099, BLOCK_NBYTES - 7, BLOCK_NBYTES]
    parts = [[row[a:b].copy() for a, b in itertools.pairwise(cuts)] for row in rows]
    assert space.put(keys, parts) == [STORED] * 3
    into = [[np.zeros(part.nbytes, np.uint8) for part in row] for row in parts]
    with space.acquire(keys) as lease:
        assert lease.read_into(into) == 3
    assert all((np.concatenate(pieces) == row).all() for pieces, row in zip(into, rows, strict=True))


def test_cold_blocks_come_as_they_are_loaded(start_remote: Start) -> None:
    remote = start_remote()
    space = namespace(remote.client(), "cold")
    keys = stored(space, 200)
    remote.daemon.ask("Flush", admin_pb2.FlushRequest(timeout_ms=20_000))
    remote.daemon.ask("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1 << 30))
    assert space.match(keys).by_tier["cold"] == 200
    assert fetch(space, keys) == (200, [])


def test_a_set_and_a_chain_in_one_lease(remote: Remote) -> None:
    client = remote.client()
    pages, states = namespace(client, "pages"), namespace(client, "states", 4096, kind="set")
    keys, marks = chain(pages, 8), chain(states, 8)
    pages.put(keys, contents(keys))
    assert states.put(marks[3:4], contents(marks[3:4], 4096)) == [STORED]
    with client.acquire([(pages, keys, "prefix"), (states, marks, "last")]) as lease:
        assert lease.blocks == 4
        state = np.zeros((1, 4096), np.uint8)
        assert lease.groups[1].read_into(state) == 1
        assert wrong(marks[3:4], state) == []
        assert lease.read_into(np.zeros((4, BLOCK_NBYTES), np.uint8)) == 4


def test_in_a_set_a_block_that_is_refused_says_nothing_of_the_next(remote: Remote) -> None:
    raw = remote.raw().hello()
    space = namespace(remote.client(), "refused", kind="set")
    keys = chain(space, 3)
    rows = contents(keys)
    opened = raw.call(raw.data.OpenNamespace, open_request(space))
    raw.call(raw.data.OpenSession, pb.OpenSessionRequest(staging_bytes=1 << 20))
    checksums = [checksum(row) for row in rows]
    checksums[1] = bytes(16)
    put = pb.PutRequest(
        namespace=opened.namespace, keys=bytes(keys), checksums=b"".join(checksums), block_nbytes=BLOCK_NBYTES
    )
    chunks = iter([pb.StoreChunk(put=put), pb.StoreChunk(data=rows.tobytes())])
    reply = raw.call(raw.data.Store, chunks)
    assert list(reply.statuses) == [1, 3, 1]
    assert reply.reasons[1] == types_pb2.REJECT_REASON_CHECKSUM
    assert space.exists(keys) == [True, False, True]


def test_in_a_chain_what_follows_a_refused_block_has_no_parent(remote: Remote) -> None:
    space = namespace(remote.client(), "orphans")
    keys = chain(space, 300)
    outcomes = space.put(keys[1:], contents(keys[1:]), timeout_s=30)
    assert outcomes == [REJECTED(RejectReason.NO_PARENT)] * 299
    assert space.put(keys[:1], contents(keys[:1])) == [STORED]


def test_views_say_that_there_is_no_shared_memory_and_stage_copies(remote: Remote) -> None:
    space = namespace(remote.client(), "views")
    keys = chain(space, 2)
    with space.stage(2) as room:
        room.array[:] = contents(keys)
        assert room.put(keys) == [STORED] * 2
    with space.acquire(keys) as lease:
        for look in (lease.view, lease.tensors):
            with pytest.raises(InvalidRequest, match=r"need shared memory.*read_into\(\)"):
                look(0)
        lease.check()


def test_a_lease_is_handed_from_one_worker_to_another(remote: Remote) -> None:
    first, second = (namespace(remote.client(), "handed") for _ in range(2))
    keys = stored(first, 5)
    token = first.acquire(keys).handoff()
    out = np.zeros((5, BLOCK_NBYTES), np.uint8)
    with second.adopt(token) as lease:
        assert lease.read_into(out) == 5
    assert wrong(keys, out) == []


def test_leases_outlive_silence_and_end_with_their_session(start_remote: Start) -> None:
    remote = start_remote(lease_ttl_s=1.0)
    client = remote.client()
    space = namespace(client, "silence")
    keys = stored(space, 3)
    with space.acquire(keys) as lease:
        threading.Event().wait(3.0)  # three times what a lease lives without a sign of life
        assert lease.read_into(np.zeros((3, BLOCK_NBYTES), np.uint8)) == 3
    lease = space.acquire(keys)
    client.close()
    eventually(lambda: remote.daemon.stats().leases == 0, "the lease to end")
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((3, BLOCK_NBYTES), np.uint8))


def test_a_session_that_says_nothing_for_a_leases_time_is_over(start_remote: Start) -> None:
    remote = start_remote(lease_ttl_s=1.0)
    raw = remote.raw().hello("silent")
    raw.call(raw.data.Renew, pb.RenewRequest())
    with pytest.raises(grpc.RpcError) as ended:
        list(raw.hello_stream)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert code_of(lambda: raw.call(raw.data.Renew, pb.RenewRequest())) is grpc.StatusCode.UNAUTHENTICATED
    assert "no call for 1 s" in remote.daemon.log()


# Who is let in


def test_a_certificate_of_another_authority_gets_no_connection(remote: Remote) -> None:
    with pytest.raises(Unavailable):
        Client(f"tcp://{remote.target}", tls=remote.certificates.tls("red", foreign=True), name="never in")
    assert "never in" not in remote.daemon.log()
    assert "Handshake failed" not in remote.daemon.log(), "somebody unknown could fill the log"
    remote.client(name="once in").ping()
    assert "once in" in remote.daemon.log()


def test_a_daemon_of_another_authority_is_not_trusted(remote: Remote) -> None:
    with pytest.raises(Unavailable):
        Client(f"tcp://{remote.target}", tls=remote.certificates.tls("red", ca=remote.certificates.foreign.ca))


def test_a_daemon_must_be_the_one_that_was_called(remote: Remote) -> None:
    tls = remote.certificates.tls("red", server_name="another.test")
    with pytest.raises(Unavailable):
        Client(f"tcp://{remote.target}", tls=tls)


@pytest.mark.parametrize(
    ("who", "message"), [("stranger", "belong to no tenant"), ("both", "several identities")], ids=["unknown", "two"]
)
def test_a_certificate_without_one_tenant_is_refused(remote: Remote, who: str, message: str) -> None:
    with pytest.raises(PermissionDenied, match=message):
        remote.client(who)
    assert "a hello over TCP was refused" in remote.daemon.log()


def test_no_certificate_no_connection(remote: Remote) -> None:
    credentials = grpc.ssl_channel_credentials(remote.certificates.authority.ca.read_bytes())
    with grpc.secure_channel(remote.target, credentials) as channel:
        call = channel.unary_unary("/kvstore.v1.Admin/GetStats")
        assert code_of(lambda: call(b"", timeout=10)) is grpc.StatusCode.UNAVAILABLE


def test_plain_tcp_is_refused(remote: Remote) -> None:
    with grpc.insecure_channel(remote.target) as channel:
        call = channel.unary_unary("/kvstore.v1.Admin/GetStats")
        assert code_of(lambda: call(b"", timeout=10)) is grpc.StatusCode.UNAVAILABLE
    host, port = remote.target.split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64))
        raw.settimeout(10)
        assert hangs_up(raw)


def hangs_up(raw: socket.socket) -> bool:
    try:
        while raw.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("shown", ["w" * 64, None], ids=["wrong", "none"])
def test_a_token_that_is_none_is_refused_everywhere(start_remote: Start, shown: str | None) -> None:
    remote = start_remote(tokens=True)
    raw = remote.raw()
    raw.access = () if shown is None else (("kvstore-access-bin", shown.encode()),)
    assert code_of(raw.hello) is grpc.StatusCode.UNAUTHENTICATED
    good = remote.raw().hello()
    raw.metadata = (*raw.access, *(pair for pair in good.metadata if pair[0] == "kvstore-token"))
    for method, request in (
        (raw.data.Renew, pb.RenewRequest()),
        (raw.data.Match, pb.MatchRequest(namespace=bytes(32), keys=bytes(32))),
        (raw.data.Store, iter([pb.StoreChunk()])),
        (raw.admin.GetStats, admin_pb2.GetStatsRequest()),
        (raw.admin.Drain, admin_pb2.DrainRequest()),
    ):
        code = code_of(lambda: raw.call(method, request))  # noqa: B023 - called at once
        assert code is grpc.StatusCode.UNAUTHENTICATED
    fetch_call = raw.data.Fetch(pb.FetchRequest(lease_id=1), metadata=raw.metadata, timeout=10)
    assert code_of(lambda: next(fetch_call)) is grpc.StatusCode.UNAUTHENTICATED
    assert good.call(good.data.Renew, pb.RenewRequest()).leases == 0
    with pytest.raises(Unauthenticated):
        remote.client(token="w" * 64)


def test_the_session_of_another_tenant_is_of_no_use(remote: Remote) -> None:
    red, blue = remote.raw("red").hello(), remote.raw("blue").hello()
    blue.metadata = red.metadata
    assert code_of(lambda: blue.call(blue.data.Renew, pb.RenewRequest())) is grpc.StatusCode.UNAUTHENTICATED
    assert red.call(red.data.Renew, pb.RenewRequest()).leases == 0


def test_a_token_of_the_unix_socket_is_of_no_use_over_tcp_nor_the_other_way_round(remote: Remote) -> None:
    raw = remote.raw().hello()
    with AdminClient(remote.daemon.address) as near, grpc.insecure_channel(remote.daemon.address) as channel:
        over_tcp, mine = raw.metadata, (("kvstore-token", near.hello.token.hex()),)
        raw.metadata = mine
        assert code_of(lambda: raw.call(raw.data.Renew, pb.RenewRequest())) is grpc.StatusCode.UNAUTHENTICATED
        renew = channel.unary_unary("/kvstore.v1.KVStore/Renew")
        assert renew(b"", metadata=mine, timeout=10) == b""
        assert code_of(lambda: renew(b"", metadata=over_tcp, timeout=10)) is grpc.StatusCode.UNAUTHENTICATED


# Tenants apart


def test_tenants_never_meet(remote: Remote) -> None:
    red, blue = remote.client("red"), remote.client("blue")
    mine, theirs = namespace(red, "same"), namespace(blue, "same")
    keys = stored(mine, 10)
    assert theirs.digest != mine.digest
    assert theirs.match(bytes(keys)).blocks == 0
    assert theirs.match(chain(theirs, 10)).blocks == 0
    raw = remote.raw("blue").hello()
    for request, method in (
        (pb.MatchRequest(namespace=mine.digest, keys=bytes(keys)), raw.data.Match),
        (pb.ExistsRequest(namespace=mine.digest, keys=bytes(keys)), raw.data.Exists),
        (pb.PrefetchRequest(namespace=mine.digest, keys=bytes(keys)), raw.data.Prefetch),
        (pb.DeleteRequest(namespace=mine.digest, keys=bytes(keys)), raw.data.Delete),
        (pb.ClearRequest(namespace=mine.digest), raw.data.Clear),
        (pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=mine.digest, keys=bytes(keys))]), raw.data.Acquire),
    ):
        assert code_of(lambda: raw.call(method, request)) in (  # noqa: B023 - called at once
            grpc.StatusCode.PERMISSION_DENIED,
            grpc.StatusCode.NOT_FOUND,
        )
    assert fetch(mine, keys) == (10, [])


def test_a_lease_of_another_session_is_not_fetched(remote: Remote) -> None:
    space = namespace(remote.client("red"), "leases")
    keys = stored(space, 2)
    with space.acquire(keys) as lease:
        for who in ("red", "blue"):
            raw = remote.raw(who).hello()
            request = pb.FetchRequest(lease_id=lease._claim.lease_id, stop=2)
            call = raw.data.Fetch(request, metadata=raw.metadata, timeout=10)
            assert code_of(lambda: next(call)) is grpc.StatusCode.FAILED_PRECONDITION  # noqa: B023 - called at once


def test_handoff_ends_at_the_tenant(remote: Remote) -> None:
    red, blue = namespace(remote.client("red"), "given"), namespace(remote.client("blue"), "given")
    keys = stored(red, 2)
    token = red.acquire(keys).handoff()
    with pytest.raises(PermissionDenied):
        blue.adopt(token)


def test_a_worker_sees_its_own_tenants_figures_and_no_others(start_remote: Start) -> None:
    remote = start_remote()
    red, blue = remote.client("red"), remote.client("blue")
    space = namespace(red, "figures")
    keys = stored(space, 16)
    held = space.acquire(keys)
    mine, theirs = red.stats(), blue.stats()
    assert (mine["tiers"]["warm"]["used_bytes"], theirs["tiers"]["warm"]["used_bytes"]) == (16 * BLOCK_NBYTES, 0)
    assert (mine["namespaces"], theirs["namespaces"]) == (1, 0)
    assert (mine["leases"], theirs["leases"]) == (1, 0)
    assert mine["put_stored"] == theirs["put_stored"] == 0, "what the daemon counts in all is for admins"
    assert held.blocks == 16


# Admins


def test_admin_verbs_are_for_admins_and_each_leaves_a_line(start_remote: Start) -> None:
    remote = start_remote()
    worker, ops = remote.raw("red").hello(), remote.raw("ops").hello()
    verbs: list[tuple[str, Any]] = [
        ("ListNamespaces", admin_pb2.ListNamespacesRequest()),
        ("ListSessions", admin_pb2.ListSessionsRequest()),
        ("InspectBlock", admin_pb2.InspectBlockRequest(key=b"12345678")),
        ("Evict", admin_pb2.EvictRequest(tier=types_pb2.TIER_WARM, bytes=1)),
        ("Flush", admin_pb2.FlushRequest(timeout_ms=1)),
        ("Verify", admin_pb2.VerifyRequest(tier=types_pb2.TIER_WARM)),
        ("SetLogLevel", admin_pb2.SetLogLevelRequest(level="error")),
        ("Record", admin_pb2.RecordRequest()),
        ("Drain", admin_pb2.DrainRequest()),
    ]
    for name, request in verbs:
        code = code_of(lambda: worker.call(getattr(worker.admin, name), request))  # noqa: B023 - called at once
        assert code is grpc.StatusCode.PERMISSION_DENIED
    assert ops.call(ops.admin.GetStats, admin_pb2.GetStatsRequest()).health == "serving", "nothing was drained"
    for name, request in verbs:
        ops.call(getattr(ops.admin, name), request)
    assert ops.call(ops.admin.GetStats, admin_pb2.GetStatsRequest()).health == "draining"
    lines = [line for line in remote.daemon.log().splitlines() if " kvstore.audit " in line]
    for name, _ in verbs:
        assert any(f"admin call {name} over TCP refused: identity='spiffe://test/red'" in line for line in lines)
        assert any(f"admin call {name} over TCP allowed: identity='spiffe://test/ops'" in line for line in lines)


def test_an_admin_inspects_its_own_tenant_only(remote: Remote) -> None:
    blue = namespace(remote.client("blue"), "inspected")
    keys = stored(blue, 1)
    ops = remote.raw("ops").hello()
    found = ops.call(ops.admin.InspectBlock, admin_pb2.InspectBlockRequest(key=bytes(keys)))
    assert not found.blocks
    spaces = ops.call(ops.admin.ListNamespaces, admin_pb2.ListNamespacesRequest()).namespaces
    assert blue.digest not in [space.namespace for space in spaces]
    sessions = ops.call(ops.admin.ListSessions, admin_pb2.ListSessionsRequest()).sessions
    assert {session.tenant for session in sessions} == {"red"}


# Bounds, and mistakes


def test_what_needs_shared_memory_says_what_to_use(remote: Remote) -> None:
    raw = remote.raw().hello()
    for method, request, instead in (
        (raw.data.MapSlabs, pb.MapSlabsRequest(slab_ids=[0]), "use Fetch"),
        (raw.data.Put, pb.PutRequest(), "use Store"),
    ):
        with pytest.raises(grpc.RpcError, match=instead) as caught:
            raw.call(method, request)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_nothing_answers_somebody_unknown(remote: Remote) -> None:
    raw = remote.raw()
    for service in ("grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
        call = raw.channel.unary_unary(f"/{service}")
        assert code_of(lambda: call(b"", timeout=10)) is grpc.StatusCode.UNIMPLEMENTED  # noqa: B023 - called at once


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "the stream has no message"),
        ([pb.StoreChunk(data=b"x")], "namespace has 0 bytes"),
        ([b"\xff\xff"], "no protobuf message"),
        (["put without checksums"], "bytes of checksums"),
        (["put"], "the stream ended 65536 bytes before the end"),
        (["put", pb.StoreChunk(data=b"x" * 100)], "the stream ended 65436 bytes before the end"),
        (["put", pb.StoreChunk(data=bytes((2 << 20) + 1))], "after the first each has 1 to 2097152"),
        (["put", "put"], "and nothing else"),
        (["put", pb.StoreChunk()], "0 bytes of data"),
        (["put of an unknown namespace"], "call OpenNamespace first"),
        (["put of other blocks"], "blocks of 128 bytes were put"),
    ],
)
def test_a_store_that_is_none_is_refused_and_leaves_nothing(remote: Remote, chunks: list[Any], message: str) -> None:
    space = namespace(remote.client(), f"mistakes: {message}")
    raw = remote.raw().hello()
    raw.call(raw.data.OpenNamespace, open_request(space))
    raw.call(raw.data.OpenSession, pb.OpenSessionRequest(staging_bytes=1 << 20))
    keys = chain(space, 1)
    put = pb.PutRequest(namespace=space.digest, keys=bytes(keys), checksums=bytes(16), block_nbytes=BLOCK_NBYTES)
    named = {
        "put": put,
        "put without checksums": changed(put, checksums=b""),
        "put of an unknown namespace": changed(put, namespace=bytes(32)),
        "put of other blocks": changed(put, block_nbytes=128),
    }
    made = [pb.StoreChunk(put=named[chunk]) if isinstance(chunk, str) else chunk for chunk in chunks]
    if "put of other blocks" in chunks:
        made.append(pb.StoreChunk(data=bytes(128)))
    raw_messages = [each if isinstance(each, bytes) else each.SerializeToString() for each in made]
    store = raw.channel.stream_unary("/kvstore.v1.KVStore/Store")
    with pytest.raises(grpc.RpcError, match=message):
        raw.call(store, iter(raw_messages))
    assert space.exists(keys) == [False]
    good = contents(keys)
    put.checksums = checksum(good[0])
    reply = raw.call(raw.data.Store, iter([pb.StoreChunk(put=put), pb.StoreChunk(data=good.tobytes())]))
    assert list(reply.statuses) == [1], "the session is as good as before"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lease_id": 0}, "lease_id is 0"),
        ({"lease_id": 1 << 40}, "is none of this session"),
        ({"group": 1}, "the lease has 1"),
        ({"stop": 4}, r"the lease has \[0, 3\)"),
        ({"start": 3, "stop": 2}, r"blocks \[3, 2\)"),
        ({"start": (1 << 64) - 1}, "were asked for"),
    ],
)
def test_a_fetch_that_asks_for_what_is_not_leased(remote: Remote, change: dict[str, int], message: str) -> None:
    space = namespace(remote.client(), f"ranges: {message}")
    keys = stored(space, 3)
    raw = remote.raw().hello()
    lease = raw.call(
        raw.data.Acquire, pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=space.digest, keys=bytes(keys))])
    )
    request = pb.FetchRequest(**{"lease_id": lease.lease_id, "start": 0, "stop": 3, **change})
    with pytest.raises(grpc.RpcError, match=message):
        list(raw.data.Fetch(request, metadata=raw.metadata, timeout=10))
    whole = pb.FetchRequest(lease_id=lease.lease_id, stop=3)
    chunks = list(raw.data.Fetch(whole, metadata=raw.metadata, timeout=10))
    assert [(chunk.block, chunk.offset, len(chunk.checksum)) for chunk in chunks] == [(i, 0, 16) for i in range(3)]
    assert all(chunk.data == content(key, BLOCK_NBYTES).tobytes() for chunk, key in zip(chunks, keys, strict=True))


def test_leases_over_tcp_have_a_limit(remote: Remote) -> None:
    space = namespace(remote.client(), "many")
    keys = stored(space, 1)
    leases = [space.acquire(keys, timeout_s=10) for _ in range(256)]
    with pytest.raises(QuotaExceeded, match="release some"):
        space.acquire(keys, timeout_s=10)
    leases[0].release()  # over gRPC calls overtake each other
    eventually(lambda: accepts(space, keys), "the release to arrive")


def accepts(space: Namespace, keys: Keys) -> bool:
    try:
        return space.acquire(keys, timeout_s=10).blocks == 1
    except QuotaExceeded:
        return False


def test_a_block_above_the_staging_says_so(remote: Remote) -> None:
    space = namespace(remote.client(staging_bytes=1 << 20), "large", 2 << 20)
    keys = chain(space, 1)
    with pytest.raises(QuotaExceeded, match="does not fit into the 1048576 bytes of staging"):
        space.put(keys, contents(keys, 2 << 20))


def test_what_is_not_open_is_a_miss_for_a_fail_open_client(remote: Remote) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        tls = remote.certificates.tls("red")
        with pytest.raises((Unavailable, DeadlineExceeded)):
            Client(address, tls=tls)
        with Client(address, tls=tls, fail_open=True) as client:
            space = namespace(client, "miss")
            keys = chain(space, 2)
            assert space.match(keys).blocks == 0
            assert space.put(keys, contents(keys)) == [REJECTED(RejectReason.UNAVAILABLE)] * 2


def test_unknown_namespaces_and_protocols(remote: Remote) -> None:
    raw = remote.raw()
    assert code_of(lambda: raw.hello(version=9)) is grpc.StatusCode.UNIMPLEMENTED
    assert code_of(lambda: raw.hello(name="n" * 129)) is grpc.StatusCode.INVALID_ARGUMENT
    known = raw.hello()
    unknown = pb.MatchRequest(namespace=bytes(32), keys=bytes(32))
    assert code_of(lambda: known.call(known.data.Match, unknown)) is grpc.StatusCode.NOT_FOUND


def open_request(space: Any) -> pb.OpenNamespaceRequest:
    return pb.OpenNamespaceRequest(spec=convert.to_proto(space.spec))


def checksum(row: Any) -> bytes:
    return xxhash.xxh3_128(row.tobytes()).digest()


def changed(put: pb.PutRequest, **fields: Any) -> pb.PutRequest:
    made = pb.PutRequest()
    made.CopyFrom(put)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


# The daemon itself


@pytest.mark.parametrize(
    ("host", "settings", "code", "message"),
    [
        ("127.0.0.1", "", 2, "a TCP listener needs to know its clients, on loopback too"),
        ("0.0.0.0", "token", 2, "tokens would cross the network in the clear"),
        ("127.0.0.1", "short token", 2, "holds 31 bytes; a token has 32"),
        ("127.0.0.1", "taken", 1, "could not listen on 127.0.0.1"),
        ("127.0.0.1", "no key", 1, "could not listen on 127.0.0.1"),
    ],
)
def test_a_listener_that_cannot_be_ends_the_start(
    tmp_path: Path, certificates: Certificates, host: str, settings: str, code: int, message: str
) -> None:
    lines = [f'state_dir = "{tmp_path}/s"', f'socket = "{tmp_path}/k"', 'warm_bytes = "64MiB"', "cold_bytes = 0"]
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("t" * (31 if settings == "short token" else 32))
    if settings in ("token", "short token", "taken"):
        lines.append(f'tenants.red.token_file = "{token}"')
    if settings == "no key":
        (tmp_path / "key").touch(mode=0o600)
        (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY-----\nbm90aGluZw==\n-----END PRIVATE KEY-----\n")
        wanted = {**certificates.settings(), "tls_key": str(tmp_path / "key")}
        lines += [f'{key} = "{wanted[key]}"' for key in ("tls_certificate", "tls_key", "tls_client_ca")]
        lines.append('tenants.red.sans = ["red"]')
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1] if settings == "taken" else 0
        (tmp_path / "c.toml").write_text("\n".join([*lines, f'listen = "{host}:{port}"']))
        command = [sys.executable, "-m", "kvstore.cli.kvstored", "--config", str(tmp_path / "c.toml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "k").exists()


def test_the_listener_can_be_a_flag(start_remote: Start) -> None:
    remote = start_remote()
    config = str(remote.daemon.folder / "kvstored.toml")
    command = [sys.executable, "-m", "kvstore.cli.kvstored", "--config", config, "--listen", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "--listen: 'nowhere' is not HOST:PORT" in done.stderr) == (2, True)
