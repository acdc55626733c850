"""One LMDB environment of the cold tier: opening it with every check that can be made before its pages are used."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final

import lmdb

from kvstore.tiers.cold_pages import DATA_VERSION, read_metas
from kvstore.tiers.cold_records import PAGE_BYTES

DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.CursorFullError,  # of trees that have no end
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
)
MIN_MAP_BYTES: Final = 1 << 20
DATA: Final = "data.mdb"
LOCK: Final = "lock.mdb"

_SPARE_TRANSACTIONS = 8  # read transactions kept for reuse, one per reader thread
_SPARE_DATABASES = 4


class DamagedEnvironmentError(Exception):
    """The environment cannot be trusted; the message says why."""


class EnvironmentFile:
    """An open environment in a directory of its own.

    `main` is the database under `name` (or the unnamed one), and `meta` a few small values beside it. Whoever closes
    it sees to it that nobody reads.
    """

    def __init__(self, path: Path, map_bytes: int, max_readers: int, *, name: bytes | None, sync: bool) -> None:
        """Open, or make.

        Args:
            path: the directory; made with mode 0700.
            map_bytes: how far the file may grow. The map is sparse: growing it later is illegal while there are
                readers.
            max_readers: read transactions at one time.
            name: of the main database; None: the unnamed one, which then holds the meta values too.
            sync: whether a commit returns only once it is on the medium, data pages before the page that names them.

        Raises:
            DamagedEnvironmentError: it cannot be trusted.
            OSError: it cannot be opened for a reason that is no damage, or is of a newer LMDB.
        """
        self.path = path
        self.fd = -1
        self._covered_bytes = 0
        make_directory(path)
        self._refuse_newer()
        self.map_bytes = self._map_bytes(map_bytes)
        self.env = self._open(max_readers, sync)
        try:
            self.main, self.meta = self._databases(name)
            self.fd = os.open(path / DATA, os.O_RDONLY | os.O_CLOEXEC)
            self.cover()
        except DAMAGE as error:
            self.close()
            raise DamagedEnvironmentError(str(error)) from error
        except lmdb.Error as error:
            self.close()
            raise OSError(f"cannot set up {path}: {error}") from error
        except (DamagedEnvironmentError, OSError):
            self.close()
            raise

    def entries(self) -> int:
        """Entries of the main database, meta values that share it included."""
        with self.env.begin() as txn:
            return int(txn.stat(self.main)["entries"])

    def get(self, name: bytes) -> bytes | None:
        """A meta value."""
        with self.env.begin() as txn:
            value = txn.get(name, db=self.meta)
            return None if value is None else bytes(value)

    def put(self, name: bytes, value: bytes) -> None:
        """Store a meta value, in a transaction of its own; on the writer's thread, or before there is one."""
        with self.env.begin(write=True) as txn:
            txn.put(name, value, db=self.meta)

    @property
    def used_bytes(self) -> int:
        """The highest page used as of the last commit, in bytes (free pages inside are reused).

        Touches no page: LMDB would look at its meta pages, which is a SIGBUS once the file has been cut.
        """
        return self._covered_bytes

    def is_cut(self) -> bool:
        """Whether the file is shorter than it was once: to read on would be a SIGBUS."""
        covered_bytes = self._covered_bytes  # first: the writer may make both larger meanwhile
        return os.fstat(self.fd).st_size < covered_bytes

    def cover(self) -> None:
        """Make the file as long as its meta page says; by whoever has just committed.

        LMDB does not write a page that was allocated at the end and freed in the same transaction. With such a page
        the file looks truncated, which is what opening checks for.
        """
        used_bytes = self._last_used_bytes()
        if used_bytes == self._covered_bytes:
            return
        with contextlib.suppress(OSError):  # no room, no harm
            if os.fstat(self.fd).st_size < used_bytes:
                os.truncate(self.path / DATA, used_bytes)
            self._covered_bytes = used_bytes

    def sync(self) -> None:
        """Return once everything that was committed before is on the medium.

        Raises:
            OSError: the medium did not take it.
        """
        try:
            self.env.sync(True)
        except lmdb.Error as error:
            raise OSError(f"{self.path} could not be synced: {error}") from error

    def close(self) -> None:
        """Close without a sync; idempotent. Nobody may be reading."""
        self.env.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def _last_used_bytes(self) -> int:
        return (int(self.env.info()["last_pgno"]) + 1) * PAGE_BYTES

    def _map_bytes(self, asked_bytes: int) -> int:
        """In whole pages; with room for a delete's new nodes also where the file is larger than what is asked for."""
        data = self.path / DATA
        held_bytes = data.stat().st_size if data.exists() else 0
        return -(-max(MIN_MAP_BYTES, asked_bytes, held_bytes + MIN_MAP_BYTES) // PAGE_BYTES) * PAGE_BYTES

    def _refuse_newer(self) -> None:
        """Leave alone what a newer LMDB wrote: both meta pages agree on a version that is not ours."""
        data = self.path / DATA
        if not data.exists():
            return
        fd = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            versions = [meta.version for meta in read_metas(fd)]
        finally:
            os.close(fd)
        if len(versions) == 2 and versions[0] == versions[1] > DATA_VERSION:
            raise OSError(f"{data} has LMDB's data version {versions[0]}; this build knows {DATA_VERSION}")

    def _open(self, max_readers: int, sync: bool) -> lmdb.Environment:
        try:
            return lmdb.open(
                str(self.path),
                map_size=self.map_bytes,
                subdir=True,
                mode=0o600,
                sync=sync,
                writemap=False,  # a full disk is a SIGBUS under it
                readahead=True,  # without it py-lmdb reads at a tenth of the disk's rate
                max_readers=max_readers,
                max_spare_txns=_SPARE_TRANSACTIONS,
                max_dbs=_SPARE_DATABASES,
            )
        except lmdb.Error as error:
            # py-lmdb has no class for some of what LMDB says to meta pages that differ from each other.
            if isinstance(error, (*DAMAGE, lmdb.VersionMismatchError)) or "LMDB data format" in str(error):
                raise DamagedEnvironmentError(str(error)) from error
            raise OSError(f"cannot open {self.path}: {error}") from error

    def _databases(self, name: bytes | None) -> tuple[Any, Any]:
        """Look at the length of the file before any page of the trees, then open the databases."""
        size, used_bytes = (self.path / DATA).stat().st_size, self._last_used_bytes()
        if size < used_bytes and self.env.info()["last_txnid"]:
            raise DamagedEnvironmentError(f"{self.path} is truncated to {size} bytes where it should have {used_bytes}")
        self.env.reader_check()  # slots of readers that died keep old pages from being reused, for ever
        if name is None:
            return None, None
        return self.env.open_db(name), self.env.open_db(b"meta")


def make_directory(path: Path) -> None:
    """Make a directory that only its owner may look into."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)  # an older one may have been made by hand


def sync_directory(path: Path) -> None:
    """Make names in a directory survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, text: str) -> None:
    """Write a small file that survives a power loss, whole or not at all."""
    draft = path.with_name(path.name + ".new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    draft.replace(path)
    sync_directory(path.parent)
