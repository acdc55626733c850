"""Keeps one agent alive: starts it, watches it, replaces it, and looks like one tier all the while."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from kvstore.engine.agent_process import AgentProcess
from kvstore.engine.agent_tier import AgentTier, PendingWrite, Settle
from kvstore.protocol.errors import InvalidRequest, KVStoreError, Unavailable
from kvstore.protocol.frames import AgentMethod
from kvstore.tiers.base import (
    BlockRef,
    CheckPage,
    CompactResult,
    Outcome,
    Scannable,
    StoredRecord,
    Tier,
    TierItem,
    WriteResult,
)
from kvstore.v1 import agent_pb2

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
MOURNING_S = 5.0  # for on_down(), should it block after all
START_ATTEMPTS = 5  # of the first agent, while it dies of SIGBUS and the like
HEALTHY_S = 30.0  # an agent that served this long ends a series of failures

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
    down a write answers BUSY, a read MISSING, and stats() is empty; everything else raises. A fresh agent gets every
    live slab before it is used. A delete that raised is the caller's to repeat, before it writes the same blocks again.

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
        start_timeout_s: float = 90.0,
    ) -> None:
        """Supervise an agent of `config`, called `name` in messages; a frame may take it `call_timeout_s`."""
        self.name = name
        self.capacity_bytes = config.capacity_bytes
        self.environment: Mapping[
            str, str
        ] = {}  # of its processes, beside what every agent has; to be set before start()
        self._config = config
        self._on_up, self._on_down = on_up, on_down
        self._call_timeout_s, self._start_timeout_s = call_timeout_s, start_timeout_s
        self._state = "starting"
        self._device = ""
        self._format = ""
        self._restarts = 0
        self._process: AgentProcess | None = None
        self._life: _Life | None = None
        self._table = threading.Lock()  # guards the slabs, and orders their changes with the changes of agents
        self._slabs: dict[int, tuple[int, int]] = {}  # slab id: our descriptor, segment bytes
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
    def format(self) -> str:
        """How the agent says it writes blocks, as of its last start."""
        return self._format

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
        pending = self.begin_write(items)
        return [WriteResult(Outcome.BUSY)] * len(items) if pending is None else pending.results()

    def begin_write(self, items: Sequence[TierItem]) -> PendingWrite | None:
        """Send blocks to be stored; the results must be asked for. None while the agent is down."""
        life = self._life
        return None if life is None else life.tier.begin_write(items)

    def read(self, items: Sequence[TierItem], settle: Settle | None = None) -> list[Outcome]:
        """Fill slots with blocks; MISSING also for what went with its agent. No slot is touched after the return.

        `settle` hears of each block as soon as its slot is filled; of blocks that went with their agent, or that it
        refused, it does not hear.
        """
        life = self._life
        if life is None:
            return [Outcome.MISSING] * len(items)
        outcomes = life.tier.read(items, settle)
        if life.process.reaped.is_set():
            life.mourned.wait(MOURNING_S)
        return outcomes

    def delete(self, refs: Sequence[BlockRef]) -> None:
        """Forget blocks.

        Raises:
            KVStoreError: that is not confirmed; some may be gone and some not.
        """
        self._serving().delete(refs)

    def stats(self) -> Mapping[str, int]:
        """Counters of the medium; none while it is down."""
        life = self._life
        return {} if life is None else life.tier.stats()

    def scan(self, after: BlockRef | None = None) -> Iterator[StoredRecord]:
        """Every record of a durable tier from behind `after`, ordered by namespace and key.

        Raises:
            KVStoreError: the agent is down or went away, or its tier keeps nothing.
        """
        return self._serving().scan(after)

    def flush(self) -> None:
        """Return once everything written before is durable.

        Raises:
            KVStoreError: that is not sure.
        """
        self._serving().flush()

    def check(self, after: BlockRef | None, limit: int, repair: bool) -> CheckPage:
        """Have up to `limit` blocks behind `after` read and verified; with `repair` the bad ones are dropped.

        Raises:
            KVStoreError: the agent is down, went away, or is too slow.
        """
        return self._serving().check(after, limit, repair)

    def compact(self) -> CompactResult:
        """Have the medium rewritten without its free space.

        Raises:
            KVStoreError: the agent is down, went away, or refused.
        """
        return self._serving().compact()

    def resize(self, capacity_bytes: int) -> int:
        """Have the medium, and that of every later agent, be of another size; what it is from now on.

        Raises:
            KVStoreError: the agent is down, or its medium has one size.
        """
        self.capacity_bytes = self._serving().resize(capacity_bytes)
        self._config.capacity_bytes, self._config.capacity_permille = capacity_bytes, 0
        return self.capacity_bytes

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

    def _keep(self) -> None:
        """The keeper's life: one agent after the other."""
        delay_s = BACKOFF_MIN_S
        attempts = 0
        while True:
            served_s = self._run_one()
            attempts += 1
            # A medium whose own pages kill whoever opens it is found out, and set aside, after a few deaths.
            if not self._started.is_set() and (attempts == START_ATTEMPTS or not self._crashed()):
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

    def _crashed(self) -> bool:
        """Whether the last process died of what it met, and not by our hand or with a reason of its own."""
        return self._process is not None and self._process.crashed

    def _run_one(self) -> float:
        """One agent from its start until it is reaped: how long it served, in seconds."""
        process: AgentProcess | None = None
        why = ""
        try:
            with self._spawning:
                if self._closing.is_set():
                    return 0.0
                self._process = process = AgentProcess(self.environment)
            return self._run(process)
        except (OSError, KVStoreError) as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001 - a defect of ours, said in full; without this nobody would replace it
            _log.exception("keeping the %s agent met a defect", self.name)
            why = f"{type(error).__name__}: {error}"
        if process is not None:
            process.end()
            process.frames.close()
        self._state = f"down: {why}"
        return 0.0

    def _run(self, process: AgentProcess) -> float:
        """Let a fresh agent serve until it is reaped: how long, in seconds."""
        life = self._introduce(process)
        began_s = time.monotonic()
        try:
            self._started.set()
            self._on_up()
            process.reaped.wait()
            self._state = f"down: {process.ending}"
        finally:
            self._mourn(life)
        return time.monotonic() - began_s

    def _mourn(self, life: _Life) -> None:
        """An agent has been reaped: tell of it, and forget it."""
        life.process.end()  # at once, but where on_up() met a defect
        try:
            self._on_down()
        finally:
            life.mourned.set()
            with self._table:
                self._life = None
            life.tier.disconnect()

    def _introduce(self, process: AgentProcess) -> _Life:
        """Configure a fresh agent, give it the slabs that the last one had, and let it serve."""
        ready = self._configure(process)
        self.capacity_bytes = ready.capacity_bytes or self._config.capacity_bytes
        tier = AgentTier(self.name, self.capacity_bytes, process.frames, ready, process.end, self._call_timeout_s)
        with self._table:
            for slab_id, (fd, segment_bytes) in self._slabs.items():
                try:
                    tier.map_slab(slab_id, fd, segment_bytes)
                except Unavailable:
                    raise
                except KVStoreError as error:  # its blocks miss; those in other slabs need not
                    _log.error("%s: slab %d is not mapped: %s", self.name, slab_id, error)
            self._device = ready.device
            self._format = ready.format
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
