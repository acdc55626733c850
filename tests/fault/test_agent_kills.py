"""SIGKILL of the cold agent at a hundred random points, under load.

Never a wrong byte, a daemon that does not care, and what was saved before is served again afterwards.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from load import SETTINGS, Evictor, Load, check_all_is_well, keep
from polling import eventually
from quick_restarts import quick_restarts

KILLS = 25  # of each seed


@pytest.fixture
def daemon(start_daemon: StartDaemon, tmp_path: Path) -> DaemonProcess:
    return start_daemon(environment=quick_restarts(tmp_path), **SETTINGS)


def is_back(daemon: DaemonProcess, restarts: int) -> bool:
    tier = daemon.tier("cold")
    return tier.restarts >= restarts and tier.state == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_cold_agent_is_killed_again_and_again(daemon: DaemonProcess, seed: int) -> None:
    dice, pid, kept = random.Random(seed), daemon.pid, keep(daemon)
    with Load(daemon.address, seed) as load, Evictor(daemon):
        for kill in range(1, KILLS + 1):
            time.sleep(dice.uniform(0.0, 0.08))  # not a wait for anything: another moment each time
            daemon.agent("cold").send_signal(signal.SIGKILL)
            eventually(lambda kill=kill: is_back(daemon, kill), "a fresh cold agent")  # type: ignore[misc]
    assert load.failures == []
    assert load.read_blocks > 0
    assert daemon.pid == pid
    check_all_is_well(daemon, kept)
