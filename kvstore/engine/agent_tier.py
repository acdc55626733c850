"""A tier that lives in an agent: its calls as frames, its failures as outcomes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from google.protobuf.message import DecodeError

from kvstore.engine.agent_channel import AgentChannel, AgentLate, AgentLost, Call
from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError, QuotaExceeded
from kvstore.protocol.frames import MAX_PAYLOAD_BYTES, AgentMethod, FrameSocket
from kvstore.tiers.base import BlockRef, Outcome, Scannable, StoredRecord, Tier, TierItem, WriteResult
from kvstore.v1 import agent_pb2

READ_FRAME_BYTES = 8 << 20  # small enough that a batch of 16 MiB keeps two reader threads busy
WRITE_FRAME_BYTES = 16 << 20  # eight 2 MiB blocks fill a transaction; more a transaction gained nothing
FRAME_ITEMS_MAX = 1024  # an item is some 190 bytes, so a frame stays below 0.3 MiB of the 4 MiB allowed
DELETE_REFS_MAX = 8192  # 70 bytes each
SCAN_PAGE_RECORDS = 4000  # 0.8 MiB; the cold tier reads a thousand in one transaction
STATS_TIMEOUT_S = 2.0

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
        answers = self._transfer(AgentMethod.WRITE, items, Outcome.BUSY)
        return [WriteResult(Outcome(answer.outcome), answer.stored_bytes) for answer in answers]

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Fill slots with blocks; MISSING for each that went with its agent, BUSY for each not asked for or refused."""
        return [Outcome(answer.outcome) for answer in self._transfer(AgentMethod.READ, items, Outcome.MISSING)]

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

    def scan(self) -> Iterator[StoredRecord]:
        """Every record, ordered by namespace and key, page by page.

        Raises:
            KVStoreError: the agent went away, or its tier keeps nothing.
        """
        after = b""
        while records := self._scan_page(after):
            yield from records
            last = records[-1].ref
            if last.namespace + last.key <= after:
                raise InternalError(f"{self.name}: the scan does not advance")
            after = last.namespace + last.key

    def flush(self) -> None:
        """Return once everything written before is durable.

        Raises:
            KVStoreError: that is not sure. A slow disk does not end the agent.
        """
        self._channel.call(AgentMethod.FLUSH, b"", self._timeout_s).result()

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

    def _transfer(self, method: AgentMethod, items: Sequence[TierItem], lost: Outcome) -> list[agent_pb2.AgentOutcome]:
        """One answer an item: the agent's, `lost` where it went away, BUSY where it refused or was not asked."""
        frame_bytes = READ_FRAME_BYTES if method is AgentMethod.READ else WRITE_FRAME_BYTES
        frames = list(_split(items, frame_bytes))  # all encoded before the first is sent: from there on nothing raises
        sent: list[Call] = []
        rest = lost
        for payload, _, nbytes in frames:
            timeout_s = self._timeout_s * max(1.0, nbytes / frame_bytes)
            try:
                sent.append(self._channel.call(method, payload, timeout_s))
            except QuotaExceeded as error:
                _log.warning("%s: %s", self.name, error)
                rest = Outcome.BUSY
                break
            except AgentLost as error:
                self._end(error)
                break
        answers: list[agent_pb2.AgentOutcome] = []
        for call, (_, size, _) in zip(sent, frames, strict=False):
            answers += self._collect(call, size, lost)
        return answers + _all(rest, len(items) - len(answers))

    def _collect(self, call: Call, size: int, lost: Outcome) -> Sequence[agent_pb2.AgentOutcome]:
        try:
            answers = agent_pb2.AgentOutcomes.FromString(call.result()).outcomes
            if len(answers) == size and all(answer.outcome <= max(Outcome) for answer in answers):
                return answers
            self._end(InternalError(f"{len(answers)} answers to {size} items, or unknown ones"))
        except AgentLost as error:
            self._end(error)
        except DecodeError as error:
            self._end(InternalError(f"unreadable answer to {call.method.name}: {error}"))
        except KVStoreError as error:
            _log.error("%s agent refused %s: %s", self.name, call.method.name, error)
            return _all(Outcome.BUSY, size)  # which says nothing of the medium
        return _all(lost, size)

    def _end(self, error: KVStoreError) -> None:
        """Return once the agent's process cannot touch anything any more."""
        if isinstance(error, AgentLate | InternalError):
            _log.error("%s agent: %s; it is killed", self.name, error)
            self._end_agent(str(error))
        else:  # already going; how, its supervisor will see
            self._end_agent("")

    def _ask(self, method: AgentMethod, payload: bytes, fds: Sequence[int] = ()) -> bytes:
        try:
            return self._channel.call(method, payload, self._timeout_s, fds).result()
        except AgentLost as error:
            self._end(error)
            raise

    def _scan_page(self, after: bytes) -> list[StoredRecord]:
        request = agent_pb2.AgentScanRequest(after=after, limit=SCAN_PAGE_RECORDS)
        payload = self._ask(AgentMethod.SCAN, request.SerializeToString())
        try:
            records = agent_pb2.AgentScanResponse.FromString(payload).records
        except DecodeError as error:
            raise InternalError(f"{self.name} agent: unreadable page: {error}") from error
        return [
            StoredRecord(BlockRef(r.namespace, r.key), r.parent, r.checksum, r.nbytes, r.stored_bytes, r.epoch)
            for r in records
        ]


def _split(items: Sequence[TierItem], frame_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """The items in order as payloads, each with its number of items and its bytes of blocks."""
    message, nbytes = agent_pb2.AgentItems(), 0
    for item in items:
        full = len(message.items) == FRAME_ITEMS_MAX or nbytes + item.range.nbytes > frame_bytes
        if message.items and full:
            yield _payload(message), len(message.items), nbytes
            message, nbytes = agent_pb2.AgentItems(), 0
        nbytes += item.range.nbytes
        message.items.add(
            namespace=item.ref.namespace,
            key=item.ref.key,
            range=agent_pb2.SlabRange(slab_id=item.range.slab_id, offset=item.range.offset, nbytes=item.range.nbytes),
            checksum=item.checksum,
            parent=item.parent,
            epoch=item.epoch,
            layout=item.layout,
        )
    if message.items:
        yield _payload(message), len(message.items), nbytes


def _payload(message: agent_pb2.AgentItems) -> bytes:
    payload = message.SerializeToString()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest(f"{len(message.items)} items of {len(payload)} bytes; a name of theirs is absurdly long")
    return payload


def _all(outcome: Outcome, size: int) -> list[agent_pb2.AgentOutcome]:
    return [agent_pb2.AgentOutcome(outcome=outcome) for _ in range(size)]
