"""Starting and stopping the real daemon: what it refuses, how it says so, and what it leaves behind."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from kvstore.bench.daemon import spawned

COMMAND = [sys.executable, "-m", "kvstore.cli.kvstored"]
WAIT_S = 60


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="kvstart-") as name:  # short enough for a socket's path
        yield Path(name)


def flags(folder: Path, **changed: object) -> list[str]:
    values: dict[str, object] = {
        "state_dir": folder / "state",
        "socket": folder / "k.sock",
        "warm_bytes": "64MiB",
        "cold_bytes": "64MiB",
        "hot_device": "off",
        **changed,
    }
    return [part for key, value in values.items() for part in (f"--{key.replace('_', '-')}", str(value))]


def refused(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.stdout == "", "a daemon that does not start must not say that it is ready"
    assert "Traceback" not in done.stderr
    return done


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(WAIT_S), "nothing on stdout"
    return process.stdout.readline()


def kvctl(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.cli.kvctl", "--address", address, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_when_it_is_ready_and_drains_on_a_signal(folder: Path, number: signal.Signals) -> None:
    command = [*COMMAND, *flags(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert first_line(process) == f"kvstored ready: unix:{folder}/k.sock\n"
            process.send_signal(number)
            rest, log = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert (process.returncode, rest) == (0, ""), log
    assert "Traceback" not in log
    assert "warm 64MiB" in log
    assert not (folder / "k.sock").exists()
    assert not (folder / "k.sock.attach").exists()


def test_a_second_daemon_on_the_state_directory_is_refused_and_the_first_serves_on(folder: Path) -> None:
    with spawned(64 << 20, 64 << 20) as first:
        done = refused(*flags(folder, state_dir=first.folder / "state"))
        assert done.returncode == 1
        assert f"is in use by another kvstored (pid {first.pid})" in done.stderr
        assert kvctl(first.address, "ping").returncode == 0


def test_a_second_daemon_on_the_socket_is_refused_and_the_first_serves_on(folder: Path) -> None:
    with spawned(64 << 20, 0) as first:
        done = refused(*flags(folder, socket=first.folder / "kv.sock"))
        assert done.returncode == 1
        assert f"kv.sock is in use by another kvstored (pid {first.pid})" in done.stderr
        assert kvctl(first.address, "ping").returncode == 0


def test_what_a_killed_daemon_left_does_not_stop_the_next(folder: Path) -> None:
    for _ in range(2):
        with subprocess.Popen(
            [*COMMAND, *flags(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert first_line(process).startswith("kvstored ready: ")
                assert kvctl(f"unix:{folder}/k.sock", "ping").returncode == 0
            finally:
                process.kill()
        assert (folder / "k.sock.attach").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_state_directory_that_others_may_write_is_refused(folder: Path, mode: int) -> None:
    (folder / "state").mkdir()
    (folder / "state").chmod(mode)
    done = refused(*flags(folder))
    assert done.returncode == 2
    assert f"has mode {mode:04o}" in done.stderr
    assert "run chmod 0700" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that is somebody else's")
def test_a_state_directory_of_somebody_else_is_refused(folder: Path) -> None:
    (folder / "state").mkdir(mode=0o700)
    os.chown(folder / "state", 12345, -1)
    done = refused(*flags(folder))
    assert done.returncode == 2
    assert "belongs to uid 12345, this daemon runs as uid 0" in done.stderr


def test_a_socket_path_that_is_too_long_is_refused(folder: Path) -> None:
    done = refused(*flags(folder, socket=folder / ("s" * 90)))
    assert done.returncode == 2
    assert "the kernel allows 107" in done.stderr


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(folder: Path) -> None:
    (folder / "kvstored.toml").write_text("warm_byts = 1\n")
    done = refused("--config", str(folder / "kvstored.toml"), *flags(folder))
    assert done.returncode == 2
    assert "warm_byts: unknown key; did you mean warm_bytes?" in done.stderr


@pytest.mark.parametrize("flag", ["warm_bytes", "cold_bytes"])
def test_a_capacity_that_cannot_hold_a_block_is_refused(folder: Path, flag: str) -> None:
    done = refused(*flags(folder, **{flag: "4KiB"}))
    assert done.returncode == 2
    assert f"--{flag.replace('_', '-')}: 4KiB is too small" in done.stderr


def test_a_daemon_whose_cold_agent_is_gone_still_stops_in_order(folder: Path) -> None:
    with spawned(64 << 20, 64 << 20) as daemon:
        for child in psutil.Process(daemon.pid).children():
            child.kill()
        os.kill(daemon.pid, signal.SIGTERM)
        deadline = time.monotonic() + WAIT_S
        while psutil.Process(daemon.pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it does not stop"
            time.sleep(0.05)
        assert "Traceback" not in daemon.log_tail()
        assert daemon.log_tail().endswith("stopped")


def test_a_cold_tier_that_cannot_start_is_told(folder: Path) -> None:
    (folder / "state").mkdir(mode=0o700)
    (folder / "state" / "cold").write_text("a file where the cold tier wants a folder")
    done = refused(*flags(folder))
    assert done.returncode == 1
    assert "cold" in done.stderr.splitlines()[-1]
