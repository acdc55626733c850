"""The local RPC: who reads, what is dropped, and that every wait is bounded."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstore.protocol.frames import HEADER, MAX_CALLS_IN_FLIGHT, MAX_PAYLOAD_BYTES, Frame, FrameSocket, Method
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import DeadlineExceeded, InvalidRequest, PermissionDenied, QuotaExceeded, Unavailable
from kvstore_client.local import LocalLink
from kvstore_client.rpc import MAP_SLABS, MATCH, RELEASE, WAIT, deadline_after
from kvstore_client.stream import connect

SOON_S = 0.05
LATER_S = 30.0


class Peer:
    """The daemon's end of the socket, by hand."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.settimeout(LATER_S)
        self.frames = FrameSocket(theirs)
        self.lost: list[str] = []
        self.link = LocalLink(ours, self.lost.append)

    def recv(self) -> Frame:
        return self.frames.recv(LATER_S)

    def answer(self, frame: Frame, blocks: int = 0) -> None:
        self.frames.send(frame.call_id, frame.method, pb.MatchResponse(blocks=blocks).SerializeToString())


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.link.close()
    made.frames.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=MAX_CALLS_IN_FLIGHT + 8) as pool:
        yield pool


def match(link: LocalLink, tag: int = 0, timeout_s: float = LATER_S) -> int:
    request = pb.MatchRequest(keys=tag.to_bytes(32, "little"))
    return link.call(MATCH, request, deadline_after(timeout_s)).blocks


def tag_of(frame: Frame) -> int:
    return int.from_bytes(pb.MatchRequest.FromString(frame.payload).keys, "little")


