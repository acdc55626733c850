"""The cold tier's LMDB environment: opening it, noticing that it is damaged, and setting it aside.

LMDB trusts its file: there are no page checksums, a truncated file is a SIGBUS on read, and without synchronous
commits a power loss can damage the tree and not only lose the last blocks. So whatever can be noticed is noticed here,
before the first page is used: an environment that cannot be trusted is renamed and an empty one takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lmdb

from kvstore.tiers.cold_records import PAGE_BYTES, Totals

_log = logging.getLogger(__name__)

DAMAGE: Final = (
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)
MIN_MAP_BYTES: Final = 1 << 20

_DATA = "data.mdb"
_SESSION = "session"  # the boot id of whoever has the environment open, or died with it open
_CONDEMNED = "condemned"  # damage was met while it was in use
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FORMAT = b"1"
_SPARE_TRANSACTIONS = 8  # read transactions kept for reuse, one per reader thread


class DamagedEnvironmentError(Exception):
    """The environment cannot be trusted; the message says why."""


@dataclass(frozen=True, slots=True)
class ColdEnvironment:
    """An open environment. `set_aside` is where a damaged one went that was found in its place."""

    path: Path
    env: lmdb.Environment
    blocks: Any  # entry key -> frame
    records: Any  # entry key -> record
    meta: Any  # b"format", b"totals"
    set_aside: Path | None

    def totals(self) -> Totals:
        """Totals as of the last commit."""
        with self.env.begin() as txn:
            return Totals.unpack(txn.get(b"totals", db=self.meta))

    def used_bytes(self) -> int:
        """The highest page ever used, in bytes: what the file takes at most (free pages inside are reused)."""
        return _used_bytes(self.env)

    def cover(self) -> None:
        """Make the file as long as its meta page says.

        LMDB does not write a page that was allocated at the end and freed in the same transaction. With such a page
        the file looks truncated, which is what opening checks for.
        """
        data = self.path / _DATA
        used_bytes = self.used_bytes()
        with contextlib.suppress(OSError):  # no room, no harm
            if data.stat().st_size < used_bytes:
                os.truncate(data, used_bytes)

    def condemn(self, reason: str) -> None:
        """Have the next opening set the environment aside."""
        condemn(self.path, reason)

    def close(self) -> None:
        """Sync, close, and leave word that all went well. Nobody may be reading.

        Raises:
            OSError: the medium did not take the last writes.
        """
        try:
            self.env.sync(True)
        except lmdb.Error as error:
            raise OSError(f"{self.path} could not be synced: {error}") from error
        finally:
            self.env.close()
        (self.path / _SESSION).unlink(missing_ok=True)


def condemn(path: Path, reason: str) -> None:
    """Have the next opening of the environment in `path` set it aside.

    Also for a supervisor whose agent died of SIGABRT or SIGBUS again and again: LMDB meets some damage that way.
    """
    _log.error("cold tier: damage in %s: %s; it will be set aside at the next start", path, reason)
    with contextlib.suppress(OSError):
        (path / _CONDEMNED).write_text(reason)


def open_environment(path: Path, map_bytes: int, max_readers: int, boot_id: str = "") -> ColdEnvironment:
    """Open the environment in directory `path` (made with mode 0700), or an empty one in its place.

    Args:
        path: the directory; its parent must be on the same file system.
        map_bytes: how far the file may grow. The map is sparse: growing it later is illegal while there are readers.
        max_readers: read transactions at one time.
        boot_id: of this boot of the machine; empty: ask the kernel.

    Raises:
        OSError: it cannot be opened for a reason that is no damage (permissions, already open in this process).
    """
    boot_id = boot_id or _current_boot()
    map_bytes = max(MIN_MAP_BYTES, -(-map_bytes // PAGE_BYTES) * PAGE_BYTES)
    _make_directory(path)
    set_aside = None
    try:
        _check_history(path, boot_id)
        opened = _open(path, map_bytes, max_readers)
    except DamagedEnvironmentError as error:
        set_aside = _set_aside(path, str(error))
        _make_directory(path)
        try:
            opened = _open(path, map_bytes, max_readers)
        except DamagedEnvironmentError as again:
            raise OSError(f"even an empty environment in {path} cannot be used: {again}") from again
    with contextlib.suppress(OSError):  # a full disk must not keep us from reading
        (path / _SESSION).write_text(boot_id)
    env, (blocks, records, meta) = opened
    return ColdEnvironment(path, env, blocks, records, meta, set_aside)


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)  # an older one may have been made by hand


def _current_boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # no /proc: a power loss cannot be told from a crash
        return ""


def _check_history(path: Path, boot_id: str) -> None:
    """Raise if its last user met damage, or went down together with the machine."""
    condemned, session = path / _CONDEMNED, path / _SESSION
    if condemned.exists():
        raise DamagedEnvironmentError(f"damage met in use: {condemned.read_text(errors='replace')[:200]}")
    left = session.read_text(errors="replace").strip() if session.exists() else ""
    if left and boot_id and left != boot_id:
        raise DamagedEnvironmentError("the machine went down while it was open, and commits are not synchronous")


def _open(path: Path, map_bytes: int, max_readers: int) -> tuple[lmdb.Environment, list[Any]]:
    """The environment and its three databases, checked."""
    try:
        env = lmdb.open(
            str(path),
            map_size=map_bytes,
            subdir=True,
            mode=0o600,
            sync=False,
            writemap=False,  # a full disk is a SIGBUS under it
            readahead=True,  # without it py-lmdb reads at a tenth of the disk's rate
            max_readers=max_readers,
            max_spare_txns=_SPARE_TRANSACTIONS,
            max_dbs=3,
        )
    except lmdb.Error as error:
        # py-lmdb has no class for the formats of other LMDB generations ("LMDB data format v99 is not supported").
        if isinstance(error, DAMAGE) or "LMDB data format" in str(error):
            raise DamagedEnvironmentError(str(error)) from error
        raise OSError(f"cannot open {path}: {error}") from error
    try:
        return _check(path, env)
    except DAMAGE as error:
        env.close()
        raise DamagedEnvironmentError(str(error)) from error
    except lmdb.Error as error:
        env.close()
        raise OSError(f"cannot set up {path}: {error}") from error
    except DamagedEnvironmentError:
        env.close()
        raise


def _check(path: Path, env: lmdb.Environment) -> tuple[lmdb.Environment, list[Any]]:
    """Look at the length of the file before any page, then at the format and at what must agree."""
    size, expected = (path / _DATA).stat().st_size, _used_bytes(env)
    if size < expected and env.info()["last_txnid"]:
        raise DamagedEnvironmentError(f"truncated to {size} bytes where it should have {expected}")
    env.reader_check()  # slots of readers that died keep old pages from being reused, for ever
    blocks, records, meta = databases = [env.open_db(name) for name in (b"blocks", b"records", b"meta")]
    with env.begin(write=True) as txn:
        found = txn.get(b"format", db=meta)
        if found is None:
            txn.put(b"format", _FORMAT, db=meta)
        counts = txn.stat(blocks)["entries"], txn.stat(records)["entries"]
        try:
            totals = Totals.unpack(txn.get(b"totals", db=meta))
        except ValueError as error:
            raise DamagedEnvironmentError(str(error)) from error
    if found not in (None, _FORMAT):
        raise DamagedEnvironmentError(f"format {found!r} is not known to this build")
    if counts != (totals.blocks, totals.blocks):
        raise DamagedEnvironmentError(f"{counts[0]} blocks, {counts[1]} records, and {totals.blocks} by the totals")
    return env, databases


def _used_bytes(env: lmdb.Environment) -> int:
    return (int(env.info()["last_pgno"]) + 1) * int(env.stat()["psize"])


def _set_aside(path: Path, reason: str) -> Path:
    """Rename the environment out of the way; an older one that was set aside goes, or they would fill the disk."""
    for older in path.parent.glob(f"{path.name}.damaged-*"):
        shutil.rmtree(older, ignore_errors=True)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    path.rename(target)
    _log.error("cold tier: %s cannot be trusted (%s); set aside as %s, starting empty", path, reason, target)
    return target
