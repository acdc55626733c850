"""Stores of other formats: the one before is taken over, a newer one is left exactly as it is."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cold_rig import NEXT_BOOT, ColdRig, edit, eventually, fresh_seed, make_format_1, quick, ref, run_child
from kvstore.tiers.base import Outcome
from kvstore.tiers.cold_env import FORMAT

OK, MISSING = Outcome.OK, Outcome.MISSING
NUMBERS = range(300)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change, and every name."""
    return {
        str(path.relative_to(folder)): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def test_the_format_before_is_served_and_goes_on(tmp_path: Path) -> None:
    records = make_format_1(tmp_path / "cold", NUMBERS)
    size = (tmp_path / "cold" / "data.mdb").stat().st_size
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.tier.set_aside is None
        assert rig.read(NUMBERS) == [OK] * len(NUMBERS)
        found = {record.ref: record for record in rig.tier.scan()}
        for record in records:
            one = found[record.ref]
            assert (one.parent, one.checksum, one.nbytes, one.stored_bytes, one.epoch) == (
                record.parent,
                record.checksum,
                record.nbytes,
                record.stored_bytes,
                record.epoch,
            )
        stats = rig.tier.stats()
        assert stats["blocks"] == len(NUMBERS)
        assert stats["stored_bytes"] == sum(record.stored_bytes for record in records)
        assert (tmp_path / "cold" / "payload" / "data.mdb").stat().st_size <= size + (1 << 20), "nothing was copied"
        eventually(lambda: rig.tier._reader.pages_known, "the pages of the payloads to be known")
        assert rig.read(NUMBERS) == [OK] * len(NUMBERS)
        rig.store(range(1000, 1010))
        rig.tier.delete([ref(0)])
        rig.reopen()
        assert rig.read([0, *range(1, 300), *range(1000, 1010)]) == [MISSING] + [OK] * 309
        assert rig.entries() == (309, 309)
        assert (tmp_path / "cold" / "format").read_text().strip() == str(FORMAT)


def test_an_empty_store_of_the_format_before(tmp_path: Path) -> None:
    make_format_1(tmp_path / "cold", [])
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.held() == set()
        rig.store([1])


def test_a_damaged_store_of_the_format_before_is_set_aside(tmp_path: Path) -> None:
    make_format_1(tmp_path / "cold", range(10))
    data = tmp_path / "cold" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.tier.set_aside is not None
        assert rig.held() == set()


def test_a_power_loss_over_the_format_before_is_verified(tmp_path: Path) -> None:
    make_format_1(tmp_path / "cold", range(10))
    (tmp_path / "cold" / "session").write_text("another boot")
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.tier.set_aside is None
        assert rig.read(range(10)) == [OK] * 10


IMPORT = """
import sys, threading, os, signal, random
from pathlib import Path
from cold_rig import ColdRig
seed = int(sys.argv[2])
threading.Timer(random.Random(seed).uniform(0.0, 0.03), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
ColdRig(Path(sys.argv[1])).tier.close()
"""


def test_a_kill_while_the_format_before_is_taken_over_costs_nothing(tmp_path: Path) -> None:
    seed = fresh_seed()
    make_format_1(tmp_path / "cold", NUMBERS)
    killed = 0
    for turn in range(8):
        killed += run_child(IMPORT, tmp_path / "cold", seed + turn).returncode == -signal.SIGKILL
    assert killed
    with ColdRig(tmp_path / "cold") as rig:
        assert rig.tier.set_aside is None
        assert rig.read(NUMBERS) == [OK] * len(NUMBERS)


@pytest.mark.parametrize("boot", ["", NEXT_BOOT])
def test_a_newer_format_is_refused_and_not_touched(tmp_path: Path, boot: str) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
    (tmp_path / "cold" / "format").write_text(f"{FORMAT + 1}\n")
    if boot:  # damage and power losses of a format that is not ours are not ours to judge
        (tmp_path / "cold" / "session").write_text("another boot")
        (tmp_path / "cold" / "condemned").write_text("damage")
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=rf"has format {FORMAT + 1}, and this build knows format {FORMAT}"):
        rig.open(quick())
    assert snapshot(tmp_path) == before
    (tmp_path / "cold" / "format").write_text(f"{FORMAT}\n")
    for name in ("session", "condemned"):
        (tmp_path / "cold" / name).unlink(missing_ok=True)
    rig.open(quick())
    assert rig.read(range(5)) == [OK] * 5


def test_a_newer_format_in_the_place_of_the_one_before_is_refused(tmp_path: Path) -> None:
    make_format_1(tmp_path / "cold", range(5))
    edit(tmp_path / "cold", b"meta", lambda txn, meta: txn.put(b"format", b"3", db=meta))
    before = (tmp_path / "cold" / "data.mdb").read_bytes()
    with pytest.raises(OSError, match="format 3"):
        ColdRig(tmp_path / "cold")
    assert (tmp_path / "cold" / "data.mdb").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cold"]


def test_a_newer_lmdb_is_refused_and_not_touched(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
    data = tmp_path / "cold" / "payload" / "data.mdb"
    with data.open("r+b") as file:
        for page in range(2):
            file.seek(page * 4096 + 20)
            file.write((2).to_bytes(4, "little"))
    before = data.read_bytes()
    with pytest.raises(OSError, match="data version 2; this build knows 1"):
        rig.open(quick())
    assert data.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cold"]


@pytest.mark.parametrize("text", ["", "two", "\x00\xff2"])
def test_a_format_that_is_no_number_is_damage(tmp_path: Path, text: str) -> None:
    with ColdRig(tmp_path / "cold") as rig:
        rig.store(range(5))
    (tmp_path / "cold" / "format").write_text(text)
    with ColdRig(tmp_path / "cold") as again:
        assert again.tier.set_aside is not None
        again.store(range(5))
