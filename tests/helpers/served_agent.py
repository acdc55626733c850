"""An agent's server in the process of the test, spoken to over its socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvstore.agents.media import Medium
from kvstore.agents.memory import MappedSlabs
from kvstore.agents.server import AgentServer
from kvstore.protocol.frames import AgentMethod, Frame, FrameSocket
from kvstore.tiers.base import (
    BlockRef,
    CheckPage,
    CompactResult,
    Outcome,
    StoredRecord,
    Tier,
    TierItem,
    WriteResult,
)
from kvstore.v1 import agent_pb2

PATIENCE_S = 30.0
SLAB_BYTES = 1 << 16


class ScriptedTier(Tier):
    """Answers OK, after whatever a test hooks in before."""

    name = "scripted"
    capacity_bytes = 1 << 20
    failure = ""

    def __init__(self) -> None:
        self.before_write: Callable[[], object] = lambda: None
        self.before_read: Callable[[], object] = lambda: None
        self.before_item: Callable[[TierItem], object] = lambda item: None
        self.before_flush: Callable[[], object] = lambda: None
        self.missing = False
        self.deleted: list[BlockRef] = []
        self.closed = threading.Event()
        self.records: list[StoredRecord] = []

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        self.before_write()
        return [WriteResult(Outcome.OK, item.range.nbytes) for item in items]

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        self.before_read()
        for item in items:
            self.before_item(item)
        return [Outcome.MISSING if self.missing else Outcome.OK for _ in items]

    def delete(self, refs: Sequence[BlockRef]) -> None:
        self.deleted += refs

    def stats(self) -> Mapping[str, int]:
        return {"blocks": 3}

    def close(self) -> None:
        self.closed.set()

    def flush(self) -> None:
        self.before_flush()

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        return CheckPage(after, limit, repaired=int(repair))

    def compact(self) -> CompactResult:
        return CompactResult(9, 4)

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        return iter([record for record in self.records if after is None or record.ref > after])


class Served:
    """A tier, its server, and the daemon's end of the connection."""

    def __init__(self, *, durable: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.tier = ScriptedTier()
        self.frames = FrameSocket(ours)
        self._theirs = FrameSocket(theirs)
        medium = Medium(self.tier, durable=self.tier if durable else None)
        self._server = AgentServer(self._theirs, medium, MappedSlabs(), reader_threads=2)
        self._thread = threading.Thread(target=self._server.serve)
        self._thread.start()

    def ask(self, call_id: int, method: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        self.frames.send(call_id, method, payload, fds=fds)

    def reply(self) -> Frame:
        return self.frames.recv(PATIENCE_S)

    def map_slab(self, slab_id: int, nbytes: int = SLAB_BYTES, file_bytes: int = SLAB_BYTES) -> Frame:
        fd = os.memfd_create("test", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, file_bytes)
            message = agent_pb2.AgentMapSlab(slab_id=slab_id, segment_bytes=nbytes)
            self.ask(0, AgentMethod.MAP_SLAB, message.SerializeToString(), [fd])
            return self.reply()
        finally:
            os.close(fd)

    def drops_its_queue(self) -> bool:
        return all(lane._dropping for lane in self._server._lanes)

    def ended(self) -> bool:
        self._thread.join(PATIENCE_S)
        return not self._thread.is_alive()

    def close(self) -> None:
        self.frames.close()
        assert self.ended()
        self._theirs.close()
