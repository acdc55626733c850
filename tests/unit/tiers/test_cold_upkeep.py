"""When commits are synced, what a check finds, what a compaction gives back, and the parts that serve them."""

from __future__ import annotations

import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cold_rig import ColdRig, eventually, fresh_seed, quick, ref, run_child
from kvstore.tiers.base import CheckPage, Outcome
from kvstore.tiers.buffers import BufferRing
from kvstore.tiers.cold_file import EnvironmentFile
from kvstore.tiers.cold_sync import Durability
from kvstore.tiers.gate import Gate

OK, MISSING, CORRUPT, BUSY, FULL = Outcome
NUMBERS = range(40)

# -- durability


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The environments in the order in which they were synced by ourselves."""
    made: list[str] = []
    inner = EnvironmentFile.sync

    def sync(file: EnvironmentFile) -> None:
        inner(file)
        made.append(file.path.name)

    monkeypatch.setattr(EnvironmentFile, "sync", sync)
    return made


def test_none_syncs_only_when_it_is_asked_to(tmp_path: Path, syncs: list[str]) -> None:
    with ColdRig(tmp_path / "cold", quick(durability="none", sync_interval_s=0.001)) as rig:
        rig.store(NUMBERS)
        assert syncs == []
        assert rig.tier.stats()["durability"] == 0
        rig.tier.flush()
        assert syncs == ["payload", "records"], "payloads first"
        assert rig.tier.stats()["syncs"] == 1
    assert syncs == ["payload", "records"] * 2, "closing syncs"


def test_interval_syncs_by_itself_and_only_after_a_commit(tmp_path: Path, syncs: list[str]) -> None:
    with ColdRig(tmp_path / "cold", quick(sync_interval_s=0.01)) as rig:
        assert rig.tier.stats()["durability"] == 1
        rig.store([1])
        eventually(lambda: rig.tier.stats()["syncs"] == 1, "the first sync")
        threading.Event().wait(0.1)
        assert rig.tier.stats()["syncs"] == 1, "nothing was committed since"
        rig.store([2])
        eventually(lambda: rig.tier.stats()["syncs"] == 2, "the second sync")
        assert syncs == ["payload", "records"] * 2
        stats = rig.tier.stats()
        assert stats["sync_us_total"] >= stats["sync_us_max"] > 0


def test_interval_does_not_sync_for_every_commit(tmp_path: Path, syncs: list[str]) -> None:
    with ColdRig(tmp_path / "cold", quick(sync_interval_s=30.0)) as rig:
        for number in range(50):
            rig.store([number])
        assert syncs == []


def test_commit_has_lmdb_sync_every_transaction(tmp_path: Path) -> None:
    for durability, synchronous in (("none", False), ("interval", False), ("commit", True)):
        with ColdRig(tmp_path / "cold", quick(durability=durability, commit_bytes_least=0)) as rig:
            for file in (rig.tier._store.payload, rig.tier._store.records):
                flags = file.env.flags()
                assert (flags["sync"], flags["metasync"]) == (synchronous, True)
            if synchronous:
                rig.store(range(20))
                assert rig.tier.stats()["syncs"] == 3, "20 blocks are three transactions"
                assert rig.tier.stats()["durability"] == 2


def test_a_durability_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none, interval, commit"):
        ColdRig(tmp_path / "cold", quick(durability="sometimes"))
    assert not (tmp_path / "cold").exists()


def test_a_sync_that_fails_is_counted_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syncs: list[str]
) -> None:
    with ColdRig(tmp_path / "cold", quick(sync_interval_s=0.01)) as rig:

        def fail(_file: EnvironmentFile) -> None:
            raise OSError("Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(EnvironmentFile, "sync", fail)
            rig.store([1])
            eventually(lambda: rig.tier.stats()["sync_failures"] == 1, "the failure")
        rig.store([2])
        eventually(lambda: syncs == ["payload", "records"], "the next sync")
        assert rig.read([1, 2]) == [OK, OK]


def test_bytes_written_are_counted(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold", quick(durability="none")) as rig:
        rig.store(NUMBERS)
        stats = rig.tier.stats()
        assert stats["written_bytes"] == len(NUMBERS) * (rig.block_bytes + 80)
        assert stats["written_bytes"] < stats["device_bytes"] < 2 * stats["written_bytes"]


# -- check


def damage(rig: ColdRig, number: int) -> None:
    """Flip a bit of a payload, in the file of a tier that is open."""
    (found,) = rig.tier._reader.look_up([b"".join(ref(number))])
    assert found is not None
    with (rig.path / "payload" / "data.mdb").open("r+b") as file:
        at = found.page * 4096 + 20_000
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def check_all(rig: ColdRig, limit: int, *, repair: bool) -> CheckPage:
    """All pages summed up."""
    after, sums = None, np.zeros(4, dtype=int)
    while True:
        page = rig.tier.check(after, limit, repair)
        assert page.checked <= limit
        sums += page[1:]
        if page.last is None:
            return CheckPage(None, *sums.tolist())
        after = page.last


def lose_payload(rig: ColdRig, number: int) -> None:
    from kvstore.tiers.cold_jobs import Run

    entries = [b"".join(ref(number))]
    rig.tier._writer.submit([Run(lambda: rig.tier._transactions._delete_payloads(entries))], 30).wait(30)


@pytest.mark.parametrize("limit", [1, 7, 40, 1000])
def test_a_check_finds_what_is_bad_and_repairs_when_it_may(tmp_path: Path, limit: int) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        assert check_all(rig, limit, repair=True) == CheckPage(None, 0, 0, 0, 0)
        rig.store(NUMBERS)
        assert check_all(rig, limit, repair=True) == CheckPage(None, 40, 0, 0, 0)
        damage(rig, 3)
        damage(rig, 30)
        lose_payload(rig, 20)
        for _ in range(2):
            assert check_all(rig, limit, repair=False) == CheckPage(None, 40, 2, 1, 0)
        assert rig.tier.stats()["blocks"] == 40
        assert rig.tier.stats()["corrupt"] == 0, "that counts what was dropped"
        assert check_all(rig, limit, repair=True) == CheckPage(None, 40, 2, 1, 3)
        assert check_all(rig, limit, repair=True) == CheckPage(None, 37, 0, 0, 0)
        assert rig.tier.stats()["blocks"] == 37
        assert rig.read(NUMBERS) == [MISSING if number in (3, 20, 30) else OK for number in NUMBERS]


def test_a_check_leaves_alone_what_another_build_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(3))

        def unknown(*_: object) -> None:
            raise LookupError("version 99")

        monkeypatch.setattr(rig.tier._reader, "_decode_frame", unknown)
        page = rig.tier.check(None, 10, repair=True)
        assert (page.checked, page.corrupt, page.repaired) == (3, 0, 0)
        assert rig.tier.stats()["blocks"] == 3


def test_a_check_of_a_closed_tier_is_an_error(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.tier.close()
        with pytest.raises(OSError, match="closed"):
            rig.tier.check(None, 10, repair=False)
        with pytest.raises(OSError, match="compacted"):
            rig.tier.compact()


# -- compaction


def test_a_compaction_gives_back_what_is_free(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(400))
        rig.tier.delete([ref(number) for number in range(400) if number % 4])
        rig.tier.flush()
        before = (tmp_path / "cold" / "payload" / "data.mdb").stat().st_size
        result = rig.tier.compact()
        after = (tmp_path / "cold" / "payload" / "data.mdb").stat().st_size
        assert after < before / 3
        assert result.after_bytes < result.before_bytes / 3
        assert result.after_bytes == rig.tier.stats()["map_used_bytes"]
        assert sorted(path.name for path in (tmp_path / "cold").iterdir()) == [
            "format",
            "lock",
            "payload",
            "records",
            "session",
        ]
        wanted = [MISSING if number % 4 else OK for number in range(400)]
        assert rig.read(range(400)) == wanted
        rig.store(range(500, 520))
        assert rig.read(range(500, 520)) == [OK] * 20
        rig.reopen()
        assert rig.tier.set_aside is None
        assert rig.read(range(400)) == wanted
        assert rig.entries() == (120, 120)


def test_while_a_compaction_runs_writes_are_busy_and_reads_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ColdRig(tmp_path / "cold") as rig, ThreadPoolExecutor(1) as pool:
        rig.store(NUMBERS)
        entered, go_on = threading.Event(), threading.Event()

        def slow_sync(_path: Path) -> None:
            entered.set()
            assert go_on.wait(30)

        monkeypatch.setattr("kvstore.tiers.cold_compact.sync_directory", slow_sync)
        compacting = pool.submit(rig.tier.compact)
        assert entered.wait(30)
        assert rig.write([100]) == [BUSY]
        with pytest.raises(OSError, match="not confirmed"):
            rig.tier.delete([ref(0)])
        with pytest.raises(OSError, match="cannot be compacted now"):
            rig.tier.compact()
        assert rig.read(NUMBERS) == [OK] * 40
        go_on.set()
        compacting.result(30)
        rig.store([100])
        rig.tier.delete([ref(0)])
        assert rig.read([0, 1, 100]) == [MISSING, OK, OK]


def test_a_compaction_without_room_for_the_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(NUMBERS)
        free = SimpleNamespace(f_bavail=100, f_frsize=4096)
        with monkeypatch.context() as patch:
            patch.setattr("kvstore.tiers.cold_compact.os.statvfs", lambda _path: free)
            with pytest.raises(OSError, match="to compact takes"):
                rig.tier.compact()
        rig.store([100])


def test_a_compaction_that_fails_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(NUMBERS)
        calls: list[int] = []
        inner = rig.tier._store.open_payload

        def fail_once() -> EnvironmentFile:
            calls.append(1)
            if len(calls) == 1:
                raise OSError("Too many open files")
            return inner()

        monkeypatch.setattr(rig.tier._store, "open_payload", fail_once)
        with pytest.raises(OSError, match="Too many open files"):
            rig.tier.compact()
        assert rig.read(NUMBERS) == [OK] * 40
        rig.store([100])
        rig.reopen()
        assert rig.read([*NUMBERS, 100]) == [OK] * 41
        assert rig.entries() == (41, 41)


COMPACT = """
import os, random, signal, sys, threading
from pathlib import Path
from cold_rig import ColdRig, quick
rig = ColdRig(Path(sys.argv[1]))
delay_s = random.Random(int(sys.argv[2])).uniform(0, 0.08)
threading.Timer(delay_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
while True:
    rig.tier.compact()
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_compaction_costs_nothing(tmp_path: Path) -> None:
    seed = fresh_seed()
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(200))
        rig.tier.delete([ref(number) for number in range(0, 200, 2)])
    for turn in range(20):
        done = run_child(COMPACT, tmp_path / "cold", seed + turn)
        assert done.returncode == -signal.SIGKILL, done.stderr
        with ColdRig(tmp_path / "cold") as rig:
            assert rig.tier.set_aside is None
            assert rig.read(range(1, 200, 2)) == [OK] * 100
            assert not [path for path in (tmp_path / "cold").iterdir() if path.name.startswith("payload.")]


