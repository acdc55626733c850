"""The cold tier's directory: two LMDB environments, what is known of their history, and setting them aside.

    format       the number of the layout, as text
    session, condemned   see cold_history
    lock         flocked by who has it open
    payload/     blocks: entry key -> frame
    records/     entry key -> record, and the totals

Payloads are committed before their records and deleted after them. So a record without a payload is a miss, and a
payload without a record is nobody's: it is swept.

LMDB trusts its file: there are no page checksums, a truncated file is a SIGBUS on read, and without synchronous
commits a power loss can damage the tree and not only lose the last blocks. So whatever can be noticed is noticed here,
before the first page is used: a store that cannot be trusted is renamed and an empty one takes its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import lmdb

from kvstore.tiers.cold_file import (
    DAMAGE,
    DATA,
    DamagedEnvironmentError,
    EnvironmentFile,
    make_directory,
    write_durably,
)
from kvstore.tiers.cold_history import History
from kvstore.tiers.cold_import import import_format_1
from kvstore.tiers.cold_pages import DamagedPagesError, verify
from kvstore.tiers.cold_records import ENTRY_BYTES, Totals, unpack_record

_log = logging.getLogger(__name__)

FORMAT: Final = 2
_OLDEST_FORMAT = 1
BLOCKS: Final = b"blocks"
PAYLOAD, RECORDS = "payload", "records"
COMPACTED, REPLACED = "payload.new", "payload.old"

_FORMAT_FILE = "format"
_LOCK_FILE = "lock"
_RECORD_SHARE = 4  # of the capacity, as the map of the records; 2 % is what blocks of 16 KiB take
_PAYLOAD_SLACK = 32  # of the capacity, kept from the map of the payloads so that both files stay within it
LAYOUT: Final = b"layout"
LAYOUT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to open a store.

    Args:
        capacity_bytes: bounds both files together. The maps are sparse: growing one later is illegal while it is read.
        max_readers: read transactions at one time.
        map_bytes: of the payloads; 0: what the capacity leaves.
        sync: whether commits are synchronous.
        boot_id: of this boot of the machine; empty: ask the kernel.
    """

    capacity_bytes: int
    max_readers: int
    map_bytes: int = 0
    sync: bool = False
    boot_id: str = ""


class ColdStore:
    """An open store.

    `set_aside` is where a damaged one went that was found in its place (None: there was none); `totals` are as of the
    opening.
    """

    def __init__(self, path: Path, options: StoreOptions, lock_fd: int, history: History) -> None:
        """Open both environments of a directory whose history has been looked at.

        Raises:
            DamagedEnvironmentError: they cannot be trusted.
            OSError: they cannot be opened, for a reason that is no damage.
        """
        self.path = path
        self.history = history
        self.set_aside: Path | None = None
        self._options = options
        self._lock_fd = lock_fd
        self.totals = Totals()
        self.payload = self.open_payload()
        try:
            records_map_bytes = options.capacity_bytes // _RECORD_SHARE
            self.records = EnvironmentFile(
                path / RECORDS, records_map_bytes, options.max_readers, name=None, sync=options.sync
            )
        except (DamagedEnvironmentError, OSError):
            self.payload.close()
            raise

    def open_payload(self) -> EnvironmentFile:
        """The payloads' environment, opened anew.

        Raises:
            DamagedEnvironmentError: it cannot be trusted.
            OSError: it cannot be opened, for a reason that is no damage.
        """
        options = self._options
        map_bytes = options.map_bytes or options.capacity_bytes - options.capacity_bytes // _PAYLOAD_SLACK
        return EnvironmentFile(self.path / PAYLOAD, map_bytes, options.max_readers, name=BLOCKS, sync=options.sync)

    def load_totals(self) -> Totals:
        """Totals as of the last commit, rebuilt from the records where the two do not agree."""
        try:
            totals = Totals.unpack(self.records.get(b"totals"))
            if totals.blocks == self.records_held():
                return totals
        except ValueError as error:
            _log.warning("cold tier: %s; they are rebuilt", error)
        return self.rebuild_totals()

    def records_held(self) -> int:
        """Records, counted by LMDB."""
        with self.records.env.begin() as txn:
            own = sum(txn.get(name) is not None for name in (b"totals", b"tick", LAYOUT))
            return int(txn.stat()["entries"]) - own

    def agrees(self) -> bool:
        """Whether there are as many payloads as records."""
        return self.payload.entries() == self.records_held()

    def pages_are_known(self) -> bool:
        """Whether the pages that the records name are those of this payload file, and not of one before it."""
        layout = self.payload.get(LAYOUT)
        return layout is not None and layout == self.records.get(LAYOUT)

    def renew_layout(self) -> None:
        """Make the pages that the records name count as unknown; before anybody writes or after everybody stopped."""
        self.payload.put(LAYOUT, os.urandom(LAYOUT_BYTES))

    def confirm_layout(self) -> None:
        """Make the pages that the records name count as known; on the writer's thread, or before there is one."""
        self.records.put(LAYOUT, self.payload.get(LAYOUT) or b"")

    def used_bytes(self) -> int:
        """What both files take at most."""
        return self.payload.used_bytes + self.records.used_bytes

    def sync(self) -> None:
        """Return once everything that was committed before is on the medium: payloads first.

        Raises:
            OSError: the medium did not take it.
        """
        self.payload.sync()
        self.records.sync()

    def close(self) -> None:
        """Sync, close, and leave word that all went well. Nobody may be reading.

        Raises:
            OSError: the medium did not take the last writes.
        """
        try:
            self.sync()
            self.history.end()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close as it is; the next opening takes it for a crash."""
        self.payload.close()
        self.records.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1

    def rebuild_totals(self) -> Totals:
        """Totals summed up from the records; on the writer's thread, or before there is one."""
        totals = Totals()
        with self.records.env.begin() as txn, txn.cursor() as cursor:
            for entry, data in cursor:
                if len(entry) != ENTRY_BYTES:
                    continue
                try:
                    record, _ = unpack_record(entry, data)
                    totals = totals.plus(record.nbytes, record.stored_bytes)
                except ValueError:  # a scan or a read drops it, and takes it off the count
                    totals = totals.plus(0, 0)
        with contextlib.suppress(lmdb.DiskError, lmdb.MapFullError):  # the next commit has them
            self.records.put(b"totals", totals.pack())
        _log.warning("cold tier: totals rebuilt from the records: %s", totals)
        return totals


