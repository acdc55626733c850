"""Where a client looks for its daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore_client import InvalidRequest
from kvstore_client.address import MAX_SOCKET_PATH_BYTES, SYSTEM_SOCKET, resolve


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_ADDRESS", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("unix:/a/b.sock", "/a/b.sock"),
        ("unix:///a/b.sock", "/a/b.sock"),
        ("/a/b.sock", "/a/b.sock"),
        ("relative.sock", "relative.sock"),
        ("/a/odd:name", "/a/odd:name"),
        (Path("/a/b.sock"), "/a/b.sock"),
    ],
)
def test_forms_of_an_address(given: str | Path, path: str) -> None:
    address = resolve(given)
    assert address.path == path
    assert address.attach_path == path + ".attach"


@pytest.mark.parametrize(
    "given", ["localhost:50051", "tcp:1.2.3.4:5", "unix-abstract:x", "unix:", "/a\0b", "\0abstract"]
)
def test_what_is_no_unix_socket(given: str) -> None:
    with pytest.raises(InvalidRequest, match="unix:/path"):
        resolve(given)


def test_argument_beats_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert resolve().path == f"{tmp_path}/kvstore/kvstore.sock"
    monkeypatch.setenv("KVSTORE_ADDRESS", "unix:/from/variable")
    assert resolve().path == "/from/variable"
    assert resolve("/from/argument").path == "/from/argument"


def test_default_is_the_system_socket() -> None:
    assert resolve().path == SYSTEM_SOCKET


def test_system_daemon_is_found_where_the_user_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "system.sock"
    system.touch()
    monkeypatch.setattr("kvstore_client.address.SYSTEM_SOCKET", str(system))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert resolve().path == str(system)
    (tmp_path / "kvstore").mkdir()
    (tmp_path / "kvstore" / "kvstore.sock").touch()
    assert resolve().path == f"{tmp_path}/kvstore/kvstore.sock"


def test_length_counts_the_attach_suffix() -> None:
    fits = "/" + "a" * (MAX_SOCKET_PATH_BYTES - len(".attach") - 1)
    assert resolve(fits).path == fits
    with pytest.raises(InvalidRequest, match=f"{MAX_SOCKET_PATH_BYTES + 1} bytes"):
        resolve(fits + "a")