# -- parts


def test_a_ring_hands_the_same_buffers_out_again() -> None:
    ring = BufferRing(1 << 20)
    first = ring.take(100_000, 0.0)
    assert first is not None
    ring.give_back(first)
    assert ring.take(99_000, 0.0) is first


def test_a_ring_is_bounded_and_waits_for_what_comes_back() -> None:
    ring = BufferRing(256 << 10)
    held = [ring.take(65_536, 0.0) for _ in range(4)]
    assert all(buffer is not None for buffer in held)
    assert ring.take(1, 0.01) is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.take, 1, 30.0)
        assert held[0] is not None
        ring.give_back(held[0])
        assert waiting.result(30) is held[0]


def test_a_ring_gives_one_that_is_too_large_to_who_is_alone() -> None:
    ring = BufferRing(64 << 10)
    large = ring.take(1 << 20, 0.0)
    assert large is not None and large.nbytes == 1 << 20
    assert ring.take(1, 0.0) is None
    ring.give_back(large)
    assert ring.take(1, 0.0) is not None


def test_a_ring_keeps_no_more_than_its_limit_when_sizes_change() -> None:
    ring = BufferRing(1 << 20)
    sizes = random.Random(1)
    for _ in range(200):
        taken = [ring.take(sizes.randrange(1, 400_000), 0.0) for _ in range(3)]
        for buffer in taken:
            if buffer is not None:
                ring.give_back(buffer)
        assert sum(buffer.nbytes for buffer in ring._free) <= 1 << 20


