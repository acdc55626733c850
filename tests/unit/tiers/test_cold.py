"""The cold tier beyond the contract: permissions, flipped bits on the disk, formats, a writer that hangs, scans."""

from __future__ import annotations

import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import BlockRef, Outcome, SlabMemory, TierItem
from kvstore.tiers.cold import BlockFormat, LmdbOptions, LmdbTier
from kvstore.tiers.cold_records import RECORD_BYTES
from kvstore.tiers.conformance import Rig

OK, MISSING, CORRUPT, BUSY, FULL = Outcome


def make(
    memory: SlabMemory,
    capacity_bytes: int,
    *,
    path: Path,
    block_format: BlockFormat | None = None,
    options: LmdbOptions = LmdbOptions(patience_s=30),  # noqa: B008
) -> LmdbTier:
    return LmdbTier(path / "cold", capacity_bytes, memory, block_format or FrameFormat(), options)


def cold(rig: Rig) -> LmdbTier:
    assert isinstance(rig.tier, LmdbTier)
    return rig.tier


def patch_file(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes that occur exactly once in the data file."""
    data = path / "cold" / "payload" / "data.mdb"
    content = data.read_bytes()
    assert content.count(old) == 1
    data.write_bytes(content.replace(old, new))


class NewerFormat(FrameFormat):
    """A build that can write what it cannot read."""

    def decode(self, frame: memoryview, item: object, out: NDArray[np.uint8]) -> None:
        raise LookupError("frame version 99 is not known to this build")


class WrongFormat(FrameFormat):
    """A codec with a defect: it decodes to other bytes, and nothing in its own checks notices."""

    def decode(self, frame: memoryview, item: object, out: NDArray[np.uint8]) -> None:
        out[:] = 7


class SlowFormat(FrameFormat):
    """Decodes when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        self.entered.set()
        assert self.go_on.wait(30)
        super().decode(frame, item, out)


class BrokenFormat(SlowFormat):
    """Finds the first frame damaged."""

    def decode(self, frame: memoryview, item: TierItem, out: NDArray[np.uint8]) -> None:
        first = not self.entered.is_set()
        super().decode(frame, item, out)
        if first:
            raise ValueError("damaged")


def test_only_the_owner_may_look_inside(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)):
        folder = tmp_path / "cold"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir() if each.is_dir()} == {0o700}
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*.mdb")} == {0o600}


def test_a_directory_that_was_open_to_all_is_closed(tmp_path: Path) -> None:
    (tmp_path / "cold").mkdir(mode=0o755)
    with Rig(partial(make, path=tmp_path)):
        assert stat.S_IMODE((tmp_path / "cold").stat().st_mode) == 0o700


def test_the_map_is_as_large_as_the_capacity_and_takes_no_room(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path), capacity_bytes=(64 << 30) - 5) as rig:
        stats = rig.tier.stats()
        assert 62 << 30 <= stats["map_bytes"] < 64 << 30
        assert stats["budget_bytes"] < stats["map_bytes"]
        assert sum(file.stat().st_size for file in (tmp_path / "cold").rglob("*")) < 1 << 20


def test_a_flipped_bit_on_the_disk_is_corrupt_then_missing(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        items = [rig.block(number) for number in range(3)]
        rig.store(items)
        cold(rig).close()
        raw = rig.memory.view(items[1].range).tobytes()
        patch_file(tmp_path, raw[1000:1100], bytes([raw[1000] ^ 4]) + raw[1001:1100])
        rig.reopen()
        assert cold(rig).set_aside is None
        assert rig.fetch(items) == [OK, CORRUPT, OK]
        assert rig.fetch(items) == [OK, MISSING, OK]
        assert (rig.tier.stats()["corrupt"], rig.tier.stats()["blocks"]) == (1, 2)
        rig.store([items[1]])
        assert rig.fetch(items) == [OK, OK, OK]


def test_a_block_that_another_build_wrote_is_missing_and_kept(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path, block_format=NewerFormat())) as rig:
        item = rig.block(1)
        rig.store([item])
        assert rig.fetch([item]) == [MISSING]
        assert rig.fetch([item]) == [MISSING]
        assert (rig.tier.stats()["unsupported"], rig.tier.stats()["corrupt"], rig.tier.stats()["blocks"]) == (2, 0, 1)
        cold(rig).close()
        rig.tier = make(rig.memory, 8 << 20, path=tmp_path)
        assert rig.fetch([item]) == [OK]


def test_the_tier_checks_what_its_format_decoded(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path, block_format=WrongFormat())) as rig:
        item = rig.block(1)
        rig.store([item])
        assert rig.fetch([item]) == [CORRUPT]
        assert rig.tier.stats()["blocks"] == 0


