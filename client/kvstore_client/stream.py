"""Frames in from a socket and out to it: the local RPC's two halves, tuned for a caller that waits for its own answer.

kvstore.protocol.frames has the format. Its FrameSocket asks poll() before every read to bound it; here the
kernel's own receive time-out does that, which leaves one system call and one hand-over of the GIL an answer: with
another Python thread busy, each hand-over can cost the switch interval of 5 ms.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from typing import NamedTuple

from kvstore.protocol.errors import PermissionDenied, Unavailable
from kvstore.protocol.frames import HEADER, MAX_FDS_PER_MESSAGE, MAX_PAYLOAD_BYTES

_BUFFER_BYTES = 64 << 10
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * 4)
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_TIMEVAL = struct.Struct("@ll")
_REARM_S = 0.001  # an armed time-out this close to the wanted one is left alone: setting it costs 1 us


def connect(path: str, timeout_s: float) -> socket.socket:
    """A connection to an attach socket.

    Raises:
        Unavailable: nobody listens there, or not in time.
        PermissionDenied: the socket's mode or group keeps this user out.
    """
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:  # no descriptor left
        raise Unavailable(f"no socket to be had: {error.strerror}") from error
    try:
        sock.settimeout(max(timeout_s, 0.001))
        sock.connect(path)
        sock.settimeout(None)
    except BaseException as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise PermissionDenied(f"this user may not connect to {path}: {error.strerror}") from error
        if isinstance(error, OSError):
            raise Unavailable(f"no daemon answers at {path}: {error.strerror or error}") from error
        raise
    return sock


class Answer(NamedTuple):
    """One received frame."""

    call_id: int
    method: int
    status: int
    payload: bytes


class AnswerReader:
    """Reads frames off a connected, blocking AF_UNIX SOCK_STREAM socket; one thread at a time.

    Attributes:
        fds: descriptors that arrived and that nobody has taken. The kernel ends a read after the message that
            carried descriptors, so they are those of the next frame popped that can have any: frames without may
            come before it in the same read.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._armed_s = 0.0
        self.fds: list[int] = []

    def pop(self) -> Answer | None:
        """The next whole frame that has been read; None if there is none.

        Raises:
            Unavailable: the peer announced a frame that is too long, so the stream cannot be read on.
        """
        start = self._start
        if self._end - start < HEADER.size:
            return None
        length, call_id, method, status, _ = HEADER.unpack_from(self._buffer, start)
        if length > MAX_PAYLOAD_BYTES:
            raise Unavailable(f"the daemon announced a frame of {length} bytes; the limit is {MAX_PAYLOAD_BYTES}")
        first = start + HEADER.size
        stop = first + length
        if stop > self._end:
            self._make_room(HEADER.size + length)
            return None
        if stop == self._end:
            self._start = self._end = 0
        else:
            self._start = stop
        return Answer(call_id, method, status, self._view[first:stop].tobytes())

    def fill(self, timeout_s: float) -> bool:
        """Read what there is, after a wait of at most `timeout_s` seconds for it; 0: without waiting.

        Returns:
            Whether anything was read.

        Raises:
            Unavailable: the connection is lost.
        """
        flags = socket.MSG_CMSG_CLOEXEC
        if timeout_s <= 0:
            flags |= socket.MSG_DONTWAIT
        elif abs(timeout_s - self._armed_s) > _REARM_S:
            self._arm(timeout_s)
        if self._end == len(self._buffer):
            self._make_room(0)
        try:
            # A plain recv_into drops passed descriptors silently.
            count, ancillary, got, _ = self._sock.recvmsg_into([self._view[self._end :]], _ANCILLARY_BYTES, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Unavailable(f"the connection to the daemon was lost: {error}") from error
        if ancillary:
            self._keep_fds(ancillary)
        if got & socket.MSG_CTRUNC:
            raise Unavailable("the kernel dropped passed descriptors: this process has too many open files")
        if count == 0:
            raise Unavailable("the daemon closed the connection")
        self._end += count
        return True

    def close(self) -> None:
        """Close descriptors that nobody took."""
        close_all(self.fds)

    def _arm(self, timeout_s: float) -> None:
        whole = int(timeout_s)
        micros = max(int((timeout_s - whole) * 1e6), 1000)  # 0 would mean for ever
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(whole, micros))
        except OSError as error:  # closed by another thread
            raise Unavailable(f"the connection to the daemon was lost: {error}") from error
        self._armed_s = timeout_s

    def _make_room(self, needed: int) -> None:
        """Make sure that a frame of `needed` bytes, and at least one byte more than is held, fits behind `_start`."""
        held = self._end - self._start
        if self._start + max(needed, held + 1) <= len(self._buffer):
            return
        size = max(needed, held + 1, _BUFFER_BYTES)
        fresh = bytearray(size)
        fresh[:held] = self._view[self._start : self._end]
        self._buffer, self._view = fresh, memoryview(fresh)
        self._start, self._end = 0, held

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.fds.extend(fds)


def close_all(fds: list[int]) -> None:
    """Close descriptors and empty the list."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())


class FrameWriter:
    """Sends frames whole over a connected, blocking socket, in bounded time; any thread may use it.

    What the daemon does not take in time of a frame that has begun is kept and goes out before the next frame, so
    the stream stays in step.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._unsent: memoryview | None = None

    def send(self, data: bytes, deadline_s: float) -> bool:
        """Send a frame; False if no byte of it went before the deadline.

        Raises:
            Unavailable: the connection is lost.
        """
        if not self._lock.acquire(timeout=max(deadline_s - time.monotonic(), 0)):
            return False
        try:
            if self._unsent is None:
                sent = self._push(data)
                if sent == len(data):
                    return True
                return self._send_slowly(data, sent, deadline_s)
            return self._send_slowly(data, 0, deadline_s)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close the socket, once no send is in a system call with its descriptor. Shut it down first."""
        with self._lock:
            self._sock.close()

    def _send_slowly(self, data: bytes, sent: int, deadline_s: float) -> bool:
        while True:
            if sent == 0 and self._unsent is not None:
                self._unsent = self._unsent[self._push(self._unsent) :] or None
            if self._unsent is None:
                sent += self._push(memoryview(data)[sent:])
                if sent == len(data):
                    return True
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0 or not self._await_room(remaining_s):
                break
        if sent:
            self._unsent = memoryview(data)[sent:]
        return sent > 0

    def _push(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data, _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Unavailable(f"the connection to the daemon was lost: {error.strerror or error}") from error

    def _await_room(self, remaining_s: float) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        return bool(poller.poll(remaining_s * 1000))
