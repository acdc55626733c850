"""Keeps one agent alive: starts it, watches it, replaces it, and looks like one tier all the while."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from google.protobuf.message import DecodeError

from kvstore.engine.agent_process import AgentProcess
from kvstore.engine.agent_tier import AgentTier
from kvstore.protocol.errors import InvalidRequest, KVStoreError, Unavailable
from kvstore.protocol.frames import AgentMethod
from kvstore.tiers.base import BlockRef, Outcome, Scannable, StoredRecord, Tier, TierItem, WriteResult
from kvstore.v1 import agent_pb2

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
MOURNING_S = 5.0  # for on_down(), should it block after all
HEALTHY_S = 30.0  # an agent that served this long ends a series of failures
UNCONFIRMED_DELETES_MAX = 65_536  # 4 MiB of names

_EXIT_S = 1.0  # from the end of its connection to that of its process, where it goes by itself

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class _Life(NamedTuple):
    """An agent that serves or served; `mourned` is set once on_down() has been called for it."""

    process: AgentProcess
    tier: AgentTier
    mourned: threading.Event


class AgentSupervisor(Tier, Scannable):
    """A Tier (and Scannable) whose agent may die at any moment.

    Call sequence: start(), then any Tier call and map_slab/unmap_slab from any thread, then close(). While the agent is
    down a write answers BUSY, a read MISSING, and stats() is empty. A fresh agent gets every live slab and every
    delete that the last one did not confirm before it is used.

    `on_up` and `on_down` are called on the supervisor's thread, alternately, beginning with `on_up`; they must neither
    block nor raise, nor call back. A read that is MISSING because its agent has gone returns only after
    `on_down`, so that whoever asked can tell it from a block that is not there.
    """

    def __init__(
        self,
        name: str,
        config: agent_pb2.AgentConfig,
        *,
        on_up: Callable[[], None] = _nothing,
        on_down: Callable[[], None] = _nothing,
        call_timeout_s: float = 30.0,
        start_timeout_s: float = 20.0,
    ) -> None:
        """Supervise an agent of `config`, called `name` in messages; a frame may take it `call_timeout_s`."""
        self.name = name
        self.capacity_bytes = config.capacity_bytes
        self._config = config
        self._on_up, self._on_down = on_up, on_down
        self._call_timeout_s, self._start_timeout_s = call_timeout_s, start_timeout_s
        self._state = "starting"
        self._device = ""
        self._restarts = 0
        self._process: AgentProcess | None = None
        self._life: _Life | None = None
        self._table = threading.Lock()  # guards the two below, and orders their changes with the changes of agents
        self._slabs: dict[int, tuple[int, int]] = {}  # slab id: our descriptor, segment bytes
        self._unconfirmed: dict[BlockRef, None] = {}  # deletes, oldest first
        self._spawning = threading.Lock()  # close() either sees a process or prevents it
        self._closing = threading.Event()
        self._started = threading.Event()
        # One thread for every start: the kernel kills an agent when the thread that started it ends.
        self._keeper = threading.Thread(target=self._keep, name=f"{name}-keeper", daemon=True)

    @property
    def state(self) -> str:
        """`starting`, `ok`, or `down: ` and why."""
        return self._state

    @property
    def restarts(self) -> int:
        """How many times a process was started to replace one."""
        return self._restarts

    @property
    def device(self) -> str:
        """What the agent says it keeps the blocks on, as of its last start."""
        return self._device

    @property
    def pid(self) -> int | None:
        """The process that serves now, if any."""
        process = self._process
        return None if process is None or process.reaped.is_set() else process.pid

    def start(self) -> None:
        """Start the first agent and wait until it serves.

        Raises:
            Unavailable: it does not; the message says why. The supervisor is closed then.
        """
        self._keeper.start()
        self._started.wait()  # bounded: by the machine's time to start a process, and start_timeout_s
        if self._life is None and self._closing.is_set():
            self._keeper.join()
            raise Unavailable(f"the {self.name} agent did not start: {self._state.removeprefix('down: ')}")

    def write(self, items: Sequence[TierItem]) -> list[WriteResult]:
        """Store blocks; BUSY for each whose fate is not known to be better."""
        life = self._life
        if life is None:
            return [WriteResult(Outcome.BUSY)] * len(items)
        results = life.tier.write(items)
        if self._unconfirmed:  # what was stored again is not to be deleted any more
            with self._table:
                for item, result in zip(items, results, strict=True):
                    if result.outcome is Outcome.OK:
                        self._unconfirmed.pop(item.ref, None)
        return results

    def read(self, items: Sequence[TierItem]) -> list[Outcome]:
        """Fill slots with blocks; MISSING also for what went with its agent. No slot is touched after the return."""
        life = self._life
        if life is None:
            return [Outcome.MISSING] * len(items)
        outcomes = life.tier.read(items)
        if life.process.reaped.is_set():
            life.mourned.wait(MOURNING_S)
        return outcomes

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks: now, or before the next agent serves."""
        life = self._life
        if life is not None:
            try:
                life.tier.delete(refs)
                return
            except KVStoreError as error:
                _log.warning("%s: %d deletes are left to the next agent: %s", self.name, len(refs), error)
        with self._table:
            late = self._life not in (None, life)  # the next agent serves already
            if not late:
                self._remember(refs)
        if late:
            self.delete(refs)

    def stats(self) -> Mapping[str, int]:
        """Counters of the medium; none while it is down."""
        life = self._life
        return {} if life is None else life.tier.stats()

    def scan(self) -> Iterator[StoredRecord]:
        """Every record of a durable tier, ordered by namespace and key.

        Raises:
            KVStoreError: the agent is down or went away, or its tier keeps nothing.
        """
        return self._serving().scan()

    def flush(self) -> None:
        """Return once everything written before is durable.

        Raises:
            KVStoreError: that is not sure.
        """
        self._serving().flush()

    def map_slab(self, slab_id: int, fd: int, segment_bytes: int) -> None:
        """Make a slab known to this agent and to every later one; `fd` is duplicated and stays the caller's.

        Raises:
            InvalidRequest: the number is taken, or the agent refuses the slab.
            InternalError: the agent cannot map it.
            OSError: no descriptor is left.
        """
        with self._table:
            if slab_id in self._slabs:
                raise InvalidRequest(f"{self.name}: slab {slab_id} is mapped already")
            if self._closing.is_set():
                return
            own = os.dup(fd)
            self._slabs[slab_id] = (own, segment_bytes)
            if self._life is None:
                return
            try:
                self._life.tier.map_slab(slab_id, own, segment_bytes)
            except Unavailable as error:
                _log.warning("%s: slab %d is left to the next agent: %s", self.name, slab_id, error)
            except KVStoreError:
                os.close(self._slabs.pop(slab_id)[0])
                raise

    def unmap_slab(self, slab_id: int) -> None:
        """Let go of a slab that no call names any more; one that is not known is no error."""
        with self._table:
            own, _ = self._slabs.pop(slab_id, (-1, 0))
            if own < 0:
                return
            os.close(own)
            try:
                if self._life is not None:
                    self._life.tier.unmap_slab(slab_id)
            except KVStoreError as error:  # gone with its agent, then
                _log.warning("%s: slab %d: %s", self.name, slab_id, error)

    def kill(self) -> None:
        """SIGKILL the present process, as a fault would; it is replaced."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self, timeout_s: float = 10.0) -> None:
        """Let the agent finish and close its medium within `timeout_s`, else kill it; it is reaped. Idempotent."""
        with self._spawning:
            self._closing.set()
            process = self._process
        life = self._life
        if process is not None:
            if life is not None:
                guard = threading.Timer(timeout_s, process.kill)
                guard.start()
                life.tier.close(timeout_s)
                process.reaped.wait()
                guard.cancel()
            process.end()
        if self._keeper.is_alive():
            self._keeper.join()
        with self._table:
            while self._slabs:
                os.close(self._slabs.popitem()[1][0])
        self._state = "down: closed"

    def _serving(self) -> AgentTier:
        life = self._life
        if life is None:
            raise Unavailable(f"the {self.name} agent is {self._state}")
        return life.tier

    def _remember(self, refs: Sequence[BlockRef]) -> None:
        self._unconfirmed.update(dict.fromkeys(refs))
        excess = len(self._unconfirmed) - UNCONFIRMED_DELETES_MAX
        if excess > 0:
            for ref in list(islice(self._unconfirmed, excess)):
                del self._unconfirmed[ref]
            _log.error("%s: %d deletes are lost; their bytes stay until the next recovery", self.name, excess)

    def _keep(self) -> None:
        """The keeper's life: one agent after the other."""
        delay_s = BACKOFF_MIN_S
        while True:
            served_s = self._run_one()
            if not self._started.is_set():
                self._closing.set()
                self._started.set()
            if self._closing.is_set():
                return
            if served_s >= HEALTHY_S:
                delay_s = BACKOFF_MIN_S
            _log.warning("the %s agent is %s; next start in %g s", self.name, self._state, delay_s)
            if self._closing.wait(delay_s):
                return
            delay_s = min(2 * delay_s, BACKOFF_MAX_S)
            self._restarts += 1

    def _run_one(self) -> float:
        """One agent from its start until it is reaped: how long it served, in seconds."""
        try:
            with self._spawning:
                if self._closing.is_set():
                    return 0.0
                self._process = process = AgentProcess()
        except OSError as error:
            self._state = f"down: {error}"
            return 0.0
        try:
            life = self._introduce(process)
        except KVStoreError as error:
            process.end()
            process.frames.close()
            self._state = f"down: {error}"
            return 0.0
        began_s = time.monotonic()
        self._started.set()
        self._on_up()
        process.reaped.wait()
        self._state = f"down: {process.ending}"
        self._on_down()
        life.mourned.set()
        with self._table:
            self._life = None
        life.tier.disconnect()
        return time.monotonic() - began_s

    def _introduce(self, process: AgentProcess) -> _Life:
        """Configure a fresh agent, give it what the last one had, and let it serve."""
        ready = self._configure(process)
        tier = AgentTier(self.name, self.capacity_bytes, process.frames, ready, process.end, self._call_timeout_s)
        with self._table:
            for slab_id, (fd, segment_bytes) in self._slabs.items():
                try:
                    tier.map_slab(slab_id, fd, segment_bytes)
                except Unavailable:
                    raise
                except KVStoreError as error:  # its blocks miss; those in other slabs need not
                    _log.error("%s: slab %d is not mapped: %s", self.name, slab_id, error)
            tier.delete(list(self._unconfirmed))
            self._unconfirmed.clear()
            self._device = ready.device
            self._life = life = _Life(process, tier, threading.Event())
            self._state = "ok"
        return life

    def _configure(self, process: AgentProcess) -> agent_pb2.AgentReady:
        try:
            process.frames.send(0, AgentMethod.CONFIGURE, self._config.SerializeToString())
            frame = process.frames.recv(self._start_timeout_s)
            ready = agent_pb2.AgentReady.FromString(frame.payload)
        except TimeoutError as error:
            raise Unavailable(f"not ready within {self._start_timeout_s:g} s") from error
        except DecodeError as error:
            raise Unavailable(f"it does not speak the agents' protocol: {error}") from error
        except Unavailable as error:
            process.reaped.wait(_EXIT_S)
            process.end()
            raise Unavailable(f"{process.ending} before it was ready") from error
        if frame.status or ready.error:
            raise Unavailable(ready.error or f"refused with status {frame.status}")
        return ready
