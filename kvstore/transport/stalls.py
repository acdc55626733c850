"""Calls over TCP while they run: so many at a time, and one whose peer does not read, or does not send, is cut off."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

import grpc

from kvstore.protocol.errors import QuotaExceeded, Unavailable

log = logging.getLogger(__name__)


class Stream:
    """One stream. `waiting` around every wait for its peer."""

    __slots__ = ("context", "name", "since_s")

    def __init__(self, name: str, context: grpc.ServicerContext) -> None:
        self.name = name
        self.context = context
        self.since_s = 0.0  # that it waits; 0: it does not

    def take(self, messages: Iterator[bytes]) -> bytes | None:
        """The next message of the peer's; None: it sends no more.

        Raises:
            Unavailable: the peer has gone, or was cut off.
        """
        self.wait_begins()
        try:
            return next(messages, None)
        except grpc.RpcError as error:
            raise Unavailable("the client has gone, or kept the call waiting for too long") from error
        finally:
            self.wait_ends()

    def wait_begins(self) -> None:
        """The next step is the peer's."""
        self.since_s = time.monotonic()

    def wait_ends(self) -> None:
        """The peer has made it."""
        self.since_s = 0.0


class Streams:
    """The calls of a kind that run: so many at a time, so many of one owner."""

    def __init__(self, streams_max: int, owner_max: int, stall_s: float) -> None:
        self._streams_max = streams_max
        self._owner_max = owner_max
        self._stall_s = stall_s
        self._lock = threading.Lock()
        self._running: dict[Stream, object] = {}

    def __len__(self) -> int:
        return len(self._running)

    @contextlib.contextmanager
    def place(self, name: str, owner: object, context: grpc.ServicerContext) -> Iterator[Stream]:
        """A place among the streams.

        Raises:
            QuotaExceeded: all are taken, or all that `owner` may have.
        """
        stream = Stream(name, context)
        with self._lock:
            mine = sum(1 for other in self._running.values() if other == owner)
            if len(self._running) >= self._streams_max or mine >= self._owner_max:
                raise QuotaExceeded(
                    f"{name}: {len(self._running)} such calls are running over TCP, {mine} of them yours; there may be "
                    f"{self._streams_max}, {self._owner_max} of one session: wait for one to end"
                )
            self._running[stream] = owner
        try:
            yield stream
        finally:
            with self._lock:
                self._running.pop(stream, None)

    def cut_stalled(self) -> None:
        """Cancel the streams whose peer keeps them waiting."""
        before_s = time.monotonic() - self._stall_s
        with self._lock:
            stalled = [stream for stream in self._running if 0.0 < stream.since_s < before_s]
        for stream in stalled:
            log.warning("%s was cut off: its peer kept it waiting for %g s", stream.name, self._stall_s)
            stream.context.cancel()  # type: ignore[no-untyped-call]
