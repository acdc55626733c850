"""A daemon whose agents answer garbage now and then: what a supervisor is for, at a rate that no machine has.

What they say is never a lie (that a slot was filled which was not): the daemon has to believe its own child processes.
"""

from __future__ import annotations

import os
from pathlib import Path

_HOOK = """
import sys
if "kvstore.cli.kvstored" in sys.orig_argv:
    from kvstore.engine import supervisor
    supervisor.BACKOFF_MIN_S = supervisor.BACKOFF_MAX_S = 0.01
if "kvstore.agents" in sys.orig_argv:
    import random
    from pathlib import Path
    from kvstore.protocol.frames import HEADER, AgentMethod, FrameSocket

    starts, garbage, sane = (Path({folder!r}) / name for name in ("starts", "garbage", "sane"))
    with starts.open("a") as file:
        file.write("x")
    dice, send = random.Random(starts.stat().st_size), FrameSocket.send
    told = [0]

    def garbled(self, call_id, method, payload, status=0, deadline_ms=0, fds=()):
        told[0] += 1
        if told[0] < 4 or dice.random() > 0.15 or sane.exists():
            return send(self, call_id, method, payload, status, deadline_ms, fds)
        with garbage.open("a") as file:
            file.write("x")
        junk, way = dice.randbytes(dice.randrange(1, 60)), dice.randrange(8)
        if way == 0:
            return send(self, call_id, method, junk)
        if way == 1:
            return send(self, call_id, method, payload[: dice.randrange(len(payload) + 1)] + junk)
        if way == 2:
            return send(self, call_id + 100_000, method, payload)
        if way == 3:
            return send(self, call_id, method, junk, dice.choice((2, 3, 5, 8, 13, 14, 999)))
        if way == 4:
            self.sock.sendall(junk)
        if way == 5:
            self.sock.sendall(HEADER.pack((1 << 32) - 1, call_id, method, 0, 0) + junk)
        if way == 6:
            self.sock.shutdown(2)
        if way == 7 and method not in (AgentMethod.READ, AgentMethod.MAP_SLAB):
            flipped = bytearray(payload or junk)
            flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
            return send(self, call_id, method, bytes(flipped))

    FrameSocket.send = garbled
"""


class GarblingAgents:
    """All agents of a daemon. `folder` is a temporary folder that outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(_HOOK.format(folder=str(folder)))
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": path}

    def garbled(self) -> int:
        """How many answers were none."""
        garbage = self._folder / "garbage"
        return garbage.stat().st_size if garbage.exists() else 0

    def cure(self) -> None:
        """From now on they answer as they should."""
        (self._folder / "sane").touch()
