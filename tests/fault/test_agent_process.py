"""An agent's process as it is started, spoken to by a daemon that does not keep to the protocol."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from agent_rig import PATIENCE_S, hot_config
from kvstore.agents.process import EXIT_DEFECT, EXIT_NOT_STARTED, EXIT_OK, EXIT_USAGE
from kvstore.protocol.errors import Unavailable
from kvstore.protocol.frames import HEADER, MAX_PAYLOAD_BYTES, AgentMethod, FrameSocket
from kvstore.v1 import agent_pb2

AGENT = ["-m", "kvstore.agents"]
# An agent whose tier has a defect that nobody thought of.
DEFECTIVE = """
import sys
from kvstore.agents import process
from kvstore.agents.media import Medium
from kvstore.tiers.host import HostMemoryTier

class Defective(HostMemoryTier):
    def stats(self):
        raise ZeroDivisionError("nobody thought of this")

process.open_medium = lambda config, memory: Medium(Defective(config.capacity_bytes, memory))
sys.exit(process.main(sys.argv[1:]))
"""

# One whose device is beyond repair when a slab is to be let go, which the receiving thread does.
BROKEN = """
import sys
from kvstore.agents import process
from kvstore.agents.media import Medium
from kvstore.protocol.cuda_calls import CudaBroken
from kvstore.tiers.host import HostMemoryTier

def broken(slab_id):
    raise CudaBroken("cuMemHostUnregister: gone")

def open_medium(config, memory):
    memory.on_unmap = broken
    return Medium(HostMemoryTier(config.capacity_bytes, memory))

process.open_medium = open_medium
sys.exit(process.main(sys.argv[1:]))
"""


class Spoken:
    """A started agent, and the daemon's end of its socket."""

    def __init__(self, program: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *program, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
            )
        self.frames = FrameSocket(ours)

    def configure(self, payload: bytes | None = None) -> agent_pb2.AgentReady:
        payload = hot_config().SerializeToString() if payload is None else payload
        self.frames.send(0, AgentMethod.CONFIGURE, payload)
        return agent_pb2.AgentReady.FromString(self.frames.recv(PATIENCE_S).payload)

    def ending(self) -> tuple[int, str]:
        """Exit status, and what it said on standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors.decode()


@pytest.fixture
def spoken() -> Iterator[Callable[[list[str]], Spoken]]:
    made: list[Spoken] = []

    def start(program: list[str]) -> Spoken:
        made.append(Spoken(program))
        return made[-1]

    yield start
    for agent in made:
        agent.frames.close()
        agent.process.kill()
        agent.process.communicate(timeout=PATIENCE_S)


Start = Callable[[list[str]], Spoken]


def test_close_and_the_end_of_the_connection_are_both_good_ends(spoken: Start) -> None:
    for close in (True, False):
        agent = spoken(AGENT)
        assert agent.configure() == agent_pb2.AgentReady(device="cpu", capacity_bytes=256 << 20)
        if close:
            agent.frames.send(1, AgentMethod.CLOSE, b"")
            assert agent.frames.recv(PATIENCE_S)[:3] == (1, AgentMethod.CLOSE, 0)
        else:
            agent.frames.close()
        assert agent.ending() == (EXIT_OK, "")


@pytest.mark.parametrize(
    ("method", "payload", "why"),
    [
        (AgentMethod.READ, b"", "the first frame has method 4; it is CONFIGURE"),
        (AgentMethod.CONFIGURE, b"\xff\xff", "payload is no AgentConfig"),
        (AgentMethod.CONFIGURE, b"", "needs a capacity"),
        (99, b"", "the first frame has method 99"),
    ],
)
def test_a_bad_first_frame_is_answered_with_the_reason(spoken: Start, method: int, payload: bytes, why: str) -> None:
    agent = spoken(AGENT)
    agent.frames.send(7, method, payload)
    reply = agent.frames.recv(PATIENCE_S)
    assert (reply.call_id, reply.method, reply.status) == (7, AgentMethod.CONFIGURE, 0)
    assert why in agent_pb2.AgentReady.FromString(reply.payload).error
    assert agent.ending() == (EXIT_NOT_STARTED, "")


def test_a_daemon_that_says_nothing_and_leaves(spoken: Start) -> None:
    agent = spoken(AGENT)
    agent.frames.close()
    assert agent.ending() == (EXIT_NOT_STARTED, "")


def test_a_second_configuration_is_refused(spoken: Start) -> None:
    agent = spoken(AGENT)
    agent.configure()
    agent.frames.send(1, AgentMethod.CONFIGURE, hot_config().SerializeToString())
    reply = agent.frames.recv(PATIENCE_S)
    assert (reply.call_id, reply.status) == (1, 3)
    agent.frames.send(2, AgentMethod.STATS, b"")
    assert agent.frames.recv(PATIENCE_S)[:3] == (2, AgentMethod.STATS, 0)


def test_an_oversize_frame_is_answered_and_ends_the_agent_in_order(spoken: Start) -> None:
    agent = spoken(AGENT)
    agent.configure()
    agent.frames.sock.sendall(HEADER.pack(MAX_PAYLOAD_BYTES + 1, 1, AgentMethod.READ, 0, 0))
    reply = agent.frames.recv(PATIENCE_S)
    assert reply.status == 3
    assert b"the limit is" in reply.payload
    with pytest.raises(Unavailable):
        agent.frames.recv(PATIENCE_S)
    assert agent.ending() == (EXIT_OK, "")


def test_half_a_frame_and_then_the_end(spoken: Start) -> None:
    agent = spoken(AGENT)
    agent.configure()
    agent.frames.sock.sendall(HEADER.pack(1000, 1, AgentMethod.READ, 0, 0) + b"half")
    agent.frames.close()
    assert agent.ending() == (EXIT_OK, "")


def test_a_defect_ends_the_process_and_says_where(spoken: Start) -> None:
    agent = spoken(["-c", DEFECTIVE])
    agent.configure()
    agent.frames.send(1, AgentMethod.STATS, b"")
    with pytest.raises(Unavailable):
        agent.frames.recv(PATIENCE_S)
    status, errors = agent.ending()
    assert status == EXIT_DEFECT
    assert "ZeroDivisionError: nobody thought of this" in errors


def test_a_device_beyond_repair_ends_the_process_with_a_line(spoken: Start) -> None:
    agent = spoken(["-c", BROKEN])
    agent.configure()
    agent.frames.send(1, AgentMethod.UNMAP_SLAB, agent_pb2.AgentUnmapSlab(slab_id=1).SerializeToString())
    status, errors = agent.ending()
    assert status == EXIT_DEFECT
    assert errors.endswith("ERROR the device cannot go on: cuMemHostUnregister: gone\n") and errors.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["1", "2"], ["three"], ["-1"], ["0"], ["999"]])
def test_used_from_a_shell_it_explains_itself(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *AGENT, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE_S
    )
    assert done.returncode == EXIT_USAGE
    assert b"usage: " in done.stderr or b"is no socket" in done.stderr