def open_store(path: Path, options: StoreOptions) -> ColdStore:
    """Open the store in directory `path` (made with mode 0700), or an empty one in its place.

    Raises:
        OSError: it cannot be opened for a reason that is no damage: permissions, already open, or a newer format, of
            which nothing is touched.
    """
    _refuse_newer(path)
    lock_fd = _claim(path)
    set_aside = None
    try:
        try:
            store = _open(path, options, lock_fd)
        except DamagedEnvironmentError as error:
            set_aside = _set_aside(path, str(error))
            os.close(lock_fd)
            lock_fd = _claim(path)
            store = _open(path, options, lock_fd)
    except DamagedEnvironmentError as again:
        os.close(lock_fd)
        raise OSError(f"even an empty store in {path} cannot be used: {again}") from again
    except OSError:
        os.close(lock_fd)
        raise
    store.set_aside = set_aside
    return store


def _claim(path: Path) -> int:
    """Make the directory and lock it against everybody else; a descriptor that holds the lock.

    Raises:
        OSError: it is locked, or cannot be made.
    """
    make_directory(path)
    fd = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise OSError(f"the cold tier in {path} is already open") from error
    return fd


def _open(path: Path, options: StoreOptions, lock_fd: int) -> ColdStore:
    history = History(path, options.boot_id)
    doubt = history.reason_to_verify()
    _finish_compaction(path)
    if _format_of(path) == _OLDEST_FORMAT:
        if doubt:
            _verify(path, doubt)
        import_format_1(path, path / PAYLOAD, path / RECORDS)
    if doubt:
        for name in (PAYLOAD, RECORDS):
            _verify(path / name, doubt)
    if _format_of(path) != FORMAT:
        write_durably(path / _FORMAT_FILE, f"{FORMAT}\n")
    history.begin()  # before LMDB meets a page: who dies of one while opening counts as well
    store = ColdStore(path, options, lock_fd, history)
    try:
        store.totals = store.load_totals()
        if store.payload.get(LAYOUT) is None:
            store.renew_layout()
            if not store.records_held():
                store.confirm_layout()
    except lmdb.Error as error:
        store.payload.close()
        store.records.close()
        if isinstance(error, DAMAGE):
            raise DamagedEnvironmentError(str(error)) from error
        raise OSError(f"{path} cannot be used: {error}") from error
    return store


def _format_of(path: Path) -> int:
    """The layout's number; 0 where there is nothing.

    Raises:
        DamagedEnvironmentError: the file that says so is unreadable.
    """
    if (path / DATA).exists():  # also while it is being imported
        return _OLDEST_FORMAT
    file = path / _FORMAT_FILE
    if not file.exists():
        return 0
    text = file.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise DamagedEnvironmentError(f"its format is {text[:20]!r}")
    return int(text)


def _refuse_newer(path: Path) -> None:
    with contextlib.suppress(DamagedEnvironmentError):  # which is seen again later
        found = _format_of(path)
        if found > FORMAT:
            raise OSError(
                f"the cold tier in {path} has format {found}, and this build knows format {FORMAT} (and reads "
                f"{_OLDEST_FORMAT}); it was left as it is"
            )


def _finish_compaction(path: Path) -> None:
    """Whatever moment it was interrupted at: `payload` is whole, or has been renamed and is whole under that name."""
    if not (path / PAYLOAD).exists() and (path / REPLACED).exists():
        (path / REPLACED).rename(path / PAYLOAD)
    for name in (COMPACTED, REPLACED):
        shutil.rmtree(path / name, ignore_errors=True)


def _verify(path: Path, doubt: str) -> None:
    """Walk the trees of an environment that there is a reason to doubt."""
    data = path / DATA
    if not data.exists():
        return
    start_s = time.monotonic()
    fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        verify(fd)
    except DamagedPagesError as error:
        raise DamagedEnvironmentError(f"{doubt}, and {error}") from error
    finally:
        os.close(fd)
    _log.warning("cold tier: %s; %s is whole (%.1f s)", doubt, data, time.monotonic() - start_s)


def _set_aside(path: Path, reason: str) -> Path:
    """Rename the store out of the way; an older one that was set aside goes, or they would fill the disk."""
    for older in path.parent.glob(f"{path.name}.damaged-*"):
        shutil.rmtree(older, ignore_errors=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    path.rename(target)
    _log.error("cold tier: %s cannot be trusted (%s); set aside as %s, starting empty", path, reason, target)
    return target
