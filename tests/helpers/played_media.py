"""An engine's mover over media that a test plays: their agents answer, refuse, hang or vanish as they are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from core_world import chain
from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.cache import BlockCache, CacheConfig, NamespaceShape
from kvstore.core.leases import Lease
from kvstore.core.puts import PutStatus
from kvstore.core.reads import AcquireGroup
from kvstore.core.residency import Limits
from kvstore.engine.mover import Mover
from kvstore.tiers.base import (
    BlockRef,
    CheckPage,
    CompactResult,
    Outcome,
    SlabRange,
    StoredRecord,
    TierItem,
    WriteResult,
)
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.warm import WarmPool

PATIENCE_S = 30.0
NBYTES = 4096
SESSION = 1

Settle = Callable[[int, Sequence[Outcome]], None]


class PlayedWrite:
    """A batch on its way; the medium decides when, and how, it is answered."""

    def __init__(self, medium: PlayedMedium, items: Sequence[TierItem]) -> None:
        self._medium = medium
        self.items = items

    def results(self) -> list[WriteResult]:
        return self._medium.store(self.items)


class PlayedMedium:
    """A dictionary behind the interface of a supervised agent. Its hooks are called on the engine's threads."""

    device = "played"
    state = "ok"
    restarts = 0

    def __init__(self, name: str, pool: WarmPool) -> None:
        self.name = name
        self.capacity_bytes = 1 << 40
        self._pool = pool
        self.blocks: dict[BlockRef, bytes] = {}
        self.events: list[tuple[str, list[BlockRef]]] = []
        self.outcome: Callable[[TierItem], Outcome] = lambda item: Outcome.OK
        self.before_map: Callable[[], object] = lambda: None
        self.before_send: Callable[[], object] = lambda: None
        self.before_results: Callable[[], object] = lambda: None
        self.before_read: Callable[[TierItem], object] = lambda item: None
        self.before_delete: Callable[[], object] = lambda: None
        self.vanishes_at: Callable[[TierItem], bool] = lambda item: False
        self.mapped: set[int] = set()
        self.page = CheckPage(None)

    def begin_write(self, items: Sequence[TierItem]) -> PlayedWrite:
        self.before_send()
        self.events.append(("write", [item.ref for item in items]))
        return PlayedWrite(self, items)

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        return self.begin_write(items).results()

    def store(self, items: Sequence[TierItem]) -> list[WriteResult]:
        self.before_results()
        results = []
        for item in items:
            outcome = self.outcome(item)
            if outcome is Outcome.OK:
                self.blocks[item.ref] = self._view(item.range).tobytes()
            results.append(WriteResult(outcome, item.range.nbytes))
        return results

    def read(self, items: Sequence[TierItem], settle: Settle | None = None) -> list[Outcome]:
        self.events.append(("read", [item.ref for item in items]))
        outcomes = [Outcome.MISSING] * len(items)
        for position, item in enumerate(items):
            self.before_read(item)
            if self.vanishes_at(item):
                break
            outcomes[position] = self._fill(item)
            if settle is not None:
                settle(position, [outcomes[position]])
        return outcomes

    def delete(self, refs: Sequence[BlockRef]) -> None:
        self.before_delete()
        self.events.append(("delete", list(refs)))
        for ref in refs:
            self.blocks.pop(ref, None)

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        for ref in sorted(self.blocks):
            if after is None or ref > after:
                yield StoredRecord(ref, b"", b"", NBYTES, NBYTES, 0)

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        return self.page

    def compact(self) -> CompactResult:
        return CompactResult(0, 0)

    def flush(self) -> None:
        pass

    def stats(self) -> Mapping[str, int]:
        return {}

    def map_slab(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        self.before_map()
        self.mapped.add(slab_id)

    def unmap_slab(self, slab_id: int) -> None:
        self.mapped.discard(slab_id)

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[list[BlockRef]]:
        """The batches of one kind, in the order in which they came."""
        return [refs for event, refs in list(self.events) if event == kind]

    def _fill(self, item: TierItem) -> Outcome:
        found = self.blocks.get(item.ref)
        if found is None:
            return Outcome.MISSING
        self._view(item.range)[:] = np.frombuffer(found, np.uint8)
        return Outcome.OK if block_checksum(self._view(item.range)) == item.checksum else Outcome.CORRUPT

    def _view(self, place: SlabRange) -> np.ndarray:
        return self._pool.view(place)


class EngineRig:
    """A core, a warm pool of `slots` slots, played media and the mover between them, which has yet to be started."""

    def __init__(self, slots: int = 64, cold_bytes: int = 1 << 30, hot_bytes: int = 0) -> None:
        self.lock = threading.Lock()
        warm_bytes = NBYTES + slots * NBYTES  # a page for the header
        self.pool = WarmPool(warm_bytes, lock_pages=False)
        limits = Limits(warm_bytes, cold_bytes, hot_bytes)
        self.cache = BlockCache(CacheConfig(limits), self._set_generation)
        self.cache.allocator.target_bytes = warm_bytes  # one slab takes the whole pool
        self.cache.residency.grow = self._grow
        self.now_s = 0.0
        self.mover = Mover(self.lock, self.cache, self.pool, lambda: self.now_s)
        self.cold = PlayedMedium("cold", self.pool)
        self.hot = PlayedMedium("hot", self.pool)
        self.mover.attach(COLD, self.cold)
        self.cache.residency.up[COLD] = True
        if hot_bytes:
            self.mover.attach(HOT, self.hot)
            self.cache.residency.up[HOT] = True
        self.space = self.open()

    def open(self, name: str = "space", *, is_chain: bool = True) -> Namespace:
        shape = NamespaceShape("tenant", NBYTES, 16, is_chain, "uint8")
        return self.cache.open_namespace(name.encode().ljust(32, b"."), shape)

    def put(self, name: str, count: int, space: Namespace | None = None) -> list[Block]:
        """Store a chain (or, in a set, so many blocks) and return what is there now."""
        space = space or self.space
        keys = chain(count, name)
        with self.lock:
            plan = self.cache.puts.begin(space, b"", keys)
            for item in plan.items:
                if item.slot is not None:
                    view = self.pool.view(self.pool.range_of(item.slot.slab_id, item.slot.index, NBYTES))
                    view[:] = np.frombuffer(item.key * (NBYTES // 32), np.uint8)
                    item.checksum = block_checksum(view)
            self.cache.puts.finish(plan)
            assert all(item.status is not PutStatus.REJECTED for item in plan.items), plan.items
            return [space.blocks[key] for key in keys]

    def evict_warm(self) -> None:
        with self.lock:
            self.cache.evict(WARM, 1 << 40)

    def acquire(self, name: str, count: int) -> Lease:
        """Begin to load a prefix; nothing is waited for."""
        with self.lock:
            lease = self.cache.reads.acquire(
                SESSION, "tenant", [AcquireGroup(self.space, b"".join(chain(count, name)))], 0.0
            )
            assert lease is not None
            self.mover.kick_loads()
        return lease

    def ready(self, lease: Lease) -> int:
        with self.lock:
            return self.cache.reads.readiness(lease, len(lease.parts[0].slots)).ready

    def release(self, lease: Lease) -> None:
        with self.lock:
            self.cache.reads.leases.release(lease, 0)

    def close(self) -> bool:
        deleted = self.mover.close()
        self.pool.close()
        return deleted

    def _grow(self, tenant: str, slot_size: int) -> bool:
        slab = self.cache.allocator.plan(tenant, slot_size)
        if slab is None:
            return False
        self.pool.make(slab.slab_id, slab.geometry)
        self.cache.allocator.made(slab.slab_id)
        return True

    def _set_generation(self, ref: object, value: int) -> None:
        self.pool.set_generation(ref.slab_id, ref.slot, value)  # type: ignore[attr-defined]


def refs_of(blocks: Iterable[Block]) -> list[BlockRef]:
    """Their names below the core."""
    return [BlockRef(block.namespace.digest, block.key) for block in blocks]
