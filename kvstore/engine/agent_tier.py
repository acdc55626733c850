"""A tier that lives in an agent: its calls as frames, its failures as outcomes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from google.protobuf.message import DecodeError

from kvstore.engine.agent_channel import AgentChannel, AgentConfused, AgentLate, AgentLost, Call
from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, QuotaExceeded
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES, AgentMethod, FrameSocket
from kvstore.tiers.base import (
    BlockRef,
    CheckPage,
    CompactResult,
    Outcome,
    Scannable,
    StoredRecord,
    Tier,
    TierItem,
    WriteResult,
)
from kvstore.v1 import agent_pb2

READ_FRAME_BYTES = 64 << 20  # its blocks are answered one by one, so it only bounds the time for a call
WRITE_FRAME_BYTES = 16 << 20  # eight 2 MiB blocks fill a transaction; more a transaction gained nothing
FRAME_ITEMS_MAX = 1024  # an item is some 190 bytes, so a frame stays below 0.3 MiB of the 4 MiB allowed
DELETE_REFS_MAX = 8192  # 70 bytes each
SCAN_PAGE_RECORDS = 4000  # 0.8 MiB; the cold tier reads a thousand in one transaction
STATS_TIMEOUT_S = 2.0
COMPACT_BYTES_S = 10 << 20  # a slower disk is a hung one

_LAST_OUTCOME = max(Outcome)

Settle: TypeAlias = Callable[[int, Sequence[Outcome]], None]
"""Is told what became of the items from a position on. Called on the receiving thread: it must neither block for long
nor call the agent."""

_log = logging.getLogger(__name__)


class AgentTier(Tier, Scannable):
    """Tier and Scannable by way of an agent; any number of threads may call at once.

    Who waits longer than `timeout_s` for the answer to one frame (of up to READ_FRAME_BYTES or WRITE_FRAME_BYTES)
    has a hung agent before it. Slots that an agent was told to fill are its own until it answered or its process was
    reaped, so such a call ends the agent through `end_agent(why)`, which returns once it is reaped, and returns only
    then.
    """

    def __init__(
        self,
        name: str,
        capacity_bytes: int,
        frames: FrameSocket,
        ready: agent_pb2.AgentReady,
        end_agent: Callable[[str], None],
        timeout_s: float = 30.0,
    ) -> None:
        """Speak to a configured agent at the other end of `frames`, which said `ready`."""
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.device = ready.device
        self._end_agent = end_agent
        self._timeout_s = timeout_s
        self._channel = AgentChannel(frames, timeout_s)

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Store blocks; BUSY for each whose fate is not known to be better."""
        return self.begin_write(items).results()

    def begin_write(self, items: Sequence[TierItem]) -> PendingWrite:
        """Send blocks to be stored; the results must be asked for, and nothing may touch the sources before."""
        return PendingWrite(self, items, self._send(AgentMethod.WRITE, items, WRITE_FRAME_BYTES))

    def read(self, items: Sequence[TierItem], settle: Settle | None = None) -> list[Outcome]:
        """Fill slots with blocks; MISSING for each that went with its agent, BUSY for each not asked for or refused.

        `settle` hears of each block as soon as its slot is filled, and never after the return. Of blocks that went
        with their agent, or were refused, it does not hear.
        """
        transfer = self._send(AgentMethod.READ, items, READ_FRAME_BYTES, settle)
        return [
            answer if isinstance(answer, Outcome) else Outcome(answer.outcome)
            for answer in self._collect(transfer, Outcome.MISSING)
        ]

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks.

        Raises:
            KVStoreError: the agent did not confirm it; some may be gone and some not.
        """
        for first in range(0, len(refs), DELETE_REFS_MAX):
            batch = refs[first : first + DELETE_REFS_MAX]
            message = agent_pb2.AgentItems(items=[agent_pb2.AgentItem(namespace=n, key=k) for n, k in batch])
            self._ask(AgentMethod.DELETE, message.SerializeToString())

    def stats(self) -> Mapping[str, int]:
        """Counters of the medium; none while the agent does not answer."""
        try:
            call = self._channel.call(AgentMethod.STATS, b"", min(STATS_TIMEOUT_S, self._timeout_s))
            return dict(agent_pb2.AgentStatsResponse.FromString(call.result()).values)
        except (KVStoreError, DecodeError):
            return {}

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record from behind `after`, ordered by namespace and key, page by page.

        Raises:
            KVStoreError: the agent went away, or its tier keeps nothing.
        """
        position = _position(after)
        page = self._begin_page(position)
        while messages := self._page(page):
            last = messages[-1].namespace + messages[-1].key
            if last <= position:
                raise InternalError(f"{self.name}: the scan does not advance")
            position = last
            page = self._begin_page(position)  # the agent reads it while this one is made use of
            yield from map(_record, messages)

    def flush(self) -> None:
        """Return once everything written before is durable.

        Raises:
            KVStoreError: that is not sure. A slow disk does not end the agent.
        """
        self._channel.call(AgentMethod.FLUSH, b"", self._timeout_s).result()

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        """Have up to `limit` stored blocks behind `after` read and verified; with `repair` the bad ones are dropped.

        Raises:
            KVStoreError: the agent went away, keeps nothing, or is too slow; a slow disk does not end it.
        """
        position = _position(after)
        request = agent_pb2.AgentCheckRequest(after=position, limit=limit, repair=repair)
        payload = self._channel.call(AgentMethod.CHECK, request.SerializeToString(), self._timeout_s).result()
        try:
            page = agent_pb2.AgentCheckResponse.FromString(payload)
        except DecodeError as error:
            raise InternalError(f"{self.name} agent: unreadable answer to CHECK: {error}") from error
        last = BlockRef(page.last[:32], page.last[32:]) if page.last else None
        if last is not None and page.last <= position:
            raise InternalError(f"{self.name}: the check does not advance")
        return CheckPage(last, page.checked, page.corrupt, page.missing, page.repaired)

    def compact(self) -> CompactResult:
        """Have the medium rewritten without its free space.

        Raises:
            KVStoreError: the agent went away or refused, as for want of disk space; a slow disk does not end it.
        """
        timeout_s = self._timeout_s + self.capacity_bytes / COMPACT_BYTES_S
        payload = self._channel.call(AgentMethod.COMPACT, b"", timeout_s).result()
        try:
            result = agent_pb2.AgentCompactResponse.FromString(payload)
        except DecodeError as error:
            raise InternalError(f"{self.name} agent: unreadable answer to COMPACT: {error}") from error
        return CompactResult(result.before_bytes, result.after_bytes)

    def resize(self, capacity_bytes: int) -> int:
        """Have a medium in memory be of another size; what it is from now on.

        Raises:
            KVStoreError: the agent is gone, or its medium has one size.
        """
        request = agent_pb2.AgentResizeRequest(capacity_bytes=capacity_bytes)
        payload = self._channel.call(AgentMethod.RESIZE, request.SerializeToString(), self._timeout_s).result()
        try:
            self.capacity_bytes = agent_pb2.AgentResizeResponse.FromString(payload).capacity_bytes
        except DecodeError as error:
            raise InternalError(f"{self.name} agent: unreadable answer to RESIZE: {error}") from error
        return self.capacity_bytes

    def map_slab(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        """Make a slab's ranges known to the agent; `fd` stays the caller's.

        Raises:
            KVStoreError: the agent is gone or refused.
        """
        message = agent_pb2.AgentMapSlab(slab_id=slab_id, segment_bytes=segment_bytes)
        self._ask(AgentMethod.MAP_SLAB, message.SerializeToString(), (fd,))

    def unmap_slab(self, slab_id: int) -> None:
        """Make the agent let go of a slab that no call names any more.

        Raises:
            KVStoreError: the agent is gone or does not have it.
        """
        self._ask(AgentMethod.UNMAP_SLAB, agent_pb2.AgentUnmapSlab(slab_id=slab_id).SerializeToString())

    def close(self, timeout_s: float | None = None) -> None:
        """Let the agent finish what it has and close its medium, within `timeout_s`; how that went is logged."""
        try:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            self._channel.call(AgentMethod.CLOSE, b"", limit_s).result()
        except KVStoreError as error:
            _log.warning("%s agent did not confirm its close: %s", self.name, error)

    def disconnect(self) -> None:
        """End the connection; for the one who reaped the process. Idempotent."""
        self._channel.close()

    def _send(
        self, method: AgentMethod, items: Sequence[TierItem], frame_bytes: int, settle: Settle | None = None
    ) -> _Transfer:
        """Send items in frames; all are encoded before the first is sent: from there on nothing raises."""
        frames = list(_split(items, frame_bytes, method))
        transfer = _Transfer([], len(items))
        first = 0
        for payload, size, nbytes in frames:
            timeout_s = self._timeout_s * max(1.0, nbytes / frame_bytes)
            answers = _Answers(method, first, size, settle)
            try:
                call = self._channel.call(method, payload, timeout_s, take_part=answers.take)
            except QuotaExceeded as error:
                _log.warning("%s: %s", self.name, error)
                return transfer._replace(rest=Outcome.BUSY)
            except AgentLost as error:
                self._end(error)
                break
            transfer.sent.append((call, answers))
            first += size
        return transfer

    def _collect(self, transfer: _Transfer, lost: Outcome) -> list[agent_pb2.AgentOutcome | Outcome]:
        """One answer an item: the agent's, `lost` where it went away, BUSY where it refused or was not asked."""
        answers: list[agent_pb2.AgentOutcome | Outcome] = []
        for call, parts in transfer.sent:
            missing = lost
            try:
                call.result()
            except AgentLost as error:
                self._end(error)
            except KVStoreError as error:
                _log.error("%s agent refused %s: %s", self.name, call.method.name, error)
                missing = Outcome.BUSY  # which says nothing of the medium
            answers += [missing if answer is None else answer for answer in parts.close()]
        rest = lost if transfer.rest is None else transfer.rest
        return answers + [rest] * (transfer.size - len(answers))

    def _end(self, error: KVStoreError) -> None:
        """Return once the agent's process cannot touch anything any more."""
        if isinstance(error, AgentLate | AgentConfused):
            _log.error("%s agent: %s; it is killed", self.name, error)
            self._end_agent(str(error))
        else:  # already going; how, its supervisor will see
            self._end_agent("")

    def _ask(self, method: AgentMethod, payload: bytes, fds: Sequence[int] = ()) -> bytes:
        with self._noting_its_end():
            return self._channel.call(method, payload, self._timeout_s, fds).result()

    @contextlib.contextmanager
    def _noting_its_end(self) -> Iterator[None]:
        try:
            yield
        except AgentLost as error:
            self._end(error)
            raise

    def _begin_page(self, after: bytes) -> Call:
        request = agent_pb2.AgentScanRequest(after=after, limit=SCAN_PAGE_RECORDS)
        with self._noting_its_end():
            return self._channel.call(AgentMethod.SCAN, request.SerializeToString(), self._timeout_s)

    def _page(self, call: Call) -> Sequence[agent_pb2.AgentRecord]:
        with self._noting_its_end():
            payload = call.result()
        try:
            return agent_pb2.AgentScanResponse.FromString(payload).records
        except DecodeError as error:
            raise InternalError(f"{self.name} agent: unreadable page: {error}") from error


class _Answers:
    """The outcomes of one call, as its frames bring them."""

    def __init__(self, method: AgentMethod, first: int, size: int, settle: Settle | None) -> None:
        """Of `size` items, the first of which is item `first` of the batch that `settle` knows."""
        self._method = method
        self._first = first
        self._settle = settle
        self._lock = threading.Lock()
        self._closed = False
        self._found: list[agent_pb2.AgentOutcome | None] = [None] * size
        self._left = size

    def take(self, payload: bytes) -> bool:
        """Add the outcomes in a frame; whether it was the last one. On the receiving thread.

        Raises:
            AgentConfused: they are not what was asked for.
        """
        try:
            part = agent_pb2.AgentOutcomes.FromString(payload)
        except DecodeError as error:
            raise AgentConfused(f"unreadable answer to {self._method.name}: {error}") from error
        answers, first, size = list(part.outcomes), part.first, len(self._found)
        with self._lock:
            if self._closed:  # whoever asked has been told that they are lost
                return True
            fits = first + len(answers) <= size and not any(self._found[first : first + len(answers)])
            self._left -= len(answers)
            if not fits or part.more != (self._left > 0) or any(a.outcome > _LAST_OUTCOME for a in answers):
                raise AgentConfused(f"{len(answers)} answers from {first} on to {size} items, or unknown ones")
            self._found[first : first + len(answers)] = answers
            if self._settle is not None:
                self._settle(self._first + first, [Outcome(answer.outcome) for answer in answers])
        return not part.more

    def close(self) -> list[agent_pb2.AgentOutcome | None]:
        """What has come; from now on nothing is taken and nothing settled."""
        with self._lock:
            self._closed = True
            return self._found


class _Transfer(NamedTuple):
    """Calls on their way for a batch of `size` items; `rest`: what became of the items that were not sent."""

    sent: list[tuple[Call, _Answers]]
    size: int
    rest: Outcome | None = None


class PendingWrite:
    """Blocks on their way to the medium."""

    def __init__(self, tier: AgentTier, items: Sequence[TierItem], transfer: _Transfer) -> None:
        self._tier = tier
        self._items = items
        self._transfer = transfer

    def results(self) -> list[WriteResult]:
        """Wait for the outcomes, in order; BUSY for each block whose fate is not known to be better."""
        return [
            WriteResult(answer)
            if isinstance(answer, Outcome)
            else WriteResult(
                Outcome(answer.outcome), answer.stored_bytes, answer.codec, answer.lossy, answer.checksum or b""
            )
            for answer in self._tier._collect(self._transfer, Outcome.BUSY)
        ]


def _position(ref: BlockRef | None) -> bytes:
    return b"" if ref is None else ref.namespace + ref.key


def _record(message: agent_pb2.AgentRecord) -> StoredRecord:
    return StoredRecord(
        BlockRef(message.namespace, message.key),
        message.parent,
        message.checksum,
        message.nbytes,
        message.stored_bytes,
        message.epoch,
        message.codec,
        message.hits,
        message.stored_s,
        message.lossy,
    )


def _split(items: Sequence[TierItem], frame_bytes: int, method: AgentMethod) -> Iterator[tuple[bytes, int, int]]:
    """The items in order as payloads, each with its number of items and its bytes of blocks."""
    add = _add_write if method is AgentMethod.WRITE else _add_read
    message, nbytes = agent_pb2.AgentItems(), 0
    for item in items:
        full = len(message.items) == FRAME_ITEMS_MAX or nbytes + item.range.nbytes > frame_bytes
        if message.items and full:
            yield _payload(message), len(message.items), nbytes
            message, nbytes = agent_pb2.AgentItems(), 0
        nbytes += item.range.nbytes
        add(message, item)
    if message.items:
        yield _payload(message), len(message.items), nbytes


def _add_read(message: agent_pb2.AgentItems, item: TierItem) -> None:
    added = message.items.add(namespace=item.ref.namespace, key=item.ref.key, checksum=item.checksum)
    place = added.range
    place.slab_id, place.offset, place.nbytes = item.range


def _add_write(message: agent_pb2.AgentItems, item: TierItem) -> None:
    _add_read(message, item)
    added = message.items[-1]
    added.parent = item.parent
    added.epoch = item.epoch
    added.layout = item.layout
    added.lossy = item.lossy
    added.hits = item.hits


def _payload(message: agent_pb2.AgentItems) -> bytes:
    payload = message.SerializeToString()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(f"{len(message.items)} items of {len(payload)} bytes; a name of theirs is absurdly long")
    return payload
