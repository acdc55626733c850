"""Notes the use of pickle and marshal in the process that imports it; copied to sitecustomize.py by PickleAudit.

Importing pickle is no offence (numpy does); finding a class for a pickle, or loading marshalled data outside an
import, is. The log lies beside this file, so that no variable has to survive on the way to a child. It gets a line
"watching PID COMMAND" per process and a line "EVENT PID DETAIL STACK" per offence.
"""

from __future__ import annotations

import os
import sys

_LOG = os.path.join(os.path.dirname(__file__), "pickle-audit.log")  # noqa: PTH118, PTH120 - runs before everything
_OFFENCES = ("pickle.find_class", "marshal.loads", "marshal.load")
_IMPORTERS = ("<frozen importlib._bootstrap_external>", "<frozen zipimport>")
_STACK_DEPTH = 8


def _stack() -> list[str]:
    frame = sys._getframe(2)
    places = []
    while frame is not None:
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return places


def _note(line: str) -> None:
    # Opened each time: a daemon may close every descriptor that it does not know.
    fd = os.open(_LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def hook(event: str, args: tuple[object, ...]) -> None:
    """The audit hook."""
    if event not in _OFFENCES:
        return
    stack = _stack()
    if event != "pickle.find_class" and any(place.startswith(_IMPORTERS) for place in stack[:3]):
        return
    detail = ".".join(map(str, args)) if event == "pickle.find_class" else "-"
    _note(f"{event} {os.getpid()} {detail} {' < '.join(stack[:_STACK_DEPTH])}")


if __name__ == "sitecustomize":
    _note(f"watching {os.getpid()} {' '.join(sys.orig_argv)}")
    sys.addaudithook(hook)
