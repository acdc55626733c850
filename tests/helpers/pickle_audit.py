"""Watches a process and its children for pickle and marshal, without a line of code in them.

Start the process with `PickleAudit.environment()`, let it work, end it, then call `check()`. A child is watched if
it gets PYTHONPATH or the parent's sys.path. A process started with -I, -S or -E is not: `check` is told how many
processes are wanted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

_HOOK = Path(__file__).with_name("pickle_audit_hook.py")


class PickleAudit:
    """One audit; `folder` is a temporary folder that outlives the processes."""

    def __init__(self, folder: Path) -> None:
        """Put the hook where an interpreter that has `folder` on its path loads it at its start."""
        self._folder = folder
        shutil.copy(_HOOK, folder / "sitecustomize.py")

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """`base` with what makes a Python process load the hook and hand it on to its children."""
        path = os.pathsep.join(filter(None, (str(self._folder), base.get("PYTHONPATH"))))
        return {**base, "PYTHONPATH": path}

    def watched(self) -> list[str]:
        """One line per process that loaded the hook: its pid and command."""
        return [line.removeprefix("watching ") for line in self._lines() if line.startswith("watching ")]

    def offences(self) -> list[str]:
        """One line per use of pickle or of marshal outside an import, with the innermost frames."""
        return [line for line in self._lines() if not line.startswith("watching ")]

    def check(self, processes: int = 1) -> None:
        """Fail unless at least `processes` processes were watched and none of them offended."""
        watched = self.watched()
        assert len(watched) >= processes, f"wanted {processes} watched processes, had {watched}"
        offences = self.offences()
        assert not offences, "pickle or marshal was used:\n" + "\n".join(offences)

    def _lines(self) -> list[str]:
        log = self._folder / "pickle-audit.log"
        return log.read_text().splitlines() if log.exists() else []
