"""Two environments: payload first, then its record; what has only one half is found; pages are known again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import lmdb
import pytest

from cold_rig import NEXT_BOOT, ColdRig, RoundedFormat, content, edit, eventually, quick, ref
from kvstore.tiers.base import Outcome
from kvstore.tiers.checksums import block_checksum
from kvstore.tiers.cold_records import entry_key

OK, MISSING, CORRUPT, BUSY, FULL = Outcome


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ColdRig]:
    with ColdRig(tmp_path / "cold") as made:
        yield made


def forget(rig: ColdRig, which: str, numbers: list[int]) -> None:
    """Take one half of some blocks away while nobody looks."""
    rig.crash()
    name = b"blocks" if which == "payload" else None

    def delete(txn: lmdb.Transaction, database: object) -> None:
        for number in numbers:
            assert txn.delete(entry_key(ref(number)), db=database)

    edit(rig.path / which, name, delete)
    rig.open(rig.options)


def test_a_record_without_a_payload_is_a_miss_and_is_swept(rig: ColdRig) -> None:
    rig.store(range(10))
    forget(rig, "payload", [3, 4])
    eventually(lambda: rig.entries() == (8, 8), "the records to be swept")
    assert rig.read(range(10)) == [OK] * 3 + [MISSING] * 2 + [OK] * 5
    stats = rig.tier.stats()
    assert (stats["blocks"], stats["swept"], stats["corrupt"]) == (8, 2, 0)
    assert stats["raw_bytes"] == 8 * rig.block_bytes


def test_a_record_without_a_payload_is_a_miss_also_before_it_is_swept(rig: ColdRig) -> None:
    rig.store(range(3))
    payload = rig.tier._store.payload
    rig.tier._writer.submit([_run(lambda: rig.tier._transactions._delete_payloads([entry_key(ref(1))]))], 30).wait(30)
    assert payload.entries() == 2
    assert rig.read(range(3)) == [OK, MISSING, OK]
    rig.store([1])
    assert rig.read(range(3)) == [OK] * 3


def _run(function: object) -> object:
    from kvstore.tiers.cold_jobs import Run

    return Run(function)  # type: ignore[arg-type]


def test_payloads_without_a_record_are_swept_in_the_background(rig: ColdRig) -> None:
    rig.store(range(10))
    forget(rig, "records", [0, 9])
    eventually(lambda: rig.entries() == (8, 8), "the payloads to be swept")
    assert rig.read(range(10)) == [MISSING] + [OK] * 8 + [MISSING]
    assert rig.tier.stats()["swept"] == 2
    assert rig.tier.stats()["blocks"] == 8, "the totals were rebuilt from the records"


def test_as_many_of_one_kind_as_of_the_other_are_misses_all_the_same(rig: ColdRig) -> None:
    rig.store(range(6))
    forget(rig, "records", [0])
    eventually(lambda: rig.entries() == (5, 5), "the first half")
    rig.tier.close()
    edit(rig.path / "payload", b"blocks", lambda txn, db: txn.delete(entry_key(ref(1)), db=db))
    edit(rig.path / "records", None, lambda txn, _db: txn.delete(entry_key(ref(2))))
    rig.open(rig.options)
    assert rig.read(range(6)) == [MISSING] * 3 + [OK] * 3


def test_the_sweep_goes_on_behind_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.cold_keeper._STEP_ENTRIES", 16)
    with ColdRig(tmp_path / "cold", block_bytes=500) as rig:
        rig.store(range(100))
        forget(rig, "records", list(range(0, 100, 7)))
        eventually(lambda: rig.entries() == (85, 85), "the payloads to be swept")
        assert rig.read(range(100)).count(OK) == 85


def test_what_is_stored_while_the_sweep_looks_is_not_swept(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold", block_bytes=500) as rig:
        rig.store(range(50))
        for turn in range(20):
            rig.tier._transactions.unsettled = True
            rig.tier._keeper.wake()
            rig.store(range(100 + 10 * turn, 110 + 10 * turn))
        assert rig.tier.stats()["swept"] == 0
        assert rig.read(range(100, 300)) == [OK] * 200


def test_totals_that_do_not_agree_are_rebuilt(rig: ColdRig) -> None:
    rig.store(range(5))
    before = rig.tier.stats()
    for wrong in (b"short", bytes(24), b"\xff" * 24):
        rig.tier.close()
        edit(rig.path / "records", None, lambda txn, _db, wrong=wrong: txn.put(b"totals", wrong))  # type: ignore[misc]
        rig.open(rig.options)
        for name in ("blocks", "raw_bytes", "stored_bytes"):
            assert rig.tier.stats()[name] == before[name]


def test_a_replaced_block_that_lost_its_second_commit_is_not_served_wrong(rig: ColdRig) -> None:
    """Killed between the two: the new payload lies under the old record."""
    rig.store([1])
    store = rig.tier._store
    with store.records.env.begin() as txn:
        old = txn.get(entry_key(ref(1)))
    rig.store([1], version=1)
    rig.crash()
    edit(rig.path / "records", None, lambda txn, _db: txn.put(entry_key(ref(1)), old))
    rig.open(rig.options)
    assert rig.read([1], version=1) == [MISSING]
    assert rig.read([1]) == [CORRUPT]
    assert rig.read([1]) == [MISSING]
    assert rig.entries() == (0, 0)


def test_a_read_of_another_content_is_missing_and_costs_nothing(rig: ColdRig) -> None:
    rig.store([1], version=1)
    assert rig.read([1], version=0) == [MISSING]
    assert rig.read([1], version=1) == [OK]
    stats = rig.tier.stats()
    assert (stats["other_copy"], stats["corrupt"], stats["blocks"]) == (1, 0, 1)


def test_a_record_has_what_recovery_needs(rig: ColdRig) -> None:
    rig.store([11])
    (record,) = rig.tier.scan()
    item = rig.item(11)
    assert (record.ref, record.parent, record.checksum, record.epoch) == (item.ref, item.parent, item.checksum, 5)
    assert (record.nbytes, record.codec, record.hits, record.lossy) == (rig.block_bytes, 7, 11, False)
    assert 1.7e9 < record.stored_s < 2**33


def test_a_lossy_copy_is_said_to_be_one_and_never_replaces_an_exact_one(tmp_path: Path) -> None:
    with ColdRig(tmp_path / "cold", block_format=RoundedFormat()) as rig:
        rounded = block_checksum(content(1, rig.block_bytes) & 0xF0)
        lossy = rig.item(1)._replace(lossy="rounded")
        rig.memory.view(lossy.range)[:] = content(1, rig.block_bytes)
        (result,) = rig.tier.write([lossy])
        assert (result.outcome, result.codec, result.lossy, result.checksum) == (OK, 8, True, rounded)
        (record,) = rig.tier.scan()
        assert (record.lossy, record.checksum) == (True, rounded)
        assert rig.tier.read([lossy]) == [MISSING], "the exact bytes are not there"
        assert rig.tier.read([lossy._replace(checksum=rounded)]) == [OK]
        rig.store([1])
        for _ in range(2):
            rig.memory.view(lossy.range)[:] = content(1, rig.block_bytes)
            (result,) = rig.tier.write([lossy])
            assert (result.outcome, result.codec, result.lossy, result.checksum) == (OK, 7, False, lossy.checksum)
            assert rig.read([1]) == [OK]
        assert rig.tier.stats()["blocks"] == 1
        (result,) = rig.tier.write([lossy._replace(epoch=6)])
        assert result.lossy is False or rig.read([1]) != [OK]


def test_the_pages_of_payloads_are_known_and_taken_before_they_are_touched(
    rig: ColdRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.store(range(40))
    reader = rig.tier._reader
    advised: list[tuple[int, int]] = []
    populated: list[tuple[int, int]] = []
    monkeypatch.setattr(reader.values, "advise", lambda *place: advised.append(place))
    monkeypatch.setattr(reader.values, "populate", lambda *place: populated.append(place))
    rig.tier.prefetch([rig.item(number) for number in range(40)])
    assert len(advised) == len(set(advised)) == 40
    rig.read(range(40))
    assert advised == [*advised[:40], *advised[:40]]
    assert populated == advised[:40]
    assert {page_bytes for _, page_bytes in advised} == {40960}
    pages = sorted(page for page, _ in populated)
    assert all(later - earlier >= 10 for earlier, later in pairwise(pages)), "none overlaps"


def test_pages_are_looked_for_again_once_they_moved(rig: ColdRig) -> None:
    rig.store(range(20))
    rig.tier.delete([ref(number) for number in range(0, 20, 2)])
    assert rig.tier._reader.pages_known
    rig.tier.compact()
    eventually(lambda: rig.tier._reader.pages_known, "the pages to be known again")
    before = {entry: page for entry, page in _pages(rig).items() if page}
    assert len(before) == 10
    assert rig.read(range(1, 20, 2)) == [OK] * 10
    rig.reopen()
    assert rig.tier._reader.pages_known
    assert _pages(rig) == before


def test_a_record_that_was_read_before_its_new_page_was_noted_does_no_harm(rig: ColdRig) -> None:
    """Regression: its page, beyond the end of the smaller file, was taken for a truncation; the store was set aside."""
    rig.store(range(40))
    reader = rig.tier._reader
    stale = [found for found in reader.look_up([entry_key(ref(39))]) if found is not None]
    assert stale[0].page
    rig.tier.delete([ref(number) for number in range(39)])
    rig.tier.compact()
    reader.pages_known = False
    (read_early,) = reader.look_up([entry_key(ref(39))])
    assert read_early is not None and read_early.page == 0
    reader.pages_known = True  # the keeper has noted all pages in between
    item = rig.item(39)
    assert reader.fetch(item, read_early, rig.memory.view(item.range)) is OK
    assert rig.tier.failure == ""


def _pages(rig: ColdRig) -> dict[bytes, int]:
    entries = [entry_key(record.ref) for record in rig.tier.scan()]
    return {entry: found.page for entry, found in zip(entries, rig.tier._reader.look_up(entries), strict=True) if found}


def test_deletes_that_are_not_confirmed_are_said_to_be(rig: ColdRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.store(range(4))

    def refuse(*_: object) -> None:
        raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(rig.tier._transactions, "carry_out", refuse)
        with pytest.raises(OSError, match="2 of 2 deletes are not confirmed"):
            rig.tier.delete([ref(0), ref(1)])
    rig.tier.delete([ref(0), ref(1)])
    assert rig.read(range(4)) == [MISSING] * 2 + [OK] * 2
    rig.tier.close()
    with pytest.raises(OSError, match="closed"):
        rig.tier.delete([ref(2)])


def test_a_record_that_cannot_be_written_takes_its_payload_back(rig: ColdRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.store([1])

    def refuse(*_: object) -> None:
        raise lmdb.DiskError("mdb_txn_commit: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(rig.tier._transactions, "_put_records", refuse)
        assert rig.write([2]) == [FULL]
    assert rig.entries() == (1, 1)
    assert rig.read([1, 2]) == [OK, MISSING]
    eventually(lambda: rig.write([2]) == [OK], "the disk to be tried again")


def test_another_boot_and_options_open_what_is_there(rig: ColdRig) -> None:
    rig.store(range(5))
    rig.reopen(replace(quick(), boot_id=NEXT_BOOT, durability="commit"))
    assert rig.read(range(5)) == [OK] * 5
    rig.reopen(replace(quick(), durability="none"))
    assert rig.read(range(5)) == [OK] * 5
