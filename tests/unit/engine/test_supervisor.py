"""The supervisor's own decisions, with processes that are played; tests/fault has the real ones."""

from __future__ import annotations

import threading

import pytest

from kvstore.engine import supervisor as module
from kvstore.engine.supervisor import BACKOFF_MAX_S, HEALTHY_S, UNCONFIRMED_DELETES_MAX, AgentSupervisor
from kvstore.protocol.errors import Unavailable
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
    def refuse() -> None:
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


def test_deletes_that_nobody_confirms_are_bounded_and_the_newest_kept(caplog: pytest.LogCaptureFixture) -> None:
    supervisor = AgentSupervisor("cold", CONFIG)
    refs = [BlockRef(b"n" * 32, number.to_bytes(32, "big")) for number in range(UNCONFIRMED_DELETES_MAX + 10)]
    supervisor.delete(refs[:-10])
    assert not caplog.records
    supervisor.delete(refs[-10:])
    supervisor.delete(refs[-10:])
    assert list(supervisor._unconfirmed) == refs[10:]
    assert "10 deletes are lost" in caplog.text
