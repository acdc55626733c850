"""Chaos: daemon, agents and workers are killed, stopped and continued at random moments under writers and readers.

    python tests/longrun/chaos.py --kills 200 --workers 8 --seed 1

Never a wrong byte, nobody hangs, and afterwards nothing is held by anybody. Prints what was done to whom.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from harness import Storm, check_nothing_is_held, daemon_for_a_while

from daemon_process import DaemonProcess

VICTIMS = {"daemon": 3, "cold agent": 3, "hot agent": 2, "worker": 4, "worker stopped": 1, "agent stopped": 0.3}


class Chaos:
    """One run."""

    def __init__(self, daemon: DaemonProcess, workers: int, seed: int) -> None:
        self._dice = random.Random(seed)
        self._daemon = daemon
        self._storm = Storm(daemon, workers, self._dice)
        self._stopped: list[tuple[float, psutil.Process]] = []  # to be continued when
        self.done: Counter[str] = Counter()

    def run(self, kills: int) -> None:
        """Do so much harm, then have everything end."""
        done = 0
        while done < kills:
            time.sleep(self._dice.uniform(0.0, 1.0))  # not a wait for anything: another moment each time
            self._go_on(time.monotonic())
            victim = self._dice.choices(list(VICTIMS), list(VICTIMS.values()))[0]
            if self._harm(victim):
                self.done[victim] += 1
                done += "stopped" not in victim
            self._storm.collect()
            assert not self._storm.wrong, self._storm.wrong
        self._go_on(float("inf"))
        self._storm.end()

    def _harm(self, victim: str) -> bool:
        if victim == "daemon":
            self._go_on(float("inf"))  # a stopped agent would outlive its daemon
            self._daemon.kill()
            self._daemon.start()
            return True
        if victim == "worker":
            self._storm.replace(self._dice.randrange(len(self._storm.workers)))
            return True
        if victim == "worker stopped":  # for longer than a lease lives
            worker = self._dice.choice(self._storm.workers)
            return self._stop(psutil.Process(worker.process.pid), 3.0)
        with contextlib.suppress(psutil.Error):
            agents = self._daemon.agents()
            if victim == "agent stopped":
                return bool(agents) and self._stop(self._dice.choice(agents), 0.5)
            wanted = [agent for agent in agents if ("cold" in victim) == _is_cold(agent)]
            for agent in wanted:
                agent.kill()
            return bool(wanted)
        return False

    def _stop(self, process: psutil.Process, seconds: float) -> bool:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP)
            self._stopped.append((time.monotonic() + seconds, process))
            return True
        return False

    def _go_on(self, now_s: float) -> None:
        """Continue what was stopped long enough."""
        for entry in [entry for entry in self._stopped if entry[0] <= now_s]:
            self._stopped.remove(entry)
            with contextlib.suppress(psutil.Error):
                entry[1].send_signal(signal.SIGCONT)

    def check(self) -> None:
        """What must hold once everything has ended."""
        counts = self._storm.counts
        assert not self._storm.wrong, self._storm.wrong
        assert not counts["hung"], f"{counts['hung']} workers hung"
        assert counts["blocks read"] > 0
        check_nothing_is_held(self._daemon)
        self._daemon.check_log()

    def report(self) -> str:
        """Counts, for people."""
        harm = ", ".join(f"{count} x {victim}" for victim, count in sorted(self.done.items()))
        counts = self._storm.counts
        rest = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
        read = f"blocks read and compared: {counts['blocks read']}, wrong: {len(self._storm.wrong)}"
        return f"harm done: {harm}\noperations: {self._storm.operations}, {read}\n{rest}"


def _is_cold(agent: psutil.Process) -> bool:
    return any("cold" in word for word in agent.cmdline()) or any(f.path.endswith(".mdb") for f in agent.open_files())


def run(kills: int, workers: int, seed: int) -> Chaos:
    """A whole run on a daemon of its own."""
    with daemon_for_a_while() as daemon:
        chaos = Chaos(daemon, workers, seed)
        chaos.run(kills)
        chaos.check()
        return chaos


def main() -> None:
    """For `make chaos`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)  # noqa: T201
    began_s = time.monotonic()
    chaos = run(given.kills, given.workers, given.seed)
    print(chaos.report())  # noqa: T201
    print(f"passed in {time.monotonic() - began_s:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
