"""What the machine itself takes for a call: 32 bytes to another process and back, with nothing done to them.

A virtual machine can take 10 or 100 us to wake a process on another core. No call of a daemon is quicker than that, so
its figures mean little without this one beside them.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

_MESSAGE = bytes(32)
_TIMEOUT_S = 10.0
_OTHER_END = """
import socket, sys
other = socket.socket(fileno=int(sys.argv[1]))
while received := other.recv(64):
    other.sendall(received)
"""


class Echo:
    """A process that sends back what it gets. Use as a context manager; calling it is one round trip."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        self._socket.settimeout(_TIMEOUT_S)
        with other:
            command = [sys.executable, "-c", _OTHER_END, str(other.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()])
        self()  # it has started

    def __call__(self) -> None:
        """One round trip.

        Raises:
            OSError: the process does not answer within 10 s.
        """
        self._socket.sendall(_MESSAGE)
        left = len(_MESSAGE)
        while left:
            received = len(self._socket.recv(left))
            if not received:
                raise ConnectionError("the echo has ended")
            left -= received

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()  # which ends it
        try:
            self._process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
