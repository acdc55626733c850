"""The composition root: names every concrete class, takes the locks, and carries the daemon from start to drain."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import click

from kvstore import runtime
from kvstore.config import Config, device_environment
from kvstore.core.adaptive import Adaptive
from kvstore.core.block import COLD, HOT, WARM
from kvstore.core.leaf_lru import LeafLru
from kvstore.core.policy import PolicyFactory
from kvstore.engine.store import Store, StoreConfig
from kvstore.engine.supervisor import AgentSupervisor
from kvstore.machine import Machine
from kvstore.protocol.errors import KVStoreError, PermissionDenied, Unavailable
from kvstore.telemetry import log
from kvstore.transport.config import Limits, TransportConfig, TransportHooks
from kvstore.transport.server import Transport
from kvstore.v1 import agent_pb2

# Of the grace period: most of it belongs to the saving of blocks, and a worker reads a lease in milliseconds.
_LEASE_SHARE = 0.25
_LEASE_POLL_S = 0.02
_CALLS_GRACE_S = 1.0
# A signal may be given to any thread, as to one that woke before this one after a SIGSTOP, and Python's handler waits
# for the main thread to run.
_SIGNAL_POLL_S = 1.0

_POLICIES: dict[str, PolicyFactory] = {"adaptive": Adaptive, "leaf-lru": LeafLru}

_log = logging.getLogger("kvstore")


class StartError(RuntimeError):
    """The daemon cannot start; the message says why and what to do."""


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        StartError: it could not start. Nothing is left behind.
    """
    log.setup(config.log_level)
    stop = _stop_on_signals()
    with _locked(config.state_dir / "lock", f"state directory {config.state_dir}"), _owned_socket(config):
        _raise_descriptor_limit()
        runtime.tune()
        for line in config.describe():
            _log.info("%s", line)
        daemon = Daemon(config)
        try:
            daemon.start()
        except (KVStoreError, OSError, MemoryError) as error:
            raise StartError(str(error)) from error
        click.echo(f"kvstored ready: {config.address}")
        while not stop.wait(_SIGNAL_POLL_S):
            pass
        _log.info("draining for at most %g s", config.drain_grace_s)
        daemon.close(config.drain_grace_s)
    _log.info("stopped")


class Daemon:
    """Store, agents and transport of one daemon. Call sequence: start, close."""

    def __init__(self, config: Config) -> None:
        self._config = config
        machine = Machine()
        self._store = Store(_store_config(config), machine.available_bytes)
        self._agents = self._make_agents()
        self._transport: Transport | None = None

    def start(self) -> None:
        """Start the agents, recover, then open the door. Where one fails, those before it are ended.

        Raises:
            KVStoreError: an agent does not start, or the sockets cannot be had.
            OSError: the machine refuses.
        """
        with contextlib.ExitStack() as undo:
            for agent in self._agents:
                undo.callback(agent.close)
                self._start_agent(agent)
            self._store.start()
            undo.callback(self._store.close, 0.0)
            transport = self._make_transport()
            transport.start()
            undo.pop_all()
        self._transport = transport

    def _start_agent(self, agent: AgentSupervisor) -> None:
        """Start an agent. Without a device the daemon serves from the other tiers, and says why."""
        try:
            agent.start()
        except Unavailable as error:
            if agent.name != "hot":
                raise
            _log.error("the hot tier is off: %s", error)

    def close(self, grace_s: float) -> None:
        """Refuse new blocks, let leases end, close the door, save what is worth it: all within `grace_s`."""
        deadline = time.monotonic() + grace_s
        self._store.start_drain()
        if self._transport is not None:
            self._transport.set_draining()
            self._await_leases(time.monotonic() + grace_s * _LEASE_SHARE)
            self._transport.stop(min(_CALLS_GRACE_S, grace_s))
        try:
            self._store.close(max(0.0, deadline - time.monotonic()))
        except KVStoreError as error:  # a medium is down: what only warm has is lost, the rest is put away all the same
            _log.error("not everything could be saved: %s", error)
        for agent in self._agents:
            agent.close()

    def _await_leases(self, deadline_s: float) -> None:
        while self._store.stats().leases and time.monotonic() < deadline_s:
            time.sleep(_LEASE_POLL_S)

    def _make_transport(self) -> Transport:
        config = self._config
        settings = TransportConfig(
            socket_path=config.socket,
            instance_id=self._store.instance_id,
            server_version=version("kvtier"),
            socket_mode=config.socket_mode,
            socket_group=config.socket_group,
            owns_paths=True,
            remote=config.remote,
            lease_ttl_s=config.lease_ttl_s,
            limits=Limits(max_sessions=config.max_sessions),
        )
        hooks = TransportHooks(resolve_tenant=tenant_resolver(config), set_log_level=log.set_level)
        return Transport(self._store, settings, hooks)

    def _make_agents(self) -> list[AgentSupervisor]:
        config, agents = self._config, []
        if config.cold_bytes:
            folder = config.state_dir / "cold"
            cold = agent_pb2.AgentConfig(
                tier="cold",
                capacity_bytes=config.cold_bytes,
                path=str(folder),
                codec=config.codec,
                kernels=config.codec_kernels,
                durability=config.durability,
                sync_interval_ms=round(config.sync_interval_s * 1000),
                free_reserve_bytes=config.cold_reserve_bytes,
            )
            agents.append(self._agent(COLD, cold))
        if config.hot_device != "off":
            hot = agent_pb2.AgentConfig(
                tier="hot",
                capacity_bytes=config.hot_bytes,
                capacity_permille=config.hot_permille,
                device=config.hot_device,
            )
            agents.append(self._agent(HOT, hot))
            agents[-1].environment = device_environment()
        return agents

    def _agent(self, tier: int, agent_config: agent_pb2.AgentConfig) -> AgentSupervisor:
        store, name = self._store, agent_config.tier
        agent_config.reader_threads = self._config.reader_threads
        agent = AgentSupervisor(
            name,
            agent_config,
            on_up=lambda: store.tier_up(tier, agent.capacity_bytes),
            on_down=lambda: store.tier_down(tier),
            call_timeout_s=self._config.agent_timeout_s,
        )
        store.attach_tier(tier, agent)
        return agent


