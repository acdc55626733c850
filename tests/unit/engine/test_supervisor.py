"""The supervisor's own decisions, with processes that are played; tests/fault has the real ones."""

from __future__ import annotations

import socket
import threading

import pytest

from kvstore.engine import supervisor as module
from kvstore.engine.supervisor import BACKOFF_MAX_S, HEALTHY_S, START_ATTEMPTS, AgentSupervisor
from kvstore.protocol.errors import Unavailable
from kvstore.protocol.frames import FrameSocket
from kvstore.tiers.base import BlockRef
from kvstore.v1 import agent_pb2

CONFIG = agent_pb2.AgentConfig(tier="cold", path="/nowhere", capacity_bytes=77)


class Closing(threading.Event):
    """Notes how long it was waited for, and lets time pass at once; it is set after as many waits as it is told."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.waited_s: list[float] = []
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waited_s.append(timeout)
        if len(self.waited_s) == self._waits:
            self.set()
        return self.is_set()


def waits_between(monkeypatch: pytest.MonkeyPatch, served_s: list[float]) -> list[float]:
    """How long a supervisor waits after agents that served for so long."""
    supervisor = AgentSupervisor("cold", CONFIG)
    closing = Closing(len(served_s))
    lives = iter(served_s)
    monkeypatch.setattr(supervisor, "_closing", closing)
    monkeypatch.setattr(supervisor, "_run_one", lambda: next(lives))
    supervisor._started.set()
    supervisor._keep()
    assert supervisor.restarts == len(served_s) - 1
    return closing.waited_s


def test_a_crash_loop_slows_down_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waits_between(monkeypatch, [0.0] * 10)
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, BACKOFF_MAX_S, BACKOFF_MAX_S, BACKOFF_MAX_S]


def test_a_healthy_life_ends_a_series_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = waits_between(monkeypatch, [0.0, 0.0, HEALTHY_S - 1, HEALTHY_S, 0.0])
    assert waits == [0.1, 0.2, 0.4, 0.1, 0.2]


def test_a_machine_without_processes_is_a_start_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_environment: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module, "AgentProcess", refuse)
    supervisor = AgentSupervisor("cold", CONFIG)
    with pytest.raises(Unavailable, match=r"did not start: .*Resource temporarily unavailable"):
        supervisor.start()
    assert "Resource" in supervisor.state
    supervisor.close()


def test_one_that_was_never_started_answers_and_closes() -> None:
    supervisor = AgentSupervisor("cold", CONFIG)
    assert (supervisor.name, supervisor.capacity_bytes, supervisor.state) == ("cold", 77, "starting")
    assert (supervisor.pid, supervisor.restarts, supervisor.device) == (None, 0, "")
    assert supervisor.stats() == {}
    with pytest.raises(Unavailable, match="cold agent is starting"):
        supervisor.flush()
    supervisor.kill()
    supervisor.close()
    supervisor.close()
    assert supervisor.state == "down: closed"


def test_a_delete_that_nobody_confirms_is_not_done() -> None:
    """Its caller asks again, before it writes the same blocks: nothing is remembered here and replayed."""
    supervisor = AgentSupervisor("cold", CONFIG)
    with pytest.raises(Unavailable, match="cold agent is starting"):
        supervisor.delete([BlockRef(b"n" * 32, b"k" * 32)])


def test_a_defect_in_the_keeper_is_a_start_that_fails_and_not_one_that_hangs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def defective(_environment: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(module, "AgentProcess", defective)
    supervisor = AgentSupervisor("cold", CONFIG)
    with pytest.raises(Unavailable, match="did not start: ZeroDivisionError: nobody thought of this"):
        supervisor.start()
    assert "Traceback" in caplog.text
    supervisor.close()


class PlayedProcess:
    """A process that ends at once when it is told to."""

    pid = 1

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.frames, self._theirs = FrameSocket(ours), theirs
        self.reaped = threading.Event()
        self.ending = "killed"
        self.crashed = True

    def end(self, why: str = "") -> None:
        self.reaped.set()
        self._theirs.close()

    kill = end


@pytest.mark.parametrize("crashed", [True, False])
def test_only_an_agent_that_crashes_while_it_starts_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, crashed: bool
) -> None:
    """A damaged medium kills whoever opens it, until it is set aside; a reason that is given will not go away."""
    made: list[PlayedProcess] = []

    def start(_environment: object) -> PlayedProcess:
        made.append(PlayedProcess())
        made[-1].crashed = crashed
        return made[-1]

    def configure(process: PlayedProcess) -> agent_pb2.AgentReady:
        raise Unavailable("killed by signal 7 before it was ready")

    monkeypatch.setattr(module, "BACKOFF_MIN_S", 0.001)
    monkeypatch.setattr(module, "AgentProcess", start)
    supervisor = AgentSupervisor("cold", CONFIG)
    monkeypatch.setattr(supervisor, "_configure", configure)
    with pytest.raises(Unavailable, match="did not start: killed by signal 7"):
        supervisor.start()
    assert len(made) == (START_ATTEMPTS if crashed else 1)
    supervisor.close()


def test_a_defect_while_an_agent_serves_ends_it_and_the_next_one_is_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The callback of the engine raises: the keeper says so, reaps the agent and goes on."""
    made: list[PlayedProcess] = []
    downs: list[int] = []

    def start(_environment: object) -> PlayedProcess:
        made.append(PlayedProcess())
        return made[-1]

    def on_up() -> None:
        raise ZeroDivisionError("nobody thought of this")

    monkeypatch.setattr(module, "AgentProcess", start)
    supervisor = AgentSupervisor("cold", CONFIG, on_up=on_up, on_down=lambda: downs.append(1))
    monkeypatch.setattr(supervisor, "_configure", lambda process: agent_pb2.AgentReady())
    monkeypatch.setattr(supervisor, "_closing", Closing(2))
    supervisor._started.set()
    supervisor._keep()
    assert len(made) == 2
    assert all(process.reaped.is_set() for process in made)
    assert len(downs) == 2
    assert supervisor.state == "down: ZeroDivisionError: nobody thought of this"
    assert supervisor._life is None
