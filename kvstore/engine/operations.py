"""What an operator asks of the engine: figures, listings, and the verbs that move or check what is stored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import cast

from kvstore.core.block import COLD, HOT, WARM, Namespace
from kvstore.core.cache import BlockCache
from kvstore.core.terms import pin
from kvstore.engine.catalogue import Catalogue
from kvstore.engine.checking import Checker
from kvstore.engine.media_stats import MediaStats
from kvstore.engine.mover import DurableTier, Mover
from kvstore.engine.recorder import Recorder
from kvstore.engine.sessions import Session, Sessions
from kvstore.engine.slab_keeper import SlabKeeper
from kvstore.engine.snapshot import Snapshots
from kvstore.engine.treatment import core_terms, merged
from kvstore.protocol.errors import InvalidRequest, NotFound, Unavailable
from kvstore.tiers.warm import WarmPool
from kvstore.v1 import admin_pb2, types_pb2

_TERMS_STEPS = 128  # a second

_log = logging.getLogger(__name__)


class Operations:
    """The operator's half of the store, which makes the parts named here."""

    draining: bool
    _lock: threading.Lock
    _clock: Callable[[], float]
    _cache: BlockCache
    _pool: WarmPool
    _mover: Mover
    _sessions: Sessions
    _slabs: SlabKeeper
    _catalogue: Catalogue
    _checker: Checker
    _snapshots: Snapshots
    _media_stats: MediaStats
    _recorder: Recorder
    _treating: threading.Lock

    def stats(self) -> admin_pb2.GetStatsResponse:
        """Everything countable."""
        with self._lock:
            message = self._snapshots.stats(self._cache, self._clock())
        self._snapshots.add_media(message, self._mover.states(), self._pool, self._media_stats)
        message.health = "draining" if self.draining else "serving"
        message.sessions = len(self._sessions)
        message.staging_bytes = self._sessions.staging_bytes
        message.counters["slabs_refused_for_memory"] = self._slabs.short_of_memory
        for name, count in self._mover.counters().items():
            message.counters[name] = count
        return message

    def medium_said(self, tier: int, said: Mapping[str, int]) -> None:
        """What a medium counts. A device gives the hot tier what it has, which need not be what was asked for."""
        capacity_bytes = said.get("capacity_bytes", 0)
        if tier != HOT or not capacity_bytes:
            return
        with self._lock:
            if self._cache.residency.budgets[HOT].capacity_bytes != capacity_bytes:
                self._cache.resize(HOT, capacity_bytes)

    def list_namespaces(self, session: Session) -> list[admin_pb2.NamespaceInfo]:
        """The tenant's namespaces."""
        with self._lock:
            return self._snapshots.namespaces(self._cache, self._catalogue.entries, session.tenant)

    def list_sessions(self, session: Session) -> list[admin_pb2.SessionInfo]:
        """The tenant's sessions."""
        mine = [other for other in self._sessions.all() if other.tenant == session.tenant]
        with self._lock:
            return [self._snapshots.session(other, self._cache, self._clock()) for other in mine]

    def inspect(self, session: Session, key: bytes, namespace: bytes) -> list[admin_pb2.BlockInfo]:
        """Blocks of the tenant whose key starts with `key`; at most 64."""
        with self._lock:
            found = self._cache.find_prefix(key, session.tenant, namespace, 64)
            return [self._snapshots.block(block) for block in found]

    def evict(self, tier: int, nbytes: int) -> tuple[int, int]:
        """Drop the next victims of a tier (kvstore.v1.Tier); returns blocks and bytes."""
        with self._lock:
            result = self._cache.evict(_tier(tier), nbytes)
        self._mover.kick_saves()
        return result

    def flush(self, timeout_s: float) -> tuple[int, int]:
        """Save every dirty block to the cold tier, durably; returns (saved, still unsaved)."""
        with self._lock:
            before = self._cache.residency.counts[COLD].writes
        cold = self._mover.tier(COLD)
        left = self._mover.flush(timeout_s) if cold is not None else self._cache.residency.unsaved
        if cold is not None:
            cast(DurableTier, cold).flush()
        return self._cache.residency.counts[COLD].writes - before, left

    def verify(self, request: admin_pb2.VerifyRequest) -> admin_pb2.VerifyResponse:
        """Check the checksum of every copy in a tier.

        Of the cold tier a page at a time, as it lies on the disk, and damaged copies go where `repair` says so. A
        damaged copy in memory always goes: the next reader would get it.
        """
        tier = _tier(request.tier)
        if tier == COLD:
            return self._checker.check_cold(request.after, request.limit, request.repair)
        checked, corrupt = self._checker.verify(tier)
        return admin_pb2.VerifyResponse(checked=checked, corrupt=corrupt, repaired=corrupt)

    def compact(self) -> admin_pb2.CompactResponse:
        """Give the file system back what the cold tier does not need.

        Raises:
            InvalidRequest: the cold tier is off.
            KVStoreError: it cannot be done now.
        """
        cold = self._mover.tier(COLD)
        if cold is None:
            raise InvalidRequest("the cold tier is off")
        before_bytes, after_bytes = cast(DurableTier, cold).compact()
        return admin_pb2.CompactResponse(before_bytes=before_bytes, after_bytes=after_bytes)

    def resize(self, request: admin_pb2.ResizeRequest) -> admin_pb2.ResizeResponse:
        """Give the hot tier another capacity: first what is over it leaves, then its medium's slabs do.

        Raises:
            InvalidRequest: another tier, or one that is off.
            KVStoreError: its agent is down, or cannot.
        """
        tier, medium = _tier(request.tier), self._mover.tier(HOT)
        if tier != HOT or medium is None:
            what = "the hot tier is off" if tier == HOT else "only the hot tier has a size that can change"
            raise InvalidRequest(what)
        with self._lock:
            if request.capacity_bytes < self._cache.residency.budgets[HOT].capacity_bytes:
                self._cache.resize(HOT, request.capacity_bytes)
        self._mover.kick_saves()  # deletes what has left
        capacity_bytes = medium.resize(request.capacity_bytes)
        self.medium_said(HOT, {"capacity_bytes": capacity_bytes})
        return admin_pb2.ResizeResponse(capacity_bytes=capacity_bytes)

    def pin(self, session: Session, request: admin_pb2.PinRequest) -> admin_pb2.PinResponse:
        """Have the one block whose key starts with what was given leave last; or no longer.

        Raises:
            NotFound: the tenant has no such block.
            InvalidRequest: there are several.
        """
        digits = request.key.hex()
        with self._lock:
            held = self._cache.find_prefix(request.key, session.tenant, request.namespace, 2)
            if len(held) > 1:
                raise InvalidRequest(f"several keys begin with {digits}; give more of it, or the namespace")
            if not held or not held[0].present:
                raise NotFound(f"no block here has a key that begins with {digits}")
            pin(self._cache.residency, held[0], pinned=not request.unpin)
            return admin_pb2.PinResponse(key=held[0].key, namespace=held[0].namespace.digest)

    def set_terms(self, session: Session, request: admin_pb2.SetTermsRequest) -> types_pb2.NamespaceTerms:
        """Treat a namespace of the tenant differently from now on; returns all terms that hold.

        Raises:
            Unavailable: it cannot be made durable. The terms are as before.
        """
        return self._treat(self._cache.namespace(request.namespace, session.tenant), request.terms)

    def _treat(self, namespace: Namespace, said: types_pb2.NamespaceTerms) -> types_pb2.NamespaceTerms:
        with self._treating:  # two at once would leave memory and disk at different terms
            entry = self._catalogue.entries.get(namespace.digest)
            if entry is None:
                raise Unavailable("the namespace could not be written to the state directory, and its terms cannot be")
            terms = merged(entry.terms, said, namespace.slot_bytes)
            if terms != entry.terms:  # every worker that opens the namespace says the same
                try:
                    self._catalogue.set_terms(namespace.digest, terms)
                except OSError as error:
                    _log.warning("the terms of a namespace cannot be written: %s", error)
                    raise Unavailable(
                        f"nothing was changed: the terms cannot be written to the state directory: {error.strerror}"
                    ) from error
                with self._lock:
                    self._cache.terms.set(namespace, core_terms(terms))
            return terms

    def _keep_terms(self) -> None:
        """What is due of priorities, times to live and limits; the lock is held for a part of it at a time."""
        with self._lock:
            self._cache.terms.tick(self._clock())
        for _ in range(_TERMS_STEPS):
            with self._lock:
                if not self._cache.terms.step(self._clock()):
                    break

    def record(self, request: admin_pb2.RecordRequest) -> admin_pb2.RecordResponse:
        """What workers of every tenant have asked for since the call before; the first call begins."""
        return self._recorder.take(request)


_TIERS = {1: HOT, 2: WARM, 3: COLD}


def _tier(number: int) -> int:
    """The core's tier for a kvstore.v1.Tier."""
    if number not in _TIERS:
        raise InvalidRequest(f"tier {number} does not exist; 1 is hot, 2 warm, 3 cold")
    return _TIERS[number]
