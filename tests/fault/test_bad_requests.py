"""Requests that cannot be right: a clear error that names the fault, nothing lost, the daemon alive."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from daemon_process import DaemonProcess
from derived import BLOCK_NBYTES, BLOCK_TOKENS, chain, contents, fetch, layout_of, namespace
from kvstore.protocol import convert
from kvstore.protocol.errors import KVStoreError, ProtocolMismatch, QuotaExceeded, Unauthenticated, Unavailable
from kvstore.protocol.frames import HEADER, MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, PROTOCOL_VERSION, Method
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import admin_pb2, types_pb2
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import (
    STORED,
    Client,
    InvalidRequest,
    Keys,
    KVLayout,
    LeaseExpired,
    Namespace,
    NotFound,
    PermissionDenied,
    TensorSpec,
)
from polling import eventually
from raw_session import RawSession, connect

BLOCKS = 8
KEY = bytes(range(32))


@pytest.fixture
def client(served: DaemonProcess, transport: str) -> Iterator[Client]:
    with Client(served.address, transport=transport, staging_bytes=8 << 20) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture
def space(client: Client, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """A namespace with a stored prefix, which is whole afterwards whatever the test has asked for."""
    made = namespace(client, request.node.name)
    keys = chain(made, BLOCKS)
    assert made.put(keys, contents(keys)) == [STORED] * BLOCKS
    yield made
    assert fetch(made, keys) == (BLOCKS, [])
    assert made.match(chain(made, BLOCKS + 1)).blocks == BLOCKS


@pytest.fixture
def raw(served: DaemonProcess, transport: str) -> Iterator[RawSession]:
    with RawSession(served.address, transport, staging_bytes=8 << 20) as made:
        yield made


@pytest.fixture(autouse=True)
def serves_on(served: DaemonProcess) -> Iterator[None]:
    """After every test of this file: alive, nothing held, nothing half done."""
    yield
    eventually(lambda: served.stats().sessions <= 1, "the test's sessions to end")
    stats = served.stats()
    assert (stats.health, stats.leases, stats.staging_bytes) == ("serving", 0, 0)
    assert stats.counters["slots_filling"] == 0


# -- what the client library refuses by itself


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (np.zeros((BLOCKS, BLOCK_NBYTES // 2), np.uint8), "32768 bytes a block; a block of this namespace has 65536"),
        (np.zeros((BLOCKS, 2 * BLOCK_NBYTES), np.uint8), "131072 bytes a block; a block of this namespace has 65536"),
        (np.zeros(BLOCKS * BLOCK_NBYTES - 1, np.uint8), "524287 bytes, not a multiple of a block's 65536"),
        (np.zeros((BLOCKS, BLOCK_NBYTES // 8), np.float64), "dtype float64, the layout bfloat16"),
        (np.zeros((BLOCKS + 1, BLOCK_NBYTES), np.uint8), "holds 9 blocks; it must hold 8"),
        (np.zeros((BLOCKS - 1, BLOCK_NBYTES), np.uint8), "holds 7 blocks; it must hold 8"),
        ([bytes(BLOCK_NBYTES)] * (BLOCKS + 1), "holds 9 blocks; it must hold 8"),
        ([bytes(BLOCK_NBYTES)] * (BLOCKS - 1) + [bytes(5)], re.escape("blocks[7] has 5 bytes; a block of")),
        ([object()] * BLOCKS, "not a contiguous buffer"),
        (np.zeros((BLOCKS, 2 * BLOCK_NBYTES), np.uint8)[:, ::2], "not contiguous"),
    ],
    ids=["half", "double", "ragged", "dtype", "more", "fewer", "more of a list", "one short", "no buffer", "strided"],
)
def test_blocks_that_do_not_fit(space: Namespace, blocks: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        space.put(chain(space, BLOCKS, seed=1), blocks)
    assert not any(space.exists(chain(space, BLOCKS, seed=1)))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (np.zeros((BLOCKS, BLOCK_NBYTES // 2), np.uint8), "a block of this namespace has 65536"),
        (np.zeros((BLOCKS - 1, BLOCK_NBYTES), np.uint8), "holds 7 blocks; it must hold at least 8"),
        (np.zeros((BLOCKS, BLOCK_NBYTES // 8), np.float64), "dtype float64, the layout bfloat16"),
        (bytes(BLOCKS * BLOCK_NBYTES), "read-only"),
    ],
    ids=["half", "fewer", "dtype", "read-only"],
)
def test_memory_that_blocks_do_not_fit_into(space: Namespace, out: object, message: str) -> None:
    with space.acquire(chain(space, BLOCKS)) as lease, pytest.raises(InvalidRequest, match=message):
        lease.read_into(out)


@pytest.mark.parametrize("call", ["match", "exists", "acquire", "prefetch", "delete"])
def test_keys_that_are_not_whole(space: Namespace, call: str) -> None:
    with pytest.raises(InvalidRequest, match="33 bytes are not a whole number of keys of 32 bytes"):
        getattr(space, call)(bytes(33))
    with pytest.raises(InvalidRequest, match="65537 keys in one call; the limit is 65536"):
        getattr(space, call)(bytes(32 * 65537))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "x" * (64 << 10)}, "model.*65536 bytes.*1024"),
        ({"model": "a\0b"}, "model.*NUL"),
        ({"model": ""}, "model"),
        ({"revision": "r" * 1025}, "revision.*1025 bytes.*1024"),
        ({"salt": "\0"}, "salt.*NUL"),
        ({"identity": {"k" * (64 << 10): "v"}}, "identity.*65536 bytes"),
        ({"identity": {"k": "v\0"}}, "identity.*NUL"),
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_tokens": 65537}, "block_tokens is 65537"),
        ({"kind": "tree"}, "kind.*tree"),
        ({"shard": {"tp": (2, 2)}}, "shard.*tp"),
        ({"hash_algorithm": "md5"}, "hash_algorithm.*md5"),
        ({"layout": layout_of(256 << 20)}, "does not fit the warm tier"),
        ({"colour": "red"}, "colour"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_namespace_that_cannot_be(client: Client, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        namespace(client, **{"model": "m", **fields})  # type: ignore[arg-type]
    assert len(str(caught.value)) < 1000, "an error must not repeat 64 KiB"


@pytest.mark.parametrize("dtype", ["bfloat17", "float128", "", "object"])
def test_a_dtype_that_nobody_knows(dtype: str) -> None:
    with pytest.raises(InvalidRequest, match="dtype"):
        KVLayout([TensorSpec("kv", dtype, (2, 16), "kv token")])


# -- what only the daemon can refuse


def spec(**changed: object) -> pb.OpenNamespaceRequest:
    """An OpenNamespace as the library would send it, then changed behind its back."""
    good = NamespaceSpec(
        model="raw", revision="1", block_tokens=BLOCK_TOKENS, kind="chain", layout=layout_of(BLOCK_NBYTES), shard="all"
    )
    message = convert.to_proto(good)
    for name, value in changed.items():
        setattr(message, name, value)
    return pb.OpenNamespaceRequest(spec=message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "x" * (64 << 10)}, "model.*65536 bytes.*1024"),
        ({"model": "a\0b"}, "model.*NUL"),
        ({"revision": "r" * (64 << 10)}, "revision.*65536 bytes"),
        ({"block_tokens": 1 << 40}, "block_tokens"),
        ({"hash_algorithm": "md5"}, "hash_algorithm.*md5"),
    ],
    ids=["64 KiB", "NUL", "revision", "block_tokens", "hash"],
)
def test_the_daemon_checks_names_itself(raw: RawSession, changed: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        raw.call("OpenNamespace", spec(**changed))


def key_calls(digest: bytes, keys: bytes) -> dict[str, object]:
    """Every call that takes keys."""
    return {
        "Match": pb.MatchRequest(namespace=digest, keys=keys),
        "Exists": pb.ExistsRequest(namespace=digest, keys=keys),
        "Acquire": pb.AcquireRequest(groups=[pb.AcquireGroup(namespace=digest, keys=keys, mode=1)]),
        "Put": pb.PutRequest(namespace=digest, keys=keys, block_nbytes=BLOCK_NBYTES),
        "Prefetch": pb.PrefetchRequest(namespace=digest, keys=keys),
        "Delete": pb.DeleteRequest(namespace=digest, keys=keys),
    }


KEY_CALLS = sorted(key_calls(b"", b""))


@pytest.mark.parametrize("name", KEY_CALLS)
def test_the_daemon_checks_keys_itself(raw: RawSession, name: str) -> None:
    opened = raw.call("OpenNamespace", spec())
    with pytest.raises(InvalidRequest, match="keys has 33 bytes; it must be a multiple of 32"):
        raw.call(name, key_calls(opened.namespace, bytes(33))[name])


@pytest.mark.parametrize("name", [*KEY_CALLS, "Clear"])
def test_an_unknown_namespace(raw: RawSession, name: str) -> None:
    unknown, short = bytes(32), bytes(31)
    calls = {"Clear": pb.ClearRequest(namespace=unknown), **key_calls(unknown, KEY)}
    with pytest.raises(NotFound, match="unknown namespace 0000"):
        raw.call(name, calls[name])
    calls = {"Clear": pb.ClearRequest(namespace=short), **key_calls(short, KEY)}
    with pytest.raises(InvalidRequest, match="namespace has 31 bytes"):
        raw.call(name, calls[name])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_nbytes": 2 * BLOCK_NBYTES}, "blocks of 131072 bytes were put; this namespace has blocks of 65536"),
        ({"block_nbytes": 0}, "block_nbytes is 0"),
        ({"parent": bytes(31)}, "parent has 31 bytes"),
        ({"checksums": bytes(15)}, "checksums has 15 bytes for 1 keys"),
        ({"staging_offset": 1 << 62}, "which no segment has"),
        ({"staging_offset": (8 << 20) - 1}, "do not fit a staging segment of 8388608 bytes"),
        ({"keys": KEY * 200}, "do not fit a staging segment"),
        ({"staging_stride": 1}, "blocks overlap"),
        ({"staging_stride": (1 << 64) - 1, "keys": KEY * 2}, "which no segment has"),
    ],
    ids=["size", "no size", "parent", "checksums", "far", "end", "many", "overlap", "stride"],
)
def test_a_put_that_cannot_be(raw: RawSession, changed: dict[str, object], message: str) -> None:
    opened = raw.call("OpenNamespace", spec())
    fields = {"namespace": opened.namespace, "keys": KEY, "block_nbytes": BLOCK_NBYTES, **changed}
    with pytest.raises(InvalidRequest, match=message):
        raw.call("Put", pb.PutRequest(**fields))  # type: ignore[arg-type]
    assert raw.call("Exists", pb.ExistsRequest(namespace=opened.namespace, keys=KEY)).bits == b"\0"


def test_a_put_whose_bytes_are_not_those_of_its_checksum(raw: RawSession) -> None:
    opened = raw.call("OpenNamespace", spec())
    request = pb.PutRequest(
        namespace=opened.namespace, keys=KEY, block_nbytes=BLOCK_NBYTES, checksums=b"0123456789abcdef"
    )
    reply = raw.call("Put", request)
    assert (reply.statuses, reply.reasons) == (bytes([types_pb2.PUT_STATUS_REJECTED]), bytes([5]))
    assert raw.call("Exists", pb.ExistsRequest(namespace=opened.namespace, keys=KEY)).bits == b"\0"


def test_a_put_without_staging(served: DaemonProcess, transport: str) -> None:
    with RawSession(served.address, transport) as raw:
        opened = raw.call("OpenNamespace", spec())
        with pytest.raises(InvalidRequest, match="the session has no staging segment"):
            raw.call("Put", pb.PutRequest(namespace=opened.namespace, keys=KEY, block_nbytes=BLOCK_NBYTES))


def test_a_client_without_staging_cannot_put(served: DaemonProcess, transport: str) -> None:
    with Client(served.address, transport=transport, staging_bytes=0) as client:  # type: ignore[arg-type]
        space = namespace(client, "no-staging")
        with pytest.raises(QuotaExceeded, match="does not fit into the 0 bytes of staging"):
            space.put(chain(space, 1), np.zeros((1, BLOCK_NBYTES), np.uint8))


def test_slabs_that_do_not_exist_are_not_mapped(served: DaemonProcess) -> None:
    with RawSession(served.address) as raw:
        reply = raw.call("MapSlabs", pb.MapSlabsRequest(slab_ids=[0, 99, 1 << 31]))
        assert not reply.slabs
        for ids in ([], range(251)):
            with pytest.raises(InvalidRequest, match=r"slab_ids names \d+ slabs"):
                raw.call("MapSlabs", pb.MapSlabsRequest(slab_ids=ids))


@pytest.mark.parametrize(
    ("name", "message"),
    [("Evict", "tier"), ("Verify", "tier"), ("InspectBlock", "key"), ("SetLogLevel", "loud")],
)
def test_admin_calls_that_cannot_be(served: DaemonProcess, name: str, message: str) -> None:
    requests: dict[str, object] = {
        "Evict": admin_pb2.EvictRequest(tier=9, bytes=1),  # type: ignore[arg-type]
        "Verify": admin_pb2.VerifyRequest(tier=0),  # type: ignore[arg-type]
        "InspectBlock": admin_pb2.InspectBlockRequest(key=b"ab"),
        "SetLogLevel": admin_pb2.SetLogLevelRequest(level="loud"),
    }
    with pytest.raises(KVStoreError, match=message):
        served.ask(name, requests[name])


# -- leases that are not the caller's


def test_a_lease_that_never_was(raw: RawSession) -> None:
    for name, request in lease_calls(0).items():
        with pytest.raises(InvalidRequest, match="lease_id is 0"):
            raw.call(name, request)
    for name, request in lease_calls(1 << 60).items():
        if name == "Release":
            raw.call(name, request)  # to release what has ended is no error
        else:
            with pytest.raises((LeaseExpired, NotFound), match="has ended"):
                raw.call(name, request)


def test_a_foreign_lease(space: Namespace, served: DaemonProcess, raw: RawSession) -> None:
    with RawSession(served.address) as holder:
        group = pb.AcquireGroup(namespace=space.digest, keys=bytes(chain(space, BLOCKS)), mode=1)
        lease = holder.call("Acquire", pb.AcquireRequest(groups=[group])).lease_id
        for name, request in lease_calls(lease).items():
            with pytest.raises(PermissionDenied, match=f"lease {lease} belongs to another session"):
                raw.call(name, request)
        assert holder.call("Wait", pb.WaitRequest(lease_id=lease, stop=BLOCKS)).ready == BLOCKS
        holder.call("Release", pb.ReleaseRequest(lease_id=lease))


def lease_calls(lease_id: int) -> dict[str, object]:
    return {
        "Wait": pb.WaitRequest(lease_id=lease_id, stop=1),
        "Release": pb.ReleaseRequest(lease_id=lease_id),
        "Handoff": pb.HandoffRequest(lease_id=lease_id),
    }


def test_a_token_that_was_never_given(raw: RawSession) -> None:
    for token in (b"", bytes(257)):
        with pytest.raises(InvalidRequest, match="token has"):
            raw.call("Adopt", pb.AdoptRequest(token=token))
    with pytest.raises(NotFound, match="no lease is offered"):
        raw.call("Adopt", pb.AdoptRequest(token=bytes(16)))


# -- calls without a token


ONLY_OVER_TCP = [f"/kvstore.v1.KVStore/{name}" for name in ("Hello", "Fetch", "Store")]


def every_rpc() -> list[str]:
    services = (pb.DESCRIPTOR.services_by_name["KVStore"], admin_pb2.DESCRIPTOR.services_by_name["Admin"])
    paths = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    return [path for path in paths if path not in ONLY_OVER_TCP]


@pytest.mark.parametrize("path", every_rpc())
def test_a_call_without_a_token(served: DaemonProcess, path: str) -> None:
    with RawSession(served.address) as ended:
        token = ended.hello.token.hex()
    eventually(lambda: served.stats().sessions <= 1, "the session to end")
    with grpc.insecure_channel(served.address) as channel:
        call: Callable[..., bytes] = channel.unary_unary(path)
        for metadata in ([], [("kvstore-token", "")], [("kvstore-token", "ab" * 32)], [("kvstore-token", token)]):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "token" in caught.value.details()


@pytest.mark.parametrize("path", ONLY_OVER_TCP)
def test_what_is_for_tcp_is_not_on_the_unix_socket(served: DaemonProcess, path: str) -> None:
    with RawSession(served.address) as raw, grpc.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=10, metadata=[("kvstore-token", raw.hello.token.hex())])
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# -- frames that are none


def hello(version: int = PROTOCOL_VERSION, name: str = "x") -> bytes:
    return pb.HelloRequest(protocol_version=version, client_name=name).SerializeToString()


@pytest.mark.parametrize(
    ("method", "payload", "kind", "message"),
    [
        (Method.MATCH, b"", Unauthenticated, "the first frame must be a HELLO"),
        (Method.HELLO, hello(99), ProtocolMismatch, "the client speaks protocol 99 and this daemon 1"),
        (Method.HELLO, b"\xff\xff\xff", InvalidRequest, "no HelloRequest"),
        (Method.HELLO, hello(name="n" * 129), InvalidRequest, "client_name has 129 bytes"),
    ],
    ids=["no hello", "version", "garbage", "name"],
)
def test_a_first_frame_that_is_refused(
    served: DaemonProcess, method: int, payload: bytes, kind: type[KVStoreError], message: str
) -> None:
    frames = connect(served.address)
    try:
        frames.send(1, method, payload)
        reply = frames.recv()
        assert reply.status == kind.code
        assert message in reply.payload.decode()
        with pytest.raises(Unavailable):
            frames.recv()
    finally:
        frames.close()


@pytest.mark.parametrize("name", ["OpenSession", "Match", "Put", "Acquire"])
def test_a_payload_that_is_no_message(served: DaemonProcess, name: str) -> None:
    with RawSession(served.address) as raw:
        with pytest.raises(InvalidRequest):
            raw.frame(Method[{"OpenSession": "OPEN_SESSION"}.get(name, name.upper())], b"\xff\xff\xff\xff")
        assert raw.call("Renew", pb.RenewRequest()).leases == 0, "the session goes on"


def test_frames_that_are_refused_and_the_session_goes_on(served: DaemonProcess) -> None:
    with RawSession(served.address) as raw:
        with pytest.raises(ProtocolMismatch, match="method 77 is unknown"):
            raw.frame(77, b"")
        with pytest.raises(InvalidRequest, match="status is 3; it must be 0"):
            raw.frame(Method.RENEW, pb.RenewRequest(), status=3)
        with pytest.raises(InvalidRequest, match="said hello already"):
            raw.frame(Method.HELLO, hello())
        assert raw.call("Renew", pb.RenewRequest()).leases == 0


def test_a_frame_that_is_too_long_ends_the_session_alone(space: Namespace, served: DaemonProcess) -> None:
    with RawSession(served.address) as raw:
        raw.frames.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 5, Method.MATCH, 0, 0))
        reply = raw.frames.recv()
        assert (reply.call_id, reply.status) == (5, InvalidRequest.code)
        assert f"above the limit of {MAX_PAYLOAD_BYTES}" in reply.payload.decode()
        with pytest.raises(Unavailable):
            raw.frames.recv()
    assert fetch(space, chain(space, BLOCKS)) == (BLOCKS, [])


def test_half_a_frame_and_then_nothing(space: Namespace, served: DaemonProcess) -> None:
    """Regression: a silent peer must hold up nobody but itself, and be gone when its connection is."""
    with RawSession(served.address) as raw:
        raw.frames.sock.sendall(HEADER.pack(1000, 5, Method.PUT, 0, 0) + b"half")
        assert fetch(space, chain(space, BLOCKS)) == (BLOCKS, [])
    eventually(lambda: served.stats().sessions == 2, "its session to end")


def test_more_calls_in_flight_than_a_session_may_have(space: Namespace, served: DaemonProcess) -> None:
    """Waits that find nothing to wait for are answered; the sixty-fifth that has to wait is refused."""
    del space
    with RawSession(served.address, staging_bytes=1 << 20) as raw:
        opened = raw.call("OpenNamespace", spec())
        request = pb.PutRequest(namespace=opened.namespace, keys=KEY, block_nbytes=BLOCK_NBYTES)
        sent = [raw.send(Method.PUT, request) for _ in range(4 * MAX_CALLS_IN_FLIGHT)]
        replies = [raw.frames.recv() for _ in sent]
        assert sorted(reply.call_id for reply in replies) == sent
        refused = [reply for reply in replies if reply.status]
        assert {reply.status for reply in refused} <= {QuotaExceeded.code}
        assert all("64 calls of this session are in flight" in reply.payload.decode() for reply in refused)
        assert raw.call("Delete", pb.DeleteRequest(namespace=opened.namespace, keys=KEY)).deleted == 1


def test_a_key_that_is_not_the_chains_is_just_a_key(space: Namespace) -> None:
    """Keys are names: the daemon cannot check them, and an odd order finds no more than what is stored."""
    keys = chain(space, BLOCKS)
    shuffled = Keys.from_bytes(b"".join(keys[at] for at in (3, 1, 0, 2)))
    assert space.match(shuffled).blocks <= 4
    count, bad = fetch(space, shuffled)
    assert (count <= 4, bad) == (True, [])
