"""The engine: one lock around the core, and the threads, memory and media that carry out what it decides.

Every method may be called from any thread. None holds the lock while it copies a block, talks to an agent, or
makes a populated slab.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from kvstore.core.benefit import WorkerCosts
from kvstore.core.block import COLD, HOT, Namespace
from kvstore.core.cache import BlockCache, CacheConfig
from kvstore.core.index import KEY_BYTES, split_keys
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import PolicyFactory
from kvstore.core.puts import PutPlan, PutStatus, Reject
from kvstore.core.reads import AcquireGroup, MatchResult
from kvstore.core.residency import Limits
from kvstore.core.slabs import SlotRef
from kvstore.engine.catalogue import Catalogue
from kvstore.engine.checking import Checker
from kvstore.engine.doorkeeper import Doorkeeper
from kvstore.engine.media_stats import MediaStats
from kvstore.engine.mover import AgentedTier, DurableTier, Mover
from kvstore.engine.operations import Operations
from kvstore.engine.putting import Source, copy_in, source_of
from kvstore.engine.recorder import Recorder
from kvstore.engine.recovery import recover, scan_records, shape_of
from kvstore.engine.replies import lease_reply
from kvstore.engine.sessions import Peer, Session, Sessions
from kvstore.engine.slab_keeper import SlabKeeper
from kvstore.engine.snapshot import Snapshots
from kvstore.engine.treatment import core_terms
from kvstore.protocol.errors import InvalidRequest, KVStoreError, LeaseExpired, Unavailable
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.tiers.warm import SlabInfo, WarmPool
from kvstore.v1 import kvstore_pb2, types_pb2

_TICK_S = 1.0
_ROOM_WAIT_S = 1.0  # a put's longest wait for a slab that is being made for it
# LMDB needs pages for its trees and for the copies a transaction replaces: measured overhead 8-10 %.
_COLD_FILL = 0.85
_HANDOFF_TOKEN_BYTES = 16
_BULK_KEYS = 48
_SMALL_BLOCK_BYTES = 64 << 10
_NO_GATE = contextlib.nullcontext()

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class StoreConfig:
    """What an engine needs to know. Sizes in bytes; `tenant_bytes` is {tier: {tenant: bytes}}, as in core.block."""

    state_dir: Path
    warm_bytes: int
    cold_bytes: int = 0
    hot_bytes: int = 0
    tenant_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    lease_ttl_s: float = 30.0
    staging_max_bytes: int = 256 << 20
    staging_total_bytes: int = 2 << 30
    lock_pages: bool = True
    policy: PolicyFactory = LeafLru
    promote_hits: int = 2
    cold_bytes_per_day: int = 0
    version: str = "0"


class Store(Operations):
    """The facade that transports call. Call sequence: attach_tier for each medium, start, anything, close."""

    def __init__(
        self, config: StoreConfig, headroom: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`headroom` says how many bytes the machine can still give."""
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._clearing = threading.Lock()
        self._treating = threading.Lock()
        self._bulk = threading.RLock()  # taken before _lock, see _gate
        limits = Limits(
            config.warm_bytes,
            int(config.cold_bytes * _COLD_FILL),
            config.hot_bytes,
            config.tenant_bytes,
            config.policy,
            config.cold_bytes_per_day,
        )
        self._pool = WarmPool(config.warm_bytes, config.lock_pages)
        self._cache = BlockCache(CacheConfig(limits, config.lease_ttl_s, config.promote_hits), self._set_generation)
        self._mover = Mover(self._lock, self._cache, self._pool, clock)
        self._sessions = Sessions(config.staging_max_bytes, config.staging_total_bytes)
        self._slabs = SlabKeeper(self._lock, self._cache, self._pool, headroom, self._slab_retired)
        self._doorkeeper = Doorkeeper(self._lock, self._cache.allocator, self._pool)
        self._catalogue = Catalogue(config.state_dir)
        self._checker = Checker(self._lock, self._cache, self._pool, self._mover)
        self.instance_id = secrets.token_hex(8)
        self._media_stats = MediaStats(self._mover.states, self.medium_said)
        self._recorder = Recorder(clock)
        self._snapshots = Snapshots(config.version, self.instance_id, clock())
        self.draining = False
        self._closing = threading.Event()
        self._ticker = threading.Thread(target=self._tick_loop, name="ticker", daemon=True)

    # -- life -------------------------------------------------------------------------------------------------

    def attach_tier(self, tier: int, medium: AgentedTier) -> None:
        """Add HOT or COLD, before start; its agent may come up and go down from now on (see tier_up, tier_down)."""
        self._mover.attach(tier, medium)

    def start(self) -> None:
        """Recover what the cold tier holds, and begin to work."""
        self._recover()
        self._slabs.start()
        self._mover.start()
        self._media_stats.start()
        self._ticker.start()

    def _recover(self) -> None:
        self._catalogue.load()
        clean = self._catalogue.take_clean_mark()
        cold = self._mover.tier(COLD)
        if cold is not None:
            started = self._clock()
            records = scan_records(cast(DurableTier, cold))
            with self._lock:
                result = recover(self._cache, self._catalogue, records)
            if result.swept:
                self._cache.residency.deletes[COLD] += result.swept
            how = "after a clean shutdown" if clean else "with no clean shutdown before"
            took_s = self._clock() - started
            _log.info(
                "recovered %d cold blocks, swept %d, in %.2f s, %s", result.blocks, len(result.swept), took_s, how
            )

    def tier_up(self, tier: int, capacity_bytes: int) -> None:
        """An agent serves, on a medium that gives `capacity_bytes`."""
        self.medium_said(tier, {"capacity_bytes": capacity_bytes})
        with self._lock:
            self._cache.residency.up[tier] = True
        self._mover.wake_saver()

    def tier_down(self, tier: int) -> None:
        """An agent has gone: its blocks are misses until it is back; the hot tier's are lost."""
        with self._lock:
            self._cache.residency.up[tier] = False
            if tier == HOT:
                blocks = [b for n in self._cache.index.namespaces.values() for b in n.blocks.values() if b.copies & HOT]
                self._cache.moves.tier_lost(HOT, blocks)

    def start_drain(self) -> None:
        """Refuse puts from now on."""
        self.draining = True

    def close(self, grace_s: float) -> None:
        """Save what is dirty, put everything away; within `grace_s` and the tiers' own bounds."""
        self.start_drain()
        try:
            unsaved = self.flush(grace_s)[1]
        except KVStoreError as error:  # the cold agent is down: what is dirty is lost, the rest goes on in order
            _log.warning("could not save before the end: %s", error)
            unsaved = 1
        self._closing.set()
        self._media_stats.close()
        deleted = self._mover.close()
        if unsaved == 0 and deleted:
            self._catalogue.leave_clean_mark()
        for session in self._sessions.all():
            self.close_session(session)
        for medium in self._mover.states().values():
            medium.close()
        self._slabs.close()

    def bulk(self, nbytes: int) -> contextlib.AbstractContextManager[object]:
        """What to hold while a message of `nbytes` is parsed and answered, by any thread, at any depth."""
        return self._gate(nbytes // KEY_BYTES)

    # -- sessions ---------------------------------------------------------------------------------------------

    def open_session(self, peer: Peer, name: str, tenant: str) -> Session:
        """Begin a session of a process that has just attached."""
        session = self._sessions.open(peer, name, tenant)
        self.touch(session)
        return session

    def attach_staging(self, session: Session, staging_bytes: int) -> int:
        """Give the session its staging segment; returns its size."""
        return self._sessions.attach_staging(session, staging_bytes)

    def close_session(self, session: Session) -> None:
        """End a session with its leases and its staging; idempotent."""
        with self._lock:
            if not self._sessions.close(session):
                return
            self._cache.reads.leases.end_session(session.id)
        self._mover.kick_saves()

    def touch(self, session: Session) -> None:
        """Any frame of a session renews its leases."""
        session.last_frame_s = now = self._clock()
        session.calls += 1
        self._cache.reads.leases.renew(session.id, now)

    def map_slabs(self, session: Session, ids: Sequence[int]) -> list[tuple[SlabInfo, int]]:
        """Geometry and a descriptor (the caller's to close) of those slabs that live and that the session may see."""
        return self._doorkeeper.open(session, ids)

    # -- namespaces -------------------------------------------------------------------------------------------

    def open_namespace(
        self, session: Session, spec: NamespaceSpec, terms: types_pb2.NamespaceTerms | None = None
    ) -> Namespace:
        """Open a namespace, treat it as `terms` say, and make room for its blocks in the background."""
        digest = spec.digest(session.tenant)
        with self._lock:
            known = self._catalogue.entries.get(digest)
            epoch, said = (known.epoch, core_terms(known.terms)) if known is not None else (0, None)
            namespace = self._cache.open_namespace(digest, shape_of(session.tenant, spec), epoch, said)
        try:
            self._catalogue.add(digest, session.tenant, spec, namespace.epoch)
        except OSError as error:  # it works; its cold blocks are swept at the next start
            _log.warning("cannot remember namespace %s: %s", digest[:8].hex(), error)
        if terms is not None and digest in self._catalogue.entries:
            self._treat(namespace, terms)
        self._slabs.expect(namespace)
        return namespace

    def clear(self, session: Session, namespace: bytes) -> int:
        """Drop every block of a namespace; returns its new epoch.

        Raises:
            Unavailable: the new epoch cannot be made durable. Nothing has been cleared.
        """
        found = self._namespace(session, namespace)
        with self._clearing:  # two at once would leave memory and disk at different epochs
            try:
                self._catalogue.set_epoch(namespace, found.epoch + 1)
            except OSError as error:
                _log.warning("the epoch of a namespace cannot be written: %s", error)
                raise Unavailable(
                    f"nothing was cleared: the new epoch cannot be written to the state directory: {error.strerror}"
                ) from error
            with self._lock:
                epoch = self._cache.clear(found)
        self._mover.wake_saver()
        return epoch

    def delete(self, session: Session, namespace: bytes, keys: bytes) -> int:
        """Forget blocks and what hangs on them."""
        found = self._namespace(session, namespace)
        with self._lock:
            deleted = self._cache.delete(found, keys)
        self._mover.kick_saves()
        return deleted

    # -- reads ------------------------------------------------------------------------------------------------

    def match(self, session: Session, namespace: bytes, keys: bytes, worker: WorkerCosts | None = None) -> MatchResult:
        """Longest stored prefix; with `worker`, of it what is worth its fetch.

        Waits for nobody: while others hold the lock it answers without noting the use.
        """
        found = self._namespace(session, namespace)
        reads = self._cache.reads
        if not self._lock.acquire(blocking=False):
            result = reads.peek(found, keys)
        else:
            try:
                result = reads.match(found, keys)
            finally:
                self._lock.release()
        if worker is not None and result.blocks:
            blocks, withheld = self._cache.gate.judge(AcquireGroup(found, keys), worker, self._clock())
            if withheld:
                return reads.peek(found, keys[: blocks * KEY_BYTES])._replace(withheld=withheld)
        return result

    def exists(self, session: Session, namespace: bytes, keys: bytes) -> bytes:
        """One byte per key."""
        found = self._namespace(session, namespace)
        with self._lock:
            return self._cache.reads.exists(found, keys)

    def acquire(
        self,
        session: Session,
        groups: Sequence[tuple[bytes, bytes, int]],
        exact: bool = False,
        worker: WorkerCosts | None = None,
    ) -> kvstore_pb2.LeaseReply:
        """Pin what is stored, start to load its cold part, and say where everything lies.

        With `worker`, what is not worth its fetch is withheld; of a single prefix only, because what the positions of
        several groups save is not known.
        """
        if not groups:
            raise InvalidRequest("acquire needs at least one group of keys")
        asked = [self._group(session, *group)._replace(exact=exact) for group in groups]
        if self._recorder.armed:
            self._recorder.note(asked)
        reads = self._cache.reads
        below, verdict, gate = reads.foresee(asked), None, self._cache.gate
        if worker is not None and len(asked) == 1 and not asked[0].last:
            verdict = gate.judge(asked[0], worker, self._clock())
            below = verdict.blocks * asked[0].namespace.block_tokens if verdict.withheld else None
        with self._lock:
            lease = reads.acquire(session.id, session.tenant, asked, self._clock(), below)
            if verdict is not None and worker is not None:
                gate.note(asked[0], verdict, worker, self._clock())
            self._mover.kick_loads()
            self._note_shortage()
        reply = lease_reply(lease) if lease is not None else kvstore_pb2.LeaseReply()
        if verdict is not None and verdict.withheld:
            reply.withheld = verdict.withheld
            reply.withheld_reason = kvstore_pb2.WITHHELD_REASON_NOT_WORTH
        self._mover.kick_saves()
        return reply

    def wait(self, session: Session, lease_id: int, stop: int, timeout_s: float) -> tuple[int, int]:
        """Until blocks [0, stop) are readable or one is lost, at most `timeout_s`; returns (ready, lost)."""
        deadline = self._clock() + timeout_s
        while True:
            with self._lock:
                lease = self._cache.reads.leases.get(session.id, lease_id)
                state = self._cache.reads.readiness(lease, stop)
                if state.pending is None or state.lost:
                    return state.ready, state.lost
                slot = state.pending
                event = self._mover.inflight.join(slot)
            left = deadline - self._clock()
            if left <= 0 or not event.wait(left):
                with self._lock:
                    self._mover.inflight.leave(slot, event)
                    lease = self._cache.reads.leases.get(session.id, lease_id)
                    state = self._cache.reads.readiness(lease, stop)
                    return state.ready, state.lost
            self.touch(session)

    def prefetch(self, session: Session, namespace: bytes, keys: bytes) -> int:
        """Start to load the cold part of the longest stored prefix."""
        found = self._namespace(session, namespace)
        with self._lock:
            count = self._cache.reads.prefetch(found, keys)
            self._mover.kick_loads()
        return count

    def renew(self, session: Session) -> tuple[int, list[int]]:
        """Leases held, and slabs that have been retired."""
        self.touch(session)
        with self._lock:
            count = len(self._cache.reads.leases.of_session(session.id))
        return count, self._sessions.take_retired(session)

    def release(self, session: Session, lease_id: int, upto: int) -> None:
        """Give blocks [0, upto) back; 0: all. A lease that has ended already is fine."""
        leases = self._cache.reads.leases
        with self._gate(leases.size(lease_id)), self._lock:
            try:
                lease = leases.get(session.id, lease_id)
            except LeaseExpired:
                return
            leases.release(lease, upto)

    def handoff(self, session: Session, lease_id: int) -> bytes:
        """A token that lets another session of the tenant adopt the lease, once."""
        token = secrets.token_bytes(_HANDOFF_TOKEN_BYTES)
        with self._lock:
            leases = self._cache.reads.leases
            leases.offer_handoff(leases.get(session.id, lease_id), token)
        return token

    def adopt(self, session: Session, token: bytes) -> kvstore_pb2.LeaseReply:
        """Take over a lease that was handed off."""
        with self._lock:
            lease = self._cache.reads.leases.adopt(session.id, session.tenant, token, self._clock())
        return lease_reply(lease)

    # -- puts -------------------------------------------------------------------------------------------------

    def put(self, session: Session, request: kvstore_pb2.PutRequest, deadline_s: float) -> tuple[bytes, bytes]:
        """Store blocks from the session's staging segment; one status and one reason per key."""
        namespace = self._namespace(session, request.namespace)
        epoch = namespace.epoch  # what is cleared from here on, while the call waits for its turn or a slab, is stale
        keys = split_keys(request.keys)
        if self.draining:
            return bytes([PutStatus.REJECTED]) * len(keys), bytes([Reject.DRAINING]) * len(keys)
        if not keys:
            return b"", b""
        staging = session.staging
        source = source_of(request, None if staging is None else staging.array, len(keys), namespace.block_nbytes)
        with self._gate(len(keys)):
            plan = self._begin_put(namespace, request, keys)
            carried = plan is not None and namespace.block_nbytes <= _SMALL_BLOCK_BYTES
            if plan is not None and carried:  # copies of small blocks are mostly bytecode too
                self._carry_out(plan, source, deadline_s, epoch)
        if plan is None:
            with self._lock:
                self._slabs.await_slabs(namespace, min(_ROOM_WAIT_S, max(0.0, deadline_s - self._clock())))
            with self._gate(len(keys)), self._lock:
                plan = self._cache.puts.begin(namespace, request.parent, keys, request.pin)
        if not carried:
            self._carry_out(plan, source, deadline_s, epoch)
        self._mover.kick_saves()
        return bytes(item.status for item in plan.items), bytes(item.reason for item in plan.items)

    def _begin_put(self, namespace: Namespace, request: kvstore_pb2.PutRequest, keys: list[bytes]) -> PutPlan | None:
        """Take slots; None where there are too few because a slab must first change hands, which has been asked for."""
        with self._lock:
            plan = self._cache.puts.begin(namespace, request.parent, keys, request.pin)
            self._slabs.balance()
            if all(item.reason != Reject.NO_ROOM for item in plan.items):
                return plan
            self._cache.puts.cancel(plan)
            self._slabs.starve(namespace, len(keys))
            return None

    def _carry_out(self, plan: PutPlan, source: Source, deadline_s: float, epoch: int) -> None:
        plan.epoch = epoch
        try:
            copy_in(plan.items, source, self._pool, deadline_s)
        finally:
            with self._gate(len(plan.items)), self._lock:
                self._cache.puts.finish(plan)

    # -- internals --------------------------------------------------------------------------------------------

    def _gate(self, keys: int) -> contextlib.AbstractContextManager[object]:
        """One large call at a time.

        Python hands its interpreter lock to any of the threads that wait for it: a one-key call among six busy
        threads was unlucky for 5 ms in one case of a hundred. Large calls take milliseconds anyway and can queue.
        """
        return self._bulk if keys > _BULK_KEYS else _NO_GATE

    def _namespace(self, session: Session, digest: bytes) -> Namespace:
        return self._cache.namespace(digest, session.tenant)

    def _group(self, session: Session, digest: bytes, keys: bytes, mode: int) -> AcquireGroup:
        return AcquireGroup(self._namespace(session, digest), keys, mode == kvstore_pb2.ACQUIRE_MODE_LAST)

    def _note_shortage(self) -> None:
        """An acquire was cut for want of slots: get its class some for the next time. A mere miss needs none."""
        short = self._cache.reads.short
        while short:
            namespace, slots = short.popitem()
            self._slabs.starve(namespace, slots)

    def _set_generation(self, ref: SlotRef, value: int) -> None:
        self._pool.set_generation(ref.slab_id, ref.slot, value)

    def _slab_retired(self, slab_id: int) -> None:
        self._sessions.slab_retired(slab_id)
        self._mover.slab_dropped(slab_id)

    def _tick_loop(self) -> None:
        while not self._closing.wait(_TICK_S):
            try:
                self._tick()
            except Exception:  # noqa: BLE001 - a defect of ours, said in full: leases must go on expiring
                _log.exception("a tick failed")

    def _tick(self) -> None:
        with self._lock:
            expired = self._cache.reads.leases.expire(self._clock())
        if expired:
            _log.info("%d leases expired", len(expired))
        self._recorder.expire()
        self._keep_terms()
        self._mover.kick_saves()
