"""Disks that are full, read-only, broken or cut short under a tier that is in use."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import numpy as np
import pytest

from cold_rig import ColdRig, eventually, mount_namespace, quick, ref, run_child
from kvstore.tiers import cold_map
from kvstore.tiers.base import Outcome
from kvstore.tiers.cold_map import CutFileError, UnreadablePagesError, ValueMap
from kvstore.tiers.cold_room import Room, reserve_bytes, usable_bytes
from kvstore.tiers.disk_rate import read_bytes_s

OK, MISSING, CORRUPT, BUSY, FULL = Outcome
PAGE = 4096

# A tmpfs of 16 MiB: the store may have 64, and something else takes the rest of the disk.
FULL_TMPFS = """
import json, subprocess, sys
from pathlib import Path
from cold_rig import ColdRig, eventually, quick, ref
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True, timeout=30)
report = {}
with ColdRig(folder / "cold", quick(sync_interval_s=0.01), capacity_bytes=64 << 20, block_bytes=100_000) as rig:
    report["first"] = rig.write(range(60))
    hog = folder / "hog"
    with hog.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(100_000)):
                pass
        except OSError as error:
            report["hog"] = error.errno
    report["full"] = rig.write(range(60, 120))
    report["served"] = rig.read(range(60))
    report["counts"] = {name: rig.tier.stats()[name] for name in ("full", "write_failures", "failed")}
    stored = [n for n, outcome in zip(range(60, 120), report["full"]) if outcome == 0]
    report["stored_served"] = rig.read(stored)
    hog.unlink()
    eventually(lambda: rig.write([200]) == [0], "the tier to go on once there is room")
    report["after"] = rig.write(range(60, 90))
    rig.tier.flush()
    rig.reopen()
    report["reopened"] = rig.read([*range(90), 200])
    report["set_aside"] = rig.tier.stats()["set_aside"]
print(json.dumps(report))
"""


def test_a_full_disk_of_16_mib_and_what_happens_when_there_is_room_again(tmp_path: Path) -> None:
    done = run_child(FULL_TMPFS, tmp_path, prefix=mount_namespace())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["first"]) == {OK}
    assert report["hog"] == errno.ENOSPC
    assert set(report["full"]) <= {OK, FULL} and FULL in report["full"]
    assert set(report["served"]) == {OK}
    assert set(report["stored_served"]) <= {OK}
    assert report["counts"]["full"] > 0
    assert report["counts"]["failed"] == 0
    assert set(report["after"]) == set(report["reopened"]) == {OK}
    assert report["set_aside"] == 0


READ_ONLY = """
import json, subprocess, sys
from pathlib import Path
from cold_rig import ColdRig, quick, ref
folder = Path(sys.argv[1])
def mount(*options):
    subprocess.run(["mount", *options, folder], check=True, timeout=30)
mount("-t", "tmpfs", "-o", "size=32m", "tmpfs")
report = {}
rig = ColdRig(folder / "cold", quick(durability="none"))
rig.store(range(20))
rig.tier.close()
mount("-o", "remount,ro")
try:
    rig.open(quick())
except OSError as error:
    report["refused"] = str(error)
