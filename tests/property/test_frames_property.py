"""Frames under hypothesis: however the stream is cut, the frames and their descriptors come out whole."""

from __future__ import annotations

import os
import socket
from array import array

from hypothesis import given
from hypothesis import strategies as st

from kvstore.protocol.frames import HEADER, Frame, FrameSocket

u16, u32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
sent_frames = st.lists(st.builds(Frame, u32, u16, u16, u32, st.binary(max_size=60)), min_size=1, max_size=6)


@given(sent_frames, st.lists(st.integers(1, 40), max_size=20))
def test_any_cut_of_the_stream_gives_the_same_frames(sent: list[Frame], steps: list[int]) -> None:
    stream = b"".join(
        HEADER.pack(len(f.payload), f.call_id, f.method, f.status, f.deadline_ms) + f.payload for f in sent
    )
    left, right = socket.socketpair()
    reader = FrameSocket(right)
    received: list[Frame] = []
    try:
        at = 0
        for step in [*steps, len(stream)]:
            left.sendall(stream[at : at + step])
            at += step
            received += drain(reader)
    finally:
        left.close()
        reader.close()
    assert received == sent


def drain(reader: FrameSocket) -> list[Frame]:
    frames: list[Frame] = []
    while True:
        try:
            frames.append(reader.recv(timeout_s=0))
        except TimeoutError:
            return frames


@given(st.lists(st.tuples(st.binary(max_size=30), st.integers(0, 4)), min_size=1, max_size=6))
def test_descriptors_stay_with_their_frame(calls: list[tuple[bytes, int]]) -> None:
    left, right = (FrameSocket(sock) for sock in socket.socketpair())
    count_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # a count, as cheap as can be
    try:
        for call_id, (payload, count) in enumerate(calls):
            fds = [os.memfd_create("property") for _ in range(count)]
            for i, fd in enumerate(fds):
                os.pwrite(fd, array("I", [call_id, i]).tobytes(), 0)
            left.send(call_id, 3, payload, fds=fds)
            for fd in fds:
                os.close(fd)
        for call_id, (payload, count) in enumerate(calls):
            assert right.recv(timeout_s=20.0) == Frame(call_id, 3, 0, 0, payload)
            for i, fd in enumerate(right.take_fds(count)):
                assert os.pread(fd, 8, 0) == array("I", [call_id, i]).tobytes()
                os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == count_before  # noqa: PTH208
    finally:
        left.close()
        right.close()
