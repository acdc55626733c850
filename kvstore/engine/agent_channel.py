"""Calls to an agent over its socket: many threads ask, one thread hears the answers."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Final

from kvstore.protocol.errors import KVStoreError, QuotaExceeded, Unavailable, from_code
from kvstore.protocol.frames import AgentMethod, Frame, FrameSocket

# How many calls of a kind may be on their way: enough to keep the agent's threads busy, so few that the last one in
# its queue is answered well within its time, and together below MAX_CALLS_IN_FLIGHT.
IN_FLIGHT: Final[Mapping[AgentMethod, int]] = {
    AgentMethod.MAP_SLAB: 2,
    AgentMethod.UNMAP_SLAB: 2,
    AgentMethod.WRITE: 4,
    AgentMethod.READ: 8,
    AgentMethod.DELETE: 2,
    AgentMethod.SCAN: 2,
    AgentMethod.STATS: 1,
    AgentMethod.FLUSH: 1,
    AgentMethod.CLOSE: 1,
    AgentMethod.CHECK: 1,
    AgentMethod.COMPACT: 1,
    AgentMethod.RESIZE: 1,
}

_DRAIN_S = 1.0

_log = logging.getLogger(__name__)


class AgentLost(Unavailable):
    """The agent is gone, late, or out of step: it can still touch what it was given until its process is reaped."""


class AgentLate(AgentLost):
    """The agent is there and did not answer in time."""


class AgentConfused(AgentLost):
    """The agent answers what nobody has asked."""


TakePart = Callable[[bytes], bool]
"""Takes the payload of a reply, on the receiving thread, and says whether it was the call's last.

It must neither block for long nor call the agent. It raises AgentConfused where the payload is no answer.
"""


class Call:
    """One frame on its way, to be answered within `timeout_s`."""

    __slots__ = ("_answered", "_deadline_s", "_frame", "_take_part", "_window", "_wrong", "method", "timeout_s")

    def __init__(
        self, method: AgentMethod, window: threading.BoundedSemaphore, timeout_s: float, take_part: TakePart | None
    ) -> None:
        """A call that holds one place of `window` until it is answered."""
        self.method = method
        self.timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._window = window
        self._take_part = take_part
        self._answered = threading.Event()
        self._frame: Frame | None = None
        self._wrong: AgentConfused | None = None

    def take(self, frame: Frame) -> bool:
        """Look at a reply; whether it is the call's last."""
        if self._take_part is None or frame.status:
            return True
        try:
            return self._take_part(frame.payload)
        except AgentConfused as error:
            self._wrong = error
            return True

    def answer(self, frame: Frame | None) -> None:
        """Hand over the last reply (None: there will be none); once."""
        self._frame = frame
        self._window.release()
        self._answered.set()

    def result(self) -> bytes:
        """Wait for the last reply's payload.

        Raises:
            AgentLate: it did not come before the deadline.
            AgentConfused: it is no answer to this call.
            AgentLost: it will not come.
            KVStoreError: the agent refused the call, by its status.
        """
        if not self._answered.wait(max(0.0, self._deadline_s - time.monotonic())):
            raise AgentLate(f"no answer to {self.method.name} within {self.timeout_s:g} s")
        if self._wrong is not None:
            raise self._wrong
        if self._frame is None:
            raise AgentLost(f"the agent went away during {self.method.name}")
        if self._frame.status:
            raise from_code(self._frame.status, self._frame.payload.decode(errors="replace"))
        return self._frame.payload


class AgentChannel:
    """The pending table of one connection; safe to use from any thread.

    A call holds one of the IN_FLIGHT places of its method from before it is sent until it is answered: time-outs
    count work and not waiting, and a long batch of one kind cannot crowd out another.
    """

    def __init__(self, frames: FrameSocket, send_timeout_s: float) -> None:
        """Take over a connected socket. A send that does not get through in `send_timeout_s` loses the agent."""
        seconds, fraction = divmod(send_timeout_s, 1)
        # Not settimeout(): that would wake the receiving thread, too, for nothing.
        frames.sock.settimeout(None)
        limit = struct.pack("ll", int(seconds), int(fraction * 1e6))
        frames.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self._frames = frames
        self._windows = {method: threading.BoundedSemaphore(places) for method, places in IN_FLIGHT.items()}
        self._lock = threading.Lock()
        self._pending: dict[int, Call] = {}
        self._ids = count(1)
        self._gone = False
        self._receiver = threading.Thread(target=self._receive, name="agent-receiver", daemon=True)
        self._receiver.start()

    def call(
        self,
        method: AgentMethod,
        payload: bytes,
        timeout_s: float,
        fds: Sequence[int] = (),
        take_part: TakePart | None = None,
    ) -> Call:
        """Send a request; its time runs from here. With `take_part` it may be answered by several frames.

        Raises:
            AgentLost: it is gone, or did not take the request in.
            QuotaExceeded: no place became free within `timeout_s`; nothing was sent.
        """
        window = self._windows[method]
        if not window.acquire(timeout=timeout_s):
            raise QuotaExceeded(f"the agent is busy: no place for {method.name} within {timeout_s:g} s")
        call = Call(method, window, timeout_s, take_part)
        with self._lock:
            call_id = next(self._ids) & 0xFFFFFFFF
            if not self._gone:
                self._pending[call_id] = call
            lost = self._gone
        if lost:
            call.answer(None)
            raise AgentLost("the agent is gone")
        try:
            self._frames.send(call_id, method, payload, fds=fds)
        except KVStoreError as error:
            self._answer(call_id, None)
            if isinstance(error, Unavailable):
                raise AgentLost(str(error)) from error
            raise
        return call

    def close(self) -> None:
        """End the connection and every call on it; idempotent."""
        self._receiver.join(_DRAIN_S)  # of a reaped agent: until its last answers are heard
        self._frames.close()
        self._receiver.join()

    def _answer(self, call_id: int, frame: Frame | None) -> None:
        with self._lock:
            call = self._pending.pop(call_id, None)
        if call is not None:  # else: given up by its sender
            call.answer(frame)

    def _receive(self) -> None:
        try:
            while True:
                frame = self._frames.recv()
                with self._lock:
                    call = self._pending.get(frame.call_id)
                if call is not None and call.take(frame):  # else: given up by its sender, or more is to come
                    self._answer(frame.call_id, frame)
        except KVStoreError:  # the end of the connection, or an oversize frame: out of step either way
            self._end()
        except Exception:  # noqa: BLE001 - without this nobody would ever hear an answer again
            _log.exception("an answer of an agent met a defect")
            self._end()

    def _end(self) -> None:
        with self._lock:
            self._gone = True
            orphans = list(self._pending.values())
            self._pending.clear()
        for call in orphans:
            call.answer(None)
