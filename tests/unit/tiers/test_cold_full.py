"""No room: in the budget, in the map, on the disk. Each costs the blocks it hits and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import Outcome, SlabMemory
from kvstore.tiers.cold import LmdbOptions, LmdbTier
from kvstore.tiers.conformance import Rig

OK, FULL = Outcome.OK, Outcome.FULL


def make(memory: SlabMemory, capacity_bytes: int, *, path: Path, map_bytes: int = 0) -> LmdbTier:
    return LmdbTier(path / "cold", capacity_bytes, memory, FrameFormat(), LmdbOptions(map_bytes=map_bytes))


def test_the_file_stays_within_the_capacity(tmp_path: Path) -> None:
    capacity_bytes = 4 << 20
    with Rig(partial(make, path=tmp_path), capacity_bytes) as rig:
        sizes = (3000, 9000, 70_000)
        items = [rig.block(number, sizes[number % 3]) for number in range(300)]
        for start in range(0, 300, 10):
            rig.write(items[start : start + 10])
            rig.tier.delete([item.ref for item in items[start : start + 10 : 3]])
        assert rig.tier.stats()["full"] > 0
        assert rig.tier.stats()["stored_bytes"] <= rig.tier.stats()["budget_bytes"] < capacity_bytes
        assert sum(file.stat().st_size for file in (tmp_path / "cold").glob("*/data.mdb")) <= capacity_bytes


def test_a_full_map_costs_one_block_and_not_its_batch(tmp_path: Path) -> None:
    """The map is smaller than the budget thinks (fragmentation does that): small blocks fit where a large one fails."""
    with Rig(partial(make, path=tmp_path, map_bytes=1 << 20), capacity_bytes=8 << 20) as rig:
        small = [rig.block(number, 20_000) for number in range(7)]
        large = rig.block(100, 2_000_000)
        assert rig.write([*small[:3], large, *small[3:]]) == [OK, OK, OK, FULL, OK, OK, OK, OK]
        assert rig.tier.stats()["map_full"] >= 2, "once for the batch, once for the block"
        assert rig.fetch(small) == [OK] * 7
        assert rig.tier.stats()["write_failures"] == 0


def test_a_full_map_goes_on_after_a_delete(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path, map_bytes=1 << 20), capacity_bytes=8 << 20) as rig:
        items = [rig.block(number, 50_000) for number in range(30)]
        outcomes = rig.write(items)
        assert set(outcomes) == {OK, FULL}
        stored = [item for item, outcome in zip(items, outcomes, strict=True) if outcome is OK]
        rig.tier.delete([item.ref for item in stored[:8]])
        fresh = rig.block(100, 50_000)
        assert [OK] in [rig.write([fresh]) for _ in range(4)], "freed pages are usable some commits later"
        assert rig.fetch([*stored[8:], fresh]) == [OK] * (len(stored) - 7)
        rig.reopen()
        assert rig.fetch([*stored[8:], fresh]) == [OK] * (len(stored) - 7)


def test_small_blocks_fill_the_tier_and_can_all_be_deleted(tmp_path: Path) -> None:
    """Deleting needs pages too: the reserve has them even when the budget is used up to the last byte."""
    with Rig(partial(make, path=tmp_path), capacity_bytes=1 << 20) as rig:
        items = [rig.block(number, 300) for number in range(2000)]
        outcomes = rig.write(items)
        assert set(outcomes) == {OK, FULL}
        assert rig.tier.stats()["map_full"] == 0
        rig.tier.delete([item.ref for item in items])
        stats = rig.tier.stats()
        assert (stats["blocks"], stats["raw_bytes"], stats["stored_bytes"]) == (0, 0, 0)
        assert [OK] in [rig.write([rig.block(5000)]) for _ in range(4)]


# A file size limit makes pwrite fail half-way, as a full disk does; only a process of its own may have one.
FULL_DISK = """
import json, resource, sys, time
from functools import partial
from pathlib import Path
from kvstore.codec.frame import FrameFormat
from kvstore.tiers.cold import LmdbTier
from kvstore.tiers.conformance import Rig

def make(memory, capacity_bytes):
    return LmdbTier(Path(sys.argv[1]) / "cold", capacity_bytes, memory, FrameFormat())

def limit(nbytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))

with Rig(make) as rig:
    items = [rig.block(number) for number in range(30)]
    before = rig.write(items[:10])
    limit((Path(sys.argv[1]) / "cold" / "payload" / "data.mdb").stat().st_size + 300_000)
    during = rig.write(items[10:])
    served = rig.fetch(items[:10])
    stored = [item for item, outcome in zip(items[10:], during) if outcome == 0]
    stored_served = rig.fetch(stored)
    failures = rig.tier.stats()["write_failures"]
    limit(resource.RLIM_INFINITY)
    for _ in range(1000):  # by itself, a moment after the disk was full
        after = rig.write(items[10:])
        if 4 not in after:
            break
        time.sleep(0.01)
    rig.reopen()
    print(json.dumps([before, during, served, stored_served, failures, after, rig.fetch(items), rig.tier.failure]))
"""


def test_a_full_disk_is_full_and_passes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    before, during, served, stored_served, failures, after, reopened, failure = json.loads(done.stdout)
    assert set(before) == {OK}
    assert set(during) == {OK, FULL}
    assert 1 <= during.count(OK) <= 5, "what fits is stored"
    assert set(served) == set(stored_served) == {OK}
    assert failures > 0
    assert set(after) == set(reopened) == {OK}
    assert failure == ""
