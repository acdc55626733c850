"""Cold tiers for tests: blocks that follow from their number, stored as they are, so that no codec is in the way."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from kvstore.tiers.base import BlockRef, Outcome, SlabRange, StoredRecord, TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold import LmdbOptions, LmdbTier
from kvstore.tiers.memory import ArrayMemory

CAPACITY_BYTES = 32 << 20
BLOCK_BYTES = 40_000
SLOTS = 64
THIS_BOOT, NEXT_BOOT = "11111111-aaaa", "22222222-bbbb"
PATIENCE_S = 30.0
WRONG_BYTES_STATUS = 99

_NAMESPACE = b"n" * 32
_HEAD = struct.Struct("<32s32s16s")
_RECORD_1 = struct.Struct("<BB6x32s16sQQQ")


class Stored(NamedTuple):
    pieces: Sequence[bytes | memoryview]
    codec: int
    checksum: bytes
    lossy: bool


class PlainFormat:
    """Name and checksum, then the bytes. The tier must notice flips in them by itself."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Stored:
        return Stored([_HEAD.pack(*item.ref, item.checksum), raw.data], 7, item.checksum, False)

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        namespace, key, checksum = _HEAD.unpack_from(frame)
        if (namespace, key, checksum) != (*item.ref, item.checksum) or frame.nbytes != _HEAD.size + out.nbytes:
            raise ValueError("another block, or damaged")
        np.copyto(out, np.frombuffer(frame, dtype=np.uint8, offset=_HEAD.size))


class RoundedFormat(PlainFormat):
    """A lossy codec: drops the low nibble of every byte, where the namespace allows it."""

    def encode(self, item: TierItem, raw: NDArray[np.uint8]) -> Stored:
        if not item.lossy:
            return super().encode(item, raw)
        rounded = raw & 0xF0
        checksum = block_checksum(rounded)
        return Stored([_HEAD.pack(*item.ref, checksum), rounded.data], 8, checksum, True)


def ref(number: int) -> BlockRef:
    return BlockRef(_NAMESPACE, xxhash.xxh3_128_digest(b"%d" % number) * 2)


