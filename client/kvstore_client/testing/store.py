"""The fake daemon's store: a dictionary of blocks, and leases on them."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.protocol.convert import from_proto
from kvstore.protocol.errors import InvalidRequest, LeaseExpired, NotFound
from kvstore.protocol.keys import KEY_BYTES
from kvstore.protocol.namespace import CHAIN, NamespaceSpec
from kvstore.protocol.slab import slot_bytes_for
from kvstore.v1 import kvstore_pb2 as pb
from kvstore.v1 import types_pb2 as types
from kvstore_client.outcomes import PutStatus, RejectReason
from kvstore_client.testing.memory import FakeSlab, Segment, SlotPool

_CHECKSUM_BYTES = 16


@dataclass(slots=True, eq=False)
class FakeBlock:
    """One stored block: readable in a slot, or cold with its bytes aside (and, while it loads, a slot as well)."""

    parent: bytes
    checksum: bytes
    nbytes: int
    slab: FakeSlab | None = None
    slot: int = 0
    generation: int = 0
    aside: NDArray[np.uint8] | None = None
    due_s: float | None = None
    is_lost: bool = False

    @property
    def is_readable(self) -> bool:
        """Whether its slot carries its generation."""
        return self.slab is not None and int(self.slab.generations[self.slot]) == self.generation


@dataclass(slots=True)
class FakeNamespace:
    """An open namespace."""

    spec: NamespaceSpec
    blocks: dict[bytes, FakeBlock] = field(default_factory=dict)
    epoch: int = 0


@dataclass(slots=True)
class FakeGroup:
    """The blocks of one namespace under a lease."""

    namespace: bytes
    first: int
    blocks: list[FakeBlock]

    @property
    def ready(self) -> int:
        """The index after the leading readable blocks."""
        return self.first + next((i for i, block in enumerate(self.blocks) if not block.is_readable), len(self.blocks))

    @property
    def stop(self) -> int:
        """The index after the last block."""
        return self.first + len(self.blocks)

    @property
    def lost(self) -> int:
        """0, or 1 + the index of the first lost block."""
        return next((self.first + i + 1 for i, block in enumerate(self.blocks) if block.is_lost), 0)


@dataclass(slots=True)
class FakeLease:
    """A lease."""

    session_id: int
    groups: list[FakeGroup]
    tokens: int
    released: int = 0

    @property
    def ready(self) -> int:
        """Leading readable blocks of the group that has fewest of them; groups that are complete do not count."""
        waiting = [group.ready for group in self.groups if group.ready < group.stop]
        return min([*waiting, max(group.stop for group in self.groups)])


@dataclass(slots=True, eq=False)
class FakeSession:
    """An attached client."""

    session_id: int
    token: bytes
    name: str
    staging: Segment | None = None
    retired: list[int] = field(default_factory=list)


class FakeStore:
    """What the daemon would know. Any thread may use it; it raises kvstore.protocol.errors.

    Attributes:
        load_s: how long a cold block takes to load; None: until load_all().
        reason: why put refuses every block it would have stored; None: it does not.
        worth: how many leading blocks are promised to a worker that says what recomputing takes; None: all.
        workers: what match and acquire were told of the worker, where they were.
        puts: every PutRequest received.
    """

    def __init__(self, tenant: str, warm_bytes: int, slab_bytes: int) -> None:
        self.tenant = tenant
        self.load_s: float | None = 0.0
        self.reason: RejectReason | None = None
        self.worth: int | None = None
        self.workers: list[pb.WorkerCosts] = []
        self.puts: list[pb.PutRequest] = []
        self.sessions: dict[int, FakeSession] = {}
        self.namespaces: dict[bytes, FakeNamespace] = {}
        self.leases: dict[int, FakeLease] = {}
        self.pool = SlotPool(warm_bytes, slab_bytes)
        self._handed_off: dict[bytes, FakeLease] = {}
        self._loading: list[FakeBlock] = []
        self._changed = threading.Condition()
        self._last_id = 0

    # --- sessions and namespaces

    def open_session(self, name: str) -> FakeSession:
        """A new session."""
        with self._changed:
            session = FakeSession(self._new_id(), secrets.token_bytes(16), name)
            self.sessions[session.session_id] = session
            return session

    def attach_staging(self, session: FakeSession, nbytes: int) -> None:
        """Make a session's staging segment."""
        if nbytes and session.staging is None:
            session.staging = Segment(nbytes, is_shared_writable=True)

    def close_session(self, session: FakeSession) -> None:
        """End a session with all it holds."""
        with self._changed:
            self.sessions.pop(session.session_id, None)
            for lease_id in [key for key, lease in self.leases.items() if lease.session_id == session.session_id]:
                del self.leases[lease_id]
            staging, session.staging = session.staging, None
        if staging is not None:
            staging.close()

    def open_namespace(self, message: types.NamespaceSpec) -> pb.OpenNamespaceResponse:
        """OpenNamespace."""
        spec = from_proto(message)
        digest = spec.digest(self.tenant)
        with self._changed:
            epoch = self.namespaces.setdefault(digest, FakeNamespace(spec)).epoch
        return pb.OpenNamespaceResponse(namespace=digest, block_nbytes=spec.block_nbytes, epoch=epoch)

    # --- lookups

    def match(self, request: pb.MatchRequest) -> pb.MatchResponse:
        """Match."""
        with self._changed:
            namespace = self.namespace(request.namespace)
            stored = _prefix(namespace, request.keys)
            blocks = stored[: self._worth(request, len(stored))]
            cold = sum(1 for block in blocks if block.aside is not None)
        return pb.MatchResponse(
            blocks=len(blocks),
            tokens=len(blocks) * namespace.spec.block_tokens,
            warm_blocks=len(blocks) - cold,
            cold_blocks=cold,
            **_withheld(len(stored) - len(blocks)),
        )

    def exists(self, digest: bytes, keys: bytes) -> pb.ExistsResponse:
        """Exists."""
        with self._changed:
            blocks = self.namespace(digest).blocks
            return pb.ExistsResponse(bits=bytes(key in blocks for key in split(keys)))

    def prefetch(self, digest: bytes, keys: bytes) -> pb.PrefetchResponse:
        """Prefetch."""
        with self._changed:
            cold = [block for block in _prefix(self.namespace(digest), keys) if block.aside is not None]
            return pb.PrefetchResponse(loading=len(self._reserve(cold)))

    # --- leases

    def acquire(self, session: FakeSession, request: pb.AcquireRequest) -> pb.LeaseReply:
        """Acquire: the longest position that every group can serve."""
        with self._changed:
            asked = [(self.namespace(group.namespace), group) for group in request.groups]
            stored = min(len(_prefix(space, group.keys)) * space.spec.block_tokens for space, group in asked)
            tokens, withheld = stored, 0
            if len(asked) == 1 and asked[0][1].mode != pb.ACQUIRE_MODE_LAST:
                block_tokens = asked[0][0].spec.block_tokens
                tokens = self._worth(request, stored // block_tokens) * block_tokens
                withheld = (stored - tokens) // block_tokens
            groups: list[FakeGroup] = []
            for space, group in asked:
                stop = tokens // space.spec.block_tokens
                first = max(stop - 1, 0) if group.mode == pb.ACQUIRE_MODE_LAST else 0
                blocks = self._reserve(_prefix(space, group.keys)[first:stop])
                groups.append(FakeGroup(group.namespace, first, blocks))
            if not all(group.blocks for group in groups):
                return pb.LeaseReply(**_withheld(withheld))
            tokens = min(group.stop * space.spec.block_tokens for group, (space, _) in zip(groups, asked, strict=True))
            reply = self._grant(FakeLease(session.session_id, groups, tokens))
            reply.MergeFrom(pb.LeaseReply(**_withheld(withheld)))
            return reply

    def wait(self, session: FakeSession, request: pb.WaitRequest, deadline_s: float) -> pb.WaitResponse:
        """Wait: until the blocks are readable, one is lost, or time is up."""
        with self._changed:
            lease = self._lease(session, request.lease_id)
            while True:
                lost = [group.lost for group in lease.groups if 0 < group.lost <= request.stop]
                remaining_s = deadline_s - time.monotonic()
                if lost or lease.ready >= request.stop or remaining_s <= 0:
                    return pb.WaitResponse(ready=lease.ready, lost=min(lost, default=0))
                self._changed.wait(remaining_s)

    def release(self, session: FakeSession, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """Release."""
        with self._changed, contextlib.suppress(LeaseExpired):
            lease = self._lease(session, request.lease_id)
            lease.released = max(lease.released, request.upto)
            if not request.upto:
                del self.leases[request.lease_id]
        return pb.ReleaseResponse()

    def renew(self, session: FakeSession) -> pb.RenewResponse:
        """Renew."""
        with self._changed:
            retired, session.retired = session.retired, []
            held = sum(1 for lease in self.leases.values() if lease.session_id == session.session_id)
        return pb.RenewResponse(leases=held, retired_slab_ids=retired)

    def handoff(self, session: FakeSession, request: pb.HandoffRequest) -> pb.HandoffResponse:
        """Handoff."""
        with self._changed:
            token = secrets.token_bytes(16)
            self._handed_off[token] = self._lease(session, request.lease_id)
            del self.leases[request.lease_id]
        return pb.HandoffResponse(token=token)

    def adopt(self, session: FakeSession, request: pb.AdoptRequest) -> pb.LeaseReply:
        """Adopt."""
        with self._changed:
            lease = self._handed_off.pop(request.token, None)
            if lease is None:
                raise NotFound("no lease was handed off with this token, or it was adopted already")
            lease.session_id = session.session_id
            return self._grant(lease)

    # --- changes

    def put(self, session: FakeSession, request: pb.PutRequest, deadline_s: float) -> pb.PutResponse:
        """Put: copies out of staging, hashes its own copy, publishes; block by block."""
        self.puts.append(request)
        keys = split(request.keys)
        end = request.staging_offset + len(keys) * request.staging_stride
        if session.staging is None or end > session.staging.memory.nbytes:
            raise InvalidRequest("the blocks do not lie within the session's staging segment")
        outcomes: list[tuple[int, int]] = []
        for index in range(len(keys)):
            first = request.staging_offset + index * request.staging_stride
            source = session.staging.memory[first : first + request.block_nbytes]
            outcomes.append(self._put_one(request, keys, index, source, deadline_s))
        return pb.PutResponse(
            statuses=bytes(status for status, _ in outcomes), reasons=bytes(reason for _, reason in outcomes)
        )

    def delete(self, digest: bytes, keys: bytes) -> pb.DeleteResponse:
        """Delete, with all descendants."""
        with self._changed:
            namespace = self.namespace(digest)
            doomed = {key for key in split(keys) if key in namespace.blocks}
            size = -1
            while namespace.spec.kind == CHAIN and size != len(doomed):
                size = len(doomed)
                doomed |= {key for key, block in namespace.blocks.items() if block.parent in doomed}
            self._drop(namespace, doomed)
        return pb.DeleteResponse(deleted=len(doomed))

    def clear(self, digest: bytes) -> pb.ClearResponse:
        """Clear."""
        with self._changed:
            namespace = self.namespace(digest)
            self._drop(namespace, set(namespace.blocks))
            namespace.epoch += 1
            return pb.ClearResponse(epoch=namespace.epoch)

    # --- what the knobs do

    def lose(self, keys: Iterable[bytes]) -> int:
        """Forget blocks in every namespace, also under a lease; returns how many."""
        wanted = set(keys)
        lost = 0
        with self._changed:
            for namespace in self.namespaces.values():
                found = wanted & namespace.blocks.keys()
                lost += len(found)
                self._drop(namespace, found)
        return lost

    def chill(self, keys: Iterable[bytes]) -> int:
        """Make blocks cold; returns how many."""
        wanted = set(keys)
        with self._changed:
            blocks = [
                block for space in self.namespaces.values() for key, block in space.blocks.items() if key in wanted
            ]
            for block in blocks:
                if block.slab is not None and block.aside is None:
                    block.aside = block.slab.row(block.slot, block.nbytes).copy()
                    self.pool.give(block.slab, block.slot)
                    block.slab = None
        return len(blocks)

    def load_all(self) -> None:
        """Load what is being loaded now."""
        with self._changed:
            for block in self._loading:
                block.due_s = 0.0
        self.load_due()

    def load_due(self) -> None:
        """Finish the loads that are due."""
        now = time.monotonic()
        with self._changed:
            due = [block for block in self._loading if block.due_s is not None and block.due_s <= now]
            for block in due:
                self._loading.remove(block)
                if block.slab is not None and block.aside is not None:
                    np.copyto(block.slab.row(block.slot, block.nbytes), block.aside)
                    block.slab.generations[block.slot] = block.generation
                    block.aside = None
            if due:
                self._changed.notify_all()

    def retire(self) -> list[int]:
        """Retire every slab, losing its blocks; sessions hear of it by their next Renew."""
        with self._changed:
            for namespace in self.namespaces.values():
                self._drop(namespace, {key for key, block in namespace.blocks.items() if block.slab is not None})
            slab_ids = list(self.pool.slabs)
            for slab_id in slab_ids:
                self.pool.retire(slab_id)
            for session in self.sessions.values():
                session.retired.extend(slab_ids)
        return slab_ids

    def close(self) -> None:
        """Close every descriptor."""
        for session in list(self.sessions.values()):
            self.close_session(session)
        self.pool.close()

    # --- inside

    def namespace(self, digest: bytes) -> FakeNamespace:
        """An open namespace.

        Raises:
            NotFound: it was not opened.
        """
        namespace = self.namespaces.get(digest)
        if namespace is None:
            raise NotFound(f"namespace {digest.hex()[:16]} was not opened")
        return namespace

    def _worth(self, request: pb.MatchRequest | pb.AcquireRequest, stored: int) -> int:
        if not request.HasField("worker"):
            return stored
        self.workers.append(request.worker)
        return stored if self.worth is None else min(stored, self.worth)

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _lease(self, session: FakeSession, lease_id: int) -> FakeLease:
        lease = self.leases.get(lease_id)
        if lease is None or lease.session_id != session.session_id:
            raise LeaseExpired(f"lease {lease_id} has ended; acquire again")
        return lease

    def _grant(self, lease: FakeLease) -> pb.LeaseReply:
        lease_id = self._new_id()
        self.leases[lease_id] = lease
        groups = [self._listed(group) for group in lease.groups]
        return pb.LeaseReply(lease_id=lease_id, groups=groups, tokens=lease.tokens, ready=lease.groups[0].ready)

    def _listed(self, group: FakeGroup) -> pb.LeaseGroup:
        blocks = group.blocks
        slab_ids = [block.slab.slab_id if block.slab is not None else 0 for block in blocks]
        return pb.LeaseGroup(
            first_block=group.first,
            slab_ids=np.array(slab_ids, "<u4").tobytes(),
            slots=np.array([block.slot for block in blocks], "<u4").tobytes(),
            generations=np.array([block.generation for block in blocks], "<u8").tobytes(),
            block_nbytes=self.namespace(group.namespace).spec.block_nbytes,
            namespace=group.namespace,
            checksums=b"".join(block.checksum for block in blocks),
        )

    def _reserve(self, blocks: list[FakeBlock]) -> list[FakeBlock]:
        """Give cold blocks a slot and start loading them; cut where there is no room."""
        for index, block in enumerate(blocks):
            if block.slab is not None:
                continue
            place = self.pool.take(slot_bytes_for(block.nbytes))
            if place is None:
                return blocks[:index]
            block.slab, block.slot = place
            block.generation = self.pool.new_generation()
            block.due_s = None if self.load_s is None else time.monotonic() + self.load_s
            self._loading.append(block)
        return blocks

    def _put_one(
        self, request: pb.PutRequest, keys: list[bytes], index: int, source: NDArray[np.uint8], deadline_s: float
    ) -> tuple[int, int]:
        parent = keys[index - 1] if index else request.parent
        with self._changed:
            namespace = self.namespace(request.namespace)
            reason = self._refusal(namespace, parent, deadline_s)
            if keys[index] in namespace.blocks:
                return PutStatus.EXISTS, 0
            place = self.pool.take(slot_bytes_for(len(source))) if reason is None else None
        if place is None:
            return PutStatus.REJECTED, reason or RejectReason.NO_ROOM
        slab, slot = place
        row = slab.row(slot, len(source))
        np.copyto(row, source)
        checksum = xxhash.xxh3_128(row.data).digest()
        wanted = request.checksums[index * _CHECKSUM_BYTES : (index + 1) * _CHECKSUM_BYTES]
        with self._changed:
            if wanted and wanted != checksum:
                self.pool.give(slab, slot)
                return PutStatus.REJECTED, RejectReason.CHECKSUM
            generation = self.pool.new_generation()
            namespace.blocks[keys[index]] = FakeBlock(parent, checksum, len(source), slab, slot, generation)
            slab.generations[slot] = generation
        return PutStatus.STORED, 0

    def _refusal(self, namespace: FakeNamespace, parent: bytes, deadline_s: float) -> RejectReason | None:
        if time.monotonic() >= deadline_s:
            return RejectReason.DEADLINE
        if namespace.spec.kind == CHAIN and parent and parent not in namespace.blocks:
            return RejectReason.NO_PARENT
        return self.reason

    def _drop(self, namespace: FakeNamespace, keys: set[bytes]) -> None:
        for key in keys:
            block = namespace.blocks.pop(key)
            block.is_lost = True
            if block.slab is not None:
                self.pool.give(block.slab, block.slot)
                block.slab = None
        if keys:
            self._changed.notify_all()


def split(keys: bytes) -> list[bytes]:
    """Packed keys, one by one."""
    return [keys[first : first + KEY_BYTES] for first in range(0, len(keys), KEY_BYTES)]


def _withheld(blocks: int) -> dict[str, Any]:
    return {"withheld": blocks, "withheld_reason": pb.WITHHELD_REASON_NOT_WORTH} if blocks else {}


def _prefix(namespace: FakeNamespace, keys: bytes) -> list[FakeBlock]:
    blocks: list[FakeBlock] = []
    for key in split(keys):
        block = namespace.blocks.get(key)
        if block is None:
            break
        blocks.append(block)
    return blocks
