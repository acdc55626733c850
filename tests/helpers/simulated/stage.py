"""The stage of a simulation: one thread, a clock that is a number, and a seeded choice of who acts next.

Actors take steps. Where the engine would wait (for an agent's answer, a slab, a reader's block) the stage lets the
others act until what it waits for has come or its time is up, so a wait is nothing but steps of others within it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

from kvstore.engine import (
    agent_tier,
    catalogue,
    inflight,
    media_stats,
    mover,
    putting,
    recorder,
    recovery,
    saver,
    sessions,
    slab_keeper,
    store,
    supervisor,
)

PATIENCE = 250  # steps within one wait, after which time begins to run
STEPS_MAX = 60_000  # steps within one wait: it is one for ever

_THREADING = (
    agent_tier, catalogue, inflight, media_stats, mover, recorder, saver, sessions, slab_keeper, store, supervisor,
)  # fmt: skip
_TIME = (putting, recovery, saver, sessions, supervisor)


class SimulationError(BaseException):
    """Something does not hold. No handler of the engine may take it for an error of the world."""


class DaemonKilled(BaseException):
    """The daemon's process has gone, in the middle of whatever it was doing."""


@dataclass(eq=False)
class Actor:
    """Somebody who takes steps, within at most `depth_max` waits of others: a step may be a wait itself."""

    name: str
    weight: int
    ready: Callable[[], bool]
    step: Callable[[], object]
    depth_max: int = 99
    busy: bool = False


class Stage:
    """Chooses who acts, and keeps the time and the last lines of what happened."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_s = 1000.0
        self.steps = 0
        self.depth = 0
        self.lines: deque[str] = deque(maxlen=60)
        self.counts: Counter[str] = Counter()
        self.timers: list[tuple[float, Callable[[], object]]] = []
        self.after_step: Callable[[], None] = lambda: None
        self._actors: list[Actor] = []
        self._urn: list[Actor] = []

    def cast(self, actors: list[Actor]) -> None:
        """Say who is on the stage."""
        self._actors = actors
        self._urn = [actor for actor in actors for _ in range(actor.weight)]

    def note(self, line: str) -> None:
        """Keep a line for the report of a failure."""
        self.lines.append(f"{self.steps:>7} {'  ' * self.depth}{line}")

    def count(self, what: str, number: int = 1) -> None:
        """Count something for the report."""
        self.counts[what] += number

    def happens(self, share: float) -> bool:
        """Whether something happens this time."""
        return self.rng.random() < share

    def one(self) -> None:
        """One step of somebody."""
        actor = self._choose()
        self.steps += 1
        if actor is None:
            self.pass_time(0.01)
            return
        actor.busy = True
        try:
            actor.step()
        finally:
            actor.busy = False
        self.after_step()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and what was set to it go off."""
        self.now_s += seconds
        for entry in [entry for entry in self.timers if entry[0] <= self.now_s]:
            self.timers.remove(entry)
            entry[1]()

    def some(self, most: int) -> None:
        """Let a few others act, as they do while a thread copies."""
        self.depth += 1
        try:
            for _ in range(self.rng.randint(1, most)):
                self.one()
        finally:
            self.depth -= 1

    def until(self, done: Callable[[], object], timeout_s: float | None) -> bool:
        """Let others act until `done`, at most for so long; whether it was."""
        deadline_s = self.now_s + (1e9 if timeout_s is None else timeout_s)
        self.depth += 1
        taken = 0
        try:
            while not done():
                if self.now_s >= deadline_s:
                    return False
                self.one()
                taken += 1
                if taken > PATIENCE and taken % 10 == 0:
                    self.pass_time(max(0.001, min(1.0, (deadline_s - self.now_s) / 8)))
                if taken > STEPS_MAX:
                    raise SimulationError(f"a wait has not ended after {taken} steps")
            return True
        finally:
            self.depth -= 1

    def _choose(self) -> Actor | None:
        depth, urn, draw = self.depth, self._urn, self.rng.random
        size = len(urn)
        for _ in range(8):
            actor = urn[int(draw() * size)]
            if not actor.busy and depth <= actor.depth_max and actor.ready():
                return actor
        able = [a for a in self._actors if not a.busy and depth <= a.depth_max and a.ready()]
        return self.rng.choice(able) if able else None


# -- what stands in for threading and time in the engine's modules ------------------------------------------------


class Lock:
    """The engine's lock. Nobody may wait while it is held: with one thread that would be found at once."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self.held:
            if not blocking:
                return False
            raise SimulationError("a lock is held across a wait")
        if not blocking and self._stage.happens(0.3):  # some other thread has it at this moment
            return False
        self.held = True
        return True

    def release(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        if self.held:
            raise SimulationError("a lock is held across a wait")
        self.held = True

    def __exit__(self, *error: object) -> None:
        self.held = False


class Event:
    """Waiting for it lets others act."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._set = False

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        return self._set or self._stage.until(self.is_set, timeout)


class LoopEvent(Event):
    """What wakes a loop: the wait at the end of a step only says when the next one is due."""

    due_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.due_s = self._stage.now_s + (1e9 if timeout is None else timeout)
        return self._set

    def awake(self) -> bool:
        return self._set or self._stage.now_s >= self.due_s


class Condition:
    """A condition of the engine's lock."""

    def __init__(self, stage: Stage, lock: Lock) -> None:
        self._stage = stage
        self._lock = lock

    def notify(self, n: int = 1) -> None:
        pass

    def notify_all(self) -> None:
        pass

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        self._lock.release()
        try:
            return self._stage.until(predicate, timeout)
        finally:
            self._lock.acquire()


class Thread:
    """Never runs."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def is_alive(self) -> bool:
        return False

    def start(self) -> None:
        raise SimulationError("a thread was started")


class Timer:
    """Goes off when the stage's time has come so far."""

    def __init__(self, stage: Stage, interval: float, function: Callable[[], object]) -> None:
        self._stage = stage
        self._entry = (stage.now_s + interval, function)

    def start(self) -> None:
        self._stage.timers.append(self._entry)

    def cancel(self) -> None:
        if self._entry in self._stage.timers:
            self._stage.timers.remove(self._entry)


class _Gate:
    """An RLock that is always free: calls behind it are larger than those of a simulation."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def replaced(pairs: list[tuple[ModuleType | object, str, object]]) -> Iterator[None]:
    """Attributes of modules or objects, for a while."""
    # A class's own entry, not what getattr makes of it.
    before = [(owner, name, vars(owner).get(name) or getattr(owner, name)) for owner, name, _ in pairs]
    try:
        for owner, name, value in pairs:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def one_thread(stage: Stage) -> list[tuple[ModuleType | object, str, object]]:
    """Replacements by which the engine has no threads and no time but the stage's."""

    def sleep(seconds: float) -> None:
        stage.pass_time(seconds)

    threading = SimpleNamespace(
        Lock=lambda: Lock(stage),
        RLock=_Gate,
        Event=lambda: Event(stage),
        Condition=lambda lock: Condition(stage, lock),
        Thread=Thread,
        Timer=lambda interval, function: Timer(stage, interval, function),
    )
    time = SimpleNamespace(monotonic=lambda: stage.now_s, time=lambda: stage.now_s, sleep=sleep)
    return [(module, "threading", threading) for module in _THREADING] + [(module, "time", time) for module in _TIME]