def content(number: int, nbytes: int = BLOCK_BYTES, version: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng([number, version]).integers(0, 256, nbytes, dtype=np.uint8)


class ColdRig:
    """A tier in a folder, and slots for its blocks."""

    def __init__(
        self,
        path: Path,
        options: LmdbOptions | None = None,
        capacity_bytes: int = CAPACITY_BYTES,
        block_format: PlainFormat | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.path = path
        self.capacity_bytes = capacity_bytes
        self.block_bytes = block_bytes
        self.block_format = block_format or PlainFormat()
        self.memory = ArrayMemory(SLOTS * block_bytes)
        self.tier = self.open(options or quick())

    def open(self, options: LmdbOptions) -> LmdbTier:
        self.options = options
        self.tier = LmdbTier(self.path, self.capacity_bytes, self.memory, self.block_format, options)
        return self.tier

    def reopen(self, options: LmdbOptions | None = None) -> LmdbTier:
        self.tier.close()
        return self.open(options or self.options)

    def crash(self) -> None:
        """Let go of everything as a killed process would: no sync, no word that all went well."""
        tier = self.tier
        assert tier._keeper.close(PATIENCE_S)
        assert tier._syncer.close(PATIENCE_S)
        assert tier._gate.close(PATIENCE_S)
        assert tier._writer.close(PATIENCE_S)
        tier._closed = True
        tier._store.abandon()

    def __enter__(self) -> ColdRig:
        return self

    def __exit__(self, *_: object) -> None:
        self.tier.close()

    def item(self, number: int, version: int = 0, slot: int | None = None) -> TierItem:
        """The block in its slot, whose bytes are overwritten only by fill() and by reads."""
        place = SlabRange(1, (number % SLOTS if slot is None else slot) * self.block_bytes, self.block_bytes)
        checksum = block_checksum(content(number, self.block_bytes, version))
        return TierItem(ref(number), place, checksum, b"p" * 32, 5, "uint8", hits=number)

    def write(self, numbers: Sequence[int], version: int = 0) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for first in range(0, len(numbers), SLOTS):
            some = numbers[first : first + SLOTS]
            items = [self.item(number, version, slot) for slot, number in enumerate(some)]
            for item, number in zip(items, some, strict=True):
                self.memory.view(item.range)[:] = content(number, self.block_bytes, version)
            outcomes += [result.outcome for result in self.tier.write(items)]
        return outcomes

    def store(self, numbers: Sequence[int], version: int = 0) -> None:
        assert set(self.write(numbers, version)) <= {Outcome.OK}

    def read(self, numbers: Sequence[int], version: int = 0) -> list[Outcome]:
        """What is OK must be exact."""
        outcomes: list[Outcome] = []
        for first in range(0, len(numbers), SLOTS):
            some = numbers[first : first + SLOTS]
            items = [self.item(number, version, slot) for slot, number in enumerate(some)]
            self.memory.array[:] = 0xA5
            found = self.tier.read(items)
            for item, number, outcome in zip(items, some, found, strict=True):
                if outcome is Outcome.OK:
                    assert np.array_equal(self.memory.view(item.range), content(number, self.block_bytes, version))
            outcomes += found
        return outcomes

    def held(self) -> set[BlockRef]:
        return {record.ref for record in self.tier.scan()}

    def entries(self) -> tuple[int, int]:
        """Payloads and records."""
        store = self.tier._store
        return store.payload.entries(), store.records_held()


def fresh_seed() -> int:
    """A seed, printed so that a failure can be replayed."""
    seed = random.SystemRandom().randrange(1 << 32)
    sys.stdout.write(f"seed {seed}\n")
    return seed


def quick(**changes: object) -> LmdbOptions:
    """Options for a test: no reserve worth the name, and a boot of its own."""
    defaults = {"patience_s": PATIENCE_S, "free_reserve_bytes": 1, "boot_id": THIS_BOOT}
    return LmdbOptions(**{**defaults, **changes})  # type: ignore[arg-type]


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.005)


def edit(path: Path, name: bytes | None, change: Callable[[lmdb.Transaction, object], None]) -> None:
    """Change an environment that nobody has open."""
    with lmdb.open(str(path), map_size=64 << 20, max_dbs=4) as env:
        database = env.open_db(name)
        with env.begin(write=True) as txn:
            change(txn, database)


def run_child(source: str, *arguments: object, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a program of the test's own, which may die."""
    command = [*prefix, sys.executable, "-c", source, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, env={"PYTHONPATH": ":".join(sys.path)}
    )


def mount_namespace() -> list[str]:
    """What to put before a command for mounts of its own; skips the test where that is not permitted."""
    prefix = ["unshare", "--mount", "--propagation", "private"]
    try:
        done = subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no unshare(1) here")
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.decode().strip()}")
    return prefix


def make_format_1(path: Path, numbers: Sequence[int]) -> list[StoredRecord]:
    """A store as format 1 was: one environment, blocks and records and totals as named databases."""
    path.mkdir(mode=0o700)
    records = []
    with lmdb.open(str(path), map_size=64 << 20, max_dbs=3) as env:
        blocks, index, meta = (env.open_db(name) for name in (b"blocks", b"records", b"meta"))
        with env.begin(write=True) as txn:
            txn.put(b"format", b"1", db=meta)
            for number in numbers:
                raw = content(number)
                checksum = block_checksum(raw)
                entry = b"".join(ref(number))
                frame = _HEAD.pack(*ref(number), checksum) + raw.tobytes()
                stored_bytes = -(-(len(frame) + 16) // 4096) * 4096 + 488
                txn.put(entry, frame, db=blocks)
                body = _RECORD_1.pack(1, 0, b"p" * 32, checksum, raw.nbytes, stored_bytes, 5)
                txn.put(entry, body + struct.pack("<Q", xxhash.xxh3_64_intdigest(entry + body)), db=index)
                records.append(StoredRecord(ref(number), b"p" * 32, checksum, raw.nbytes, stored_bytes + 32, 5))
            sums = (len(records), sum(r.nbytes for r in records), sum(r.stored_bytes - 32 for r in records))
            txn.put(b"totals", struct.pack("<QQQ", *sums), db=meta)
    return records
