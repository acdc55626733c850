"""What workers ask for, kept for a moment for an operator who records it (kvctl record).

Nobody pays for it while nobody records: an acquire tests one attribute. While somebody does, an acquire leaves a
reference to the keys that it came with (1.6 us, and 6 us to hand 256 of them on). Hashing those would take 270 us of
the interpreter lock, so it is the recorder's, in a process of its own. A recorder that is too slow loses requests,
which are counted, and one that has died is forgotten after `_IDLE_S`.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstore.core.block import Namespace
from kvstore.core.reads import AcquireGroup
from kvstore.protocol.errors import NotFound, QuotaExceeded
from kvstore.v1 import admin_pb2

_IDLE_S = 5.0  # kvctl asks five times a second
_RING_BYTES = 32 << 20  # a million blocks: two seconds of 2,000 requests a second for 256 blocks each
_ENTRY_BYTES = 512  # what a request takes beside its keys
_REPLY_BYTES = 1 << 20  # of one reply, or one request alone
_LONGEST_BYTES = (4 << 20) - 1024  # of keys: with all else in it, the reply still fits what gRPC lets through


class _Entry(NamedTuple):
    time_s: float
    namespace: Namespace
    keys: bytes


class Recorder:
    """One recording at a time. Any thread may call; its own lock is held for O(1) a request."""

    def __init__(self, clock: Callable[[], float], ring_bytes: int = _RING_BYTES) -> None:
        """`clock` in seconds, monotonic; `ring_bytes`: what waits for the recorder at most."""
        self.armed = False
        self._clock = clock
        self._ring_bytes = ring_bytes
        self._lock = threading.Lock()
        self._recording = 0
        self._forget()

    def note(self, groups: Sequence[AcquireGroup]) -> None:
        """An acquire has come. Each group of a prefix is one request; others cannot be replayed as one."""
        with self._lock:
            if not self.armed:  # it has ended since the caller looked
                return
            now_s = self._clock()
            for namespace, keys, last, _ in groups:
                nbytes = len(keys) + _ENTRY_BYTES
                if last or not namespace.chain:
                    self._left_out += 1
                elif self._held_bytes + nbytes > self._ring_bytes or len(keys) > _LONGEST_BYTES:
                    self._dropped += 1
                else:
                    self._ring.append(_Entry(now_s, namespace, keys))
                    self._held_bytes += nbytes

    def take(self, request: admin_pb2.RecordRequest) -> admin_pb2.RecordResponse:
        """The next requests of a recording, or the beginning of one.

        Raises:
            QuotaExceeded: somebody else records.
            NotFound: the recording has ended.
        """
        self.expire()
        with self._lock:
            self._enter(request.recording)
            self._asked_s = self._clock()
            self._acknowledge(request.after)
            entries = self._next()
            reply = admin_pb2.RecordResponse(
                recording=self._recording,
                waiting=len(self._ring) - len(entries),
                dropped=self._dropped,
                left_out=self._left_out,
            )
            began_s = self._began_s
            if request.stop:
                self._end()
        for time_s, namespace, keys in entries:
            reply.requests.add(
                time_us=round(1e6 * (time_s - began_s)),
                namespace=namespace.digest,
                block_tokens=namespace.block_tokens,
                keys=keys,
            )
        return reply

    def expire(self) -> None:
        """End a recording that nobody has asked for of late."""
        with self._lock:
            if self.armed and self._clock() - self._asked_s > _IDLE_S:
                self._end()

    def _enter(self, recording: int) -> None:
        if not recording:
            if self.armed:
                raise QuotaExceeded("somebody records already; one recording at a time")
            self._recording = secrets.randbits(64) or 1
            self._began_s = self._clock()
            self.armed = True
        elif not self.armed or recording != self._recording:
            raise NotFound(f"this recording has ended: nobody asked for it for {_IDLE_S:.0f} s, or it was stopped")

    def _acknowledge(self, after: int) -> None:
        while self._ring and self._passed < after:
            self._passed += 1
            self._held_bytes -= len(self._ring.popleft().keys) + _ENTRY_BYTES

    def _next(self) -> list[_Entry]:
        entries: list[_Entry] = []
        nbytes = 0
        for entry in self._ring:
            nbytes += len(entry.keys) + _ENTRY_BYTES
            if entries and nbytes > _REPLY_BYTES:
                break
            entries.append(entry)
        return entries

    def _end(self) -> None:
        self.armed = False
        self._forget()

    def _forget(self) -> None:
        self._ring: deque[_Entry] = deque()
        self._held_bytes = 0
        self._passed = 0  # requests that the recorder has, and the ring no more
        self._dropped = 0
        self._left_out = 0
        self._began_s = 0.0
        self._asked_s = 0.0