def test_a_damaged_copy_that_was_replaced_meanwhile_is_not_dropped(tmp_path: Path) -> None:
    """The reader finds damage, a writer stores a good copy, the reader's delete comes last."""
    slow = BrokenFormat()
    with Rig(partial(make, path=tmp_path, block_format=slow)) as rig, ThreadPoolExecutor(1) as pool:
        old, new = rig.block(1), rig.block(1, version=1)
        rig.store([old])
        reading = pool.submit(rig.fetch, [old])
        assert slow.entered.wait(30)
        rig.store([new])
        slow.go_on.set()
        assert reading.result(30) == [MISSING], "what it asked for is gone, which is no damage"
        assert rig.fetch([new]) == [OK]
        assert (rig.tier.stats()["corrupt"], rig.tier.stats()["other_copy"]) == (0, 1)


@pytest.mark.parametrize(
    ("count", "nbytes", "commits"), [(20, 140_000, 3), (8, 200_000, 1), (130, 1000, 3), (9, 2000, 1)]
)
def test_a_commit_takes_eight_blocks_or_more_if_they_are_small(
    tmp_path: Path, count: int, nbytes: int, commits: int
) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        env = cold(rig)._store.payload.env
        before = env.info()["last_txnid"]
        rig.store([rig.block(number, nbytes) for number in range(count)])
        assert env.info()["last_txnid"] - before == commits


def test_a_commit_of_large_blocks_is_bounded_by_bytes(tmp_path: Path) -> None:
    options = LmdbOptions(commit_bytes_most=100_000)
    with Rig(partial(make, path=tmp_path, options=options)) as rig:
        env = cold(rig)._store.payload.env
        before = env.info()["last_txnid"]
        rig.store([rig.block(number, 60_000) for number in range(4)])
        assert env.info()["last_txnid"] - before == 2


