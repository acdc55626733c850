"""Reading a store of format 1: one environment with the blocks, their records and the totals as named databases.

Its payloads stay where they are: the file becomes the payloads' environment by a rename, and only the records (88
bytes a block) are copied into an environment of their own. So it takes a second for 100,000 blocks, whatever their
size; to rewrite the payloads would take minutes and wear the drive.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lmdb

from kvstore.tiers.base import StoredRecord
from kvstore.tiers.cold_file import (
    DAMAGE,
    DATA,
    LOCK,
    MIN_MAP_BYTES,
    DamagedEnvironmentError,
    make_directory,
    sync_directory,
)
from kvstore.tiers.cold_records import ENTRY_BYTES, Totals, pack_record, unpack_record_1

_log = logging.getLogger(__name__)

_FORMAT = b"1"
_DATABASES = 3
_RECORD_MAP_SHARE = 4  # of the old file; its records took a 2,000th of it for large blocks, a tenth for the smallest


def import_format_1(path: Path, payload: Path, records: Path) -> None:
    """Turn the environment in `path` into the two in `payload` and `records`.

    A kill at any moment leaves either the old environment where it was, or everything done.

    Raises:
        DamagedEnvironmentError: it is no whole environment of format 1.
        OSError: it is of a format that this build does not know (nothing is touched then), or the disk failed.
    """
    start_s = time.monotonic()
    try:
        _check(path)
        shutil.rmtree(records, ignore_errors=True)
        make_directory(records)
        totals = _copy_records(path, records)
    except DAMAGE as error:
        raise DamagedEnvironmentError(str(error)) from error
    except lmdb.Error as error:
        raise OSError(f"format 1 in {path} cannot be read: {error}") from error
    make_directory(payload)
    sync_directory(records)
    (path / DATA).rename(payload / DATA)
    (path / LOCK).unlink(missing_ok=True)
    sync_directory(payload)
    sync_directory(path)
    _forget_records(payload)
    _log.warning("cold tier: %d blocks of format 1 taken over in %.1f s", totals.blocks, time.monotonic() - start_s)


def _check(path: Path) -> None:
    """Length first, before any page of a tree is used; then the format."""
    with lmdb.open(str(path), max_dbs=_DATABASES, mode=0o600) as env:
        used_bytes = (int(env.info()["last_pgno"]) + 1) * int(env.stat()["psize"])
        size = (path / DATA).stat().st_size
        if size < used_bytes:
            raise DamagedEnvironmentError(f"truncated to {size} bytes where it should have {used_bytes}")
        found = _format(env)
    if found.isdigit() and found != _FORMAT:
        raise OSError(
            f"the cold tier in {path} has format {found.decode()} in the place of format {_FORMAT.decode()}, and this "
            f"build knows no such thing; it was left as it is"
        )
    if found != _FORMAT:
        raise DamagedEnvironmentError(f"format {found!r}")


def _copy_records(path: Path, records: Path) -> Totals:
    """All whole records, in one transaction; payloads of the others are swept later."""
    map_bytes = max(MIN_MAP_BYTES, (path / DATA).stat().st_size // _RECORD_MAP_SHARE)
    totals = Totals()
    now_s = int(time.time())
    with (
        lmdb.open(str(path), max_dbs=_DATABASES, mode=0o600) as old,
        lmdb.open(str(records), map_size=map_bytes, mode=0o600) as new,
    ):
        with new.begin(write=True) as txn:
            for record in _records(old):
                totals = totals.plus(record.nbytes, record.stored_bytes)
                dated = replace(record, stored_s=now_s)
                txn.put(record.ref.namespace + record.ref.key, pack_record(dated), append=True)
            txn.put(b"totals", totals.pack())
        new.sync(True)
    return totals


def _format(env: lmdb.Environment) -> bytes:
    try:
        meta = env.open_db(b"meta", create=False)
    except lmdb.NotFoundError:
        return b""
    with env.begin() as txn:
        return bytes(txn.get(b"format", b"", db=meta))


def _forget_records(payload: Path) -> None:
    """Give the pages of the old records back. To fail costs their room and nothing else."""
    try:
        map_bytes = (payload / DATA).stat().st_size + MIN_MAP_BYTES
        with lmdb.open(str(payload), map_size=map_bytes, max_dbs=_DATABASES, mode=0o600) as env:
            records = env.open_db(b"records", create=False)
            with env.begin(write=True) as txn:
                txn.drop(records)
    except lmdb.Error as error:
        _log.warning("cold tier: the records of format 1 stay where they were: %s", error)


def _records(env: lmdb.Environment) -> Iterator[StoredRecord]:
    with env.begin(db=env.open_db(b"records", create=False)) as txn, txn.cursor() as cursor:
        for entry, data in cursor:
            if len(entry) != ENTRY_BYTES:
                continue
            try:
                yield unpack_record_1(entry, data)
            except ValueError as error:
                _log.warning("cold tier: a record of format 1 is left out: %s", error)
