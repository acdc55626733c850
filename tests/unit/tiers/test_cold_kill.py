"""SIGKILL of a process in the middle of writing: what it acknowledged is there, byte for byte.

This file is also the program that is killed: it forks a writer per round, kills it at a random moment, and forks
another process that opens the store and looks at every block. The program itself never has a store open, so that it
stays a process of one thread that may fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cold_rig import ColdRig, fresh_seed, quick, ref
from kvstore.tiers.base import Outcome

ROUNDS = 100
BATCH = 12
RING = 8 * BATCH  # blocks that the writer leaves behind it, so that freed pages are being reused when it dies
BLOCK_BYTES = 30_000
WRITES_S = 0.06
FAILED, WRONG = 1, 2


def write_for_ever(folder: Path, first: int, durability: str, acknowledge: Callable[[str], None]) -> None:
    """Numbers that are stored are acknowledged once per batch; the first word is that the store is open."""
    rig = ColdRig(folder, quick(durability=durability, sync_interval_s=0.01), block_bytes=BLOCK_BYTES)
    acknowledge("ready")
    for start in range(first, first + 100_000, BATCH):
        numbers = range(start, start + BATCH)
        rig.store(numbers)
        acknowledge(" ".join(map(str, numbers)))
        if start - RING >= 0:
            rig.tier.delete([ref(number - RING) for number in numbers])
        if is_replaced(start):
            rig.write(range(start, start + 3), version=1)  # replaced, so that no longer what was acknowledged


def is_replaced(number: int) -> bool:
    """Whether its batch is one of those of which some are written twice."""
    return number // BATCH % 7 == 0


def verify(folder: Path, expected: set[int], stop: int) -> None:
    """What is expected is served exactly, and so is whatever else the tier claims to hold, in one version or other."""
    with ColdRig(folder, quick(), block_bytes=BLOCK_BYTES) as rig:
        assert rig.tier.set_aside is None
        records = {record.ref: record for record in rig.tier.scan()}
        for number in expected:
            assert ref(number) in records, f"block {number} was acknowledged and is gone"
        held = [number for number in range(stop) if ref(number) in records]
        assert len(held) == rig.tier.stats()["blocks"] == len(records)
        for number in held:
            outcomes = {rig.read([number], version=version)[0] for version in range(2)}
            assert outcomes == {Outcome.OK, Outcome.MISSING} or is_replaced(number), f"block {number} is {outcomes}"
        rig.tier.delete([ref(number) for number in held[:-RING]])  # or the rounds would fill it


def forked(work: Callable[[], None]) -> int:
    """A child's process id."""
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            work()
            status = 0
        except AssertionError:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def killed_writer(folder: Path, first: int, durability: str, delay_s: float) -> list[int]:
    """What it acknowledged on whole lines."""
    receive, send = os.pipe()

    def work() -> None:
        write_for_ever(folder, first, durability, lambda line: _say(send, line))

    child = forked(work)
    os.close(send)
    with os.fdopen(receive, "rb") as lines:
        ready = lines.readline()
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
        text = lines.read().decode()
    assert ready == b"ready\n", "it did not even open the store"
    os.waitpid(child, 0)
    return [int(number) for number in text[: text.rfind("\n") + 1].split()]


def _say(fd: int, line: str) -> None:
    os.write(fd, line.encode() + b"\n")


def main(folder: Path, seed: int, durability: str) -> int:
    rng = random.Random(seed)
    first = rounds = acknowledged = 0
    for _ in range(ROUNDS):
        numbers = killed_writer(folder, first, durability, rng.uniform(0, WRITES_S))
        last = max(numbers, default=first - 1)
        # Replaced ones may have either content or, between two commits, none; deleted ones are gone.
        expected = {n for n in numbers if n > last - RING + BATCH and not is_replaced(n)}
        child = forked(partial(verify, folder, expected, last + 3 * BATCH))
        if os.waitpid(child, 0)[1]:
            return WRONG
        rounds += 1
        acknowledged += len(numbers)
        first = last + 1 + BATCH  # the batch behind the last may have been committed without a word
        first += -first % BATCH
    sys.stdout.write(json.dumps([rounds, acknowledged]))
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["interval", "commit"])
def test_every_acknowledged_block_survives_sigkill(tmp_path: Path, durability: str) -> None:
    command = [sys.executable, __file__, str(tmp_path / "cold"), str(fresh_seed()), durability]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rounds, acknowledged = json.loads(done.stdout)
    assert rounds == ROUNDS
    assert acknowledged > ROUNDS


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
