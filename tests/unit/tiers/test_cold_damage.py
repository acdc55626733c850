"""A cold environment that cannot be trusted is set aside, said so, and replaced by an empty one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lmdb
import pytest

from kvstore.codec.frame import FrameFormat
from kvstore.tiers.base import Outcome, SlabMemory
from kvstore.tiers.cold import LmdbOptions, LmdbTier
from kvstore.tiers.cold_history import History
from kvstore.tiers.conformance import Rig

THIS_BOOT = "11111111-aaaa"
NEXT_BOOT = "22222222-bbbb"


def make(memory: SlabMemory, capacity_bytes: int, *, path: Path, boot_id: str = THIS_BOOT) -> LmdbTier:
    return LmdbTier(path / "cold", capacity_bytes, memory, FrameFormat(), LmdbOptions(patience_s=30, boot_id=boot_id))


def cold(rig: Rig) -> LmdbTier:
    assert isinstance(rig.tier, LmdbTier)
    return rig.tier


def overwrite(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: b"\x5a\xa5\x3c" * (len(content) // 3),
    "text": lambda _content: b"not a database\n",
    "half a meta page": lambda content: content[:100],
    "one page": lambda content: content[:4096],
    "first meta page gone": lambda content: overwrite(content, 0, b"\xff" * 4096),
    "other version on one": lambda content: overwrite(content, 20, b"\x63"),
    "meta pages only": lambda content: content[:8192],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "last page cut off": lambda content: content[:-4096],
    "last byte cut off": lambda content: content[:-1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_file(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        items = [rig.block(number) for number in range(16)]
        rig.store(items)
        cold(rig).close()
        data = tmp_path / "cold" / "payload" / "data.mdb"
        damaged = damage(data.read_bytes())
        data.write_bytes(damaged)
        rig.reopen()
        aside = cold(rig).set_aside
        assert aside is not None
        assert aside.parent == tmp_path
        assert aside.name.startswith("cold.damaged-")
        assert (aside / "payload" / "data.mdb").read_bytes() == damaged, "it is kept as it was"
        assert rig.tier.stats()["set_aside"] == 1
        assert rig.fetch(items) == [Outcome.MISSING] * 16
        assert list(cold(rig).scan()) == []
        rig.store(items)
        rig.reopen()
        assert cold(rig).set_aside is None, "once only"
        assert rig.fetch(items) == [Outcome.OK] * 16


def test_a_data_file_that_is_gone_is_an_empty_tier(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)
        rig.store([item])
        cold(rig).close()
        (tmp_path / "cold" / "payload" / "data.mdb").unlink()
        rig.reopen()
        assert rig.fetch([item]) == [Outcome.MISSING]
        rig.store([item])


def test_only_the_latest_that_was_set_aside_is_kept(tmp_path: Path) -> None:
    (tmp_path / "cold.damaged-20200101T000000Z").mkdir()
    (tmp_path / "cold.damaged-20200101T000000Z" / "data.mdb").write_bytes(b"old")
    (tmp_path / "colder.damaged-20200101T000000Z").mkdir()
    with Rig(partial(make, path=tmp_path)) as rig:
        cold(rig).close()
        (tmp_path / "cold" / "payload" / "data.mdb").write_bytes(b"damaged")
        rig.reopen()
        aside = cold(rig).set_aside
        assert aside is not None
        names = {folder.name for folder in tmp_path.iterdir()}
        assert names == {"cold", aside.name, "colder.damaged-20200101T000000Z"}


def test_reboot_after_a_clean_close_and_crash_within_a_boot_are_trusted(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)
        rig.store([item])
        cold(rig).close()
        rig.tier = make(rig.memory, 8 << 20, path=tmp_path, boot_id=NEXT_BOOT)
        assert rig.fetch([item]) == [Outcome.OK]
        cold(rig).close()
        (tmp_path / "cold" / "session").write_text(NEXT_BOOT)  # killed, same boot
        rig.tier = make(rig.memory, 8 << 20, path=tmp_path, boot_id=NEXT_BOOT)
        assert cold(rig).set_aside is None
        assert rig.fetch([item]) == [Outcome.OK]


def test_a_condemned_store_is_set_aside(tmp_path: Path) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        cold(rig).close()
        History(tmp_path / "cold").condemn("died of SIGABRT five times")
        rig.reopen()
        assert cold(rig).set_aside is not None
        rig.reopen()
        assert cold(rig).set_aside is None


def test_damage_met_in_use_stops_the_tier_and_is_set_aside_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)
        rig.store([item])

        def damaged(*_: object) -> None:
            raise lmdb.CorruptedError("mdb_put: MDB_CORRUPTED")

        with monkeypatch.context() as patch:
            patch.setattr(cold(rig)._transactions, "carry_out", damaged)
            assert rig.write([rig.block(2)]) == [Outcome.BUSY]
        assert "MDB_CORRUPTED" in cold(rig).failure
        assert rig.tier.stats()["failed"] == 1
        assert rig.fetch([item]) == [Outcome.MISSING]
        assert rig.write([rig.block(3)]) == [Outcome.BUSY]
        rig.reopen()
        assert cold(rig).set_aside is not None
        rig.store([item])


def test_damage_met_by_a_reader_stops_the_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rig(partial(make, path=tmp_path)) as rig:
        item = rig.block(1)
        rig.store([item])

        def damaged(*_: object) -> Outcome:
            raise lmdb.PageNotFoundError("mdb_get: MDB_PAGE_NOTFOUND")

        with monkeypatch.context() as patch:
            patch.setattr(cold(rig)._reader, "_decode", damaged)
            assert rig.fetch([item]) == [Outcome.MISSING]
        assert cold(rig).failure
        assert rig.write([item]) == [Outcome.BUSY]
        assert rig.tier.stats()["read_failures"] == 1


def test_no_permission_is_an_error_and_no_damage(tmp_path: Path) -> None:
    (tmp_path / "cold").write_text("a file where the directory should be")
    with pytest.raises(OSError):
        make(Rig(partial(make, path=tmp_path / "other")).memory, 1 << 20, path=tmp_path)
    assert (tmp_path / "cold").read_text().startswith("a file")
