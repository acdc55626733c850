"""A BlockCache in a world of dictionaries: memory, media and clock are plain values, and every byte has an author.

The world plays the engine. It copies the bytes of puts, and carries out loads, saves, promotions and deletions in the
order that the engine keeps: one saver, which deletes what has left a medium before it writes to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kvstore.core.block import COLD, HOT, WARM, Block, Namespace
from kvstore.core.cache import BlockCache, CacheConfig, NamespaceShape, RecoveredBlock
from kvstore.core.leases import Lease
from kvstore.core.moves import Copy
from kvstore.core.puts import PutPlan, PutStatus
from kvstore.core.reads import AcquireGroup
from kvstore.core.residency import Limits
from kvstore.core.slabs import SlotRef
from kvstore.core.slots import Slot

PAGE = 4096
TENANT = "tenant"
SESSION = 1
TTL_S = 30.0
LOSSY = 1_000_000  # added to the variant of what went through a lossy codec


def key(name: object) -> bytes:
    """A 32-byte key."""
    return hashlib.sha256(repr(name).encode()).digest()


def chain(count: int, name: str = "a", start: int = 0) -> list[bytes]:
    """Keys name/start … of one chain, as far as the tests keep to it."""
    return [key((name, i)) for i in range(start, start + count)]


def packed(keys: Iterable[bytes]) -> bytes:
    """Keys as they travel."""
    return b"".join(keys)


def warm_bytes_for(slots: int, slot_bytes: int = PAGE) -> int:
    """A pool with room for one slab of so many slots."""
    return PAGE + slots * slot_bytes


class Content(NamedTuple):
    """What stands for a block's bytes: whose they are. Two writers of one key need not agree to the bit."""

    digest: bytes
    epoch: int
    key: bytes
    variant: int

    @property
    def checksum(self) -> bytes:
        """Of these bytes."""
        return hashlib.sha256(repr(self).encode()).digest()[:16]


class Record(NamedTuple):
    """A block on a medium."""

    content: Content
    checksum: bytes
    parent: bytes
    epoch: int
    stored_bytes: int
    lossy: bool = False


class Promise(NamedTuple):
    """What a lease tells its reader of one block."""

    ref: SlotRef
    generation: int
    checksum: bytes
    digest: bytes
    epoch: int
    key: bytes


class Answer(Enum):
    """How an agent's read ends. GOOD is what it says if the medium has the right bytes."""

    GOOD = 0
    CORRUPT = 1
    MISSING = 2
    BUSY = 3


class Memory:
    """Slots and their generations, as readers in other processes see them."""

    def __init__(self) -> None:
        self.generations: dict[SlotRef, int] = {}
        self.contents: dict[SlotRef, Content] = {}
        self.published: set[int] = set()
        self.writes: list[tuple[SlotRef, int]] = []  # of generations

    def set_generation(self, ref: SlotRef, value: int) -> None:
        """The core writes into a slab's header."""
        if value:
            assert self.generations.get(ref, 0) == 0, "a generation was replaced without being made invalid"
            assert value not in self.published, "a generation was used twice"
            assert ref in self.contents, "a slot without bytes was published"
            self.published.add(value)
        self.generations[ref] = value
        self.writes.append((ref, value))

    def write(self, ref: SlotRef, content: Content) -> None:
        """A filler writes bytes."""
        assert self.generations.get(ref, 0) == 0, "bytes were overwritten while a reader may believe them"
        self.contents[ref] = content

    def read(self, promise: Promise) -> Content | None:
        """What a reader gets: bytes that it has proof for, or None."""
        if self.generations.get(promise.ref, 0) != promise.generation:
            return None
        return self.contents[promise.ref]


@dataclass(slots=True, eq=False)
class Load:
    """An agent fills a slot."""

    block: Block
    slot: Slot
    tier: int
    checksum: bytes


@dataclass(slots=True, eq=False)
class Save:
    """An agent copies from a slot."""

    copy: Copy
    tier: int
    checksum: bytes
    parent: bytes
    epoch: int


