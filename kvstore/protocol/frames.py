"""Frames on a Unix stream socket: the local RPC, and the daemon's talk with its agents.

A frame is a 16-byte little-endian header (payload length, call id, method, status, deadline_ms) and a
protobuf message. A status other than 0 is a gRPC status number and the payload is the message in UTF-8.
Descriptors (SCM_RIGHTS) travel with the first byte of the frame that names them.
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
from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from kvstore.protocol.errors import InvalidRequest, Unavailable

HEADER = struct.Struct("<IIHHI")
MAX_PAYLOAD_BYTES = 4 << 20
MAX_CALLS_IN_FLIGHT = 64
MAX_FDS_PER_MESSAGE = 250  # 254 in one message are EINVAL
PROTOCOL_VERSION = 1

_READ_BYTES = 64 << 10
_KEEP_BYTES = 512 << 10  # a batch of 8,192 keys or leased blocks is 256 KiB: no new buffer each time
_PENDING_FDS_MAX = 2 * MAX_FDS_PER_MESSAGE
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * 4)


class Method(IntEnum):
    """Methods of the local RPC; one for every RPC of the KVStore service, and the hello before them."""

    HELLO = 0
    OPEN_SESSION = 1
    OPEN_NAMESPACE = 2
    MAP_SLABS = 3
    MATCH = 4
    EXISTS = 5
    ACQUIRE = 6
    WAIT = 7
    RENEW = 8
    RELEASE = 9
    HANDOFF = 10
    ADOPT = 11
    PUT = 12
    PREFETCH = 13
    DELETE = 14
    CLEAR = 15


class AgentMethod(IntEnum):
    """Methods between the daemon and an agent."""

    CONFIGURE = 0
    MAP_SLAB = 1
    UNMAP_SLAB = 2
    WRITE = 3
    READ = 4
    DELETE = 5
    SCAN = 6
    STATS = 7
    FLUSH = 8
    CLOSE = 9
    CHECK = 10
    COMPACT = 11
    RESIZE = 12


class Frame(NamedTuple):
    """One received frame."""

    call_id: int
    method: int
    status: int
    deadline_ms: int
    payload: bytes


class FrameSocket:
    """A framed stream socket: any thread may send, one thread at a time may receive.

    The socket's own time-out bounds a send (and a recv that names none). A send that fails leaves half a frame
    behind, so it shuts the connection down: nobody can write into the middle of a frame.

    Raises:
        Unavailable: the peer is gone, or descriptors were lost on the way.
        InvalidRequest: the peer announced a frame above MAX_PAYLOAD_BYTES or sent descriptors that nobody asked
            for (the stream is then unusable); or what was to be sent is above a limit (the stream is untouched).
        TimeoutError: the time-out passed before a whole frame came; what came is kept, so that recv() can be
            called again.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected AF_UNIX SOCK_STREAM socket."""
        self.sock = sock
        self._send_lock = threading.Lock()
        self._buffer = bytearray(_READ_BYTES)
        self._start = 0
        self._end = 0
        self._fds: deque[int] = deque()

    def fileno(self) -> int:
        """The descriptor, for poll."""
        return self.sock.fileno()

    def send(
        self, call_id: int, method: int, payload: bytes, status: int = 0, deadline_ms: int = 0, fds: Sequence[int] = ()
    ) -> None:
        """Send one frame whole, with descriptors if any."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(
                f"message of {len(payload)} bytes is above the limit of {MAX_PAYLOAD_BYTES}; split the batch"
            )
        if len(fds) > MAX_FDS_PER_MESSAGE:
            raise InvalidRequest(f"{len(fds)} descriptors are above the limit of {MAX_FDS_PER_MESSAGE} a message")
        data = HEADER.pack(len(payload), call_id, method, status, deadline_ms) + payload
        with self._send_lock:
            try:
                sent = 0
                if fds:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                    sent = self.sock.sendmsg([data], rights)
                if sent < len(data):
                    self.sock.sendall(memoryview(data)[sent:] if sent else data)
            except OSError as error:  # BrokenPipe, reset, a send time-out: the stream is no longer in step
                self._shut_down()
                raise Unavailable(f"connection lost while sending: {error}") from error

    def recv(self, timeout_s: float | None = None) -> Frame:
        """Receive one whole frame.

        Args:
            timeout_s: bound of this call alone; None: the socket's time-out, for each read. A short bound given
                here leaves the sends of other threads their time, which settimeout() would not.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._need(HEADER.size, deadline)
        length, call_id, method, status, deadline_ms = HEADER.unpack_from(self._buffer, self._start)
        if length > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(f"the peer announced a frame of {length} bytes; the limit is {MAX_PAYLOAD_BYTES}")
        self._need(HEADER.size + length, deadline)
        first = self._start + HEADER.size
        payload = bytes(memoryview(self._buffer)[first : first + length])
        self._start = first + length
        return Frame(call_id, method, status, deadline_ms, payload)

    def has_buffered_frame(self) -> bool:
        """Whether recv() would return (or refuse the frame) without touching the socket."""
        have = self._end - self._start
        if have < HEADER.size:
            return False
        length: int = HEADER.unpack_from(self._buffer, self._start)[0]
        return length > MAX_PAYLOAD_BYTES or have - HEADER.size >= length

    def take_fds(self, count: int) -> list[int]:
        """The next `count` descriptors that arrived (fewer where fewer came); the caller owns them."""
        return [self._fds.popleft() for _ in range(min(count, len(self._fds)))]

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took; idempotent."""
        self._close_fds()
        self._shut_down()
        self.sock.close()

    def _shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that is blocked in recv

    def _close_fds(self) -> None:
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.popleft())

    def _need(self, count: int, deadline: float | None) -> None:
        while self._end - self._start < count:
            self._make_room(count)
            if deadline is not None:
                self._await_readable(deadline)
            with memoryview(self._buffer) as view:
                self._fill(view[self._end :])

    def _await_readable(self, deadline: float) -> None:
        fd = self.sock.fileno()
        if fd < 0:
            raise Unavailable("the connection is closed")
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError("no whole frame came in time")

    def _make_room(self, count: int) -> None:
        size = len(self._buffer)
        held = self._end - self._start
        if held == 0:
            self._start = self._end = 0
        if size > _KEEP_BYTES and max(count, held) <= _READ_BYTES:
            size = _READ_BYTES  # a rare large frame is over: do not keep its 4 MiB for every session
        elif self._start + count <= size:
            return
        size = max(count, size)
        if size == len(self._buffer):
            self._buffer[:held] = self._buffer[self._start : self._end]
        else:
            fresh = bytearray(size)
            fresh[:held] = self._buffer[self._start : self._end]
            self._buffer = fresh
        self._start, self._end = 0, held

    def _fill(self, view: memoryview) -> None:
        try:
            # A plain recv_into drops passed descriptors silently.
            count, ancillary, flags, _ = self.sock.recvmsg_into([view], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            raise
        except BlockingIOError as error:
            raise TimeoutError("no whole frame has come yet") from error
        except OSError as error:
            raise Unavailable(f"connection lost while receiving: {error}") from error
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        self._check_fds(flags)
        if count == 0:
            raise Unavailable("the peer closed the connection")
        self._end += count

    def _check_fds(self, flags: int) -> None:
        """Refuse what would pair a descriptor with the wrong frame, or fill the descriptor table."""
        if flags & socket.MSG_CTRUNC:  # out of descriptors: the kernel dropped some, the next ones would shift
            self._close_fds()
            self._shut_down()
            raise Unavailable("passed descriptors were lost; raise the NOFILE limit of this process")
        if len(self._fds) > _PENDING_FDS_MAX:
            self._close_fds()
            self._shut_down()
            raise InvalidRequest(f"the peer sent more than {_PENDING_FDS_MAX} descriptors that nobody took")
