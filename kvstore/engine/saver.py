"""Carries out what leaves the warm pool, on one thread: saves, promotions and deletions.

Saves are pipelined: while the agent commits one batch the next is encoded and a third is on its way. Everything else
waits for its answer, and deletions come before the next write, so that they never hit a newer copy.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from kvstore.core.block import COLD, HOT
from kvstore.core.cache import BlockCache
from kvstore.core.moves import Copy
from kvstore.engine.agent_tier import PendingWrite
from kvstore.engine.guarded import guarded
from kvstore.engine.spokes import Spokes
from kvstore.protocol.errors import KVStoreError
from kvstore.tiers.base import BlockRef, Outcome, WriteResult

SAVE_BLOCKS = 64
SAVE_BYTES = 16 << 20
SAVES_UNDER_WAY = 3  # one is encoded, one committed, one on its way
# More loads than that keep every reader of an agent busy, and what is encoded beside them would only take their time.
LOADS_FIRST = 8
YIELD_MAX_S = 0.25  # and then one batch goes all the same: readers without end must not cost what was never saved
PROMOTE_BLOCKS = 8

_YIELD_STEP_S = 0.02
_RETRY_S = 1.0
_FLUSH_RETRY_S = 0.1
_FLUSH_LOOK_S = 0.1
_FLUSH_FAILURES = 3  # in a row: the medium is full, or broken
_REAP_BLOCKS = 256
_SETTLE_BLOCKS = 32  # at a time: the engine's lock is not to be held for a millisecond

_log = logging.getLogger(__name__)


class _Begun(Enum):
    SENT = 1
    NOTHING = 2  # there is nothing to save, or no room for it
    LATER = 3


class _Save(NamedTuple):
    """A batch on its way; `pending` is None where it could not be sent."""

    batch: list[Copy]
    pending: PendingWrite | None
    began_s: float


class Saver:
    """The thread, and what it counts. kick() and wake() are cheap and may be called from any thread."""

    def __init__(self, lock: threading.Lock, cache: BlockCache, spokes: Spokes) -> None:
        """`lock` is the engine's, around `cache`."""
        self._lock = lock
        self._cache = cache
        self._spokes = spokes
        self._wake = threading.Event()
        self._flushing = 0  # flush() calls under way
        self._flushes = 0  # flush() calls so far
        self._exhausted = 0  # the last of them for which nothing more can be saved
        self._looked = threading.Event()  # that has changed
        self._failures = 0  # batches or deletions in a row of which the cold tier took nothing
        self._not_before_s = {COLD: 0.0, HOT: 0.0}
        self._yielding_since_s: float | None = None
        self._under_way: deque[_Save] = deque()
        self._closing = False
        self._counts = dict.fromkeys(
            ("save_batches", "save_bytes", "save_us", "saves_refused", "saves_yielded", "deletes_refused"), 0
        )
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def counters(self) -> Mapping[str, int]:
        """What it did so far: batches, bytes and microseconds of saves (from sent to answered, also side by side)."""
        return dict(self._counts)

    def kick(self) -> None:
        """There may be something to do."""
        residency = self._cache.residency
        if (
            self._cache.moves.wants_saving()
            or self._cache.reads.promotions
            or residency.deletes[COLD]
            or residency.deletes[HOT]
        ):
            self._wake.set()

    def wake(self) -> None:
        """Look for work whatever the thresholds say."""
        self._wake.set()

    def flush(self, timeout_s: float) -> int:
        """Save every dirty block, as far as the time and the medium allow; returns how many are left."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._flushing += 1
            self._flushes += 1
            self._failures = 0
            self._not_before_s[COLD] = 0.0
            mine = self._flushes
        self._wake.set()
        while not self._closing and self._exhausted < mine and self._can_save():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            self._looked.wait(min(_FLUSH_LOOK_S, left_s))
            self._looked.clear()
        with self._lock:
            self._flushing -= 1
            return len(self._cache.residency.dirty)

    def close(self) -> bool:
        """End after what is under way and the deletions that are due; whether the cold tier took them.

        Bounded by the tiers' own time-outs.
        """
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(35.0)
        while self._reap():  # what was cleared or deleted must not come back after the restart
            pass
        self._not_before_s[COLD] = 0.0
        self._delete(COLD)
        with self._lock:
            return not self._cache.residency.deletes[COLD]

    # -- the thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing:
            guarded(self._step)
        while self._under_way:
            guarded(self._end_save)

    def _step(self) -> None:
        seen = self._flushes
        busy = self._reap() | self._delete(COLD) | self._delete(HOT) | self._promote()
        begun = self._begin_save()
        if self._under_way and (begun is not _Begun.SENT or len(self._under_way) == SAVES_UNDER_WAY):
            self._end_save()
        elif begun is not _Begun.SENT and not busy:
            if begun is _Begun.NOTHING or self._failures >= _FLUSH_FAILURES:
                self._exhausted = seen
                self._looked.set()
            self._wake.wait(self._rest_s(begun))
            self._wake.clear()

    def _rest_s(self, begun: _Begun) -> float | None:
        """How long there is nothing to do but what a kick tells of; None: for ever."""
        if self._yielding_since_s is not None:
            return _YIELD_STEP_S
        with self._lock:
            residency = self._cache.residency
            due = [tier for tier, refs in residency.deletes.items() if refs and residency.up[tier]]
            if any(self._may_call(tier) for tier in due):
                return 0.0  # they came just now
            if not due and begun is _Begun.NOTHING and not self._cache.moves.wants_saving():
                return None
            return _FLUSH_RETRY_S if self._flushing and self._failures < _FLUSH_FAILURES else _RETRY_S

    def _can_save(self) -> bool:
        with self._lock:
            return bool(self._cache.residency.dirty) and self._cache.residency.up[COLD]

    def _may_call(self, tier: int) -> bool:
        return time.monotonic() >= self._not_before_s[tier]

    def _took_nothing(self, tier: int) -> None:
        """The medium is full, or down: leave it alone for a while."""
        self._failures += tier == COLD
        self._not_before_s[tier] = time.monotonic() + (_FLUSH_RETRY_S if self._flushing else _RETRY_S)

    # -- saves ------------------------------------------------------------------------------------------------

    def _begin_save(self) -> _Begun:
        """Send one batch, if there is one and nothing stands against it."""
        if self._spokes.get(COLD) is None:
            return _Begun.NOTHING
        with self._lock:
            flushing = bool(self._flushing)
            if not (flushing and self._cache.residency.up[COLD]) and not self._cache.moves.wants_saving():
                return _Begun.NOTHING
            # Deletions that the agent did not confirm come first, or they would hit the copies that are written now.
            if not self._may_call(COLD) or self._cache.residency.deletes[COLD]:
                return _Begun.LATER
            if not flushing and self._gives_way():
                return _Begun.LATER
            batch = self._cache.moves.begin_saves(SAVE_BLOCKS, SAVE_BYTES, time.monotonic(), newest_first=flushing)
        if not batch:
            return _Begun.NOTHING
        self._delete(COLD)  # what made room for them
        self._under_way.append(_Save(batch, self._send(batch), time.monotonic()))
        return _Begun.SENT

    def _gives_way(self) -> bool:
        """Whether loads are queued that should go first. Under the lock."""
        now_s = time.monotonic()
        if len(self._cache.reads.loads) <= LOADS_FIRST:
            self._yielding_since_s = None
            return False
        if self._yielding_since_s is None:
            self._yielding_since_s = now_s
            self._counts["saves_yielded"] += 1
        if now_s - self._yielding_since_s < YIELD_MAX_S:
            return True
        self._yielding_since_s = None
        return False

    def _send(self, batch: Sequence[Copy]) -> PendingWrite | None:
        medium = self._spokes.get(COLD)
        with self._lock:
            if medium is None or self._cache.residency.deletes[COLD]:
                return None
        try:
            return medium.begin_write(self._spokes.items(COLD, batch))
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("%d writes to %s failed: %s", len(batch), medium.name, error)
            return None

    def _end_save(self) -> None:
        """Wait for the oldest batch, and note what became of it."""
        batch, pending, began_s = self._under_way[0]
        results = [WriteResult(Outcome.BUSY)] * len(batch)
        try:
            if pending is not None:
                results = pending.results()
        finally:  # whatever happens, its slots are pinned no longer
            self._under_way.popleft()
            for start in range(0, len(batch), _SETTLE_BLOCKS):
                self._saved(batch[start : start + _SETTLE_BLOCKS], results[start : start + _SETTLE_BLOCKS])
        stored = sum(result.outcome is Outcome.OK for result in results)
        if stored:
            self._failures = 0
        else:
            self._took_nothing(COLD)
        if any(result.outcome is Outcome.FULL for result in results):
            with self._lock:
                self._cache.evict(COLD, self._cache.residency.budgets[COLD].used_bytes // 32)
        self._counts["save_batches"] += 1
        self._counts["saves_refused"] += len(batch) - stored
        self._counts["save_us"] += int(1e6 * (time.monotonic() - began_s))

    def _saved(self, batch: Sequence[Copy], results: Sequence[WriteResult]) -> None:
        with self._lock:
            for copy, result in zip(batch, results, strict=True):
                stored = result.outcome is Outcome.OK
                lossy = result.checksum if result.lossy else b""
                self._cache.moves.saved(copy, result.stored_bytes if stored else None, lossy)
                self._counts["save_bytes"] += copy.block.namespace.block_nbytes * stored

    # -- promotions and deletions -----------------------------------------------------------------------------

    def _promote(self) -> bool:
        medium = self._spokes.get(HOT)
        if medium is None:
            return False
        with self._lock:
            batch = self._cache.moves.begin_promotions(PROMOTE_BLOCKS)
        if not batch:
            return False
        self._delete(HOT)  # what made room for them
        results = [WriteResult(Outcome.BUSY)] * len(batch)
        try:
            with self._lock:
                clear = not self._cache.residency.deletes[HOT]
            if clear:
                results = medium.write(self._spokes.items(HOT, batch))
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("%d writes to %s failed: %s", len(batch), medium.name, error)
        with self._lock:
            for copy, result in zip(batch, results, strict=True):
                self._cache.moves.promoted(copy, result.outcome is Outcome.OK)
            if any(result.outcome is Outcome.FULL for result in results):  # no slot of that size: others are in its way
                self._cache.evict(HOT, self._cache.residency.budgets[HOT].used_bytes // 32)
        return True

    def _delete(self, tier: int) -> bool:
        """Carry out what is due; whether something was. What the agent does not confirm stays due."""
        residency = self._cache.residency
        medium = self._spokes.get(tier)
        with self._lock:
            if medium is None:
                residency.deletes[tier].clear()
            if not residency.deletes[tier] or not residency.up[tier] or not self._may_call(tier):
                return False
            refs, residency.deletes[tier] = residency.deletes[tier], []
        assert medium is not None
        try:
            medium.delete([BlockRef(namespace, key) for namespace, key in refs])
        except (KVStoreError, OSError, MemoryError) as error:
            _log.warning("%d deletions from %s failed, will be tried again: %s", len(refs), medium.name, error)
            with self._lock:
                residency.deletes[tier] = refs + residency.deletes[tier]
                self._counts["deletes_refused"] += 1
            self._took_nothing(tier)
            return False
        return True

    def _reap(self) -> bool:
        with self._lock:
            return self._cache.moves.reap(_REAP_BLOCKS)