@dataclass(slots=True)
class World:
    """A daemon without threads, and everything around it."""

    warm_bytes: int = warm_bytes_for(8)
    cold_bytes: int = 0
    hot_bytes: int = 0
    tenant_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    slab_bytes: int = 0  # nominal size of a slab; 0: one slab takes the whole pool
    promote_hits: int = 2
    prefetch_share: float = 1.0
    now_s: float = 0.0
    may_grow: bool = True
    media: dict[int, dict[tuple[bytes, bytes], Record]] = field(default_factory=lambda: {HOT: {}, COLD: {}})
    memory: Memory = field(default_factory=Memory)
    plans: list[PutPlan] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    cache: BlockCache = field(init=False)

    def __post_init__(self) -> None:
        limits = Limits(self.warm_bytes, self.cold_bytes, self.hot_bytes, self.tenant_bytes)
        config = CacheConfig(limits, TTL_S, self.promote_hits, self.prefetch_share)
        self.cache = BlockCache(config, self.memory.set_generation)
        self.cache.allocator.target_bytes = self.slab_bytes or self.warm_bytes
        self.cache.residency.grow = self.grow
        self.cache.residency.up[COLD] = self.cold_bytes > 0
        self.cache.residency.up[HOT] = self.hot_bytes > 0

    def grow(self, tenant: str, slot_bytes: int) -> bool:
        """Make a slab at once."""
        slab = self.cache.allocator.plan(tenant, slot_bytes) if self.may_grow else None
        if slab is not None:
            self.cache.allocator.made(slab.slab_id)
        return slab is not None

    def open(
        self,
        name: str = "ns",
        tenant: str = TENANT,
        chain: bool = True,
        nbytes: int = PAGE,
        block_tokens: int = 16,
        cold_codec: str = "",
    ) -> Namespace:
        """A namespace."""
        shape = NamespaceShape(tenant, nbytes, block_tokens, chain, cold_codec=cold_codec)
        return self.cache.open_namespace(key(("namespace", name)), shape)

    def keep_terms(self) -> int:
        """What the engine does once a second; returns how many blocks outlived their time."""
        before = self.cache.terms.expired
        self.cache.terms.tick(self.now_s)
        while self.cache.terms.step(self.now_s):
            pass
        return self.cache.terms.expired - before

    # -- puts -------------------------------------------------------------------------------------------------

    def begin(self, namespace: Namespace, keys: Sequence[bytes], parent: bytes = b"", pin: bool = False) -> PutPlan:
        """Begin a put."""
        plan = self.cache.puts.begin(namespace, parent, keys, pin)
        self.plans.append(plan)
        return plan

    def copy(self, plan: PutPlan, variant: int = 0, stop: int | None = None) -> None:
        """Copy the first `stop` blocks out of staging."""
        for item in plan.items[:stop]:
            if item.slot is not None and not item.checksum:
                content = Content(plan.namespace.digest, plan.epoch, item.key, variant)
                self.memory.write(item.slot.ref, content)
                item.checksum = content.checksum

    def finish(self, plan: PutPlan) -> list[str]:
        """Publish; the outcome of every block in a word."""
        self.plans = [other for other in self.plans if other is not plan]
        self.cache.puts.finish(plan)
        return outcomes(plan)

    def cancel(self, plan: PutPlan) -> None:
        """As if it had never begun."""
        self.plans = [other for other in self.plans if other is not plan]
        self.cache.puts.cancel(plan)

    def put(
        self,
        namespace: Namespace,
        keys: Sequence[bytes],
        parent: bytes = b"",
        variant: int = 0,
        pin: bool = False,
    ) -> list[str]:
        """A whole put."""
        plan = self.begin(namespace, keys, parent, pin)
        self.copy(plan, variant)
        return self.finish(plan)

    # -- reads ------------------------------------------------------------------------------------------------

    def match(self, namespace: Namespace, keys: Sequence[bytes]) -> int:
        """Blocks of the longest stored prefix."""
        return self.cache.reads.match(namespace, packed(keys)).blocks

    def exists(self, namespace: Namespace, keys: Sequence[bytes]) -> list[bool]:
        """For each key whether it is stored."""
        return [bool(bit) for bit in self.cache.reads.exists(namespace, packed(keys))]

    def acquire(self, namespace: Namespace, keys: Sequence[bytes], session: int = SESSION) -> Lease | None:
        """A lease on a prefix."""
        return self.acquire_all([AcquireGroup(namespace, packed(keys))], session)

    def acquire_all(self, groups: Sequence[AcquireGroup], session: int = SESSION) -> Lease | None:
        """A lease on several namespaces."""
        below = self.cache.reads.foresee(groups)
        return self.cache.reads.acquire(session, groups[0].namespace.tenant, groups, self.now_s, below)

    def lease(self, namespace: Namespace, keys: Sequence[bytes], session: int = SESSION) -> Lease:
        """A lease that there must be."""
        lease = self.acquire(namespace, keys, session)
        assert lease is not None
        return lease

    def release(self, lease: Lease, upto: int = 0) -> None:
        """Give a lease back, or the first `upto` blocks of it."""
        self.cache.reads.leases.release(lease, upto)

    def ready(self, lease: Lease) -> int:
        """Blocks that are readable now."""
        return self.cache.reads.readiness(lease, len(lease.parts[0].slots)).ready

    # -- the agents -------------------------------------------------------------------------------------------

    def start_load(self) -> Load | None:
        """The next load goes to its agent; None where nothing can serve it."""
        block = self.cache.reads.loads.popleft()
        tier = self.cache.reads.source(block)
        slot = block.slot
        assert slot is not None
        if not tier:
            self.cache.reads.load_failed(block, 0)
            return None
        load = Load(block, slot, tier, block.checksum)
        self.loads.append(load)
        return load

    def end_load(self, load: Load, answer: Answer = Answer.GOOD) -> None:
        """The agent answers."""
        self.loads.remove(load)
        block, reads = load.block, self.cache.reads
        name = (block.namespace.digest, block.key)
        if answer is Answer.BUSY or not self.cache.residency.up[load.tier]:
            reads.load_failed(block, 0)
            return
        record = self.media[load.tier].get(name)
        if record is not None:
            self.memory.write(load.slot.ref, record.content)  # bad bytes reach the slot too, and no reader
        if answer is Answer.GOOD and record is not None and record.content.checksum == load.checksum:
            reads.loaded(block, load.tier)
            return
        self.media[load.tier].pop(name, None)
        reads.load_failed(block, load.tier)

    def load_all(self, answer: Answer = Answer.GOOD) -> int:
        """Carry out every load; returns how many."""
        count = 0
        while self.cache.reads.loads:
            load = self.start_load()
            if load is not None:
                self.end_load(load, answer)
            count += 1
        return count

    def start_saves(self, count: int = 8, nbytes: int = 1 << 30, flush: bool = True) -> list[Save]:
        """The saver takes a batch; what made room for it is deleted before anything is written."""
        return self._started(self.cache.moves.begin_saves(count, nbytes, self.now_s, newest_first=flush), COLD)

    def start_promotions(self, count: int = 8) -> list[Save]:
        """The saver takes a batch for the hot tier."""
        return self._started(self.cache.moves.begin_promotions(count), HOT)

    def end_save(self, save: Save, stored_bytes: int | None = PAGE) -> None:
        """The agent answers; None: it did not take the block."""
        self.saves.remove(save)
        copy = save.copy
        content = self.memory.contents[copy.slot.ref]
        lossy = save.tier == COLD and bool(copy.block.namespace.cold_codec)
        if stored_bytes is not None:
            assert content.checksum == save.checksum, "the source changed while it was copied"
            assert not (lossy and content.variant >= LOSSY), "encoded a second time"
            name = (copy.block.namespace.digest, copy.block.key)
            if lossy:
                content = content._replace(variant=content.variant + LOSSY)
            self.media[save.tier][name] = Record(
                content, content.checksum, save.parent, save.epoch, stored_bytes, lossy
            )
        if save.tier == COLD:
            self.cache.moves.saved(copy, stored_bytes, content.checksum if lossy else b"")
        else:
            self.cache.moves.promoted(copy, stored_bytes is not None)

    def save(self, count: int) -> None:
        """What the saver does in normal operation, up to so many blocks: what leaves next goes first."""
        while count > 0 and (batch := self.start_saves(count, flush=False)):
            for save in batch:
                self.end_save(save)
            count -= len(batch)
        self.delete_all()

    def save_all(self) -> int:
        """Save what is dirty, and delete what has gone; returns how many blocks were saved."""
        count = 0
        while batch := self.start_saves():
            for save in batch:
                self.end_save(save)
            count += len(batch)
            assert count < 10_000, "the saver never ends"
        self.delete_all()
        return count

    def promote_all(self) -> int:
        """Copy to hot what was asked for often; returns how many blocks."""
        batch = self.start_promotions(1 << 30)
        for save in batch:
            self.end_save(save)
        self.delete_all()
        return len(batch)

    def delete_all(self) -> None:
        """Delete from the media what has left them."""
        for tier in (HOT, COLD):
            deletes, self.cache.residency.deletes[tier] = self.cache.residency.deletes[tier], []
            for name in deletes:
                self.media[tier].pop(name, None)

    def lose_tier(self, tier: int) -> None:
        """An agent is gone; hot loses all it had."""
        self.cache.residency.up[tier] = False
        if tier == HOT:
            self.media[HOT].clear()
            namespaces = self.cache.index.namespaces.values()
            self.cache.moves.tier_lost(HOT, [b for n in namespaces for b in n.blocks.values() if b.copies & HOT])

    def restart(self, namespaces: Mapping[str, Namespace]) -> dict[str, Namespace]:
        """Kill the daemon and start another on the same cold medium."""
        epochs = {namespace.digest: namespace.epoch for namespace in namespaces.values()}
        shapes = {
            name: NamespaceShape(n.tenant, n.block_nbytes, n.block_tokens, n.chain, cold_codec=n.cold_codec)
            for name, n in namespaces.items()
        }
        self.memory = Memory()
        self.plans, self.loads, self.saves, self.media[HOT] = [], [], [], {}
        self.__post_init__()
        reopened = {
            name: self.cache.open_namespace(n.digest, shapes[name], epochs[n.digest]) for name, n in namespaces.items()
        }
        by_digest = {namespace.digest: namespace for namespace in reopened.values()}
        for (digest, name), record in list(self.media[COLD].items()):
            if record.epoch != epochs[digest]:
                del self.media[COLD][digest, name]
            else:
                entry = RecoveredBlock(name, record.parent, record.checksum, record.stored_bytes, record.lossy)
                self.cache.recover(by_digest[digest], entry)
        for namespace in reopened.values():
            self.cache.recovered(namespace)
        return reopened

    def _started(self, batch: Sequence[Copy], tier: int) -> list[Save]:
        self.delete_all()
        started = [
            Save(
                copy,
                tier,
                copy.block.checksum,
                copy.block.parent.key if copy.block.parent is not None else b"",
                copy.block.epoch,
            )
            for copy in batch
        ]
        self.saves += started
        return started


def outcomes(plan: PutPlan) -> list[str]:
    """STORED, EXISTS or the reason, for each block."""
    return [item.reason.name if item.status is PutStatus.REJECTED else item.status.name for item in plan.items]


def promises(lease: Lease) -> list[Promise]:
    """What the lease's reader was told."""
    return [
        Promise(slot.ref, slot.generation, block.checksum, part.namespace.digest, part.namespace.epoch, block.key)
        for part in lease.parts
        for block, slot in zip(part.blocks, part.slots, strict=True)
    ]


def tiers_of(block: Block) -> str:
    """The tiers that hold a block, for example "warm cold"."""
    return " ".join(name for tier, name in ((HOT, "hot"), (WARM, "warm"), (COLD, "cold")) if block.copies & tier)
