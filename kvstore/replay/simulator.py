"""A daemon without media and threads: the core, and an engine that carries out every move at once.

Every decision is the core's own (BlockCache): what is found, what leaves, what is saved and promoted. Time is the
trace's. A request acquires the full blocks of its prompt, waits for what loads, puts what was missing, and releases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from kvstore.core.block import COLD, HOT, WARM, Namespace
from kvstore.core.cache import BlockCache, CacheConfig, NamespaceShape
from kvstore.core.leases import Lease
from kvstore.core.policy import PolicyFactory
from kvstore.core.reads import AcquireGroup
from kvstore.core.residency import Limits
from kvstore.core.slabs import SlotRef
from kvstore.protocol.slab import PAGE_BYTES, SlabGeometry
from kvstore.replay.trace import Request, Trace

TIERS = {"hot": HOT, "warm": WARM, "cold": COLD}
PROMOTE_HITS = 2  # the daemon's own

_SESSION, _TENANT = 1, "replay"
_CHECKSUM = bytes(16)
_SAVE_BLOCKS = 32
_COPIES = attrgetter("copies")


@dataclass(slots=True)
class Counts:
    """What a replay has seen, in blocks but where the name says otherwise. `moved` is by (from, to).

    `left_warm` are blocks that warm dropped for room, each time: what an exclusive tier below, which takes all that
    warm drops and gives up what goes up again, would have written.
    """

    requests: int = 0
    references: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    prefix_hit: float = 0.0  # sum over requests of the share that was found
    tokens: int = 0
    tokens_saved: int = 0
    stored: int = 0
    refused: int = 0
    left_warm: int = 0
    moved: dict[tuple[str, str], int] = field(default_factory=dict)

    def move(self, source: str, target: str, blocks: int) -> None:
        """Count a copy of `blocks` blocks between tiers."""
        self.moved[source, target] = self.moved.get((source, target), 0) + blocks


class Simulator:
    """Replays requests against tiers of so many blocks."""

    def __init__(self, blocks: Mapping[str, int], policy: PolicyFactory, promote_hits: int = PROMOTE_HITS) -> None:
        """`blocks`: capacity by the name of the tier; warm is needed, the others may be missing.

        `promote_hits`: acquires of a block until it is copied to hot; 1: at its first.

        Raises:
            ValueError: there is no warm tier, or a tier of another name.
        """
        if blocks.get("warm", 0) < 1 or not set(blocks) <= set(TIERS) or min(blocks.values()) < 0:
            raise ValueError("give warm=N, and hot=N and cold=N where there are such tiers, in blocks")
        self.counts = Counts()
        self.cache = _cache(blocks, policy, promote_hits)
        shape = NamespaceShape(_TENANT, PAGE_BYTES, 1, chain=True)
        self._namespace = self.cache.open_namespace(bytes(32), shape)
        self._tiered = len([tier for tier in blocks if blocks[tier]]) > 1

    @property
    def namespace(self) -> Namespace:
        """What is stored."""
        return self._namespace

    def run(self, trace: Trace, progress: Callable[[int], None] | None = None) -> Counts:
        """Replay all requests; `progress` is told of every one."""
        for request in trace.requests:
            self.request(request, trace.block_tokens)
            if progress is not None:
                progress(1)
        self.counts.left_warm = self.cache.residency.counts[WARM].evictions
        return self.counts

    def request(self, request: Request, block_tokens: int = 0) -> int:
        """Serve one request; returns the blocks that were found."""
        reads, keys = self.cache.reads, request.keys[: request.full]
        lease = None
        if keys:
            group = AcquireGroup(self._namespace, b"".join(keys))
            lease = reads.acquire(_SESSION, _TENANT, [group], request.time_s)
        found = len(lease.parts[0].slots) if lease is not None else 0
        if lease is not None:
            self._count_hits(lease)
        if found < len(keys):
            self._put(keys[found - 1] if found else b"", keys[found:])
        if lease is not None:
            reads.leases.release(lease)
        if self._tiered:
            self._move(request.time_s)
        self._count(request, found, block_tokens)
        return found

    def _count_hits(self, lease: Lease) -> None:
        """By the fastest tier of each block, before what is missing in warm has been loaded."""
        hits, part = self.counts.hits, lease.parts[0]
        if not self._tiered:
            hits["warm"] += len(part.blocks)
            return
        for copies, blocks in Counter(map(_COPIES, part.blocks)).items():
            hits["hot" if copies & HOT else "warm" if copies & WARM else "cold"] += blocks
        self._load()

    def _put(self, parent: bytes, keys: list[bytes]) -> None:
        puts = self.cache.puts
        stored, rejected = puts.stored, sum(puts.rejected.values())
        plan = puts.begin(self._namespace, parent, keys)
        for item in plan.items:
            item.checksum = _CHECKSUM
        puts.finish(plan)
        self.counts.stored += puts.stored - stored
        self.counts.refused += sum(puts.rejected.values()) - rejected

    def _load(self) -> None:
        reads = self.cache.reads
        while reads.loads:
            block = reads.loads.popleft()
            tier = reads.source(block)
            if tier:
                self.counts.move("hot" if tier == HOT else "cold", "warm", 1)
                reads.loaded(block, tier)
            else:
                reads.load_failed(block, 0)

    def _move(self, now_s: float) -> None:
        """Save and promote until nothing wants to move."""
        moves, residency = self.cache.moves, self.cache.residency
        while moves.wants_saving() and (batch := moves.begin_saves(_SAVE_BLOCKS, 1 << 62, now_s)):
            for copy in batch:
                moves.saved(copy, PAGE_BYTES)
            self.counts.move("warm", "cold", len(batch))
        while batch := moves.begin_promotions(_SAVE_BLOCKS):
            for copy in batch:
                moves.promoted(copy, stored=True)
            self.counts.move("warm", "hot", len(batch))
        for deletes in residency.deletes.values():
            deletes.clear()

    def _count(self, request: Request, found: int, block_tokens: int) -> None:
        counts, blocks = self.counts, len(request.keys)
        counts.requests += 1
        counts.references += blocks
        counts.tokens += request.tokens
        if found:
            counts.prefix_hit += found / blocks
            counts.tokens_saved += found * block_tokens if block_tokens else request.tokens * found // blocks


def _cache(blocks: Mapping[str, int], policy: PolicyFactory, promote_hits: int) -> BlockCache:
    """A core whose warm tier is one slab of exactly so many slots."""
    # And a page that serves nobody: the core wants room for a page more than one block and its header.
    warm_bytes = SlabGeometry.for_class(PAGE_BYTES, blocks["warm"] * PAGE_BYTES).segment_bytes + PAGE_BYTES
    limits = Limits(warm_bytes, blocks.get("cold", 0) * PAGE_BYTES, blocks.get("hot", 0) * PAGE_BYTES, policy=policy)
    cache = BlockCache(CacheConfig(limits, promote_hits=promote_hits), _no_generation)
    cache.allocator.target_bytes = blocks["warm"] * PAGE_BYTES
    slab = cache.allocator.plan(_TENANT, PAGE_BYTES)
    assert slab is not None and slab.geometry.slots == blocks["warm"]
    cache.allocator.made(slab.slab_id)
    for tier in (HOT, COLD):
        cache.residency.up[tier] = cache.residency.budgets[tier].capacity_bytes > 0
    return cache


def _no_generation(ref: SlotRef, value: int) -> None:
    """There is no shared memory."""
