"""Who may come in on the attach socket, and how sessions end."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from kvstore.protocol.errors import (
    InvalidRequest,
    PermissionDenied,
    ProtocolMismatch,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES, Method
from kvstore.transport import watcher
from kvstore.transport.attach import peer_of
from kvstore.transport.config import TransportConfig
from kvstore.transport.sockets import PathTaken
from kvstore.v1 import kvstore_pb2 as pb
from transport_double import BOUND_S, Setup, error_of, eventually, packed

Make: TypeAlias = Callable[..., Setup]

CHILD = """
import os, socket, sys, time
from kvstore.protocol.frames import FrameSocket
from kvstore.v1 import kvstore_pb2 as pb
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(sys.argv[1])
frames = FrameSocket(sock)
frames.send(1, 0, pb.HelloRequest(protocol_version=1).SerializeToString())
assert frames.recv().status == 0
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
time.sleep(60)
"""


def test_hello_gives_a_token_and_says_where_grpc_is(setup: Setup) -> None:
    reply = setup.attach().hello_reply
    assert reply.token == setup.session().token
    assert len(reply.token) == 32
    assert reply.protocol_version == 1
    assert reply.instance_id == "instance-1"
    assert reply.server_version == "9.9"
    assert reply.grpc_target == f"unix:{setup.config.grpc_path}"
    assert setup.session().pid == os.getpid()
    assert setup.session().tenant == "tenant-a"


def test_open_session_gives_staging_whose_descriptor_map_slabs_passes(setup: Setup) -> None:
    peer = setup.attach()
    opened = pb.OpenSessionResponse.FromString(
        peer.call(Method.OPEN_SESSION, pb.OpenSessionRequest(staging_bytes=4096))
    )
    assert (opened.staging_bytes, opened.lease_ttl_ms, opened.renew_every_ms) == (4096, 30000, 5000)
    mapped = pb.MapSlabsResponse.FromString(peer.call(Method.MAP_SLABS, pb.MapSlabsRequest(slab_ids=[0, 99])))
    (fd,) = peer.frames.take_fds(5)
    try:
        assert [slab.slab_id for slab in mapped.slabs] == [0]
        assert os.fstat(fd).st_ino == os.fstat(setup.session().staging_fd).st_ino
    finally:
        os.close(fd)


def test_another_protocol_version_is_refused_with_both_versions_named(setup: Setup) -> None:
    error = error_of(lambda: setup.connect().hello(version=7))
    assert isinstance(error, ProtocolMismatch)
    assert "7" in str(error)
    assert "1" in str(error)
    assert not setup.engine.sessions


def test_who_has_no_tenant_is_refused(setup: Setup) -> None:
    setup.refused_uids.add(os.getuid())
    peer = setup.connect()
    assert isinstance(error_of(peer.hello), PermissionDenied)
    assert peer.ended()
    assert not setup.engine.sessions


def test_nothing_is_answered_before_hello(setup: Setup) -> None:
    peer = setup.connect()
    assert isinstance(error_of(lambda: peer.call(Method.RENEW)), Unauthenticated)
    assert peer.ended()


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x0a"])
def test_a_hello_of_garbage_is_refused(setup: Setup, payload: bytes) -> None:
    peer = setup.connect()
    assert isinstance(error_of(lambda: peer.call(Method.HELLO, payload)), InvalidRequest)
    assert peer.ended()


def test_a_client_name_has_a_limit(setup: Setup) -> None:
    error = error_of(lambda: setup.connect().hello(name="x" * 129))
    assert isinstance(error, InvalidRequest)
    assert "client_name" in str(error)
    assert "128" in str(error)


def test_random_bytes_end_the_connection_and_nothing_else(setup: Setup) -> None:
    other = setup.attach()
    for _ in range(5):
        peer = setup.connect()
        peer.send_raw(b"\xff" * 64)
        assert peer.ended()
    other.call(Method.RENEW)


def test_a_frame_above_the_limit_is_answered_and_ends_the_session(setup: Setup) -> None:
    peer = setup.attach()
    session = setup.session()
    peer.send_raw(packed(b"", call_id=9, method=Method.MATCH, length=MAX_PAYLOAD_BYTES + 1))
    reply = peer.recv()
    assert (reply.call_id, reply.status) == (9, InvalidRequest.code)
    assert str(MAX_PAYLOAD_BYTES) in reply.payload.decode()
    assert peer.ended()
    assert session.closed.wait(10)


def test_the_largest_frame_is_served(setup: Setup) -> None:
    peer = setup.attach()
    room = MAX_PAYLOAD_BYTES - len(pb.ExistsRequest(namespace=bytes(32)).SerializeToString()) - 8
    keys = bytes(room - room % 32)
    reply = peer.call(Method.EXISTS, pb.ExistsRequest(namespace=bytes(32), keys=keys))
    assert len(pb.ExistsResponse.FromString(reply).bits) == len(keys) // 32


def test_a_silent_connection_is_closed(make: Make) -> None:
    setup = make(limits={"hello_timeout_s": 0.2})
    assert setup.connect().ended()


def test_a_hello_that_trickles_in_is_closed_all_the_same(make: Make) -> None:
    setup = make(limits={"hello_timeout_s": 0.5})
    peer = setup.connect()
    hello = packed(pb.HelloRequest(protocol_version=1, client_name="slow").SerializeToString())
    with pytest.raises(OSError):
        for byte in hello:
            peer.send_raw(bytes([byte]))
            time.sleep(0.1)
        assert peer.ended()
        raise BrokenPipeError


def test_who_said_hello_in_time_may_be_silent_afterwards(make: Make) -> None:
    setup = make(limits={"hello_timeout_s": 0.2})
    peer = setup.attach()
    time.sleep(0.6)
    assert peer.call(Method.RENEW)
    assert not setup.session().closed.is_set()


def test_one_session_too_many_is_told_so(make: Make) -> None:
    setup = make(limits={"max_sessions": 2})
    first = setup.attach()
    setup.attach()
    error = error_of(lambda: setup.connect().hello())
    assert isinstance(error, QuotaExceeded)
    assert "2 sessions" in str(error)
    first.close()
    assert setup.engine.sessions[1].closed.wait(10)
    eventually(lambda: _can_attach(setup))


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _can_attach(setup: Setup) -> bool:
    try:
        setup.connect().hello()
    except QuotaExceeded:
        return False
    return True


def test_connections_that_only_wait_do_not_take_the_places_of_sessions(make: Make) -> None:
    setup = make(limits={"max_sessions": 2})
    for _ in range(20):
        setup.connect()
    setup.attach()
    setup.attach()
    assert len(setup.engine.sessions) == 2


def test_the_session_ends_when_its_peer_closes(setup: Setup) -> None:
    peer = setup.attach()
    peer.close()
    assert setup.session().closed.wait(10)


def test_the_session_of_a_killed_process_ends_though_its_child_holds_the_socket(setup: Setup) -> None:
    """A forked child kept the socket open, so no EOF came: the dead worker's leases lived on."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(setup.config.attach_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        session = setup.session()
        assert session.pid == process.pid
        process.kill()
        process.wait(10)
        if watcher.peer_pidfd(setup.connect().sock) is None:
            pytest.skip("this kernel has no SO_PEERPIDFD")
        assert session.closed.wait(10)
        os.kill(child, 0)  # it still lives, and so does the socket in it
    finally:
        process.stdout.close()
        os.kill(child, signal.SIGKILL)


