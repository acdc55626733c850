"""The process of one agent: started with one end of a socket pair, killed without a race, reaped for sure."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

from kvstore.protocol.frames import FrameSocket

# The whole environment of an agent: nothing of the daemon's own. One BLAS thread, because numpy only moves bytes here
# and idle threads cost memory. Two arenas, because by default freed decode buffers stay in up to eight a core.
_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONUTF8": "1",
}

_CRASHES = (-signal.SIGBUS, -signal.SIGSEGV, -signal.SIGABRT)


class AgentProcess:
    """A started agent.

    The thread that makes an AgentProcess has to outlive the process: the agent asked the kernel to be killed
    when its parent dies, and the kernel takes the starting thread for the parent.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the process, with `environment` beside what every agent has.

        Raises:
            OSError: the machine refuses (no memory, no descriptors, no processes).
        """
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.agents", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the daemon's own first line there is for its parent
                close_fds=True,
                env=_environment() | dict(environment or {}),
                process_group=0,  # an interrupt from the terminal is the daemon's to handle, from the first moment
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.frames = FrameSocket(ours)
        self.reaped = threading.Event()
        self._why = ""
        self._lock = threading.Lock()
        try:
            threading.Thread(target=self._reap, name=f"agent-{self.pid}-reaper", daemon=True).start()
        except RuntimeError as error:
            self._process.kill()
            self._process.wait()
            self.frames.close()
            raise OSError(errno.EAGAIN, f"no thread to watch an agent: {error}") from error

    @property
    def ending(self) -> str:
        """How it ended, in words; to be asked once it is reaped."""
        code = self._process.returncode
        if code is None:
            return "still running"
        if code == -signal.SIGKILL and self._why:
            return f"killed: {self._why}"
        return f"killed by signal {-code}" if code < 0 else f"exited with status {code}"

    @property
    def crashed(self) -> bool:
        """Whether it died of SIGBUS, SIGSEGV or SIGABRT; to be asked once it is reaped."""
        return self._process.returncode in _CRASHES

    def kill(self) -> None:
        """Send SIGKILL, if it still lives; returns at once."""
        with self._lock:  # not yet reaped under this lock, so the number cannot belong to another process
            if not self.reaped.is_set():
                os.kill(self.pid, signal.SIGKILL)

    def end(self, why: str = "") -> None:
        """Kill and return once reaped: from then on nothing of the process can touch a slab.

        The first `why` that is not empty is what `ending` says then.

        This wait has no bound of its own. A killed process that does not go sits in the kernel, in the middle of
        the very copy whose destination must not be given away.
        """
        self._why = self._why or why
        self.kill()
        self.reaped.wait()

    def _reap(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # sleeps; leaves a zombie that keeps the number taken
        with self._lock:
            self._process.wait()
            self.reaped.set()


def _environment() -> dict[str, str]:
    # The whole path in its order, so that the agent imports exactly what the daemon would.
    return _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
