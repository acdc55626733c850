"""SIGKILL of the daemon at a hundred random points, under load.

Never a wrong byte, and what was saved before is served again afterwards.
"""

from __future__ import annotations

import random
import time

import pytest

from daemon_fixtures import StartDaemon
from daemon_process import DaemonProcess
from load import SETTINGS, Load, check_all_is_well, keep

KILLS = 25  # of each seed


@pytest.fixture
def daemon(start_daemon: StartDaemon) -> DaemonProcess:
    return start_daemon(**SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_the_daemon_is_killed_again_and_again(daemon: DaemonProcess, seed: int) -> None:
    dice, kept = random.Random(seed), keep(daemon)
    with Load(daemon.address, seed) as load:
        for _ in range(KILLS):
            time.sleep(dice.uniform(0.0, 0.15))  # not a wait for anything: another moment each time
            daemon.kill()
            daemon.start()
    assert load.failures == []
    assert load.read_blocks > 0
    check_all_is_well(daemon, kept)
