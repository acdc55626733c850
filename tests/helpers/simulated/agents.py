"""Agents and their media: what the engine's own tier code (AgentTier, AgentSupervisor) talks to in a simulation.

A medium is a dictionary. Its agent takes the real frames, copies bytes in halves, answers a block at a time, and may be
slow, hang, or be killed at any point of that. What it has sent is heard later, also after its death.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvstore.agents import messages
from kvstore.core.block import COLD
from kvstore.engine.agent_channel import IN_FLIGHT, AgentConfused, AgentLate, AgentLost
from kvstore.protocol.errors import InternalError, InvalidRequest, QuotaExceeded, from_code
from kvstore.protocol.frames import AgentMethod, Frame
from kvstore.tiers.base import BlockRef, CheckPage, CompactResult, Outcome, StoredRecord, TierItem, WriteResult
from kvstore.v1 import agent_pb2
from simulated.content import Contents, checksum_of
from simulated.stage import Event, SimulationError, Stage

_AT_ONCE = {AgentMethod.MAP_SLAB, AgentMethod.UNMAP_SLAB, AgentMethod.SCAN, AgentMethod.STATS, AgentMethod.FLUSH}
_READERS, _ENCODERS = 3, 2


class Record(NamedTuple):
    """A block on a medium: what a read gives, and what a scan says."""

    data: bytes
    checksum: bytes
    parent: bytes
    epoch: int
    stored_bytes: int
    lossy: bool


class Medium:
    """Outlives its agents, and a cold one the daemon."""

    def __init__(self, tier: int) -> None:
        self.tier = tier
        self.records: dict[BlockRef, Record] = {}
        self.full = False
        self.delay_s = 0.0
        self.damaged: set[BlockRef] = set()  # lost or flipped behind the daemon's back
        self.unheard: set[BlockRef] = set()  # written, and the answer was not heard (yet)


class Call:
    """One frame on its way, as kvstore.engine.agent_channel.Call."""

    def __init__(self, link: Link, method: AgentMethod, timeout_s: float, take_part: Any) -> None:
        self.method = method
        self._link = link
        self._timeout_s = timeout_s
        self._deadline_s = link.stage.now_s + timeout_s
        self._take_part = take_part
        self._frame: Frame | None = None
        self._wrong: AgentConfused | None = None
        self.answered = False

    def hear(self, payload: bytes, status: int) -> None:
        """A reply has come."""
        frame = Frame(0, self.method, status, 0, payload)
        try:
            last = self._take_part is None or bool(status) or self._take_part(payload)
        except AgentConfused as error:
            self._wrong, last = error, True
        if last:
            self.end(frame)

    def end(self, frame: Frame | None) -> None:
        """The last reply; None: there will be none."""
        self._frame, self.answered = frame, True
        if self in self._link.pending:
            self._link.pending.remove(self)

    def result(self) -> bytes:
        """As the real one."""
        left_s = self._deadline_s - self._link.stage.now_s
        if self.method in _AT_ONCE and not self.answered:  # it hangs; its supervisor holds a lock that all ask for
            raise AgentLate(f"no answer to {self.method.name} within {self._timeout_s:g} s")
        if not self.answered and not self._link.stage.until(lambda: self.answered, left_s):
            self._link.stage.count(f"agent late: {self.method.name}")
            raise AgentLate(f"no answer to {self.method.name} within {self._timeout_s:g} s")
        if self._wrong is not None:
            raise self._wrong
        if self._frame is None:
            raise AgentLost(f"the agent went away during {self.method.name}")
        if self._frame.status:
            raise from_code(self._frame.status, self._frame.payload.decode(errors="replace"))
        return self._frame.payload


class Link:
    """The socket to an agent and its pending table: a FrameSocket while it is configured, then an AgentChannel."""

    def __init__(self, process: Process) -> None:
        self.stage = process.stage
        self.pending: list[Call] = []
        self.sent: deque[tuple[Call, bytes, int]] = deque()
        self.gone = False
        self._process = process

    def send(self, call_id: int, method: int, payload: bytes, status: int = 0, fds: Sequence[int] = ()) -> None:
        assert method == AgentMethod.CONFIGURE

    def recv(self, timeout_s: float | None = None) -> Frame:
        ready = agent_pb2.AgentReady(device="simulated", format="plain")
        return Frame(0, AgentMethod.CONFIGURE, 0, 0, ready.SerializeToString())

    def call(
        self,
        method: AgentMethod,
        payload: bytes,
        timeout_s: float,
        fds: Sequence[int] = (),
        take_part: Callable[[bytes], bool] | None = None,
    ) -> Call:
        """As AgentChannel.call."""
        if method not in _AT_ONCE and not self.stage.until(lambda: self._has_place(method), timeout_s):
            raise QuotaExceeded(f"the agent is busy: no place for {method.name} within {timeout_s:g} s")
        if self.gone or self._process.reaped.is_set():
            raise AgentLost("the agent is gone")
        call = Call(self, method, timeout_s, take_part)
        self.pending.append(call)
        self._process.accept(call, payload, fds)
        return call

    def _has_place(self, method: AgentMethod) -> bool:
        return self.gone or sum(call.method is method for call in self.pending) < IN_FLIGHT[method]

    def hear(self) -> None:
        """The receiving thread: the next reply, or the end of the connection."""
        if self.sent:
            call, payload, status = self.sent.popleft()
            if call in self.pending:
                call.hear(payload, status)
        elif self._process.reaped.is_set() and not self.gone:
            self.gone = True
            for call in list(self.pending):
                call.end(None)

    def has_news(self) -> bool:
        return bool(self.sent) or (not self.gone and self._process.reaped.is_set())

    def close(self) -> None:
        """Its supervisor ends the connection; the last answers are heard first."""
        while self.has_news():
            self.hear()


@dataclass(eq=False)
class _Job:
    """A frame that the agent works at. `stage`: how far the present item has come."""

    call: Call
    items: list[TierItem]
    todo: list[int] = field(default_factory=list)
    half: tuple[int, bytes] | None = None  # the item at hand and what has been copied of it
    found: dict[int, Any] = field(default_factory=dict)


class Process:
    """An agent's process, as kvstore.engine.agent_process.AgentProcess."""

    pid = 0
    crashed = False

    def __init__(self, stage: Stage, medium: Medium, contents: Contents) -> None:
        self.stage = stage
        self.medium = medium
        self.reaped = Event(stage)
        self.frames = Link(self)
        self.ending = "still running"
        self.hung_until_s = 0.0
        self.doom = ""  # what comes over it once it is in the middle of a block
        self._contents = contents
        self._slabs: dict[int, np.ndarray] = {}
        self._reads: list[_Job] = []
        self._writes: list[_Job] = []
        self._others: dict[AgentMethod, deque[tuple[Call, bytes]]] = {
            AgentMethod.DELETE: deque(), AgentMethod.CHECK: deque(), AgentMethod.COMPACT: deque(),
        }  # fmt: skip
        self._closing: Call | None = None
        self._not_before_s = 0.0

    @property
    def hung(self) -> bool:
        """Whether it is stopped: it does nothing, and may go on later."""
        return self.stage.now_s < self.hung_until_s

    @property
    def slab_ids(self) -> set[int]:
        """Those that it has mapped."""
        return set(self._slabs)

    # -- its life -------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.end("killed by signal 9")

    def end(self, why: str = "") -> None:
        """Nothing of it touches a slab any more."""
        if self.reaped.is_set():
            return
        self.ending = why or "killed by signal 9"
        self.reaped.set()
        self._slabs.clear()
        if self.medium.tier != COLD:
            self.medium.records.clear()
            self.medium.unheard.clear()

    def harm(self, how: str) -> None:
        """Kill it, or stop it for a while."""
        self.doom = ""
        if how == "kill agent":
            self.kill()
        else:
            self.hung_until_s = self.stage.now_s + self.stage.rng.choice([1.0, 60.0, 200.0])

    # -- what it is asked -----------------------------------------------------------------------------------------

    def accept(self, call: Call, payload: bytes, fds: Sequence[int]) -> None:
        """A frame has come."""
        method = call.method
        if method in _AT_ONCE:
            if not self.hung:  # no wait for it: these are answered by the thread that parses
                self._answer_at_once(call, payload, fds)
        elif method is AgentMethod.CLOSE:
            self._closing = call
        elif method in self._others:
            self._others[method].append((call, payload))
        else:
            try:
                items = messages.decode_items(payload, self)  # type: ignore[arg-type]
            except InvalidRequest as error:
                self._reply(call, str(error).encode(), error.code)
                return
            job = _Job(call, items, list(range(len(items))))
            (self._reads if method is AgentMethod.READ else self._writes).append(job)

    def check(self, place: Any) -> None:
        """Whether a range lies in a slab that is mapped."""
        slab = self._slabs.get(place.slab_id)
        if slab is None or place.offset + place.nbytes > slab.nbytes:
            raise InvalidRequest(f"slab {place.slab_id} is not mapped")

    def _answer_at_once(self, call: Call, payload: bytes, fds: Sequence[int]) -> None:
        method, reply = call.method, b""
        if method is AgentMethod.MAP_SLAB:
            request = agent_pb2.AgentMapSlab.FromString(payload)
            if request.slab_id in self._slabs:
                raise SimulationError(f"slab {request.slab_id} is mapped twice")
            mapped = mmap.mmap(fds[0], request.segment_bytes)
            self._slabs[request.slab_id] = np.frombuffer(mapped, np.uint8)
        elif method is AgentMethod.UNMAP_SLAB:
            del self._slabs[agent_pb2.AgentUnmapSlab.FromString(payload).slab_id]
        elif method is AgentMethod.SCAN:
            after, limit = messages.decode_scan(payload)
            refs = [ref for ref in sorted(self.medium.records) if after is None or ref > after][:limit]
            reply = messages.encode_records([_stored(ref, self.medium.records[ref]) for ref in refs])
        call.hear(reply, 0)

    # -- what it does ---------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        if self.reaped.is_set() or self.hung or self.stage.now_s < self._not_before_s:
            return False
        return bool(self._reads or self._writes or self._closing or any(self._others.values()))

    def step(self) -> None:
        """Go on with one of the frames, on one of its threads."""
        rng = self.stage.rng
        if self.doom and any(job.half for job in self._reads + self._writes):
            self.harm(self.doom)
            return
        if self.medium.delay_s:
            self._not_before_s = self.stage.now_s + self.medium.delay_s * rng.random()
        lanes: list[Callable[[], None]] = []
        if self._reads:
            lanes.append(self._read_step)
        if self._writes:
            lanes.append(self._write_step)
        lanes += [lambda m=method: self._other_step(m) for method, queue in self._others.items() if queue]
        if lanes:
            rng.choice(lanes)()
        elif self._closing is not None:
            self._reply(self._closing, agent_pb2.AgentCloseResponse().SerializeToString())
            self._closing = None
            self.end("exited with status 0")

    def _read_step(self) -> None:
        rng = self.stage.rng
        job = rng.choice(self._reads[:_READERS])
        if job.half is None:
            at = job.todo.pop(rng.randrange(min(2, len(job.todo))))
            record = self.medium.records.get(job.items[at].ref)
            item = job.items[at]
            if record is None or record.checksum != item.checksum or len(record.data) != item.range.nbytes:
                self._read_done(job, at, Outcome.MISSING)
                return
            place = self._view(item)
            place[: place.nbytes // 2] = np.frombuffer(record.data, np.uint8)[: place.nbytes // 2]
            job.half = (at, record.data)
            return
        at, data = job.half
        item, job.half = job.items[at], None
        place = self._view(item)
        place[place.nbytes // 2 :] = np.frombuffer(data, np.uint8)[place.nbytes // 2 :]
        if is_intact(place.tobytes(), item.checksum):
            self._read_done(job, at, Outcome.BUSY if rng.random() < 0.01 else Outcome.OK)
            return
        record = self.medium.records.get(item.ref)
        if record is not None and record.data == data:  # not a newer copy, written meanwhile
            del self.medium.records[item.ref]
        self._read_done(job, at, Outcome.CORRUPT)

    def _read_done(self, job: _Job, at: int, outcome: Outcome) -> None:
        job.found[at] = outcome
        more = len(job.found) < len(job.items)
        self._reply(job.call, messages.encode_outcomes([outcome], at, more=more))
        if not more:
            self._reads.remove(job)

    def _write_step(self) -> None:
        rng = self.stage.rng
        job = rng.choice(self._writes[:_ENCODERS])
        if job.half is not None:
            at, first = job.half
            item, job.half = job.items[at], None
            place = self._view(item)
            data = first + place[place.nbytes // 2 :].tobytes()
            job.found[at] = data
        elif job.todo:
            at = job.todo.pop(0)
            place = self._view(job.items[at])
            job.half = (at, place[: place.nbytes // 2].tobytes())
        else:
            self._writes.remove(job)
            results = [self._store(item, job.found[at]) for at, item in enumerate(job.items)]
            self._reply(job.call, messages.encode_written(results))

    def _store(self, item: TierItem, data: bytes) -> WriteResult:
        medium, rng = self.medium, self.stage.rng
        if checksum_of(data) != item.checksum:
            raise SimulationError(f"the source of a save changed while it was copied: {item.ref.key[:4].hex()}")
        if medium.full and rng.random() < 0.9:
            return WriteResult(Outcome.FULL)
        if rng.random() < 0.01:
            return WriteResult(Outcome.BUSY)
        old = medium.records.get(item.ref)
        lossy = bool(item.lossy)
        if lossy:
            owner = self._contents.owner(data)
            if owner is None or owner.lossy:
                raise SimulationError("a lossy copy was encoded a second time")
            data = self._contents.of(owner.digest, owner.key, owner.version, len(data), lossy=True)
        if old is not None and lossy and not old.lossy and old.checksum == item.checksum:
            return WriteResult(Outcome.OK, old.stored_bytes, checksum=old.checksum)
        stored_bytes = int(len(data) * rng.uniform(0.6, 1.05))
        checksum = checksum_of(data) if lossy else item.checksum
        medium.records[item.ref] = Record(data, checksum, item.parent, item.epoch, stored_bytes, lossy)
        medium.unheard.add(item.ref)
        medium.damaged.discard(item.ref)
        return WriteResult(Outcome.OK, stored_bytes, lossy=lossy, checksum=checksum)

    def _other_step(self, method: AgentMethod) -> None:
        call, payload = self._others[method].popleft()
        if method is AgentMethod.DELETE:
            if self.stage.happens(0.3 if self.medium.full else 0.05):
                self._reply(call, b"the disk is full", InternalError.code)
                return
            for ref in messages.decode_refs(payload):
                self.medium.records.pop(ref, None)
                self.medium.unheard.discard(ref)
            self._reply(call, b"")
        elif method is AgentMethod.COMPACT:
            self._reply(call, messages.encode_compacted(CompactResult(2, 1)))
        else:
            self._reply(call, messages.encode_checked(self._check(payload)))

    def _check(self, payload: bytes) -> CheckPage:
        after, limit, repair = messages.decode_check(payload)
        records = self.medium.records
        refs = [ref for ref in sorted(records) if after is None or ref > after]
        page = refs[:limit]
        bad = [ref for ref in page if not is_intact(records[ref].data, records[ref].checksum)]
        for ref in bad if repair else ():
            del records[ref]
        last = page[-1] if len(refs) > limit else None
        return CheckPage(last, len(page), len(bad), 0, len(bad) if repair else 0)

    def _view(self, item: TierItem) -> np.ndarray:
        place = item.range
        slab = self._slabs.get(place.slab_id)
        if slab is None:
            raise SimulationError(f"slab {place.slab_id} was unmapped under a call")
        return slab[place.offset : place.offset + place.nbytes]

    def _reply(self, call: Call, payload: bytes, status: int = 0) -> None:
        self.frames.sent.append((call, payload, status))


def is_intact(data: bytes, checksum: bytes) -> bool:
    """Whether what was read has its checksum."""
    return checksum_of(data) == checksum


def _stored(ref: BlockRef, record: Record) -> StoredRecord:
    return StoredRecord(
        ref, record.parent, record.checksum, len(record.data), record.stored_bytes, record.epoch, lossy=record.lossy
    )