def test_without_pidfds_the_end_of_the_stream_ends_the_session(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "peer_pidfd", lambda sock: None)
    setup = make()
    peer = setup.attach()
    peer.close()
    assert setup.session().closed.wait(10)


def test_a_dead_peers_running_calls_do_not_keep_its_session(setup: Setup) -> None:
    setup.engine.set_ready(0)
    peer = setup.attach()
    peer.send(Method.WAIT, pb.WaitRequest(lease_id=7, stop=1), deadline_ms=60_000)
    eventually(lambda: setup.engine.waiting == 1)
    peer.close()
    assert setup.session().closed.wait(10)
    eventually(lambda: setup.engine.waiting == 0)


def test_a_peer_that_never_reads_loses_its_session_and_the_others_do_not_notice(make: Make) -> None:
    setup = make(limits={"send_timeout_s": 0.3})
    other = setup.attach()
    deaf = setup.attach()
    session = setup.session()
    request = pb.ExistsRequest(namespace=bytes(32), keys=bytes(32 * 8192)).SerializeToString()
    with pytest.raises(Unavailable):
        for call_id in range(1000):
            deaf.frames.send(call_id, Method.EXISTS, request)
    assert session.closed.wait(10)
    other.call(Method.RENEW)


def test_descriptors_that_a_peer_passes_are_dropped(setup: Setup) -> None:
    peer = setup.attach()
    before = _open_descriptors()
    fd = os.open("/dev/null", os.O_RDONLY)
    for call_id in range(100, 120):
        peer.frames.send(call_id, Method.RENEW, b"", fds=[fd] * 10)
        assert peer.recv().status == 0
    os.close(fd)
    assert _open_descriptors() <= before


