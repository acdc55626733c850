"""Frames over socketpairs: bytes, descriptors, partial reads, limits, failures."""

import fcntl
import json
import os
import resource
import socket
import struct
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from kvstore.protocol import frames
from kvstore.protocol.errors import InvalidRequest, Unavailable
from kvstore.protocol.frames import HEADER, MAX_FDS_PER_MESSAGE, MAX_PAYLOAD_BYTES, Frame, FrameSocket, Method
from kvstore.v1 import kvstore_pb2

GOLDEN = json.loads((Path(__file__).parent / "golden" / "frames.json").read_text())
TIMEOUT_S = 20.0  # for what must come
SHORT_S = 0.02  # for what must not

Pair = tuple[FrameSocket, FrameSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = (FrameSocket(sock) for sock in socket.socketpair())
    left.sock.settimeout(TIMEOUT_S)
    right.sock.settimeout(TIMEOUT_S)
    yield left, right
    left.close()
    right.close()


def open_fds() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def send_raw(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])


@contextmanager
def nofile_limit(spare: int) -> Iterator[None]:
    """Leave this process room for `spare` more descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in open_fds())
    with open_null(highest):  # no holes below the limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def open_null(highest: int) -> Iterator[None]:
    held = [os.open("/dev/null", os.O_RDONLY)]
    while held[-1] < highest:
        held.append(os.open("/dev/null", os.O_RDONLY))
    os.close(held.pop())
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_frames(case: dict[str, Any], pair: Pair) -> None:
    left, right = pair
    payload = bytes.fromhex(case["payload"])
    left.send(case["call_id"], case["method"], payload, case["status"], case["deadline_ms"])
    raw = right.sock.recv(1024)
    assert raw.hex() == case["frame"]
    left.sock.sendall(raw)
    frame = right.recv()
    assert frame == Frame(case["call_id"], case["method"], case["status"], case["deadline_ms"], payload)


def test_every_rpc_of_the_service_has_a_method() -> None:
    service = kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"]
    assert [method.name.replace("_", "").lower() for method in Method] == [
        "hello",
        *(rpc.name.lower() for rpc in service.methods if rpc.name not in ("Hello", "Fetch", "Store")),
    ]
    assert [int(method) for method in Method] == list(range(len(Method)))


def test_frames_keep_their_order_and_bounds(pair: Pair) -> None:
    left, right = pair
    sent = [Frame(call_id, call_id % 16, 0, 0, bytes([call_id]) * call_id) for call_id in range(200)]
    sender = threading.Thread(target=lambda: [left.send(frame.call_id, frame.method, frame.payload) for frame in sent])
    sender.start()
    assert [right.recv() for _ in sent] == sent
    sender.join(TIMEOUT_S)
    assert not right.has_buffered_frame()


@pytest.mark.parametrize("size", [0, 1, (64 << 10) - 16, 64 << 10, (64 << 10) + 1, 1 << 20, MAX_PAYLOAD_BYTES])
def test_payloads_of_any_size_up_to_the_limit(size: int, pair: Pair) -> None:
    left, right = pair
    payload = os.urandom(size)
    sender = threading.Thread(target=left.send, args=(1, 2, payload))
    sender.start()
    assert right.recv().payload == payload
    sender.join(TIMEOUT_S)
    assert not sender.is_alive()


def test_a_frame_that_comes_byte_by_byte(pair: Pair) -> None:
    left, right = pair
    data = HEADER.pack(3, 7, 4, 0, 100) + b"abc"
    for at in range(len(data)):
        assert not right.has_buffered_frame()
        left.sock.sendall(data[at : at + 1])
        if at < len(data) - 1:
            with pytest.raises(TimeoutError):
                right.recv(timeout_s=0)
    assert right.recv(timeout_s=TIMEOUT_S) == Frame(7, 4, 0, 100, b"abc")


def test_time_outs_keep_what_came(pair: Pair) -> None:
    left, right = pair
    right.sock.settimeout(SHORT_S)
    payload = os.urandom(100_000)
    data = HEADER.pack(len(payload), 7, 4, 0, 0) + payload
    for start, stop in ((0, 10), (10, 16), (16, 70_000), (70_000, 100_015)):
        left.sock.sendall(data[start:stop])
        with pytest.raises(TimeoutError):
            right.recv()
    left.sock.sendall(data[100_015:])
    left.send(8, 5, b"next")
    assert right.recv().payload == payload
    assert right.recv() == Frame(8, 5, 0, 0, b"next")


def test_a_bound_of_one_call_leaves_the_socket_alone(pair: Pair) -> None:
    _, right = pair
    with pytest.raises(TimeoutError):
        right.recv(timeout_s=SHORT_S)
    with pytest.raises(TimeoutError):
        right.recv(timeout_s=-1.0)
    assert right.sock.gettimeout() == TIMEOUT_S


def test_a_buffered_frame_needs_no_time(pair: Pair) -> None:
    left, right = pair
    left.send(1, 2, b"a")
    left.send(2, 2, b"b")
    assert right.recv().payload == b"a"
    assert right.has_buffered_frame()
    assert right.recv(timeout_s=0).payload == b"b"


def test_a_non_blocking_socket_says_not_yet(pair: Pair) -> None:
    left, right = pair
    right.sock.setblocking(False)
    with pytest.raises(TimeoutError):
        right.recv()
    left.send(1, 2, b"a")
    assert right.recv().payload == b"a"


def test_a_frame_above_the_limit_is_not_sent(pair: Pair) -> None:
    left, right = pair
    with pytest.raises(InvalidRequest, match="4194305 bytes is above the limit of 4194304"):
        left.send(1, 2, bytes(MAX_PAYLOAD_BYTES + 1))
    left.send(2, 2, b"still in step")
    assert right.recv().call_id == 2


def test_an_announced_frame_above_the_limit_is_refused_before_it_comes(pair: Pair) -> None:
    left, right = pair
    left.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 1, 2, 0, 0))
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="announced a frame of 4194305"):
            right.recv()
        assert right.has_buffered_frame()
    assert len(right._buffer) == frames._READ_BYTES


def test_the_buffer_grows_for_a_large_frame_and_shrinks_after_it(pair: Pair) -> None:
    left, right = pair
    big = bytes(MAX_PAYLOAD_BYTES)
    sender = threading.Thread(target=lambda: (left.send(1, 2, big), left.send(2, 2, b"x" * 1000)))
    sender.start()
    assert right.recv().payload == big
    assert right.recv().payload == b"x" * 1000
    sender.join(TIMEOUT_S)
    assert len(right._buffer) == frames._READ_BYTES


def test_the_buffer_of_a_batch_is_kept(pair: Pair) -> None:
    left, right = pair
    buffers = set()
    for call_id in range(5):
        payload = bytes([call_id]) * (256 << 10)
        sender = threading.Thread(target=left.send, args=(call_id, 2, payload))
        sender.start()
        assert right.recv().payload == payload
        sender.join(TIMEOUT_S)
        buffers.add(id(right._buffer))
    assert len(buffers) == 1


def test_frames_across_the_end_of_the_buffer(pair: Pair) -> None:
    left, right = pair
    sizes = [40_000, 30_000, 65_520, 1, 65_537, 0, 600_000, 20_000, 50_000] * 3
    payloads = [os.urandom(size) for size in sizes]
    sender = threading.Thread(target=lambda: [left.send(i, 1, payload) for i, payload in enumerate(payloads)])
    sender.start()
    received = [right.recv() for _ in payloads]
    sender.join(TIMEOUT_S)
    assert [frame.call_id for frame in received] == list(range(len(sizes)))
    assert [frame.payload for frame in received] == payloads


def test_many_threads_send_whole_frames(pair: Pair) -> None:
    left, right = pair

    def work(thread: int) -> None:
        for number in range(50):
            left.send(thread * 1000 + number, thread, bytes([thread]) * (number * 997))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    last = dict.fromkeys(range(4), -1)
    for _ in range(200):
        frame = right.recv()
        number = frame.call_id - frame.method * 1000
        assert number == last[frame.method] + 1
        assert frame.payload == bytes([frame.method]) * (number * 997)
        last[frame.method] = number
    for thread in threads:
        thread.join(TIMEOUT_S)


def test_descriptors_travel_with_their_frame(pair: Pair) -> None:
    left, right = pair
    numbers: list[bytes] = []
    for call_id in range(3):
        fds = [os.memfd_create(f"t{call_id}{i}") for i in range(call_id)]
        for i, fd in enumerate(fds):
            os.write(fd, b"%d%d" % (call_id, i))
        left.send(call_id, Method.MAP_SLABS, b"", fds=fds)
        for fd in fds:
            os.close(fd)
    for call_id in range(3):
        assert right.recv().call_id == call_id
        taken = right.take_fds(call_id)
        assert len(taken) == call_id
        for fd in taken:
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            numbers.append(os.pread(fd, 10, 0))
            os.close(fd)
    assert numbers == [b"10", b"20", b"21"]
    assert right.take_fds(5) == []


def test_as_many_descriptors_as_a_message_takes(pair: Pair) -> None:
    left, right = pair
    before = open_fds()
    null = os.open("/dev/null", os.O_RDONLY)
    left.send(1, 3, b"x" * 100_000, fds=[null] * MAX_FDS_PER_MESSAGE)
    assert len(right.recv().payload) == 100_000
    taken = right.take_fds(MAX_FDS_PER_MESSAGE)
    assert len(set(taken)) == MAX_FDS_PER_MESSAGE
    for fd in [*taken, null]:
        os.close(fd)
    assert open_fds() == before


def test_too_many_descriptors_are_refused_before_a_byte_is_sent(pair: Pair) -> None:
    left, right = pair
    with pytest.raises(InvalidRequest, match="251 descriptors"):
        left.send(1, 3, b"", fds=[0] * (MAX_FDS_PER_MESSAGE + 1))
    left.send(2, 3, b"still in step")
    assert right.recv().call_id == 2


def test_untaken_descriptors_are_closed_with_the_socket(pair: Pair) -> None:
    left, right = pair
    null = os.open("/dev/null", os.O_RDONLY)
    left.send(1, 3, b"", fds=[null] * 4)
    os.close(null)
    before = open_fds()
    right.recv()
    assert len(open_fds() - before) == 4
    right.close()
    right.close()
    assert open_fds() < before


def test_a_peer_that_floods_descriptors_is_cut_off(pair: Pair) -> None:
    left, right = pair
    before = open_fds()
    frame = HEADER.pack(0, 1, 2, 0, 0)
    with pytest.raises(InvalidRequest, match="descriptors that nobody took"):
        for _ in range(10):
            send_raw(left.sock, frame, [0] * MAX_FDS_PER_MESSAGE)
            right.recv()
    assert open_fds() == before
    with pytest.raises(Unavailable):
        left.send(1, 2, b"")


def test_lost_descriptors_break_the_connection_instead_of_shifting(pair: Pair) -> None:
    left, right = pair
    null = os.open("/dev/null", os.O_RDONLY)
    left.send(1, 3, b"", fds=[null] * 8)
    before = open_fds()
    with nofile_limit(spare=3), pytest.raises(Unavailable, match="descriptors were lost"):
        right.recv()
    assert open_fds() == before
    assert right.take_fds(8) == []
    os.close(null)


def test_a_peer_that_closes_is_unavailable(pair: Pair) -> None:
    left, right = pair
    left.send(1, 2, b"last words")
    left.sock.sendall(b"half a header"[:7])
    left.close()
    assert right.recv().payload == b"last words"
    for timeout_s in (None, 0, TIMEOUT_S):
        with pytest.raises(Unavailable):
            right.recv(timeout_s)


def test_sending_to_a_gone_peer_is_unavailable(pair: Pair) -> None:
    left, right = pair
    right.close()
    for fds in ((), (0,)):
        with pytest.raises(Unavailable, match="while sending"):
            left.send(1, 2, b"x", fds=fds)


def test_a_reset_peer_is_unavailable(pair: Pair) -> None:
    left, right = pair
    right.send(1, 2, b"unread by left, so that closing resets")
    left.sock.close()
    with pytest.raises(Unavailable):
        right.recv()
    with pytest.raises(Unavailable):
        right.recv(timeout_s=TIMEOUT_S)


def test_a_send_that_times_out_half_way_ends_the_connection(pair: Pair) -> None:
    left, right = pair
    left.sock.settimeout(SHORT_S)
    with pytest.raises(Unavailable, match="while sending"):
        left.send(1, 2, bytes(MAX_PAYLOAD_BYTES))
    with pytest.raises(Unavailable):  # and not a second frame in the middle of the first
        left.send(2, 2, b"x")
    with pytest.raises(Unavailable):
        right.recv(timeout_s=TIMEOUT_S)
    with pytest.raises(Unavailable):
        left.recv(timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("timeout_s", [None, TIMEOUT_S])
def test_close_wakes_a_blocked_receiver(pair: Pair, timeout_s: float | None) -> None:
    _, right = pair
    outcomes: list[type[BaseException]] = []
    entered = threading.Event()

    def work() -> None:
        entered.set()
        try:
            right.recv(timeout_s)
        except (Unavailable, TimeoutError) as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(TIMEOUT_S)
    right.close()
    thread.join(TIMEOUT_S)
    assert outcomes == [Unavailable]


def test_a_closed_socket_is_unavailable(pair: Pair) -> None:
    left, _ = pair
    left.close()
    assert left.fileno() == -1
    for timeout_s in (None, SHORT_S):
        with pytest.raises(Unavailable):
            left.recv(timeout_s)
    with pytest.raises(Unavailable):
        left.send(1, 2, b"")


def test_a_descriptor_alone_is_fine_for_poll(pair: Pair) -> None:
    left, _ = pair
    assert left.fileno() == left.sock.fileno()


def test_garbage_is_a_frame_or_an_error_and_never_a_hang(pair: Pair) -> None:
    left, right = pair
    left.sock.sendall(struct.pack("<IIHHI", 4, 2**32 - 1, 65_535, 65_535, 2**32 - 1) + b"abcd" + b"\xff" * 64)
    assert right.recv(TIMEOUT_S) == Frame(2**32 - 1, 65_535, 65_535, 2**32 - 1, b"abcd")
    with pytest.raises(InvalidRequest), suppress(TimeoutError):
        right.recv(TIMEOUT_S)
