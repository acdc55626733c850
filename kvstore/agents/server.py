"""Serves a tier over a framed socket: one thread parses and dispatches, lanes do the work."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from kvstore.agents import messages
from kvstore.agents.lanes import Lane
from kvstore.agents.media import Durable, Medium
from kvstore.agents.memory import MappedSlabs
from kvstore.agents.reading import Reading
from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, QuotaExceeded, Unavailable
from kvstore.protocol.frames import MAX_CALLS_IN_FLIGHT, AgentMethod, Frame, FrameSocket
from kvstore.tiers.base import Outcome, ReadAhead, TierItem
from kvstore.v1 import agent_pb2

_ENCODER_THREADS = 2

_log = logging.getLogger(__name__)

Handler = Callable[[bytes], bytes]  # payload of the request to payload of the reply


class AgentServer:
    """One connection's calls.

    The receiving thread only parses. Loads, saves, deletes, syncs, questions and upkeep have threads of their own, so
    that none waits behind another kind: above all no load behind a save. A save is encoded on the thread that serves
    it and committed by the tier's writer; two of them keep one batch encoding while the other is committed, and bound
    the memory that encoded blocks take.

    Replies carry the call id and come in any order. What a tier raises on purpose, and what the kernel refuses, becomes
    the status of that call; anything else is a defect and ends the process, which the supervisor then replaces.
    """

    def __init__(self, frames: FrameSocket, medium: Medium, memory: MappedSlabs, reader_threads: int) -> None:
        """Serve `medium`, whose ranges `memory` resolves."""
        self._frames = frames
        self._medium = medium
        self._tier = medium.tier
        self._durable = medium.durable
        self._memory = memory
        self._count_lock = threading.Lock()
        self._in_flight = 0
        self._reads = reads = Lane("read", reader_threads)
        saves, deletes, syncs = Lane("encode", _ENCODER_THREADS), Lane("delete", 1), Lane("sync", 1)
        questions, upkeep = Lane("question", 1), Lane("upkeep", 1)
        self._hints = Lane("hint", 1)
        self._lanes = (reads, saves, deletes, syncs, questions, upkeep, self._hints)
        self._calls: dict[int, tuple[Lane, Handler]] = {
            AgentMethod.WRITE: (saves, self._write),
            AgentMethod.DELETE: (deletes, self._delete),
            AgentMethod.FLUSH: (syncs, self._flush),
            AgentMethod.SCAN: (questions, self._scan),
            AgentMethod.STATS: (questions, self._stats),
            AgentMethod.CHECK: (upkeep, self._check),
            AgentMethod.COMPACT: (upkeep, self._compact),
            AgentMethod.RESIZE: (upkeep, self._resize),
        }
        self._immediate: dict[int, Handler] = {
            AgentMethod.MAP_SLAB: self._map_slab,
            AgentMethod.UNMAP_SLAB: self._unmap_slab,
        }

    def serve(self) -> None:
        """Answer calls until CLOSE (what is queued is finished first) or the end of the connection (it is not)."""
        while True:
            try:
                frame = self._frames.recv()
            except Unavailable:
                self._shut_down(finish=False)
                return
            except InvalidRequest as error:  # an oversize frame: the stream is out of step from here on
                self._reply(Frame(0, 0, 0, 0, b""), str(error).encode(), error.code)
                self._shut_down(finish=False)
                return
            if frame.method == AgentMethod.CLOSE:
                self._shut_down(finish=True)
                self._reply(frame, agent_pb2.AgentCloseResponse().SerializeToString())
                return
            self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if frame.method in self._immediate:
            self._answer(frame, self._immediate[frame.method])
            return
        call = self._calls.get(frame.method)
        if call is None and frame.method != AgentMethod.READ:
            self._reply(frame, f"unknown method {frame.method}".encode(), InvalidRequest.code)
            return
        with self._count_lock:
            room = self._in_flight < MAX_CALLS_IN_FLIGHT
            self._in_flight += room
        if not room:
            self._reply(frame, f"{MAX_CALLS_IN_FLIGHT} calls are in flight already".encode(), QuotaExceeded.code)
        elif call is None:
            self._begin_read(frame)
        else:
            lane, handler = call
            lane.submit(partial(self._run, frame, handler))

    def _begin_read(self, frame: Frame) -> None:
        """Share a READ out among the readers, in prefix order."""
        try:
            items = messages.decode_items(frame.payload, self._memory)
        except InvalidRequest as error:
            self._finished()
            self._reply(frame, str(error).encode(), error.code)
            return
        if not items:
            self._finished()
            self._reply(frame, messages.encode_outcomes([]))
            return
        reading = Reading(items, self._read, partial(self._reply, frame))
        parts = list(reading.parts())
        self._medium.loads.begin(len(parts))
        if self._medium.ahead is not None and len(parts) > 1:
            self._hints.submit(partial(self._hint, self._medium.ahead, items))
        for start, stop in parts:
            self._reads.submit(partial(self._read_part, reading, start, stop))

    def _hint(self, ahead: ReadAhead, items: Sequence[TierItem]) -> None:
        """Have the disk read what the readers will come to; on a thread of its own, for a full queue makes it wait."""
        try:
            ahead.prefetch(items)
        except OSError as error:
            _log.warning("tier %s: no read-ahead: %s", self._tier.name, error)

    def _read_part(self, reading: Reading, start: int, stop: int) -> None:
        last = reading.read_part(start, stop)
        self._medium.loads.end()
        if last:
            self._finished()
        self._end_if_failed()

    def _read(self, items: Sequence[TierItem]) -> list[Outcome]:
        try:
            outcomes = self._tier.read(items)
        except (OSError, KeyError) as error:  # a disk or mmap error; a slab that was unmapped under the call
            _log.warning("tier %s: %d reads failed: %s: %s", self._tier.name, len(items), type(error).__name__, error)
            return [Outcome.BUSY] * len(items)
        if self._durable is not None and self._durable.failure:  # it finds nothing any more: that says nothing
            return [Outcome.BUSY if outcome is Outcome.MISSING else outcome for outcome in outcomes]
        return outcomes

    def _run(self, frame: Frame, handler: Handler) -> None:
        self._answer(frame, handler, counted=True)
        self._end_if_failed()

    def _end_if_failed(self) -> None:
        if self._durable is not None and self._durable.failure:
            _log.error("tier %s cannot go on: %s", self._tier.name, self._durable.failure)
            with contextlib.suppress(OSError):  # another lane was faster
                # The receiving thread closes the tier; a fresh process repairs it.
                self._frames.sock.shutdown(socket.SHUT_RDWR)

    def _finished(self) -> None:
        with self._count_lock:
            self._in_flight -= 1

    def _answer(self, frame: Frame, handler: Handler, *, counted: bool = False) -> None:
        payload, status = b"", 0
        try:
            payload = handler(frame.payload)
        except KVStoreError as error:
            payload, status = str(error).encode(), error.code
        except (OSError, KeyError) as error:  # a disk or mmap error; a slab that was unmapped under the call
            payload, status = f"{type(error).__name__}: {error}".encode(), InternalError.code
        if counted:
            self._finished()
        self._reply(frame, payload, status)

    def _reply(self, frame: Frame, payload: bytes, status: int = 0) -> None:
        try:
            self._frames.send(frame.call_id, frame.method, payload, status)
        except Unavailable:
            return  # nobody is left to hear it; the receiving thread sees the end of the connection itself

    def _shut_down(self, *, finish: bool) -> None:
        for lane in self._lanes:
            lane.stop(finish=finish)
        for lane in self._lanes:
            lane.join()
        self._tier.close()
        self._memory.close()

    def _map_slab(self, payload: bytes) -> bytes:
        fds = self._frames.take_fds(1)
        try:
            request = messages.parse(agent_pb2.AgentMapSlab, payload)
            if not fds:
                raise InvalidRequest(f"slab {request.slab_id}: no descriptor came with it")
            self._memory.map(request.slab_id, fds[0], request.segment_bytes)
        finally:
            for fd in fds:
                os.close(fd)
        return b""

    def _unmap_slab(self, payload: bytes) -> bytes:
        self._memory.unmap(messages.parse(agent_pb2.AgentUnmapSlab, payload).slab_id)
        return b""

    def _write(self, payload: bytes) -> bytes:
        return messages.encode_written(self._tier.write(messages.decode_items(payload, self._memory)))

    def _delete(self, payload: bytes) -> bytes:
        self._tier.delete(messages.decode_refs(payload))
        return b""

    def _scan(self, payload: bytes) -> bytes:
        after, limit = messages.decode_scan(payload)
        return messages.encode_records(islice(self._lasting().scan(after), limit))

    def _stats(self, payload: bytes) -> bytes:
        messages.parse(agent_pb2.AgentStatsRequest, payload)
        values = {**self._tier.stats(), **self._medium.stats()}
        return agent_pb2.AgentStatsResponse(values=values).SerializeToString()

    def _flush(self, payload: bytes) -> bytes:
        messages.parse(agent_pb2.AgentFlushRequest, payload)
        if self._durable is not None:
            self._durable.flush()
        return agent_pb2.AgentFlushResponse().SerializeToString()

    def _check(self, payload: bytes) -> bytes:
        after, limit, repair = messages.decode_check(payload)
        return messages.encode_checked(self._lasting().check(after, limit, repair))

    def _compact(self, payload: bytes) -> bytes:
        messages.parse(agent_pb2.AgentCompactRequest, payload)
        return messages.encode_compacted(self._lasting().compact())

    def _resize(self, payload: bytes) -> bytes:
        request = messages.parse(agent_pb2.AgentResizeRequest, payload)
        if self._medium.resize is None or not request.capacity_bytes:
            raise InvalidRequest(f"tier {self._tier.name} cannot be made {request.capacity_bytes} bytes large")
        capacity_bytes = self._medium.resize(request.capacity_bytes)
        return agent_pb2.AgentResizeResponse(capacity_bytes=capacity_bytes).SerializeToString()

    def _lasting(self) -> Durable:
        if self._durable is None:
            raise InvalidRequest(f"tier {self._tier.name} keeps nothing across a restart, so there is nothing to scan")
        return self._durable
