"""Serves a tier over a framed socket: one thread parses and dispatches, lanes do the work."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from functools import partial
from itertools import islice

from kvstore.agents import messages
from kvstore.agents.lanes import Lane
from kvstore.agents.media import Medium
from kvstore.agents.memory import MappedSlabs
from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, QuotaExceeded, Unavailable
from kvstore.protocol.frames import MAX_CALLS_IN_FLIGHT, AgentMethod, Frame, FrameSocket
from kvstore.v1 import agent_pb2

_log = logging.getLogger(__name__)

Handler = Callable[[bytes], bytes]  # payload of the request to payload of the reply


class AgentServer:
    """One connection's calls.

    Reads, scans and statistics have threads of their own, writes and deletes one (a write transaction of LMDB lives
    on one thread), flushes one (they sync for seconds), so that none waits behind another kind. Replies carry the
    call id and come in any order. What a tier raises on purpose, and what the kernel refuses, becomes the status of
    that call; anything else is a defect and ends the process, which the supervisor then replaces.
    """

    def __init__(self, frames: FrameSocket, medium: Medium, memory: MappedSlabs, reader_threads: int) -> None:
        """Serve `medium`, whose ranges `memory` resolves."""
        self._frames = frames
        self._tier = medium.tier
        self._durable = medium.durable
        self._memory = memory
        self._count_lock = threading.Lock()
        self._in_flight = 0
        reads, writes, syncs = Lane("read", reader_threads), Lane("write", 1), Lane("sync", 1)
        self._lanes = (reads, writes, syncs)
        self._calls: dict[int, tuple[Lane, Handler]] = {
            AgentMethod.READ: (reads, self._read),
            AgentMethod.SCAN: (reads, self._scan),
            AgentMethod.STATS: (reads, self._stats),
            AgentMethod.WRITE: (writes, self._write),
            AgentMethod.DELETE: (writes, self._delete),
            AgentMethod.FLUSH: (syncs, self._flush),
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
        if call is None:
            self._reply(frame, f"unknown method {frame.method}".encode(), InvalidRequest.code)
            return
        with self._count_lock:
            room = self._in_flight < MAX_CALLS_IN_FLIGHT
            self._in_flight += room
        if not room:
            self._reply(frame, f"{MAX_CALLS_IN_FLIGHT} calls are in flight already".encode(), QuotaExceeded.code)
            return
        lane, handler = call
        lane.submit(partial(self._run, frame, handler))

    def _run(self, frame: Frame, handler: Handler) -> None:
        self._answer(frame, handler, counted=True)
        if self._durable is not None and self._durable.failure:
            _log.error("tier %s cannot go on: %s", self._tier.name, self._durable.failure)
            with contextlib.suppress(OSError):  # another lane was faster
                self._frames.sock.shutdown(
                    socket.SHUT_RDWR
                )  # the receiving thread closes the tier; a fresh one repairs it

    def _answer(self, frame: Frame, handler: Handler, *, counted: bool = False) -> None:
        payload, status = b"", 0
        try:
            payload = handler(frame.payload)
        except KVStoreError as error:
            payload, status = str(error).encode(), error.code
        except (OSError, KeyError) as error:  # a disk or mmap error; a slab that was unmapped under the call
            payload, status = f"{type(error).__name__}: {error}".encode(), InternalError.code
        if counted:
            with self._count_lock:
                self._in_flight -= 1
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

    def _read(self, payload: bytes) -> bytes:
        return messages.encode_outcomes(self._tier.read(messages.decode_items(payload, self._memory)))

    def _delete(self, payload: bytes) -> bytes:
        self._tier.delete(messages.decode_refs(payload))
        return b""

    def _scan(self, payload: bytes) -> bytes:
        if self._durable is None:
            raise InvalidRequest(f"tier {self._tier.name} keeps nothing across a restart, so there is nothing to scan")
        after, limit = messages.decode_scan(payload)
        return messages.encode_records(islice(self._durable.scan(after), limit))

    def _stats(self, payload: bytes) -> bytes:
        messages.parse(agent_pb2.AgentStatsRequest, payload)
        return agent_pb2.AgentStatsResponse(values=self._tier.stats()).SerializeToString()

    def _flush(self, payload: bytes) -> bytes:
        messages.parse(agent_pb2.AgentFlushRequest, payload)
        if self._durable is not None:
            self._durable.flush()
        return agent_pb2.AgentFlushResponse().SerializeToString()