def test_nothing_is_left_open_by_connections_that_came_and_went(setup: Setup) -> None:
    setup.attach().close()
    before = _open_descriptors()
    for _ in range(50):
        setup.attach().close()
    eventually(lambda: _open_descriptors() <= before)


def test_both_sockets_are_private_from_the_start(setup: Setup) -> None:
    for path in (setup.config.grpc_path, setup.config.attach_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_mode_and_group_are_given_to_both_sockets(make: Make) -> None:
    setup = make(socket_mode=0o660, socket_group=os.getgid())
    for path in (setup.config.grpc_path, setup.config.attach_path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()


def test_an_unknown_group_is_refused(make: Make) -> None:
    setup = make(start=False, socket_group="no-such-group-here")
    with pytest.raises(InvalidRequest, match="no-such-group-here"):
        setup.transport.start()
    assert not setup.config.attach_path.exists()
    assert not setup.config.grpc_path.exists()


def test_stop_removes_both_sockets_and_ends_the_sessions(setup: Setup) -> None:
    peer = setup.attach()
    setup.transport.stop(1.0)
    assert setup.session().closed.is_set()
    assert peer.ended()
    assert not setup.config.attach_path.exists()
    assert not setup.config.grpc_path.exists()


def test_stop_lets_a_call_in_flight_finish(setup: Setup) -> None:
    setup.engine.set_ready(0)
    peer = setup.attach()
    call_id = peer.send(Method.WAIT, pb.WaitRequest(lease_id=7, stop=1), deadline_ms=300)
    eventually(lambda: setup.engine.waiting == 1)
    setup.transport.stop(5.0)
    assert peer.recv().call_id == call_id


def test_the_socket_of_a_dead_daemon_is_replaced_only_by_the_paths_owner(make: Make) -> None:
    setup = make(start=False)
    for path in (setup.config.grpc_path, setup.config.attach_path):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(path))
    with pytest.raises(PathTaken):
        setup.transport.start()
    owner = make(owns_paths=True)
    owner.attach()


def test_a_living_daemons_socket_is_never_taken_over(make: Make) -> None:
    first = make(owns_paths=True)
    second = make(start=False, owns_paths=True)
    with pytest.raises(PathTaken, match="listens"):
        second.transport.start()
    first.attach()


def test_a_file_in_the_way_is_left_alone(make: Make) -> None:
    setup = make(start=False, owns_paths=True)
    setup.config.grpc_path.write_text("mine")
    with pytest.raises(PathTaken):
        setup.transport.start()
    assert setup.config.grpc_path.read_text() == "mine"


def test_a_path_that_no_socket_can_have_is_refused_by_name(tmp_path: Path) -> None:
    config = TransportConfig(tmp_path / ("x" * 110), "i", "v")
    with pytest.raises(InvalidRequest, match=r"--socket"):
        config.validate()


def test_the_kernel_says_which_groups_a_peer_is_in(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "s"))
        door.listen()
        program = "import os, socket, sys\n" + (
            "os.setgroups([4711, 4712]) if os.geteuid() == 0 else None\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(*os.getgroups()); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "s")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            door.settimeout(BOUND_S)
            peer, _ = door.accept()
            assert process.stdout is not None
            with peer:
                found = peer_of(peer)
                said = process.stdout.readline().split()
            process.communicate(timeout=BOUND_S)
    assert (found.pid, found.uid, found.gid) == (process.pid, os.getuid(), os.getgid())
    assert sorted(found.groups) == sorted(map(int, said))
