"""Daemons with one defect each, to prove that a harness which looks for such defects finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_HOOK = """
import sys
if "kvstore.cli.kvstored" in sys.orig_argv:
    from kvstore.core.leases import LeaseTable
    from kvstore.engine.store import Store
    from kvstore.protocol.errors import InvalidRequest, KVStoreError
    from kvstore.transport.handlers import Handlers
    from kvstore.v1 import kvstore_pb2 as pb

    def renew(self, request, session, deadline_s):
        {0}
        return pb.RenewResponse()

    Handlers.renew = renew
    {1}
"""


class Defect(NamedTuple):
    """What Renew does, what else is changed, and what has to be said of it."""

    renew: str = "pass"
    rest: str = "pass"
    found: str = ""


DEFECTS = {
    "memory that is kept": Defect("HELD.append(bytearray(8 << 20))", "HELD = []", "MiB were resident"),
    "bytes that are overwritten": Defect(
        "for n in self._engine._cache.index.namespaces.values():\n"
        "            for b in n.blocks.values():\n"
        "                s, p = b.slot, self._engine._pool\n"
        "                if s is not None: p.view(p.range_of(s.slab_id, s.index, 4096))[:] = 7",
        found="wrong bytes in blocks",
    ),
    "leases that never end": Defect(
        rest="LeaseTable.end_session = lambda self, session_id: []; LeaseTable.expire = lambda self, now_s: []",
        found="holds nothing for a peer",
    ),
    "no look at the tenant": Defect(
        rest="Store._namespace = lambda self, session, d: self._cache.index.namespaces[d]", found="blocks are left"
    ),
}


def broken(folder: Path, defect: str) -> dict[str, str]:
    """The environment of a daemon with this defect; `folder` is a temporary folder that outlives it."""
    (folder / "sitecustomize.py").write_text(_HOOK.format(*DEFECTS[defect]))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}
