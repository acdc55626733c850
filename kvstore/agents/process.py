"""An agent's process: how it is hardened, configured, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from kvstore.agents import messages
from kvstore.agents.media import Medium, open_medium, reader_threads
from kvstore.agents.memory import MappedSlabs
from kvstore.agents.server import AgentServer
from kvstore.protocol.cuda_calls import CudaBroken
from kvstore.protocol.errors import InvalidRequest, KVStoreError, Unavailable
from kvstore.protocol.frames import AgentMethod, FrameSocket
from kvstore.v1 import agent_pb2

EXIT_OK = 0
EXIT_NOT_STARTED = 1
EXIT_USAGE = 64
EXIT_DEFECT = 70

_SWITCH_INTERVAL_S = 0.0001
_COLD_NICENESS = 10  # compression must not take the processor from workers and daemon
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Serve the daemon at the other end of descriptor `arguments[0]`; the exit status."""
    if len(arguments) != 1 or not arguments[0].isdecimal():
        sys.stderr.write("usage: python -m kvstore.agents FD (the daemon starts agents; they are not for the shell)\n")
        return EXIT_USAGE
    try:
        connection = socket.socket(fileno=int(arguments[0]))
    except OSError as error:
        sys.stderr.write(f"descriptor {arguments[0]} is no socket: {error}\n")
        return EXIT_USAGE
    _harden()
    frames = FrameSocket(connection)
    try:
        return _serve(frames)
    except CudaBroken as error:
        _end_without_device(error)
    finally:
        frames.close()


def _harden() -> None:
    """Die with the daemon, leave its signals to it, and fail as a whole or not at all."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="agent[%(process)d] %(levelname)s %(message)s")
    faulthandler.enable()  # SIGBUS and SIGABRT of a damaged file leave a trace in the daemon's log
    threading.excepthook = _end_process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:  # Python's mmap keeps a descriptor for every slab
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_process(failure: threading.ExceptHookArgs) -> NoReturn:
    """An unexpected error in a lane: the supervisor's restart is the one way to recover."""
    if isinstance(failure.exc_value, CudaBroken):
        _end_without_device(failure.exc_value)
    if failure.exc_value is not None:
        sys.excepthook(failure.exc_type, failure.exc_value, failure.exc_traceback)
    sys.stderr.flush()
    os._exit(EXIT_DEFECT)


def _end_without_device(error: CudaBroken) -> NoReturn:
    """The device's failure and not ours: a line, and no traceback. At once: a lane may hang in the driver."""
    sys.stderr.write(f"agent[{os.getpid()}] ERROR the device cannot go on: {error}\n")
    sys.stderr.flush()
    os._exit(EXIT_DEFECT)


def _serve(frames: FrameSocket) -> int:
    try:
        frame = frames.recv()
    except (Unavailable, InvalidRequest):
        return EXIT_NOT_STARTED
    memory = MappedSlabs()
    try:
        if frame.method != AgentMethod.CONFIGURE:
            raise InvalidRequest(f"the first frame has method {frame.method}; it is CONFIGURE")
        config = messages.parse(agent_pb2.AgentConfig, frame.payload)
        readers = reader_threads(config)
        medium = _open(config, memory)
    except (KVStoreError, OSError, ValueError, ImportError) as error:
        _announce(frames, frame.call_id, agent_pb2.AgentReady(error=str(error) or type(error).__name__))
        return EXIT_NOT_STARTED
    server = AgentServer(frames, medium, memory, readers)
    capacity = medium.tier.capacity_bytes
    ready = agent_pb2.AgentReady(device=medium.device, format=medium.format, capacity_bytes=capacity)
    _announce(frames, frame.call_id, ready)
    server.serve()
    return EXIT_OK


def _announce(frames: FrameSocket, call_id: int, ready: agent_pb2.AgentReady) -> None:
    with contextlib.suppress(Unavailable):  # the daemon is gone: serve() sees it, and closes the tier
        frames.send(call_id, AgentMethod.CONFIGURE, ready.SerializeToString())


def _open(config: agent_pb2.AgentConfig, memory: MappedSlabs) -> Medium:
    if config.tier == "cold":
        os.nice(_COLD_NICENESS)
    # A reader that is back from decoding must not wait 5 ms for the interpreter while codecs are being compiled.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    return open_medium(config, memory)