def test_small_jobs_of_several_callers_are_one_commit(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig, ThreadPoolExecutor(3) as pool:
        payload = cold(rig)._store.payload
        items = [rig.block(number, 1000) for number in range(3)]
        with payload.env.begin(write=True):  # so that the first waits
            first = pool.submit(rig.store, items[:1])
            while cold(rig)._writer._queue.qsize() or not cold(rig)._encoder.ring._out_bytes:
                threading.Event().wait(0.001)
            before = payload.env.info()["last_txnid"]
            second = pool.submit(rig.store, items[1:2])
            while not cold(rig)._writer._queue.qsize():
                threading.Event().wait(0.001)
            third = pool.submit(rig.store, items[2:])
            while cold(rig)._writer._queue.qsize() < 2:
                threading.Event().wait(0.001)
        first.result(30)
        second.result(30)
        third.result(30)
        assert rig.fetch(items) == [OK] * 3
        assert payload.env.info()["last_txnid"] - before == 2, "the first, and the two that waited behind it"


def test_a_writer_that_hangs_is_busy_within_the_patience(tmp_path: Path) -> None:
    """Another process in the middle of a write transaction: nobody waits for ever, and nothing is left broken."""
    with Rig(partial(make, path=tmp_path, options=LmdbOptions(patience_s=0.2))) as rig:
        items = [rig.block(number, 1000) for number in range(60)]
        stored = rig.block(100)
        rig.store([stored])
        with cold(rig)._store.payload.env.begin(write=True):
            assert set(rig.write(items)) == {BUSY}
            assert rig.fetch([stored]) == [OK], "readers do not wait for the writer"
            with pytest.raises(OSError, match="1 of 1 deletes are not confirmed"):
                rig.tier.delete([stored.ref])
        for _ in range(100):
            if rig.write(items[:1]) == [OK]:
                break
        rig.store(items[:1])
        assert rig.fetch(items[:1]) == [OK]


def test_closing_under_a_slow_reader_does_not_unmap_its_block(tmp_path: Path) -> None:
    slow = SlowFormat()
    options = LmdbOptions(patience_s=0.2)
    with Rig(partial(make, path=tmp_path, block_format=slow, options=options)) as rig, ThreadPoolExecutor(1) as pool:
        item = rig.block(1)
        rig.store([item])
        reading = pool.submit(rig.fetch, [item])
        assert slow.entered.wait(30)
        rig.tier.close()
        slow.go_on.set()
        assert reading.result(30) == [OK]
        cold(rig)._writer.close(30)
        cold(rig)._store.close()


def test_closing_waits_for_a_reader_that_is_about_to_finish(tmp_path: Path) -> None:
    slow = SlowFormat()
    with Rig(partial(make, path=tmp_path, block_format=slow)) as rig, ThreadPoolExecutor(2) as pool:
        item = rig.block(1)
        rig.store([item])
        reading = pool.submit(rig.fetch, [item])
        assert slow.entered.wait(30)
        closing = pool.submit(rig.tier.close)
        slow.go_on.set()
        assert reading.result(30) == [OK]
        closing.result(30)
        assert rig.fetch([item]) == [MISSING]


def test_scan_goes_on_behind_a_block_and_in_batches(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        items = [rig.block(number, 10) for number in range(2500)]
        rig.store(items)
        records = list(cold(rig).scan())
        assert [record.ref for record in records] == sorted(item.ref for item in items)
        middle = records[1234].ref
        assert list(cold(rig).scan(middle)) == records[1235:]
        between = BlockRef(middle.namespace, middle.key[:-1] + bytes([min(middle.key[-1] + 1, 255)]))
        assert list(cold(rig).scan(between)) == records[1235:]
        assert list(cold(rig).scan(records[-1].ref)) == []


def test_a_scan_holds_no_transaction_while_its_consumer_thinks(tmp_path: Path) -> None:
    """A parked reader would make the file grow without bound."""
    with Rig(partial(make, path=tmp_path)) as rig:
        rig.store([rig.block(number, 10) for number in range(1500)])
        scan = cold(rig).scan()
        next(scan)
        used_bytes = 0
        for turn in range(40):
            rig.store([rig.block(1, 100_000, version=turn)])
            used_bytes = used_bytes or (rig.tier.stats()["map_used_bytes"] if turn == 5 else 0)
        assert rig.tier.stats()["map_used_bytes"] <= used_bytes + 200_000
        assert len(list(scan)) == 1499


def test_a_damaged_record_is_dropped_with_its_block(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        items = [rig.block(number) for number in range(3)]
        results = rig.tier.write(items)
        cold(rig).close()
        data = tmp_path / "cold" / "records" / "data.mdb"
        content = bytearray(data.read_bytes())
        at = content.index(items[1].parent + items[1].checksum + items[1].range.nbytes.to_bytes(8, "little"))
        content[at] ^= 1
        data.write_bytes(content)
        rig.reopen()
        assert {record.ref for record in cold(rig).scan()} == {items[0].ref, items[2].ref}
        stats = rig.tier.stats()
        assert (stats["bad_records"], stats["blocks"]) == (1, 2)
        assert stats["stored_bytes"] == results[0].stored_bytes + results[2].stored_bytes
        assert rig.fetch(items) == [OK, MISSING, OK]
        rig.reopen()
        assert cold(rig).set_aside is None
        assert len(list(cold(rig).scan())) == 2
    assert RECORD_BYTES == 104


def test_a_smaller_capacity_serves_what_there_is(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path), capacity_bytes=8 << 20) as rig:
        items = [rig.block(number) for number in range(64)]
        rig.store(items)
        cold(rig).close()
        rig.tier = make(rig.memory, 2 << 20, path=tmp_path)
        assert rig.fetch(items) == [OK] * 64
        assert rig.write([rig.block(100)]) == [FULL]
        rig.tier.delete([item.ref for item in items[10:]])
        rig.store([rig.block(101)])


def test_a_name_of_the_wrong_length_is_our_own_mistake(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)._replace(ref=BlockRef(b"short", b"k" * 32))
        for call in (rig.tier.write, rig.tier.read):
            with pytest.raises(ValueError, match="32 bytes"):
                call([item])


def test_a_second_opening_in_one_process_leaves_the_first_alone(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)
        rig.store([item])
        with pytest.raises(OSError, match="already open"):
            make(rig.memory, 1 << 20, path=tmp_path)
        assert rig.fetch([item]) == [OK]
        assert [folder.name for folder in tmp_path.iterdir()] == ["cold"]


def test_readers_at_work_while_the_writer_replaces_and_deletes(tmp_path: Path) -> None:
    """Readers see the copy they ask for, or none; whatever is OK is byte-exact (Rig.fetch looks)."""
    with Rig(partial(make, path=tmp_path)) as rig, ThreadPoolExecutor(3) as pool:
        versions = [[rig.block(number, 20_000, version) for number in range(10)] for version in range(2)]
        targets = [[[rig.target(item) for item in version] for version in versions] for _ in range(2)]
        stop = threading.Event()

        def read(mine: Sequence[Sequence[TierItem]]) -> int:
            exact = 0
            while not stop.is_set():
                for version, wanted in zip(mine, versions, strict=True):
                    outcomes = rig.tier.read(version)
                    for target, item, outcome in zip(version, wanted, outcomes, strict=True):
                        if outcome is OK:
                            assert np.array_equal(rig.memory.view(target.range), rig.memory.view(item.range))
                            exact += 1
            return exact

        readers = [pool.submit(read, mine) for mine in targets]
        try:
            for turn in range(30):
                rig.store(versions[turn % 2])
                rig.tier.delete([item.ref for item in versions[0][::3]])
        finally:
            stop.set()
        assert all(reader.result(60) >= 0 for reader in readers)
        rig.store(versions[0])
        assert rig.fetch(versions[0]) == [OK] * 10