report["left"] = sorted(path.name for path in folder.iterdir())
mount("-o", "remount,rw")
rig.open(quick())
report["served"] = rig.read(range(20))
rig.tier.close()
print(json.dumps(report))
"""


def test_a_read_only_file_system_is_an_error_and_no_damage(tmp_path: Path) -> None:
    done = run_child(READ_ONLY, tmp_path, prefix=mount_namespace())
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "Read-only" in report["refused"]
    assert report["left"] == ["cold"]
    assert set(report["served"]) == {OK}


def test_a_disk_that_fails_a_write_is_full_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
        tried: list[int] = []

        def fail(*_: object) -> None:
            tried.append(1)
            raise lmdb.Error("mdb_txn_commit: Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(rig.tier._transactions, "_put_payloads", fail)
            assert rig.write(range(10, 30)) == [FULL] * 20
            assert len(tried) < 10, "a disk that just failed is not asked for every block"
        assert rig.tier.stats()["write_failures"] == len(tried)
        assert rig.tier.stats()["full"] > 0
        assert rig.read(range(5)) == [OK] * 5
        eventually(lambda: rig.write([10]) == [OK], "the disk to be tried again")
        rig.store(range(10, 30))


def test_a_disk_that_fails_a_read_costs_that_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
        assert rig.read(range(5)) == [OK] * 5
        reader = rig.tier._reader
        (bad,) = reader.look_up([b"".join(ref(2))])
        assert bad is not None
        populate = reader.values.populate

        def fail(page: int, page_bytes: int) -> None:
            if page == bad.page:
                raise UnreadablePagesError("Input/output error")
            populate(page, page_bytes)

        monkeypatch.setattr(reader.values, "populate", fail)
        assert rig.read(range(5)) == [OK, OK, CORRUPT, OK, OK]
        assert rig.read([2]) == [MISSING]
        assert rig.tier.stats()["read_failures"] == 1
        assert rig.tier.failure == ""


CUT = """
import json, os, sys
from pathlib import Path
from cold_rig import ColdRig, quick
folder, name, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
rig = ColdRig(folder / "cold")
rig.store(range(50))
rig.read(range(10))
data = folder / "cold" / name / "data.mdb"
os.truncate(data, int(data.stat().st_size * share))
first = rig.read(range(50))
print(json.dumps([first, rig.read(range(50)), rig.write([100]), rig.tier.failure, rig.tier.stats()["read_failures"]]))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("share", ["0.9", "0.5", "0"])
@pytest.mark.parametrize("name", ["payload", "records"])
def test_a_file_cut_in_use_stops_the_tier_without_a_signal(tmp_path: Path, name: str, share: str) -> None:
    done = run_child(CUT, tmp_path, name, share)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    first, second, written, failure, failures = json.loads(done.stdout)
    assert first == second == [MISSING] * 50
    assert written == [BUSY]
    assert "truncated" in failure
    assert failures == 1
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.tier.set_aside is not None
        rig.store(range(5))


