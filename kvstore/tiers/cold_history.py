"""What the cold tier's directory says of how its last users ended.

session     whoever has the store open, or died with it open: the boot id of the machine, and how many in a row
            before it had died with it open
condemned   damage was met in use; says which
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from kvstore.tiers.cold_file import DamagedEnvironmentError, sync_directory, write_durably

_log = logging.getLogger(__name__)

_SESSION = "session"
_CONDEMNED = "condemned"
_DOUBTED = "a sync failed"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# LMDB meets some damage with SIGABRT. Who dies of it again and again finds a tree that is not whole; who was killed
# as often finds that it is.
_DEATHS_BEFORE_DOUBT = 2


class History:
    """Of one store, for the one who has it locked."""

    def __init__(self, path: Path, boot_id: str = "") -> None:
        """`boot_id` is of this boot of the machine; empty: ask the kernel."""
        self._path = path
        self._boot_id = boot_id or _current_boot()
        self._deaths = 0

    def reason_to_verify(self) -> str:
        """Why the trees must be walked before they are used; empty: they can be trusted.

        Raises:
            DamagedEnvironmentError: damage was met in use.
        """
        condemned, session = self._path / _CONDEMNED, self._path / _SESSION
        if condemned.exists():
            raise DamagedEnvironmentError(f"damage met in use: {condemned.read_text(errors='replace')[:200]}")
        left = session.read_text(errors="replace").strip() if session.exists() else ""
        if left == _DOUBTED:
            return _DOUBTED
        boot_id, _, deaths = left.partition(" ")
        if boot_id and self._boot_id and boot_id != self._boot_id:
            return "the machine went down while it was open"
        self._deaths = (int(deaths) if deaths.isdecimal() else 0) + 1 if left else 0
        if self._deaths > _DEATHS_BEFORE_DOUBT:
            return f"the last {self._deaths} processes that had it open died"
        return ""

    def begin(self) -> None:
        """Leave word that the store is open."""
        with contextlib.suppress(OSError):  # a full disk must not keep us from reading
            write_durably(self._path / _SESSION, f"{self._boot_id} {self._deaths}")

    def doubt(self) -> None:
        """Have the next opening walk the trees: the disk did not take some pages."""
        with contextlib.suppress(OSError):
            (self._path / _SESSION).write_text(_DOUBTED)

    def condemn(self, reason: str) -> None:
        """Have the next opening set the store aside."""
        _log.error("cold tier: damage in %s: %s; it will be set aside at the next start", self._path, reason)
        with contextlib.suppress(OSError):
            (self._path / _CONDEMNED).write_text(reason)

    def end(self) -> None:
        """Leave word that all went well, and everything is on the medium.

        Raises:
            OSError: the directory cannot be written.
        """
        session = self._path / _SESSION
        if session.exists() and session.read_text() != _DOUBTED:
            session.unlink()
            sync_directory(self._path)


def _current_boot() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # no /proc: a power loss cannot be told from a crash
        return ""
