"""The contract of a tier as an executable kit: every tier and every wrapper must pass it.

    for check in TIER_CHECKS:            # DURABLE_CHECKS too, where the tier is Scannable
        check(factory)

A factory makes a tier over the given memory with the given capacity in bytes. Each check wants a medium of its own;
within a check of DURABLE_CHECKS the factory is called again after close() and must then open the same medium. A
check raises AssertionError with what went wrong. Nothing here needs a test framework.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, cast

import numpy as np

from kvstore.protocol.errors import KVStoreError
from kvstore.tiers.base import (
    BlockRef,
    Outcome,
    Scannable,
    SlabMemory,
    SlabRange,
    Tier,
    TierItem,
)
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.memory import ArrayMemory

TierFactory = Callable[[SlabMemory, int], Tier]
Check = Callable[[TierFactory], None]


class DurableTier(Tier, Scannable, Protocol):
    """What DURABLE_CHECKS are for."""


_CAPACITY_BYTES = 8 << 20
_MEMORY_BYTES = 24 << 20
_BLOCK_BYTES = 64 << 10
_AWKWARD_SIZES = (1, 2, 3, 63, 511, 1966, 1967, 4080, 4096, 4097, 65_535, 131_073, 1_000_001)
_FILLER = 0xA5
_THREADS = 4
_WAIT_S = 100.0


def expect(condition: bool, message: str) -> None:
    """An assert that survives python -O.

    Raises:
        AssertionError: the condition does not hold.
    """
    if not condition:
        raise AssertionError(message)


class Rig:
    """A tier under test, with blocks whose bytes follow from their number and version, so that any mix-up shows."""

    def __init__(self, factory: TierFactory, capacity_bytes: int = _CAPACITY_BYTES) -> None:
        self._factory = factory
        self._capacity_bytes = capacity_bytes
        self.memory = ArrayMemory(_MEMORY_BYTES)
        self.tier = factory(self.memory, capacity_bytes)

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tier.close()

    def reopen(self) -> None:
        """Close the tier and make it again."""
        self.tier.close()
        self.tier = self._factory(self.memory, self._capacity_bytes)

    def block(self, number: int, nbytes: int = _BLOCK_BYTES, version: int = 0, namespace: str = "one") -> TierItem:
        """A block to write, its bytes in memory."""
        place = self.memory.reserve(nbytes)
        seed = [number, nbytes, version, *namespace.encode()]
        self.memory.view(place)[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
        checksum = block_checksum(self.memory.view(place))
        parent = _digest(f"key {number - 1}") if number else b""
        ref = BlockRef(_digest(f"namespace {namespace}"), _digest(f"key {number}"))
        return TierItem(ref, place, checksum, parent, epoch=7 + version, layout="bfloat16", hits=number)

    def target(self, item: TierItem) -> TierItem:
        """The same block, to be read into a fresh range with a guard byte on either side."""
        place = self.memory.reserve(item.range.nbytes + 2)
        self.memory.view(place)[:] = _FILLER
        return item._replace(range=SlabRange(place.slab_id, place.offset + 1, item.range.nbytes))

    def write(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Write a batch; an outcome and an honest size per block."""
        results = self.tier.write(items)
        expect(len(results) == len(items), f"write of {len(items)} blocks gave {len(results)} results")
        for result in results:
            stored = result.stored_bytes > 0
            expect(stored == (result.outcome is Outcome.OK), f"{result}: stored bytes go with OK, and only with OK")
        return [result.outcome for result in results]

    def store(self, items: Sequence[TierItem]) -> None:
        """Write a batch that must be stored whole."""
        outcomes = self.write(items)
        expect(set(outcomes) <= {Outcome.OK}, f"write gave {outcomes}")

    def fetch(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Read blocks into fresh ranges; whatever is OK must be byte-exact, and no other byte may change."""
        targets = [self.target(item) for item in items]
        outcomes = self.tier.read(targets)
        expect(len(outcomes) == len(items), f"read of {len(items)} blocks gave {len(outcomes)} outcomes")
        for target, outcome in zip(targets, outcomes, strict=True):
            self._inspect(target, outcome)
        return outcomes

    def _inspect(self, target: TierItem, outcome: Outcome) -> None:
        expect(type(outcome) is Outcome, f"{outcome!r} is no Outcome")
        place = target.range
        around = self.memory.view(SlabRange(place.slab_id, place.offset - 1, place.nbytes + 2))
        expect((around[0], around[-1]) == (_FILLER, _FILLER), "read changed a byte outside its range")
        if outcome is Outcome.OK:
            expect(block_checksum(self.memory.view(place)) == target.checksum, "read said OK and gave wrong bytes")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def check_round_trip(factory: TierFactory) -> None:
    """Blocks of any size come back byte-exact; writing leaves the source alone."""
    with Rig(factory) as rig:
        items = [rig.block(number, nbytes) for number, nbytes in enumerate(_AWKWARD_SIZES)]
        rig.store(items)
        for item in items:
            expect(block_checksum(rig.memory.view(item.range)) == item.checksum, "write changed its source")
        expect(rig.fetch(items) == [Outcome.OK] * len(items), "what was written is not served")
        expect(rig.fetch(items[::-1]) == [Outcome.OK] * len(items), "what was read once is not served again")


def check_unwritten_is_missing(factory: TierFactory) -> None:
    """A block that was never written is MISSING; an empty batch is nothing."""
    with Rig(factory) as rig:
        expect(rig.fetch([rig.block(1), rig.block(2)]) == [Outcome.MISSING] * 2, "an absent block is not MISSING")
        expect(rig.tier.read([]) == [], "an empty read")
        expect(rig.tier.write([]) == [], "an empty write")
        rig.tier.delete([])


def check_outcomes_are_in_order(factory: TierFactory) -> None:
    """Every outcome stands where its item stood, hit or miss."""
    with Rig(factory) as rig:
        items = [rig.block(number, 1000 + number) for number in range(20)]
        rig.store(items[::3])
        wanted = [Outcome.MISSING if number % 3 else Outcome.OK for number in range(20)]
        expect(rig.fetch(items) == wanted, "outcomes are out of order")


def check_write_replaces(factory: TierFactory) -> None:
    """The newer copy is served, and the older is gone; within one batch the later of two wins."""
    with Rig(factory) as rig:
        old, new, newest = (rig.block(1, version=version) for version in range(3))
        rig.store([old])
        rig.store([new])
        expect(rig.fetch([new]) == [Outcome.OK], "the newer copy is not served")
        rig.store([old, newest])
        expect(rig.fetch([newest]) == [Outcome.OK], "the later copy of a batch is not served")
        other_size = rig.block(1, nbytes=5000)
        rig.store([other_size])
        expect(rig.fetch([other_size]) == [Outcome.OK], "a copy of another size does not replace")


def check_delete(factory: TierFactory) -> None:
    """Deleted blocks are MISSING, their neighbours are not; deleting what is not there is fine."""
    with Rig(factory) as rig:
        items = [rig.block(number) for number in range(4)]
        rig.store(items)
        rig.tier.delete([items[1].ref, items[3].ref, rig.block(99).ref])
        rig.tier.delete([items[1].ref, items[1].ref])
        wanted = [Outcome.OK, Outcome.MISSING, Outcome.OK, Outcome.MISSING]
        expect(rig.fetch(items) == wanted, "delete took the wrong blocks")
        rig.store(items)
        expect(rig.fetch(items) == [Outcome.OK] * 4, "a deleted block cannot be stored again")


def check_namespaces_do_not_meet(factory: TierFactory) -> None:
    """The same key in two namespaces is two blocks."""
    with Rig(factory) as rig:
        one, two = rig.block(1), rig.block(1, namespace="two")
        rig.store([one])
        same_bytes = one._replace(ref=two.ref)
        expect(rig.fetch([two, same_bytes]) == [Outcome.MISSING] * 2, "a block is served to another namespace")
        rig.store([two])
        rig.tier.delete([one.ref])
        expect(rig.fetch([one, two]) == [Outcome.MISSING, Outcome.OK], "delete reached into another namespace")


def check_wrong_checksum_is_never_served(factory: TierFactory) -> None:
    """Bytes that fail the checksum are never OK: neither taken as good when written nor handed out."""
    with Rig(factory) as rig:
        item = rig.block(1)
        rig.memory.view(item.range)[_BLOCK_BYTES // 2] ^= 1  # flipped in memory, after it was hashed
        rig.write([item])
        expect(rig.fetch([item]) != [Outcome.OK], "bytes that never matched their checksum are served")
        good = rig.block(2)
        rig.store([good])
        asked = good._replace(checksum=bytes(16))
        expect(rig.fetch([asked]) == [Outcome.MISSING], "another content than is stored is not MISSING")
        expect(rig.fetch([good]) == [Outcome.OK], "a good copy was dropped because another content was asked for")


def check_wrong_size_is_never_served(factory: TierFactory) -> None:
    """A block asked for in another size is not OK."""
    with Rig(factory) as rig:
        for number, change in enumerate((-1, 1)):
            item = rig.block(number, 5000)
            rig.store([item])
            other = item._replace(range=item.range._replace(nbytes=5000 + change))
            expect(rig.fetch([other]) != [Outcome.OK], "a block is served in another size")


def check_unmapped_slab_is_busy(factory: TierFactory) -> None:
    """A range that is not mapped is BUSY and does not cost the rest of its batch."""
    with Rig(factory) as rig:
        good, stray = rig.block(1), rig.block(2)
        stray = stray._replace(range=stray.range._replace(slab_id=404))
        expect(rig.write([stray, good]) == [Outcome.BUSY, Outcome.OK], "write from a slab that is not mapped")
        expect(rig.fetch([good]) == [Outcome.OK], "the rest of the batch was not stored")
        rig.store([rig.block(2)])
        expect(rig.tier.read([stray, rig.target(good)]) == [Outcome.BUSY, Outcome.OK], "read into one")


def check_full(factory: TierFactory) -> None:
    """Without room a block is FULL; what was stored stays served, and a delete makes room again."""
    with Rig(factory, capacity_bytes=2 << 20) as rig:
        items = [rig.block(number) for number in range(48)]  # 3 MiB that do not compress
        outcomes = rig.write(items)
        expect(set(outcomes) == {Outcome.OK, Outcome.FULL}, f"3 MiB into 2 MiB gave {set(outcomes)}")
        stored = [item for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.OK]
        expect(len(stored) >= 20, f"2 MiB hold {len(stored)} blocks of 64 KiB")
        expect(rig.fetch(stored) == [Outcome.OK] * len(stored), "a full tier does not serve what it has")
        rig.tier.delete([item.ref for item in stored[::2]])
        fresh = [rig.block(number) for number in range(100, 104)]
        for item in fresh:  # space may come back only some commits after the delete
            attempts = [rig.write([item]) for _ in range(4)]
            expect([Outcome.OK] in attempts, "a delete does not make room")
        expect(rig.fetch(fresh + stored[1::2]) == [Outcome.OK] * len(fresh + stored[1::2]), "after the delete")


def check_threads(factory: TierFactory) -> None:
    """Several threads write, read and delete blocks of their own at once."""
    with Rig(factory) as rig, ThreadPoolExecutor(_THREADS) as pool:
        work = [
            [rig.block(100 * thread + number, 30_000 + number) for number in range(12)] for thread in range(_THREADS)
        ]
        spare = [[rig.target(item) for item in mine] for mine in work]

        def run(thread: int) -> None:
            for _ in range(4):
                rig.store(work[thread])
                expect(rig.tier.read(spare[thread]) == [Outcome.OK] * 12, "a block of this thread's is not served")
                for target in spare[thread]:
                    expect(block_checksum(rig.memory.view(target.range)) == target.checksum, "wrong bytes")
                rig.tier.delete([item.ref for item in work[thread][::2]])
                wanted = [Outcome.OK if number % 2 else Outcome.MISSING for number in range(12)]
                expect(rig.tier.read(spare[thread]) == wanted, "after this thread's delete")

        for future in [pool.submit(run, thread) for thread in range(_THREADS)]:
            future.result(_WAIT_S)


def check_stats(factory: TierFactory) -> None:
    """A name, a capacity, and counters that are plain numbers and follow what happens."""
    with Rig(factory) as rig:
        expect(bool(rig.tier.name), "a tier has a name")
        expect(rig.tier.capacity_bytes == _CAPACITY_BYTES, "a tier says its capacity")
        items = [rig.block(number) for number in range(3)]
        rig.store(items)
        stats = rig.tier.stats()
        expect(all(type(value) is int and value >= 0 for value in stats.values()), f"stats: {dict(stats)}")
        expect((stats["blocks"], stats["raw_bytes"]) == (3, 3 * _BLOCK_BYTES), f"stats after three: {dict(stats)}")
        expect(stats["stored_bytes"] > 0, "stored bytes")
        rig.store(items[:1])
        rig.tier.delete([item.ref for item in items[1:]])
        stats = rig.tier.stats()
        expect((stats["blocks"], stats["raw_bytes"]) == (1, _BLOCK_BYTES), f"after replace and delete: {dict(stats)}")


def check_close(factory: TierFactory) -> None:
    """close() may be called twice; what comes after it is answered, and not with OK."""
    with Rig(factory) as rig:
        item = rig.block(1)
        rig.store([item])
        rig.tier.close()
        rig.tier.close()
        expect(rig.fetch([item]) != [Outcome.OK], "a closed tier serves")
        expect(rig.write([item]) != [Outcome.OK], "a closed tier stores")
        with contextlib.suppress(OSError, KVStoreError):  # a tier that cannot delete any more may say so
            rig.tier.delete([item.ref])


def check_reopening_serves(factory: TierFactory) -> None:
    """Everything written is there after a restart, byte-exact, and what was deleted is not."""
    with Rig(factory) as rig:
        items = [rig.block(number, nbytes) for number, nbytes in enumerate(_AWKWARD_SIZES)]
        rig.store(items)
        rig.tier.delete([items[2].ref])
        before = dict(rig.tier.stats())
        rig.reopen()
        wanted = [Outcome.MISSING if number == 2 else Outcome.OK for number in range(len(items))]
        expect(rig.fetch(items) == wanted, "a restart lost or revived blocks")
        for name in ("blocks", "raw_bytes", "stored_bytes"):
            expect(rig.tier.stats()[name] == before[name], f"a restart changed {name}")


def check_scan(factory: TierFactory) -> None:
    """scan() gives one true record per block, before and after a restart."""
    with Rig(factory) as rig:
        items = [rig.block(number, 100 + number) for number in range(40)]
        results = rig.tier.write(items)
        rig.tier.delete([items[0].ref])
        rig.store([rig.block(1, 2000, version=3)])
        wanted = [
            (item.ref, item.parent, item.checksum, item.range.nbytes, item.epoch, item.hits, *result[1:4])
            for item, result in zip(items[2:], results[2:], strict=True)
        ]
        for _ in range(2):
            found = {record.ref: record for record in cast(DurableTier, rig.tier).scan()}
            expect(len(found) == 39 and items[0].ref not in found, f"scan found {len(found)} blocks")
            names = ("ref", "parent", "checksum", "nbytes", "epoch", "hits", "stored_bytes", "codec", "lossy")
            kept = [tuple(getattr(found[record[0]], name) for name in names) for record in wanted]
            expect(kept == wanted, "a record is not what was written")
            replaced = found[items[1].ref]
            expect((replaced.nbytes, replaced.epoch) == (2000, 10), "a replaced block has its old record")
            rig.reopen()


def check_root_is_kept_apart(factory: TierFactory) -> None:
    """A block without a parent and one whose parent is 32 zero bytes are told apart."""
    with Rig(factory) as rig:
        root, child = rig.block(0), rig.block(1)._replace(parent=bytes(32))
        rig.store([root, child])
        rig.reopen()
        found = {record.ref: record.parent for record in cast(DurableTier, rig.tier).scan()}
        expect(found == {root.ref: b"", child.ref: bytes(32)}, "a parent changed")


def check_flush(factory: TierFactory) -> None:
    """flush() returns, with and without anything to do, and so it does while others write."""
    with Rig(factory) as rig, ThreadPoolExecutor(1) as pool:
        durable = cast(DurableTier, rig.tier)
        durable.flush()
        items = [rig.block(number) for number in range(32)]
        writing = pool.submit(rig.store, items)
        for _ in range(3):
            durable.flush()
        writing.result(_WAIT_S)
        durable.flush()
        expect(rig.fetch(items) == [Outcome.OK] * 32, "after flush")


TIER_CHECKS: tuple[Check, ...] = (
    check_round_trip,
    check_unwritten_is_missing,
    check_outcomes_are_in_order,
    check_write_replaces,
    check_delete,
    check_namespaces_do_not_meet,
    check_wrong_checksum_is_never_served,
    check_wrong_size_is_never_served,
    check_unmapped_slab_is_busy,
    check_full,
    check_threads,
    check_stats,
    check_close,
)
DURABLE_CHECKS: tuple[Check, ...] = (check_reopening_serves, check_scan, check_root_is_kept_apart, check_flush)