@pytest.fixture
def mapped(tmp_path: Path) -> Any:
    """A file of 8 pages that is mapped, and a ValueMap that knows where."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 * PAGE))
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, 8 * PAGE)
    values = ValueMap(SimpleNamespace(fd=fd, path=path))  # type: ignore[arg-type]
    values._base = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    yield path, values
    os.close(fd)


def test_pages_behind_the_end_of_a_file_are_an_error_and_no_signal(mapped: Any) -> None:
    path, values = mapped
    values.populate(0, 8 * PAGE)
    os.truncate(path, 4 * PAGE)
    values.populate(0, 4 * PAGE)
    if not values._populates:
        pytest.skip("this kernel has no MADV_POPULATE_READ")
    with pytest.raises(CutFileError, match="ends before page 8"):
        values.populate(3, 5 * PAGE)


@pytest.mark.parametrize(("code", "expected"), [(errno.EFAULT, UnreadablePagesError), (133, UnreadablePagesError)])
def test_pages_that_the_disk_does_not_give(
    mapped: Any, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    def madvise(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    monkeypatch.setattr(cold_map, "_libc", SimpleNamespace(madvise=madvise))
    with pytest.raises(expected):
        mapped[1].populate(0, 8 * PAGE)


def test_a_kernel_that_cannot_take_pages_ahead_is_asked_once(mapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def madvise(*_: object) -> int:
        asked.append(1)
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(cold_map, "_libc", SimpleNamespace(madvise=madvise))
    for _ in range(3):
        mapped[1].populate(0, 8 * PAGE)
    assert len(asked) == 1


# -- room


def system(monkeypatch: pytest.MonkeyPatch, total_bytes: int, free_bytes: int) -> None:
    values = SimpleNamespace(f_frsize=PAGE, f_blocks=total_bytes // PAGE, f_bavail=free_bytes // PAGE)
    monkeypatch.setattr("kvstore.tiers.cold_room.os.statvfs", lambda _path: values)


GIB, MIB = 1 << 30, 1 << 20


@pytest.mark.parametrize(
    ("total_bytes", "capacity_bytes", "asked_bytes", "expected"),
    [
        (1000 * GIB, 64 * GIB, 0, 50 * GIB),  # 5 %
        (10 * GIB, 2 * GIB, 0, GIB),
        (2 * GIB, GIB, 0, GIB // 2),  # half of what the capacity leaves
        (160 * MIB, 500 * MIB, 0, 8 * MIB),  # a capacity beyond the disk: 5 % of it all the same
        (16 * MIB, 8 * MIB, 0, 4 * MIB),
        (1000 * GIB, 64 * GIB, 5, 5),
    ],
)
def test_the_reserve(
    monkeypatch: pytest.MonkeyPatch, total_bytes: int, capacity_bytes: int, asked_bytes: int, expected: int
) -> None:
    system(monkeypatch, total_bytes, total_bytes)
    assert reserve_bytes(Path("/"), capacity_bytes, asked_bytes) == expected


def test_room_is_what_the_reserve_leaves_or_what_is_free_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now, inside = [0.0], [0]
    room = Room(Path("/"), 10 * MIB, lambda: inside[0], lambda: now[0])
    system(monkeypatch, GIB, 20 * MIB)
    assert room.allows(10 * MIB)
    assert not room.allows(11 * MIB)
    inside[0] = 11 * MIB
    assert room.allows(11 * MIB)
    room.close()
    assert room.is_closed() and not room.allows(1)
    now[0] = 1.0
    assert not room.is_closed() and room.allows(1)
    room.disk_failed()
    assert not room.allows(1)
    assert usable_bytes(80 * MIB, 60 * MIB) == 10 * MIB


def test_the_reserve_makes_a_tier_full_until_space_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ColdRig(tmp_path / "cold", quick(free_reserve_bytes=GIB)) as rig:
        assert rig.tier.stats()["reserve_bytes"] == GIB
        rig.store(range(5))
        with monkeypatch.context() as patch:
            system(patch, 100 * GIB, GIB - MIB)
            assert rig.write(range(5, 10)) == [FULL] * 5
            assert rig.read(range(5)) == [OK] * 5
            rig.tier.delete([ref(0)])
        eventually(lambda: rig.write([5]) == [OK], "the tier to go on")
        assert rig.tier.stats()["full"] >= 5
        assert rig.tier.stats()["write_failures"] == 0


def test_pages_freed_by_deletes_are_used_without_new_space_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ColdRig(tmp_path / "cold", quick(free_reserve_bytes=GIB)) as rig:
        rig.store(range(200))
        rig.tier.delete([ref(number) for number in range(150)])
        before = rig.tier.stats()["map_used_bytes"]
        system(monkeypatch, 100 * GIB, GIB - MIB)
        rig.store(range(300, 350))
        assert rig.tier.stats()["map_used_bytes"] <= before + 2 * MIB


# -- the rate of the disk


def test_the_rate_of_a_disk_is_measured_on_what_is_there(tmp_path: Path) -> None:
    assert read_bytes_s(tmp_path) == 0.0
    (tmp_path / "small").write_bytes(bytes(PAGE))
    assert read_bytes_s(tmp_path) == 0.0
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "sparse").touch()
    os.truncate(tmp_path / "deep" / "sparse", GIB)
    assert read_bytes_s(tmp_path) == 0.0, "holes are no reads"
    (tmp_path / "deep" / "file").write_bytes(os.urandom(40 * MIB))
    rate = read_bytes_s(tmp_path)
    assert rate == 0.0 or rate > 1e5


def test_a_disk_that_cannot_be_read_directly_has_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(40 * MIB))

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("kvstore.tiers.disk_rate.os.open", refuse)
    assert read_bytes_s(tmp_path) == 0.0
