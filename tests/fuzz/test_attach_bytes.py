"""The attach socket under any bytes: torn frames, absurd lengths, descriptors that nobody asked for, half a hello."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz_messages import fuzzing, payloads
from fuzz_target import DOCUMENTED, Target, check_text, open_files, private_bytes
from kvstore.protocol.errors import InvalidRequest, Unavailable
from kvstore.protocol.frames import HEADER, MAX_PAYLOAD_BYTES, PROTOCOL_VERSION, FrameSocket, Method
from kvstore.v1 import kvstore_pb2 as pb
from polling import PATIENCE_S, eventually
from raw_session import RawSession, connect

HELLO = pb.HelloRequest(protocol_version=PROTOCOL_VERSION, client_name="fuzz").SerializeToString()
KNOWN = {"protocol_version": [PROTOCOL_VERSION], "client_name": [b"fuzz"], "client_version": [b"1"]}
LENGTHS = (0, 1, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
FRAMES_MAX = 6
PEERS = 48

lengths = st.one_of(st.none(), st.none(), st.none(), st.sampled_from(LENGTHS), st.integers(0, 200))
numbers = st.one_of(st.integers(0, 20), st.integers(0, (1 << 16) - 1))
frames = st.builds(
    lambda length, call_id, method, status, deadline_ms, payload: (
        HEADER.pack(len(payload) if length is None else length, call_id, method, status, deadline_ms) + payload
    ),
    lengths,
    st.integers(0, (1 << 32) - 1),
    numbers,
    st.one_of(st.just(0), st.just(0), numbers),
    st.one_of(st.sampled_from((0, 1, 50)), st.integers(0, 300)),
    st.one_of(st.binary(max_size=60), st.just(HELLO)),
)
streams = st.one_of(st.binary(max_size=200), st.lists(frames, max_size=FRAMES_MAX).map(b"".join))
pieces = st.lists(st.tuples(st.integers(1, 80), st.integers(0, 3)), max_size=5)  # bytes of a send, descriptors with it


@pytest.fixture
def idle(target: Target) -> Iterator[Target]:
    """The target, and what the tests' connections took of it must be given back."""
    daemon = psutil.Process(target.daemon.pid)
    target.check_idle()
    files, threads = open_files(daemon.pid), daemon.num_threads()
    yield target
    target.check_idle()
    target.check_alive()
    target.check_whole()
    eventually(lambda: open_files(daemon.pid) <= files, f"the {files} descriptors of before")
    eventually(lambda: daemon.num_threads() <= threads + 2, "the threads of the sessions to end")


def send(sock: socket.socket, stream: bytes, cuts: list[tuple[int, int]], fd: int) -> None:
    """A stream in pieces, some of them with copies of a descriptor."""
    for size, fds in cuts:
        piece, stream = stream[:size], stream[size:]
        if piece and fds:
            socket.send_fds(sock, [piece], [fd] * fds)
        elif piece:
            sock.sendall(piece)
    sock.sendall(stream)


def answers(peer: FrameSocket) -> Iterator[tuple[int, bytes]]:
    """Status and payload of all that comes, until the daemon closes: it must do one or the other in time."""
    while True:
        try:
            answer = peer.recv(PATIENCE_S)
        except Unavailable:
            return
        yield answer.status, answer.payload


@pytest.mark.parametrize("greeted", [False, True], ids=["before the hello", "after it"])
def test_any_stream_is_answered_or_ends(idle: Target, greeted: bool) -> None:
    """Half a frame at the end of it waits for the rest; once we have said that there is none, all is over."""
    path, null = idle.daemon.address, os.open("/dev/null", os.O_RDONLY)

    @fuzzing(120, f"stream {greeted}")
    @given(streams, pieces)
    def stream_ends(stream: bytes, cuts: list[tuple[int, int]]) -> None:
        peer = connect(path)
        try:
            if greeted:
                peer.send(1, Method.HELLO, HELLO)
                assert peer.recv(PATIENCE_S).status == 0
            with contextlib.suppress(OSError):  # it has had enough already
                send(peer.sock, stream, cuts, null)
                peer.sock.shutdown(socket.SHUT_WR)
            for status, payload in answers(peer):
                assert status in DOCUMENTED
                if status:
                    check_text("stream", payload.decode())
            for fd in peer.take_fds(1000):
                os.close(fd)
        finally:
            peer.close()

    try:
        stream_ends()
    finally:
        os.close(null)


def test_any_hello(idle: Target) -> None:
    """Greeted or refused with a word; whoever is refused is out."""

    @fuzzing(60, "hello")
    @given(payloads(pb.HelloRequest.DESCRIPTOR, KNOWN), st.sampled_from((0, 0, 0, 1, 4, 77, 65_535)))
    def hello_is_answered(payload: bytes, method: int) -> None:
        peer = connect(idle.daemon.address)
        try:
            with contextlib.suppress(Unavailable, InvalidRequest):
                peer.send(9, method, payload)
            first = peer.recv(PATIENCE_S)
            assert first.status in DOCUMENTED
            if first.status:
                check_text("hello", first.payload.decode())
                with pytest.raises(Unavailable):
                    peer.recv(PATIENCE_S)
            else:
                assert pb.HelloResponse.FromString(first.payload).token
        finally:
            peer.close()

    hello_is_answered()


def test_half_a_hello_from_many(idle: Target) -> None:
    """Regression: 16 bytes that announced 4 MiB were given 4 MiB, before anybody had said who he is."""
    daemon, before = psutil.Process(idle.daemon.pid), private_bytes(idle.daemon.pid)
    files = open_files(daemon.pid)
    peers = [connect(idle.daemon.address) for _ in range(PEERS)]
    for number, peer in enumerate(peers):
        length = (MAX_PAYLOAD_BYTES, len(HELLO))[number % 2]
        with contextlib.suppress(OSError):
            peer.sock.sendall(HEADER.pack(length, 1, Method.HELLO, 0, 0) + HELLO[: number % 5])
    with RawSession(idle.daemon.address) as worker:
        assert worker.call("Renew", pb.RenewRequest()).leases == 0, "others are served all the while"
    refused = [peer.recv(PATIENCE_S) for peer in peers[::2]]
    assert {answer.status for answer in refused} == {InvalidRequest.code}
    assert all("above the limit" in answer.payload.decode() for answer in refused)
    grown = private_bytes(idle.daemon.pid) - before
    assert grown < PEERS * MAX_PAYLOAD_BYTES // 8, f"half a hello of {PEERS} peers took {grown >> 20} MiB"
    eventually(lambda: open_files(daemon.pid) <= files, "them to be closed though they never end their hello")
    for peer in peers:
        with pytest.raises(Unavailable):
            peer.recv(PATIENCE_S)
        peer.close()


def test_sessions_that_stop_in_the_middle_of_a_frame(idle: Target) -> None:
    """Each holds its own frame and nothing else; descriptors that come with it are not taken."""
    null = os.open("/dev/null", os.O_RDONLY)
    daemon = psutil.Process(idle.daemon.pid)
    stuck = [RawSession(idle.daemon.address) for _ in range(8)]
    files = open_files(daemon.pid)
    try:
        for session in stuck:
            header = HEADER.pack(1 << 16, 5, Method.PUT, 0, 0)
            for byte in header:
                socket.send_fds(session.frames.sock, [bytes([byte])], [null] * 200)
        idle.check_whole()
        assert open_files(daemon.pid) <= files, "descriptors that nobody asked for are dropped by the kernel"
    finally:
        os.close(null)
        for session in stuck:
            session.close()
