"""How the index scales to a million blocks: `python ops/bench/core_scale.py [--json]`.

A core without media is filled with conversations (64 to 512 blocks that go on from a part of an earlier one), in three
ways, each at 10^4, 10^5 and 10^6 blocks and in a process of its own:

warm     all in warm, no cold tier, and full
cold     all in cold, as after a restart; warm holds a tenth
both     all in warm and, saved, in cold too

bytes    growth of the process per block, after the orders have been asked once (which makes the memory of adaptive)
insert   puts.begin and finish, for a block, of calls of up to 256
stall    what the slowest such call took over the median: a table grew, if there is one that does
touch    acquire and release of a prefix of 256 blocks, for a block; match of 256, for a call
evict    cache.evict, for a block; pressed: put into a full cache, with what must leave for it
match    8,192 keys, all stored, for a call

Times are CPU time of the thread, so that what else the machine does counts little; the median of many calls.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import psutil

from kvstore.core.adaptive import Adaptive
from kvstore.core.block import COLD, WARM, Namespace
from kvstore.core.cache import BlockCache, CacheConfig, NamespaceShape, RecoveredBlock
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import PolicyFactory
from kvstore.core.reads import AcquireGroup
from kvstore.core.residency import Limits
from kvstore.core.slabs import SlotRef
from kvstore.protocol.slab import GENERATION_BYTES, SlabGeometry, slab_target_bytes

SIZES = (10_000, 100_000, 1_000_000)
PLACES = ("warm", "cold", "both")
POLICIES: dict[str, PolicyFactory] = {"adaptive": Adaptive, "leaf-lru": LeafLru}
BLOCK_BYTES = 256 << 10
STORED_BYTES = (100 << 10, 250 << 10)  # as a codec leaves them: hardly two alike
CALL_BLOCKS = 256
MATCH_BLOCKS = 8192
PROBES = 60
KEY_BYTES = 32

_SESSION, _TENANT = 1, "bench"
_PROCESS_TIMEOUT_S = 600.0


class Chain(NamedTuple):
    """Packed keys of a conversation from its root on, and how many of them were known before."""

    keys: bytes
    known: int


class Workload:
    """Conversations, the same ones for every run."""

    def __init__(self) -> None:
        self._random = random.Random(1)
        self._heads: list[bytes] = []

    def chain(self, new: int | None = None) -> Chain:
        """The next conversation: `new` blocks from the root on, or 64 to 512 that may go on from an earlier one."""
        draw = self._random
        head = b""
        if new is None and self._heads and draw.random() < 0.5:
            head = draw.choice(self._heads)
            head = head[: draw.randrange(1, len(head) // KEY_BYTES + 1) * KEY_BYTES]
        count = new or draw.randint(64, 512)
        keys = head + draw.randbytes(count * KEY_BYTES)
        if new is None:
            at = draw.randrange(32)
            self._heads[at : at + 1] = [keys[: 512 * KEY_BYTES]]
        return Chain(keys, len(head) // KEY_BYTES)

    def checksum(self) -> bytes:
        """Of bytes that nobody has."""
        return self._random.randbytes(16)

    def stored_bytes(self) -> int:
        """What a block takes in cold."""
        return self._random.randint(*STORED_BYTES)


class Rig:
    """A core, and an engine that carries out everything at once."""

    def __init__(self, place: str, blocks: int, policy: PolicyFactory) -> None:
        self.place, self.blocks = place, blocks
        warm_blocks = blocks // 10 if place == "cold" else blocks
        slots_of_slab = slab_target_bytes(warm_blocks * BLOCK_BYTES) // BLOCK_BYTES
        slab = SlabGeometry.for_class(BLOCK_BYTES, slots_of_slab * BLOCK_BYTES)
        warm_bytes = -(-warm_blocks // slab.slots) * slab.segment_bytes + GENERATION_BYTES
        cold_bytes = 0 if place == "warm" else 2 * blocks * BLOCK_BYTES
        self.cache = BlockCache(CacheConfig(Limits(warm_bytes, cold_bytes, policy=policy)), _no_generation)
        self.cache.residency.grow = self._grow
        self.cache.residency.up[COLD] = place != "warm"
        self.space: Namespace = self.cache.open_namespace(
            bytes(32), NamespaceShape(_TENANT, BLOCK_BYTES, 16, chain=True)
        )
        self.work = Workload()
        self.put_s: list[tuple[float, int]] = []  # seconds, and blocks of the call

    def fill(self) -> None:
        """Store the blocks; at least one conversation is MATCH_BLOCKS long. Where all are in cold nothing was put."""
        self.long = self.work.chain(min(MATCH_BLOCKS, self.blocks // 2)).keys
        self.recent: list[bytes] = []
        chain, stored = Chain(self.long, 0), 0
        while stored + len(chain.keys) // KEY_BYTES - chain.known <= self.blocks:
            stored += len(chain.keys) // KEY_BYTES - chain.known
            if self.place == "cold":
                self._recover(chain)
            else:
                self.put(chain)
            self.recent = [*self.recent[-63:], chain.keys]
            chain = self.work.chain()
        if self.place == "cold":
            self.cache.recovered(self.space)

    def put(self, chain: Chain) -> None:
        """Put a conversation call by call, saved at once where cold is wanted."""
        for start in range(chain.known, len(chain.keys) // KEY_BYTES, CALL_BLOCKS):
            keys = _split(chain.keys[start * KEY_BYTES : (start + CALL_BLOCKS) * KEY_BYTES])
            parent = chain.keys[(start - 1) * KEY_BYTES : start * KEY_BYTES] if start else b""
            checksums = [self.work.checksum() for _ in keys]
            before = time.thread_time()
            plan = self.cache.puts.begin(self.space, parent, keys)
            for item, checksum in zip(plan.items, checksums, strict=True):
                item.checksum = checksum
            self.cache.puts.finish(plan)
            self.put_s.append((time.thread_time() - before, len(keys)))
        if self.place == "both":
            self._save()

    def lease(self, keys: bytes) -> None:
        """Acquire a prefix and release it."""
        group = AcquireGroup(self.space, keys)
        lease = self.cache.reads.acquire(_SESSION, _TENANT, [group], 0.0)
        if lease is not None:
            self.cache.reads.leases.release(lease)

    def _save(self) -> None:
        moves = self.cache.moves
        while batch := moves.begin_saves(CALL_BLOCKS, 1 << 62, newest_first=True):
            for copy in batch:
                moves.saved(copy, self.work.stored_bytes())

    def _recover(self, chain: Chain) -> None:
        keys = _split(chain.keys)
        for i in range(chain.known, len(keys)):
            record = RecoveredBlock(keys[i], keys[i - 1] if i else b"", self.work.checksum(), self.work.stored_bytes())
            self.cache.recover(self.space, record)

    def _grow(self, tenant: str, slot_bytes: int) -> bool:
        slab = self.cache.allocator.plan(tenant, slot_bytes)
        if slab is not None:
            self.cache.allocator.made(slab.slab_id)
        return slab is not None


def measure(place: str, blocks: int, policy: str) -> dict[str, float]:
    """All figures of one size; in a process that does nothing else."""
    gc.disable()
    rig = Rig(place, blocks, POLICIES[policy])
    own = psutil.Process()
    before = own.memory_info().rss
    rig.fill()
    tier = COLD if place == "cold" else WARM
    rig.cache.evict(tier, 1)
    stored = rig.cache.residency.counts[tier].blocks
    figures = {"blocks": float(stored), "bytes": (own.memory_info().rss - before) / stored}
    if rig.put_s:
        figures |= _of_puts("insert_us", rig.put_s[-len(rig.put_s) // 4 :])
        median_s = statistics.median(seconds / count for seconds, count in rig.put_s)
        figures["stall_ms"] = 1e3 * max(seconds - count * median_s for seconds, count in rig.put_s)
    figures["match_us"] = 1e6 * _median(lambda: rig.cache.reads.match(rig.space, rig.long))
    short = [keys[: CALL_BLOCKS * KEY_BYTES] for keys in rig.recent]
    figures["match_256_us"] = 1e6 * _median_of(lambda keys: rig.cache.reads.match(rig.space, keys), short)
    if place != "cold":
        figures["touch_us"] = 1e6 / CALL_BLOCKS * _median_of(rig.lease, short)
        _use(rig)
    figures["evict_us"] = 1e6 / 64 * _median(lambda: rig.cache.evict(tier, 64 * BLOCK_BYTES))
    figures |= _pressed(rig)
    return figures


def _use(rig: Rig) -> None:
    """Conversations of late are used again, so that their entries are not where they were."""
    for keys in rig.recent:
        rig.lease(keys)


def _pressed(rig: Rig) -> dict[str, float]:
    for _ in range(PROBES):  # until it is full
        rig.put(rig.work.chain(CALL_BLOCKS))
    rig.put_s.clear()
    for _ in range(PROBES):
        rig.put(rig.work.chain(CALL_BLOCKS))
    return _of_puts("pressed_us", rig.put_s)


def _of_puts(name: str, put_s: Sequence[tuple[float, int]]) -> dict[str, float]:
    return {name: 1e6 * statistics.median(seconds / blocks for seconds, blocks in put_s)}


def _median(call: Callable[[], object]) -> float:
    return _median_of(lambda _: call(), [b""] * PROBES)


def _median_of(call: Callable[[bytes], object], arguments: Sequence[bytes]) -> float:
    seconds = []
    for argument in arguments:
        before = time.thread_time()
        call(argument)
        seconds.append(time.thread_time() - before)
    return statistics.median(seconds)


def _split(keys: bytes) -> list[bytes]:
    return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]


def _no_generation(ref: SlotRef, value: int) -> None:
    """There is no shared memory."""


def _in_process(place: str, blocks: int, policy: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--here", "--place", place, "--blocks", str(blocks), "--policy", policy]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=_PROCESS_TIMEOUT_S)
    return {str(name): float(value) for name, value in json.loads(answer.stdout).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--policy", choices=sorted(POLICIES), action="append", help="both, where not given")
    parser.add_argument("--place", choices=PLACES, action="append", help="all, where not given")
    parser.add_argument("--blocks", type=int, action="append", help="sizes; 10^4, 10^5 and 10^6, where not given")
    parser.add_argument("--here", action="store_true", help="one of each, in this process; prints figures only")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.place[0], options.blocks[0], options.policy[0])))
        return
    results = []
    for policy in options.policy or POLICIES:
        for place in options.place or PLACES:
            for blocks in options.blocks or SIZES:
                figures = _in_process(place, blocks, policy)
                results.append({"policy": policy, "place": place, **figures})
                if not options.json:
                    told = "  ".join(f"{name} {value:,.2f}" for name, value in figures.items() if name != "blocks")
                    print(f"{policy:9} {place:5} {int(figures['blocks']):>9,}  {told}", flush=True)
    if options.json:
        json.dump({"python": sys.version.split()[0], "results": results}, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
