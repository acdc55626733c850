"""A daemon that replaces its agents at once: a hundred deaths in a row would take it a quarter of an hour."""

from __future__ import annotations

import os
from pathlib import Path

_HOOK = """
import sys
if "kvstore.cli.kvstored" in sys.orig_argv:
    from kvstore.engine import supervisor
    supervisor.BACKOFF_MIN_S = supervisor.BACKOFF_MAX_S = 0.01
"""


def quick_restarts(folder: Path) -> dict[str, str]:
    """The environment of such a daemon; `folder` is a temporary folder that outlives it."""
    (folder / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