def test_a_gate_lets_one_be_alone_and_the_others_wait() -> None:
    gate = Gate()
    order: list[str] = []
    with ThreadPoolExecutor(1) as pool:

        def enter() -> None:
            with gate.inside() as entered:
                order.append(f"inside {entered}")

        with gate.alone(30) as alone:
            assert alone
            waiting = pool.submit(enter)
            order.append("alone")
        waiting.result(30)
        assert order == ["alone", "inside True"]
    with gate.inside(), gate.alone(0.01) as alone:
        assert not alone
        with gate.inside() as entered:
            assert entered, "who could not be alone keeps nobody out"
    assert gate.close(0)


def test_encoding_takes_no_fresh_buffer_per_block(tmp_path: Path) -> None:
    options = quick(buffer_bytes=1 << 20, durability="none")
    with ColdRig(tmp_path / "cold", options) as rig:
        for _ in range(5):
            rig.store(range(60))
        ring = rig.tier._encoder.ring
        eventually(lambda: not ring._out_bytes, "every buffer to come back")
        assert sum(buffer.nbytes for buffer in ring._free) <= 1 << 20


def test_two_batches_that_want_all_buffers_get_on(tmp_path: Path) -> None:
    durability: Durability = "none"
    options = quick(buffer_bytes=192 << 10, durability=durability)
    with ColdRig(tmp_path / "cold", options) as rig, ThreadPoolExecutor(4) as pool:
        items = [[rig.item(number) for number in range(first, 64, 4)] for first in range(4)]
        for number in range(64):
            rig.memory.view(rig.item(number).range)[:] = _content(number, rig)
        for _ in range(3):
            for results in pool.map(rig.tier.write, items):
                assert {result.outcome for result in results} == {OK}


def _content(number: int, rig: ColdRig) -> np.ndarray:
    from cold_rig import content

    return content(number, rig.block_bytes)


PARKED = """
import lmdb, os, signal, sys
txn = lmdb.open(sys.argv[1], max_dbs=4, map_size=64 << 20).begin()
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_readers_that_died_are_forgotten_on_a_timer(tmp_path: Path) -> None:
    """Their slots would keep old pages from being used again, for ever."""
    with ColdRig(tmp_path / "cold", quick(reader_check_s=0.05)) as rig:
        rig.store([1])
        pid = run_child(PARKED, tmp_path / "cold" / "payload").stdout.strip()
        assert pid
        eventually(lambda: pid not in rig.tier._store.payload.env.readers(), "the dead reader's slot to be freed")
        assert rig.read([1]) == [OK]
