"""Rewriting the payloads without their free pages: LMDB never gives a page back to the file system by itself.

The copy is made beside the original, synced, and takes its place by two renames. A kill at any moment leaves the
original or the copy as the payloads, whole: the next start finishes the renames or removes the copy.
"""

from __future__ import annotations

import os
import shutil

import lmdb

from kvstore.tiers.base import CompactResult
from kvstore.tiers.cold_env import COMPACTED, LAYOUT, LAYOUT_BYTES, PAYLOAD, REPLACED, ColdStore
from kvstore.tiers.cold_file import DATA, DamagedEnvironmentError, make_directory, sync_directory
from kvstore.tiers.cold_records import PAGE_BYTES
from kvstore.tiers.gate import Gate

_SPARE_BYTES = 16 << 20  # beside the copy, for whatever else is written meanwhile
_DATABASES = 4


class Compaction:
    """One compaction. Nothing may be written while it runs; reads go on but for the moment of the swap."""

    def __init__(self, store: ColdStore, gate: Gate, patience_s: float) -> None:
        self._store = store
        self._gate = gate
        self._patience_s = patience_s
        self._path = store.path

    def check_room(self, reserve_bytes: int) -> None:
        """Whether the disk holds the copy beside the original.

        Raises:
            OSError: it does not.
        """
        live_bytes = self._live_bytes() + _SPARE_BYTES
        system = os.statvfs(self._path)
        free_bytes = system.f_bavail * system.f_frsize
        if free_bytes - reserve_bytes < live_bytes:
            raise OSError(
                f"to compact takes {live_bytes} bytes for the copy, beside the {reserve_bytes} that must stay free; "
                f"there are {free_bytes}"
            )

    def run(self) -> CompactResult:
        """Copy and swap.

        Raises:
            OSError: it did not come to that; everything is as it was.
            DamagedEnvironmentError: the copy cannot be opened, and neither can the original.
        """
        before_bytes = self._store.used_bytes()
        copy = self._path / COMPACTED
        try:
            self._copy()
            with self._gate.alone(self._patience_s) as alone:
                if not alone:
                    raise OSError("to compact takes a moment without readers, and there was none")
                self._swap()
        except lmdb.Error as error:
            raise OSError(f"the payloads cannot be copied: {error}") from error
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(self._path / REPLACED, ignore_errors=True)
        return CompactResult(before_bytes, self._store.used_bytes())

    def _live_bytes(self) -> int:
        """Pages of the payloads that are in use."""
        payload = self._store.payload
        with payload.env.begin() as txn:
            trees = (payload.env.stat(), txn.stat(payload.main))
        pages = sum(tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"] for tree in trees)
        return pages * PAGE_BYTES

    def _copy(self) -> None:
        """A copy that is on the disk. The pages of its values are new, and it says so."""
        copy = self._path / COMPACTED
        shutil.rmtree(copy, ignore_errors=True)
        make_directory(copy)
        self._store.payload.env.copy(str(copy), compact=True)
        (copy / DATA).chmod(0o600)
        map_bytes = self._store.payload.map_bytes
        with lmdb.open(str(copy), map_size=map_bytes, max_dbs=_DATABASES, mode=0o600) as env:
            meta = env.open_db(b"meta")
            with env.begin(write=True) as txn:
                txn.put(LAYOUT, os.urandom(LAYOUT_BYTES), db=meta)
            env.sync(True)
        sync_directory(copy)

    def _swap(self) -> None:
        payload, copy, old = (self._path / name for name in (PAYLOAD, COMPACTED, REPLACED))
        shutil.rmtree(old, ignore_errors=True)
        self._store.payload.close()
        payload.rename(old)
        try:
            copy.rename(payload)
            sync_directory(self._path)
            self._store.payload = self._store.open_payload()
        except (OSError, DamagedEnvironmentError):
            shutil.rmtree(payload, ignore_errors=True)
            old.rename(payload)
            self._store.payload = self._store.open_payload()
            raise
