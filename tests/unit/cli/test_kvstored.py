"""kvstored's command line up to the point where the daemon would start."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvstore import app
from kvstore.cli.kvstored import main
from kvstore.config import Config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that the daemon would have been started with."""
    configs: list[Config] = []
    monkeypatch.setattr(app, "run", configs.append)
    return configs


def kvstored(tmp_path: Path, *arguments: str) -> Result:
    places = ("--state-dir", str(tmp_path / "state"), "--socket", "/run/test/k.sock")
    return CliRunner().invoke(main, [*places, *arguments], env={"KVSTORE_CONFIG": ""})


def test_flags_reach_the_daemon(tmp_path: Path, started: list[Config]) -> None:
    flags = [
        "--warm-bytes",
        "64MiB",
        "--cold-bytes",
        "0",
        "--hot-device",
        "off",
        "--log-level",
        "debug",
        "--socket-mode",
        "0600",
    ]
    result = kvstored(tmp_path, *flags)
    assert result.exit_code == 0, result.output
    (config,) = started
    assert (config.warm_bytes, config.cold_bytes, config.log_level) == (64 << 20, 0, "debug")
    assert config.state_dir.stat().st_mode & 0o777 == 0o700


def test_a_configuration_error_is_exit_code_2_on_stderr(tmp_path: Path, started: list[Config]) -> None:
    result = kvstored(tmp_path, "--warm-bytes", "plenty")
    assert (result.exit_code, result.stdout, started) == (2, "", [])
    assert result.stderr.startswith("kvstored: --warm-bytes: 'plenty' is not a size")


def test_a_shared_state_directory_is_exit_code_2(tmp_path: Path, started: list[Config]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o770)
    result = kvstored(tmp_path)
    assert (result.exit_code, started) == (2, [])
    assert "may write to it" in result.stderr


def test_a_start_failure_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Config) -> None:
        raise app.StartError("no room at the inn")

    monkeypatch.setattr(app, "run", fail)
    result = kvstored(tmp_path)
    assert (result.exit_code, result.stderr) == (1, "kvstored: no room at the inn\n")


def test_help_names_every_flag() -> None:
    shown = CliRunner().invoke(main, ["--help"]).stdout
    flags = ("config", "state-dir", "socket", "socket-mode", "socket-group", "warm-bytes", "cold-bytes", "hot-bytes")
    assert all(f"--{flag} " in shown for flag in (*flags, "hot-device", "log-level"))
