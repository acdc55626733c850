"""Clients over TCP that vanish, stall, flood or do not read, and a daemon that goes away under them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import xxhash

from derived import chain, contents, fetch, namespace, wrong
from kvstore.protocol import convert
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import (
    EXISTS,
    REJECTED,
    STORED,
    DeadlineExceeded,
    InternalError,
    Keys,
    KVStoreError,
    LeaseExpired,
    Namespace,
    PutStatus,
    RejectReason,
    Unavailable,
)
from polling import eventually
from remote_fixtures import RawRemote, Remote

Start = Callable[..., Remote]

BIG = 2 << 20


def stored(space: Namespace, count: int, seed: int = 0) -> Keys:
    keys = chain(space, count, seed)
    assert space.put(keys, contents(keys, space.block_nbytes), timeout_s=30) == [STORED] * count
    return keys


def storing(raw: RawRemote, space: Namespace, keys: Keys) -> pb.StoreChunk:
    """A session made ready to store, and the first message of the Store."""
    raw.call(raw.data.OpenNamespace, pb.OpenNamespaceRequest(spec=convert.to_proto(space.spec)))
    raw.call(raw.data.OpenSession, pb.OpenSessionRequest(staging_bytes=16 << 20))
    checksums = [xxhash.xxh3_128(row.tobytes()).digest() for row in contents(keys, space.block_nbytes)]
    put = pb.PutRequest(
        namespace=space.digest, keys=bytes(keys), checksums=b"".join(checksums), block_nbytes=space.block_nbytes
    )
    return pb.StoreChunk(put=put)


@pytest.mark.parametrize("whole", [0, 3, 7], ids=["in the first block", "in the fourth", "after a window"])
def test_a_client_that_vanishes_in_mid_store_leaves_nothing_behind(start_remote: Start, whole: int) -> None:
    remote = start_remote()
    space = namespace(remote.client("red"), "vanished", BIG)
    keys = chain(space, 8)
    before = remote.daemon.stats().staging_bytes
    raw = remote.raw().hello()
    first = storing(raw, space, keys)
    assert remote.daemon.stats().staging_bytes == before + (16 << 20)
    rows = contents(keys, BIG)
    sent = threading.Event()

    def messages() -> Iterator[pb.StoreChunk]:
        yield first
        for row in rows[:whole]:
            yield pb.StoreChunk(data=row.tobytes())
        yield pb.StoreChunk(data=rows[whole].tobytes()[: BIG // 2])
        sent.set()
        threading.Event().wait(3)  # and then nothing, until the channel is closed

    call = raw.data.Store.future(messages(), metadata=raw.metadata, timeout=60)
    assert sent.wait(20)
    raw.channel.close()
    eventually(lambda: remote.daemon.stats().staging_bytes == before, "the staging to be given back")
    assert call.code() is grpc.StatusCode.CANCELLED
    found = space.match(keys, timeout_s=10).blocks
    assert found <= whole, "no block that had not come whole"
    assert found in (0, 4), "a window of four is put together, or not at all"
    assert fetch(space, keys)[1] == []
    assert space.put(keys, rows, timeout_s=30) == [EXISTS] * found + [STORED] * (8 - found)
    assert fetch(space, keys) == (8, [])
    assert remote.daemon.stats().quarantined_bytes == 0


def test_a_reader_that_never_reads_is_cut_off_and_others_are_served(start_remote: Start) -> None:
    remote = start_remote(warm_bytes="256MiB")
    space = namespace(remote.client("red"), "unread", BIG)
    keys = stored(space, 48)
    raw = remote.raw().hello()
    group = pb.AcquireGroup(namespace=space.digest, keys=bytes(keys))
    lease = raw.call(raw.data.Acquire, pb.AcquireRequest(groups=[group]))
    request = pb.FetchRequest(lease_id=lease.lease_id, stop=48)
    calls = [raw.data.Fetch(request, metadata=raw.metadata, timeout=300) for _ in range(4)]  # all a session may have
    eventually(lambda: code_of_first(raw, request) is grpc.StatusCode.RESOURCE_EXHAUSTED, "the fifth to be refused")
    assert fetch(space, keys) == (48, []), "another session is not concerned"
    eventually(lambda: remote.daemon.log().count("Fetch was cut off") == 4, "the four to be cut off")
    assert list(raw.data.Fetch(request, metadata=raw.metadata, timeout=60))[-1].block == 47, "their places are free"
    for call in calls:
        with pytest.raises(grpc.RpcError):
            list(call)


def code_of_first(raw: RawRemote, request: pb.FetchRequest) -> grpc.StatusCode | None:
    try:
        next(raw.data.Fetch(request, metadata=raw.metadata, timeout=10))
    except grpc.RpcError as error:
        return error.code()  # type: ignore[no-any-return]
    return None


def test_a_writer_that_stalls_is_cut_off(start_remote: Start) -> None:
    remote = start_remote()
    space = namespace(remote.client("red"), "stalled")
    keys = chain(space, 4)
    raw = remote.raw().hello()
    first = storing(raw, space, keys)
    release = threading.Event()

    def messages() -> Iterator[pb.StoreChunk]:
        yield first
        release.wait(60)

    call = raw.data.Store.future(messages(), metadata=raw.metadata, timeout=300)
    try:
        with pytest.raises(grpc.RpcError):
            call.result(timeout=30)
    finally:
        release.set()
    assert "Store was cut off" in remote.daemon.log()
    whole = iter([first, pb.StoreChunk(data=contents(keys).tobytes())])
    assert list(raw.call(raw.data.Store, whole).statuses) == [1] * 4, "the session may store again"


def test_calls_that_send_no_request_are_cut_off(start_remote: Start) -> None:
    remote = start_remote()
    raw = remote.raw().hello()
    match = raw.channel.stream_unary("/kvstore.v1.KVStore/Match")
    release = threading.Event()

    def nothing() -> Iterator[bytes]:
        release.wait(60)
        yield b""

    calls = [match.future(nothing(), metadata=raw.metadata, timeout=300) for _ in range(40)]
    try:
        assert remote.client("blue").ping(timeout_s=10) > 0, "one session cannot take all there is"
        for call in calls:
            with pytest.raises(grpc.RpcError):
                call.result(timeout=40)
    finally:
        release.set()
    assert raw.call(raw.data.Renew, pb.RenewRequest()).leases == 0


def test_a_flood_of_half_open_connections_is_bounded_and_passes(start_remote: Start) -> None:
    remote = start_remote()
    client = remote.client("red")
    space = namespace(client, "flooded")
    keys = stored(space, 4)
    host, port = remote.target.split(":")
    threads = psutil.Process(remote.daemon.pid).num_threads()
    with contextlib.ExitStack() as flood:
        for _ in range(600):
            sock = flood.enter_context(socket.socket())
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect((host, int(port)))
        time.sleep(1.0)
        process = psutil.Process(remote.daemon.pid)
        held = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
        assert len(held) <= 256 + 8
        assert process.num_threads() <= threads + 8, "nobody unknown gets a thread"
        assert fetch(space, keys) == (4, []), "who is in stays in"
        # Those that say nothing are closed, so that others come in, the flood going on or not.
        other = eventually(lambda: attached(remote), "another client to get in", 30)
        assert namespace(other, "flooded").match(keys).blocks == 4


def attached(remote: Remote) -> Any:
    try:
        return remote.client("red")
    except (Unavailable, DeadlineExceeded):
        return None


def fixed_port(remote: Remote) -> None:
    """Have the daemon come back where it was."""
    remote.daemon.settings["listen"] = remote.target


def test_a_daemon_that_comes_back_is_used_again(start_remote: Start) -> None:
    remote = start_remote(tokens=True)
    fixed_port(remote)
    client = remote.client("red")
    space = namespace(client, "restart")
    keys = stored(space, 30)
    lease = space.acquire(keys)
    remote.daemon.stop()
    with pytest.raises((Unavailable, DeadlineExceeded)):
        space.match(keys)
    remote.daemon.start()
    with pytest.raises(LeaseExpired):
        lease.read_into(np.zeros((30, space.block_nbytes), np.uint8))
    assert eventually(lambda: matched(space, keys), "the client to attach again") == 30
    assert fetch(space, keys) == (30, []), "from cold, and not a byte wrong"
    more = stored(space, 5, seed=9)
    remote.daemon.kill()
    remote.daemon.start()
    eventually(lambda: matched(space, keys), "the client to attach again")
    count, mistakes = fetch(space, more)
    assert (count <= 5, mistakes) == (True, [])


def matched(space: Namespace, keys: Keys) -> int:
    try:
        return space.match(keys, timeout_s=1.0).blocks
    except KVStoreError:
        return 0


def test_for_a_fail_open_client_a_daemon_that_is_gone_is_a_miss_in_time(start_remote: Start) -> None:
    remote = start_remote()
    fixed_port(remote)
    client = remote.client("red", fail_open=True)
    space = namespace(client, "open")
    keys = stored(space, 4)
    remote.daemon.pause()
    assert space.match(keys).blocks == 0
    with space.acquire(keys) as lease:
        assert lease.blocks == 0
    assert space.put(keys, contents(keys), timeout_s=0.5) == [REJECTED(RejectReason.UNAVAILABLE)] * 4
    remote.daemon.resume()
    eventually(lambda: space.match(keys).blocks == 4, "the breaker to close")
    remote.daemon.kill()
    assert space.match(keys).blocks == 0
    remote.daemon.start()
    eventually(lambda: space.put(keys, contents(keys))[0].status is not PutStatus.REJECTED, "puts to be taken again")
    assert fetch(space, keys) == (4, [])


def test_a_daemon_that_dies_in_mid_fetch(start_remote: Start) -> None:
    remote = start_remote(warm_bytes="256MiB")
    space = namespace(remote.client("red"), "dies", BIG)
    keys = stored(space, 48)
    out = np.zeros((48, BIG), np.uint8)
    with ThreadPoolExecutor(1) as pool:
        lease = space.acquire(keys)
        reading = pool.submit(repeatedly, lambda: lease.read_into(out))
        time.sleep(0.2)
        remote.daemon.kill()
        with pytest.raises((LeaseExpired, Unavailable)):
            reading.result(timeout=30)
    remote.daemon.start()


def repeatedly(call: Callable[[], object]) -> None:
    for _ in range(1000):
        call()


def test_the_daemon_stops_in_order_under_clients(start_remote: Start) -> None:
    remote = start_remote()
    space = namespace(remote.client("red"), "stops")
    keys = stored(space, 8)
    idle = remote.raw("blue").hello()
    with space.acquire(keys):
        remote.daemon.stop()
    with pytest.raises(grpc.RpcError):
        list(idle.hello_stream)
    remote.daemon.start()


_WORKER = """
import sys
from kvstore_client import TLS, Client
client = Client(sys.argv[1], tls=TLS(*sys.argv[2:5]))
print("attached", flush=True)
sys.stdin.read()
"""


def test_a_worker_that_is_killed_is_noticed_at_once(start_remote: Start) -> None:
    remote = start_remote()
    tls = remote.certificates.tls("red")
    files = [str(tls.ca), str(tls.certificate), str(tls.key)]
    command = [sys.executable, "-c", _WORKER, f"tcp://{remote.target}", *files]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"attached\n"
        assert remote.daemon.stats().sessions == 2, "the worker's, and the one that asks"
        os.kill(worker.pid, signal.SIGKILL)
        eventually(lambda: remote.daemon.stats().sessions == 1, "the session to end", 10)


def test_many_threads_of_one_client_share_its_streams(start_remote: Start) -> None:
    remote = start_remote()
    space = namespace(remote.client("red"), "threads")
    chains = [chain(space, 12, seed) for seed in range(10)]

    def work(keys: Keys) -> tuple[list[Any], tuple[int, list[int]]]:
        return space.put(keys, contents(keys), timeout_s=40), fetch(space, keys, 40)

    with ThreadPoolExecutor(10) as pool:
        for outcomes, read in pool.map(work, chains):
            assert outcomes == [STORED] * 12
            assert read == (12, [])


def test_a_byte_that_changed_on_its_way_is_noticed(start_remote: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = start_remote()
    client = remote.client("red")
    space = namespace(client, "changed")
    keys = stored(space, 3)
    session = client._connection._session
    assert session is not None
    whole = session.fetch  # type: ignore[attr-defined]

    def changed(request: pb.FetchRequest, deadline_s: float) -> Iterator[bytes]:
        for message in whole(request, deadline_s):
            chunk = pb.FetchChunk.FromString(message)
            if chunk.block == 2:
                chunk.data = bytes([chunk.data[0] ^ 1]) + chunk.data[1:]
            yield chunk.SerializeToString()

    monkeypatch.setattr(session, "fetch", changed)
    out = np.zeros((3, space.block_nbytes), np.uint8)
    with space.acquire(keys) as lease, pytest.raises(InternalError, match="block 2 differs from its checksum"):
        lease.read_into(out)
    assert wrong(keys[:2], out) == []


_FORKER = """
import os, sys
from kvstore_client import TLS, Client, InvalidRequest
client = Client(sys.argv[1], tls=TLS(*sys.argv[2:5]))
child = os.fork()
if not child:
    try:
        client.ping()
    except InvalidRequest as error:
        os._exit(0 if "fork" in str(error) else 2)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
client.ping()
print("the parent goes on", flush=True)
"""


def test_a_forked_child_cannot_use_the_client_and_the_parent_goes_on(start_remote: Start) -> None:
    remote = start_remote()
    tls = remote.certificates.tls("red")
    files = [str(tls.ca), str(tls.certificate), str(tls.key)]
    command = [sys.executable, "-c", _FORKER, f"tcp://{remote.target}", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "the parent goes on\n"), done.stderr
