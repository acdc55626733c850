"""The pieces of the composition root that need no daemon."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from kvstore import app
from kvstore.config import load
from kvstore.protocol.errors import PermissionDenied


def test_a_lock_is_held_once_and_says_by_whom(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with (
        app._locked(path, "state directory X"),
        pytest.raises(app.StartError, match=rf"state directory X is in use by another kvstored \(pid {os.getpid()}\)"),
        app._locked(path, "state directory X"),
    ):
        pytest.fail("two daemons held one lock")
    with app._locked(path, "state directory X"):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(app.StartError, match="cannot be opened: No such file"),
        app._locked(tmp_path / "no" / "lock", "x"),
    ):
        pytest.fail("a lock without a folder")


def test_the_descriptor_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        app._raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tenants_are_found_by_uid_and_group_and_strangers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f'state_dir="{tmp_path}"\nsocket="/k"\n[tenants.a]\nuids=[70001]\ngids=[70]\n')
    resolve = app.tenant_resolver(load({}, file))
    assert resolve(70001, [1]) == "a"
    assert resolve(70002, [71, 70]) == "a"
    assert resolve(os.geteuid(), [os.getegid()]) == "default"
    with pytest.raises(PermissionDenied, match=r"uid 70002 \(groups 71, 72\) belongs to no tenant"):
        resolve(70002, [72, 71, 72])


def test_root_comes_in_as_the_daemons_own_tenant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    resolve = app.tenant_resolver(load({"state_dir": str(tmp_path), "socket": "/k"}, environ={}))
    assert resolve(0, [0]) == "default"
    with pytest.raises(PermissionDenied):
        resolve(4243, [4243])


def test_a_lock_is_not_followed_to_somebody_elses_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(app.StartError, match="cannot be opened"), app._locked(tmp_path / "lock", "x"):
        pytest.fail("a link was taken for a lock")
    assert (tmp_path / "precious").read_text() == "kept"
