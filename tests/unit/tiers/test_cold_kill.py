"""kill -9 of a process in the middle of writing: what it acknowledged is there, byte for byte.

This file is also the program that is killed: `python test_cold_kill.py FOLDER FIRST` writes blocks from number FIRST
on and prints the numbers of those that were acknowledged, a line per batch.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import BlockRef, Outcome, SlabRange, TierItem
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold import LmdbTier
from kvstore.tiers.memory import ArrayMemory

CAPACITY_BYTES = 64 << 20
BLOCK_BYTES = 150_000
BATCH = 12
RING = 8 * BATCH  # blocks that the writer leaves behind it
ROUNDS = 6


def content(number: int) -> NDArray[np.uint8]:
    """bfloat16 noise that follows from the number."""
    values = np.random.default_rng(number).standard_normal(BLOCK_BYTES // 2, dtype=np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def reference(number: int) -> BlockRef:
    return BlockRef(b"n" * 32, number.to_bytes(32, "big"))


def item(slot: int, number: int, raw: NDArray[np.uint8]) -> TierItem:
    place = SlabRange(1, slot * BLOCK_BYTES, BLOCK_BYTES)
    return TierItem(reference(number), place, block_checksum(raw), b"", number, "bfloat16")


def write_for_ever(folder: Path, first: int) -> None:
    memory = ArrayMemory(BATCH * BLOCK_BYTES)
    tier = LmdbTier(folder, CAPACITY_BYTES, memory, FrameFormat())
    say(f"ready {tier.set_aside}")
    for start in range(first, first + 100_000, BATCH):
        numbers = range(start, start + BATCH)
        items = []
        for slot, number in enumerate(numbers):
            raw = content(number)
            memory.array[slot * BLOCK_BYTES :][:BLOCK_BYTES] = raw
            items.append(item(slot, number, raw))
        results = zip(numbers, tier.write(items), strict=True)
        say(" ".join(str(number) for number, result in results if result.outcome is Outcome.OK))
        # A ring: old blocks go, so that freed pages are being reused when the process dies.
        tier.delete([reference(number - RING) for number in numbers if number >= RING])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def written_until_killed(folder: Path, first: int, delay_s: float) -> list[int]:
    """Numbers that were acknowledged on a whole line before SIGKILL."""
    command = [sys.executable, __file__, str(folder), str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready None\n"
        text = process.stdout.readline()
        time.sleep(delay_s)
    finally:
        process.kill()
        rest = process.communicate(timeout=30)[0]
    text += rest[: rest.rfind("\n") + 1]
    return [int(number) for number in text.split()]


def verify(folder: Path, expected: set[int]) -> None:
    """What is expected is served exactly, and so is whatever else the tier claims to hold."""
    memory = ArrayMemory(BLOCK_BYTES)
    tier = LmdbTier(folder, CAPACITY_BYTES, memory, FrameFormat())
    try:
        assert tier.set_aside is None
        held = {int.from_bytes(record.ref.key, "big") for record in tier.scan()}
        assert expected <= held
        assert len(held) == tier.stats()["blocks"]
        for number in sorted(held):
            raw = content(number)
            assert tier.read([item(0, number, raw)]) == [Outcome.OK], f"block {number}"
            assert np.array_equal(memory.array, raw), f"block {number}"
    finally:
        tier.close()


def test_every_acknowledged_block_survives_kill_9(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    say(f"seed {seed}")
    rng = random.Random(seed)
    first = 0
    for _ in range(ROUNDS):
        acknowledged = written_until_killed(tmp_path / "cold", first, rng.uniform(0, 0.25))
        assert acknowledged, "killed before its first block"
        last = max(acknowledged)
        verify(tmp_path / "cold", {number for number in acknowledged if number > last - RING + BATCH})
        first = last + 1 + BATCH  # the batch behind the last may have been committed without a word


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), int(sys.argv[2]))