def test_a_call_and_its_answer(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(match, peer.link, 5, 2.0)
    frame = peer.recv()
    assert (frame.method, frame.status, tag_of(frame)) == (Method.MATCH, 0, 5)
    assert 1500 < frame.deadline_ms < 2000, "the daemon is told a little less than the time left"
    peer.answer(frame, 7)
    assert waiting.result(LATER_S) == 7


def test_answers_of_other_callers_are_dealt_out(peer: Peer, threads: ThreadPoolExecutor) -> None:
    """Sixteen callers, answered in reverse: whoever reads gives each its own."""
    waiting = [threads.submit(match, peer.link, tag) for tag in range(16)]
    frames = [peer.recv() for _ in waiting]
    for frame in reversed(frames):
        peer.answer(frame, tag_of(frame) + 100)
    assert [call.result(LATER_S) for call in waiting] == [tag + 100 for tag in range(16)]


def test_the_lead_passes_on_when_the_leader_gives_up(peer: Peer, threads: ThreadPoolExecutor) -> None:
    leader = threads.submit(match, peer.link, 1, SOON_S)
    first = peer.recv()
    follower = threads.submit(match, peer.link, 2)
    second = peer.recv()
    with pytest.raises(DeadlineExceeded):
        leader.result(LATER_S)
    peer.answer(first, 1)
    peer.answer(second, 2)
    assert follower.result(LATER_S) == 2


def test_a_late_answer_leaves_the_stream_in_step(peer: Peer, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(DeadlineExceeded):
        match(peer.link, 1, SOON_S)
    late = peer.recv()
    waiting = threads.submit(match, peer.link, 2)
    frame = peer.recv()
    peer.answer(late, 1)
    peer.answer(frame, 2)
    assert waiting.result(LATER_S) == 2


def test_half_an_answer_is_kept_over_a_deadline(peer: Peer, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(DeadlineExceeded):
        match(peer.link, 1, SOON_S)
    late = peer.recv()
    payload = pb.MatchResponse(blocks=1).SerializeToString()
    whole = HEADER.pack(len(payload), late.call_id, late.method, 0, 0) + payload
    peer.frames.sock.sendall(whole[:7])
    with pytest.raises(DeadlineExceeded):
        match(peer.link, 2, SOON_S)
    peer.recv()
    peer.frames.sock.sendall(whole[7:])
    waiting = threads.submit(match, peer.link, 3)
    peer.answer(peer.recv(), 3)
    assert waiting.result(LATER_S) == 3


def test_an_answer_to_nobody_is_dropped(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(match, peer.link)
    frame = peer.recv()
    peer.frames.send(frame.call_id + 1000, Method.MATCH, pb.MatchResponse(blocks=99).SerializeToString())
    peer.answer(frame, 3)
    assert waiting.result(LATER_S) == 3


def test_descriptors_for_nobody_are_closed(peer: Peer, threads: ThreadPoolExecutor) -> None:
    reading, writing = os.pipe()
    try:
        waiting = threads.submit(match, peer.link)
        frame = peer.recv()
        peer.frames.send(frame.call_id + 1000, Method.MAP_SLABS, b"", fds=[writing])
        peer.answer(frame)
        waiting.result(LATER_S)
    finally:
        os.close(writing)
    with open(reading, "rb") as end:  # noqa: PTH123 - a descriptor
        assert end.read() == b"", "nobody holds the other end any more"


def test_descriptors_are_not_given_to_the_answer_before_theirs(peer: Peer) -> None:
    """Regression: one read took another thread's answer and then a slab's, whose descriptor went to the first."""
    deadline_s = deadline_after(LATER_S)
    first = peer.link.start(MATCH, pb.MatchRequest(), deadline_s)
    second = peer.link.start(MAP_SLABS, pb.MapSlabsRequest(), deadline_s)
    reading, writing = os.pipe()
    peer.answer(peer.recv())
    peer.frames.send(peer.recv().call_id, Method.MAP_SLABS, b"", fds=[writing])
    peer.link.pump()
    assert first.was_answered
    assert second.was_answered
    assert (len(first._call.fds), len(second._call.fds)) == (0, 1)
    for fd in (reading, writing, *second._call.fds):
        os.close(fd)


def test_an_error_answer_is_raised(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(match, peer.link)
    frame = peer.recv()
    peer.frames.send(frame.call_id, frame.method, "zu viel: ü".encode(), QuotaExceeded.code)
    with pytest.raises(QuotaExceeded, match="zu viel: ü"):
        waiting.result(LATER_S)


def test_answers_larger_than_the_buffer(peer: Peer, threads: ThreadPoolExecutor) -> None:
    bits = bytes(range(256)) * 4096
    waiting = [threads.submit(match, peer.link, tag) for tag in range(2)]
    frames = [peer.recv() for _ in waiting]
    reply = pb.ExistsResponse(bits=bits).SerializeToString()
    with ThreadPoolExecutor(1) as sender:  # larger than the socket's buffer
        sent = sender.submit(lambda: [peer.frames.send(frame.call_id, frame.method, reply) for frame in frames])
        for call in waiting:
            assert call.result(LATER_S) == 0, "read as another message, which has no such field"
        sent.result(LATER_S)


def test_what_is_too_large_is_refused_before_it_is_sent(peer: Peer, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(InvalidRequest, match=f"limit is {MAX_PAYLOAD_BYTES}"):
        peer.link.call(MATCH, pb.MatchRequest(keys=bytes(MAX_PAYLOAD_BYTES)), deadline_after(LATER_S))
    waiting = threads.submit(match, peer.link)
    peer.answer(peer.recv(), 4)
    assert waiting.result(LATER_S) == 4


def test_a_frame_above_the_limit_ends_the_connection(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(match, peer.link)
    frame = peer.recv()
    peer.frames.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, frame.call_id, frame.method, 0, 0))
    with pytest.raises(Unavailable, match="limit"):
        waiting.result(LATER_S)
    assert len(peer.lost) == 1


def test_no_more_calls_in_flight_than_allowed(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = [threads.submit(match, peer.link, tag) for tag in range(MAX_CALLS_IN_FLIGHT)]
    frames = [peer.recv() for _ in waiting]
    with pytest.raises(DeadlineExceeded, match=f"{MAX_CALLS_IN_FLIGHT} calls"):
        match(peer.link, 1000, SOON_S)
    extra = threads.submit(match, peer.link, 2000)
    peer.answer(frames[0], 1)
    frames.append(peer.recv())
    assert tag_of(frames[-1]) == 2000
    for frame in frames[1:]:
        peer.answer(frame, 1)
    assert [call.result(LATER_S) for call in [*waiting, extra]] == [1] * (MAX_CALLS_IN_FLIGHT + 1)


def release(link: LocalLink, lease_id: int) -> None:
    link.defer(RELEASE, pb.ReleaseRequest(lease_id=lease_id))


def released(frame: Frame) -> int:
    assert frame.method == Method.RELEASE
    return pb.ReleaseRequest.FromString(frame.payload).lease_id


def test_deferred_requests_go_before_the_next_call_in_one_piece(peer: Peer, threads: ThreadPoolExecutor) -> None:
    for lease_id in (1, 2):
        release(peer.link, lease_id)
    assert peer.link.has_deferred
    waiting = threads.submit(match, peer.link, 3)
    frames = [peer.recv() for _ in range(3)]
    assert [released(frame) for frame in frames[:2]] == [1, 2]
    assert tag_of(frames[2]) == 3
    assert not peer.link.has_deferred
    for frame in frames:
        peer.answer(frame, 9)
    assert waiting.result(LATER_S) == 9


def test_deferred_requests_are_bounded_in_flight(peer: Peer, threads: ThreadPoolExecutor) -> None:
    for lease_id in range(MAX_CALLS_IN_FLIGHT + 10):
        release(peer.link, lease_id)
    peer.link.flush()
    peer.link.flush()
    frames = [peer.recv() for _ in range(MAX_CALLS_IN_FLIGHT)]
    assert peer.link.has_deferred
    for frame in frames:
        peer.answer(frame)
    peer.link.flush()
    frames += [peer.recv() for _ in range(10)]
    assert [released(frame) for frame in frames] == list(range(MAX_CALLS_IN_FLIGHT + 10))
    assert not peer.link.has_deferred
    for frame in frames[-10:]:
        peer.answer(frame)
    waiting = threads.submit(match, peer.link)
    peer.answer(peer.recv(), 8)
    assert waiting.result(LATER_S) == 8


def test_a_call_waits_for_its_turn_behind_deferred_ones(peer: Peer, threads: ThreadPoolExecutor) -> None:
    for lease_id in range(MAX_CALLS_IN_FLIGHT):
        release(peer.link, lease_id)
    peer.link.flush()
    waiting = threads.submit(match, peer.link, 9)
    for _ in range(MAX_CALLS_IN_FLIGHT):
        peer.answer(peer.recv())
    peer.answer(peer.recv(), 9)
    assert waiting.result(LATER_S) == 9


def test_deferred_requests_that_could_not_be_sent_go_later(peer: Peer, threads: ThreadPoolExecutor) -> None:
    with pytest.raises(DeadlineExceeded):
        peer.link.call(MATCH, pb.MatchRequest(keys=bytes(3 << 20)), deadline_after(SOON_S))
    release(peer.link, 5)
    with pytest.raises(DeadlineExceeded):
        match(peer.link, 6, SOON_S)
    peer.link.flush()
    assert peer.link.has_deferred
    waiting = threads.submit(match, peer.link, 7)
    assert len(peer.recv().payload) > 3 << 20
    assert released(peer.recv()) == 5
    peer.answer(peer.recv(), 7)
    assert waiting.result(LATER_S) == 7


def test_a_peer_that_reads_nothing_costs_the_deadline_only(peer: Peer, threads: ThreadPoolExecutor) -> None:
    big = pb.MatchRequest(keys=bytes(3 << 20))
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            peer.link.call(MATCH, big, deadline_after(SOON_S))
    seen: list[Frame] = []

    def read() -> None:
        while len(seen) < 2:
            seen.append(peer.recv())
            peer.answer(seen[-1], 5)

    waiting = threads.submit(match, peer.link, 77)
    read()
    assert waiting.result(LATER_S) == 5
    assert len(seen[0].payload) > 3 << 20, "the frame that had begun came whole"
    assert tag_of(seen[1]) == 77, "those of which nothing had been sent never came"


def test_all_callers_hear_of_the_end(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = [threads.submit(match, peer.link, tag) for tag in range(8)]
    for _ in waiting:
        peer.recv()
    peer.frames.close()
    for call in waiting:
        with pytest.raises(Unavailable):
            call.result(LATER_S)
    with pytest.raises(Unavailable):
        match(peer.link)
    assert peer.link.is_lost
    assert len(peer.lost) == 1


def test_close_wakes_the_reader(peer: Peer, threads: ThreadPoolExecutor) -> None:
    waiting = threads.submit(match, peer.link)
    peer.recv()
    peer.link.close()
    with pytest.raises(Unavailable, match="this client closed"):
        waiting.result(LATER_S)
    peer.link.close()
    assert peer.lost == ["this client closed the connection"]


def test_the_end_is_noticed_without_a_call(peer: Peer) -> None:
    peer.link.check_peer()
    assert not peer.lost
    peer.frames.close()
    peer.link.check_peer()
    assert peer.link.is_lost


def test_started_calls_and_late_answers(peer: Peer) -> None:
    late: list[tuple[int, bytes | None]] = []
    calls = [peer.link.start(WAIT, pb.WaitRequest(stop=i), deadline_after(LATER_S)) for i in range(3)]
    frames = [peer.recv() for _ in calls]
    for index, call in enumerate(calls):
        call.on_late(lambda payload, index=index: late.append((index, payload)))  # type: ignore[misc]
    peer.frames.send(frames[1].call_id, Method.WAIT, pb.WaitResponse(ready=11).SerializeToString())
    peer.link.pump()
    assert [call.was_answered for call in calls] == [False, True, False]
    assert calls[1].take(deadline_after(LATER_S)).ready == 11
    with pytest.raises(DeadlineExceeded):
        calls[0].take(0.0)
    peer.frames.send(frames[0].call_id, Method.WAIT, b"")
    peer.frames.send(frames[2].call_id, Method.WAIT, b"")
    peer.link.pump()
    assert late == [(0, b"")], "only the one that was given up"
    assert [call.was_answered for call in calls] == [False, True, True]


def test_many_threads_many_calls(peer: Peer, threads: ThreadPoolExecutor) -> None:
    """Every caller gets its own answer while answers are delayed, reordered and some callers give up."""
    done = threading.Event()

    def serve() -> None:
        held: list[Frame] = []
        with contextlib.suppress(Unavailable, TimeoutError):
            while not done.is_set():
                held.append(peer.frames.recv(SOON_S) if held else peer.recv())
                if len(held) >= 5:
                    for frame in reversed(held):
                        peer.answer(frame, tag_of(frame))
                    held.clear()

    def call(worker: int) -> int:
        wrong = 0
        for i in range(50):
            tag = worker * 1000 + i + 1
            with contextlib.suppress(DeadlineExceeded):
                wrong += match(peer.link, tag, 0.001 if i % 7 == 0 else 0.2) != tag
        return wrong

    server = threads.submit(serve)
    results = [threads.submit(call, worker) for worker in range(8)]
    assert sum(result.result(LATER_S) for result in results) == 0
    done.set()
    peer.link.close()
    server.result(LATER_S)


def test_connect_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no daemon answers at"):
        connect(str(tmp_path / "nobody"), 1.0)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(Unavailable):
            connect(str(tmp_path / "s"), 1.0)
        if os.geteuid() != 0:
            (tmp_path / "s").chmod(0)
            with pytest.raises(PermissionDenied):
                connect(str(tmp_path / "s"), 1.0)


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "1", None])
def test_a_timeout_is_a_number_of_seconds(timeout_s: object) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        deadline_after(timeout_s)  # type: ignore[arg-type]


def test_an_endless_timeout_is_bounded() -> None:
    assert deadline_after(float("inf")) - time.monotonic() < 100_000
