"""How the cold tier's store ages, and how soon it serves again: `python ops/bench/lmdb_churn.py --json`.

churn    a store filled to 85 % is rewritten at random, five times its map, in values of 0.8 to 1.7 MiB; the rate of the
         last map size against that of the first, each divided by a plain write and fsync of the same bytes done in
         turns with it, so that a disk that slows down for everybody does not count
restart  a store of 100,000 blocks of 16 KiB: seconds from opening it until every record is known and a block is read,
         after a clean close and after SIGKILL

The blocks are noise and stored as they are: this is about LMDB, not about codecs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.base import BlockRef, Outcome, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold import LmdbOptions, LmdbTier
from kvstore.tiers.memory import ArrayMemory

FILL = 0.85
TURNS = 5
BATCH = 8
SIZES = (838_861, 1_782_579)
SMALL_BYTES = 16 << 10
POOL_BYTES = 64 << 20


class Stored(NamedTuple):
    """What the tier asks of an encoded block."""

    pieces: Sequence[memoryview]
    codec: int
    checksum: bytes
    lossy: bool


class AsItIs:
    """Stores blocks as they are."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Stored:
        """See BlockFormat."""
        return Stored([raw.data], 0, item.checksum, False)

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        """See BlockFormat."""
        np.copyto(out, np.frombuffer(frame, dtype=np.uint8))


class Blocks:
    """Makes blocks out of a pool of noise: ranges of it, each with its checksum."""

    def __init__(self, seed: int) -> None:
        self.memory = ArrayMemory(POOL_BYTES)
        self.memory.array[:] = np.random.default_rng(seed).integers(0, 256, POOL_BYTES, dtype=np.uint8)
        self.random = random.Random(seed)

    def item(self, number: int, nbytes: int) -> TierItem:
        """Block `number`, at a random place of the pool."""
        place = SlabRange(1, self.random.randrange(0, POOL_BYTES - nbytes, 64), nbytes)
        ref = BlockRef(b"n" * 32, random.Random(number).randbytes(32))
        return TierItem(ref, place, block_checksum(self.memory.view(place)))


def store(tier: LmdbTier, items: Sequence[TierItem]) -> int:
    """Write blocks, all of which must be taken; their bytes."""
    outcomes = {result.outcome for result in tier.write(items)}
    if outcomes != {Outcome.OK}:
        raise SystemExit(f"the tier answered {outcomes}; is the disk full?")
    return sum(item.range.nbytes for item in items)


def plain_write(path: Path, blocks: Blocks, nbytes: int) -> float:
    """Seconds for a plain write and fsync of so many bytes."""
    view = memoryview(blocks.memory.array)
    start_s = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = nbytes
        while left > 0:
            left -= file.write(view[: min(left, POOL_BYTES)])
        os.fsync(file.fileno())
    return time.perf_counter() - start_s


def churn(folder: Path, map_bytes: int, seed: int) -> dict[str, object]:
    """Rates of the map sizes of churn, in turns with plain writes."""
    blocks = Blocks(seed)
    tier = LmdbTier(folder / "cold", map_bytes, blocks.memory, AsItIs(), LmdbOptions())
    held: dict[int, TierItem] = {}
    ratios: list[list[float]] = [[] for _ in range(TURNS)]
    number = 0
    try:
        room_bytes = FILL * tier.stats()["map_bytes"]
        while tier.stats()["stored_bytes"] < room_bytes:
            items = [blocks.item(number + turn, blocks.random.randint(*SIZES)) for turn in range(BATCH)]
            number += BATCH
            store(tier, items)
            held.update({number - BATCH + turn: item for turn, item in enumerate(items)})
        tier.flush()
        for turn in range(TURNS):
            written = 0
            while written < map_bytes:
                portion, number, seconds = _churn_some(tier, blocks, held, number, map_bytes // 16)
                written += portion
                ratios[turn].append(plain_write(folder / "plain", blocks, portion) / seconds)
        stats = dict(tier.stats())
    finally:
        tier.close()
    rates = [statistics.median(portions) for portions in ratios]
    return {
        "last_to_first": rates[-1] / rates[0],
        "to_plain_write": rates,
        "write_amplification": stats["device_bytes"] / stats["written_bytes"],
        "map_used": stats["map_used_bytes"] / map_bytes,
        "map_full": stats["map_full"],
    }


def _churn_some(
    tier: LmdbTier, blocks: Blocks, held: dict[int, TierItem], number: int, least_bytes: int
) -> tuple[int, int, float]:
    """Delete and write some blocks, and flush; bytes written, next number, seconds."""
    portion = 0
    plan = []
    while portion < least_bytes:
        victims = blocks.random.sample(sorted(held), BATCH)
        items = [blocks.item(number + turn, held[victim].range.nbytes) for turn, victim in enumerate(victims)]
        refs = [held.pop(victim).ref for victim in victims]
        held.update({number + turn: item for turn, item in enumerate(items)})
        number += BATCH
        portion += sum(item.range.nbytes for item in items)
        plan.append((refs, items))
    start_s = time.perf_counter()
    for refs, items in plan:
        tier.delete(refs)
        store(tier, items)
    tier.flush()
    return portion, number, time.perf_counter() - start_s


def restart(folder: Path, count: int, seed: int) -> dict[str, object]:
    """Seconds until a store of `count` small blocks serves again."""
    blocks = Blocks(seed)
    path = folder / "many"
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _fill_and_die(path, blocks, count)
        os._exit(1)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise SystemExit("the child that fills the store failed")
    result: dict[str, object] = {"blocks": count}
    for name in ("after_kill_s", "after_close_s"):
        for file in path.rglob("data.mdb"):
            _drop_cache(file)
        start_s = time.perf_counter()
        tier = LmdbTier(path, 64 << 30, blocks.memory, AsItIs(), LmdbOptions())
        opened_s = time.perf_counter()
        records = list(tier.scan())
        item = TierItem(records[0].ref, SlabRange(1, 0, records[0].nbytes), records[0].checksum)
        served = tier.read([item])
        result[name] = time.perf_counter() - start_s
        result[name.replace("_s", "_open_s")] = opened_s - start_s
        tier.close()
        if served != [Outcome.OK] or len(records) != count:
            raise SystemExit(f"{len(records)} records, and a read that answers {served}")
    return result


def _fill_and_die(path: Path, blocks: Blocks, count: int) -> None:
    tier = LmdbTier(path, 64 << 30, blocks.memory, AsItIs(), LmdbOptions(commit_bytes_least=8 << 20))
    for first in range(0, count, 256):
        store(tier, [blocks.item(number, SMALL_BYTES) for number in range(first, min(first + 256, count))])
    tier.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _drop_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@contextlib.contextmanager
def scratch(parent: str | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lmdb-churn-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map-mib", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with scratch(asked.folder) as folder:
        results = {
            "churn": churn(folder, asked.map_mib << 20, asked.seed),
            "restart": restart(folder, asked.blocks, asked.seed),
        }
    if asked.json:
        print(json.dumps(results, indent=2))
        return 0
    for name, result in results.items():
        for key, value in result.items():
            print(f"{name:8} {key:22} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