def tenant_resolver(config: Config) -> Callable[[int, Sequence[int]], str]:
    """The function that says whose blocks a peer (uid, groups) may see.

    It raises PermissionDenied for a peer that belongs to nobody.
    """

    def resolve(uid: int, gids: Sequence[int]) -> str:
        tenant = config.tenant_of(uid, gids)
        if tenant is None and uid == 0:  # root can read our memory anyway, and `sudo kvctl` is what operators type
            tenant = config.tenant_of(os.geteuid(), [])
        if tenant is None:
            groups = ", ".join(map(str, sorted(set(gids))))
            raise PermissionDenied(
                f"uid {uid} (groups {groups}) belongs to no tenant of this daemon; add it to a [tenants] table, "
                "or its user to the socket group"
            )
        return tenant

    return resolve


def _store_config(config: Config) -> StoreConfig:
    quotas: dict[int, dict[str, int]] = {WARM: {}, COLD: {}}
    for tenant in config.tenants:
        for tier, quota in ((WARM, tenant.warm_bytes), (COLD, tenant.cold_bytes)):
            if quota is not None:
                quotas[tier][tenant.name] = quota
    return StoreConfig(
        state_dir=config.state_dir,
        warm_bytes=config.warm_bytes,
        cold_bytes=config.cold_bytes,
        hot_bytes=config.hot_bytes,
        tenant_bytes=quotas,
        policy=_POLICIES[config.policy],
        promote_hits=config.promote_hits,
        cold_bytes_per_day=config.cold_daily_bytes,
        lease_ttl_s=config.lease_ttl_s,
        staging_max_bytes=config.staging_max_bytes,
        staging_total_bytes=config.staging_total_bytes,
        version=version("kvtier"),
    )


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the kernel lets go of it when this process ends, however it ends.

    Raises:
        StartError: another process holds it, or it cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            raise StartError(f"{what} is in use by another kvstored (pid {holder or 'unknown'})") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _owned_socket(config: Config) -> contextlib.AbstractContextManager[None]:
    """The socket's path is ours: gRPC binds over a living server's socket silently, so a lock has to tell."""
    folder = config.socket.parent
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise StartError(f"socket folder {folder} cannot be made: {error.strerror}") from error
    return _locked(folder / f"{config.socket.name}.lock", f"socket {config.socket}")


def _raise_descriptor_limit() -> None:
    """As many descriptors as may be had: slabs and sessions take one each, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
