"""The real daemon, in a process that a test starts, stops, kills and starts again on the same state directory."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from kvstore.cli.admin_client import AdminClient
from kvstore.v1 import admin_pb2
from kvstore_client import Client
from polling import PATIENCE_S, eventually

READY = "kvstored ready: "
_COLD_FILE = "data.mdb"


class DaemonProcess:
    """One daemon at a time on one folder; every client made here is closed with it.

    Attributes:
        folder: short enough for a socket's path; holds state directory, socket, configuration and log.
        address: unix:/path.
        settings: keys of the configuration file; a change counts from the next start.
        environment: of the process.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, **settings: object) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.address = f"unix:{folder}/k.sock"
        self.environment = environment
        self.settings: dict[str, object] = {
            "state_dir": str(self.state_dir),
            "socket": str(folder / "k.sock"),
            "warm_bytes": "64MiB",
            "cold_bytes": "256MiB",
            "hot_device": "off",
            "drain_grace_s": 4,
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[Client] = []

    # -- its life

    def start(self) -> DaemonProcess:
        """Start it and wait until it says that it is ready."""
        assert self._process is None, "it runs already"
        lines = [f"{key} = {_toml(value)}\n" for key, value in self.settings.items()]
        (self.folder / "kvstored.toml").write_text("".join(lines))
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.cli.kvstored", "--config", str(self.folder / "kvstored.toml")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
            )
        try:
            self._await_ready()
        except BaseException:
            self._discard()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM: it has to end in order."""
        process = self._running()
        process.send_signal(signal.SIGTERM)
        code = self._await_end(process)
        assert code == 0, f"it ended with {code}:\n{self.log_tail()}"

    def kill(self) -> None:
        """SIGKILL, and reap it; its agents are gone as well when this returns."""
        process = self._running()
        agents = self.agents()
        process.kill()
        self._await_end(process)
        eventually(lambda: all(has_ended(agent) for agent in agents), "the agents to end with their daemon")

    def pause(self) -> None:
        """SIGSTOP: it is there and does not answer."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        # Not before the last of its threads has stopped.
        eventually(lambda: os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG), "it to stop")

    def resume(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def close(self) -> None:
        """Close the clients, end the daemon, and fail if it ended by itself or logged a defect."""
        for client in self._clients:
            client.close()
        if self._process is not None:
            try:
                assert self._process.poll() is None, f"the daemon has died:\n{self.log_tail()}"
                self._process.send_signal(signal.SIGCONT)
                self.stop()
            finally:
                self._discard()
        self.check_log()

    def check_log(self) -> None:
        """Fail if the daemon, or an agent, met a defect of its own."""
        log = self.log()
        assert "Traceback" not in log, log[-3000:]

    def abandon(self) -> None:
        """Kill it if it still runs: the end of a test that has failed."""
        self._discard()

    # -- what a test asks of it

    @property
    def pid(self) -> int:
        """Of the running daemon."""
        return self._running().pid

    def client(self, **options: Any) -> Client:
        """A client of it."""
        made = Client(self.address, **options)
        self._clients.append(made)
        return made

    def stats(self) -> admin_pb2.GetStatsResponse:
        """What it counts."""
        with contextlib.closing(AdminClient(self.address)) as admin:
            return admin.stats()

    def tier(self, name: str) -> admin_pb2.TierStats:
        """What it counts of a tier."""
        return next(tier for tier in self.stats().tiers if tier.name == name)

    def ask(self, method: str, request: object, timeout_s: float = PATIENCE_S) -> Any:
        """One call of the Admin service."""
        with contextlib.closing(AdminClient(self.address)) as admin:
            return admin.call(method, request, timeout_s)

    def sessions(self) -> list[admin_pb2.SessionInfo]:
        """The sessions that are attached, but for the one that asks."""
        with contextlib.closing(AdminClient(self.address)) as admin:
            answer = admin.call("ListSessions", admin_pb2.ListSessionsRequest())
        return [session for session in answer.sessions if not session.client_name.startswith("kvctl")]

    def agents(self) -> list[psutil.Process]:
        """The agents' processes."""
        return psutil.Process(self.pid).children()

    def agent(self, name: str) -> psutil.Process:
        """The process of the cold or the hot agent, once it serves."""
        eventually(lambda: self.tier(name).state == "ok", f"the {name} agent")
        return next(agent for agent in self.agents() if _holds_cold_file(agent) == (name == "cold"))

    def log(self) -> str:
        """Everything that it and its agents have logged, over all starts."""
        return (self.folder / "log").read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        """The end of the log."""
        return "\n".join(self.log().splitlines()[-lines:])

    # -- inside

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it does not run"
        return self._process

    def _await_ready(self) -> None:
        process = self._running()
        assert process.stdout is not None
        received, deadline_s = b"", time.monotonic() + PATIENCE_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                assert selector.select(max(0.0, deadline_s - time.monotonic())), f"not ready:\n{self.log_tail()}"
                chunk = os.read(process.stdout.fileno(), 4096)
                assert chunk, f"it ended instead of starting:\n{self.log_tail()}"
                received += chunk
        assert received.decode() == f"{READY}{self.address}\n"

    def _await_end(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.log_tail()}") from None
        finally:
            self._discard()

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if nobody has reaped it: PID 1 of a container may never do so."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _holds_cold_file(process: psutil.Process) -> bool:
    return any(file.path.endswith(_COLD_FILE) for file in process.open_files())
