"""The daemon's end of an attach socket's byte stream.

`kvstore.protocol.frames.FrameSocket` serves both peers of a trusted connection. This end differs in three ways:
it takes no descriptors (a plain recv makes the kernel drop what a peer passes, so nobody can fill our descriptor
table), it gives up on a peer that does not read, and it is made for the shortest way from recv to send.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.protocol.errors import InvalidRequest, Unavailable
from kvstore.protocol.frames import HEADER, MAX_PAYLOAD_BYTES

_READ_BYTES = 64 << 10
_HEADER_BYTES = HEADER.size
_TIMEVAL = struct.Struct("ll")
_NOW = socket.MSG_DONTWAIT


class Request(NamedTuple):
    """One received frame."""

    call_id: int
    method: int
    status: int
    deadline_ms: int
    payload: bytes


class OversizeFrame(InvalidRequest):
    """A frame above the limit was announced: it can be answered, and then the stream is of no use."""

    def __init__(self, call_id: int, method: int, length: int, limit: int = MAX_PAYLOAD_BYTES) -> None:
        super().__init__(f"frame of {length} bytes is above the limit of {limit}; split the batch")
        self.call_id = call_id
        self.method = method


class FrameReader:
    """Reads frames from a blocking socket; one thread only.

    `spin_s` is how long `poll` goes on before one should rather sleep. Waking a sleeping thread on another core costs
    30 us and more where an idle core halts (measured in a virtual machine: a bare Python echo 68 us with both
    sides asleep, 23 us with one side polling).
    """

    def __init__(self, sock: socket.socket, spin_s: float) -> None:
        self._recv = sock.recv
        self._recv_into = sock.recv_into
        self._spin_s = spin_s
        self._rest = b""  # received beyond the last frame

    def poll(self) -> bool:
        """Poll for bytes of a next frame for up to `spin_s`; says whether there are any. `receive` then finds them.

        Raises:
            Unavailable: the peer is gone.
        """
        until_s = time.monotonic() + self._spin_s
        while not self._rest and time.monotonic() < until_s:
            with contextlib.suppress(BlockingIOError):
                self._rest = self._read(_NOW)
        return bool(self._rest)

    def receive(self, limit: int = MAX_PAYLOAD_BYTES) -> Request:
        """The next frame.

        Raises:
            Unavailable: the peer is gone.
            OversizeFrame: it announced a frame above `limit`. Nothing was allocated for it.
        """
        data = self._rest
        if data:
            self._rest = b""
        else:
            data = self._read()
        if len(data) < _HEADER_BYTES:
            data = self._read_to(data, _HEADER_BYTES)
        length, call_id, method, status, deadline_ms = HEADER.unpack_from(data)
        total = _HEADER_BYTES + length
        if len(data) != total:
            if length > limit:
                raise OversizeFrame(call_id, method, length, limit)
            if len(data) < total:
                data = self._read_to(data, total)
            if len(data) > total:
                self._rest = data[total:]
                data = data[:total]
        return Request(call_id, method, status, deadline_ms, data[_HEADER_BYTES:])

    def _read(self, flags: int = 0) -> bytes:
        try:
            data = self._recv(_READ_BYTES, flags)
        except BlockingIOError:
            raise
        except OSError as error:
            raise Unavailable(f"connection lost while receiving: {error}") from error
        if not data:
            raise Unavailable("the peer closed the connection")
        return data

    def _read_to(self, data: bytes, count: int) -> bytes:
        """Read on until exactly `count` bytes are there."""
        buffer = bytearray(count)
        have = len(data)
        buffer[:have] = data
        while have < count:  # once, but for a signal or an ending connection: each turn must win the GIL back
            try:
                got = self._recv_into(memoryview(buffer)[have:], 0, socket.MSG_WAITALL)
            except OSError as error:
                raise Unavailable(f"connection lost while receiving: {error}") from error
            if not got:
                raise Unavailable("the peer closed the connection")
            have += got
        return bytes(buffer)


class ReplyWriter:
    """Sends replies whole, from any thread, and gives up after `timeout_s` on a peer that does not read."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        # A time-out in the kernel: Python's own would cost a poll() before every send and recv.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6)))

    def reply(
        self, call_id: int, method: int, payload: bytes, status: int = 0, settles: set[int] | None = None
    ) -> None:
        """Send one reply.

        The id leaves `settles`, the calls in flight, just before: a peer that sends its next call on seeing the
        reply is not above its limit, and who finds the set empty needs only `wait_idle` to know that all is sent.

        Raises:
            Unavailable: the peer is gone or does not read; the stream is no longer in step.
        """
        data = HEADER.pack(len(payload), call_id, method, status, 0) + payload
        with self._lock:
            if settles is not None:
                settles.discard(call_id)
            try:
                sent = self._sock.send(data)
                if sent != len(data):
                    self._send_rest(memoryview(data)[sent:])
            except OSError as error:  # BlockingIOError: SO_SNDTIMEO passed
                raise Unavailable(f"the peer does not take its replies: {error}") from error

    def reply_with_descriptors(self, call_id: int, method: int, payload: bytes, fds: Sequence[int]) -> None:
        """Send one reply, its descriptors with its first byte. Raises as `reply` does."""
        data = HEADER.pack(len(payload), call_id, method, 0, 0) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._lock:
            try:
                sent = self._sock.sendmsg([data], rights)
                if sent != len(data):
                    self._send_rest(memoryview(data)[sent:])
            except OSError as error:
                raise Unavailable(f"the descriptors could not be sent: {error}") from error

    def wait_idle(self, timeout_s: float) -> None:
        """Wait, within bounds, until no reply is being sent."""
        if self._lock.acquire(timeout=timeout_s):
            self._lock.release()

    def close(self) -> None:
        """Close the socket, never under a send: its number could be another socket's by then."""
        with self._lock:
            self._sock.close()

    def _send_rest(self, rest: memoryview) -> None:
        until_s = time.monotonic() + self._timeout_s
        while rest:
            if time.monotonic() > until_s:  # SO_SNDTIMEO alone is content with a byte now and then
                raise TimeoutError("it reads too slowly")
            rest = rest[self._sock.send(rest) :]
