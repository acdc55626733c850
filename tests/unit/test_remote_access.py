"""The TCP listener's configuration: it opens only if it can know its clients, and says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kvstore.access import Identity, RemoteAccess
from kvstore.protocol.errors import PermissionDenied, Unauthenticated
from kvstore.remote_access import describe_remote, is_loopback, load_remote_access
from kvstore.settings import ConfigError, Settings

PEM = "-----BEGIN CERTIFICATE-----\n"
RED, BLUE = "r" * 32, "b" * 40


@dataclass
class Files:
    """Writes files and loads a configuration that names them."""

    folder: Path
    modes: dict[str, int] = field(default_factory=dict)

    def file(self, name: str, content: str = PEM, mode: int = 0o600) -> str:
        path = self.folder / name
        path.write_text(content)
        path.chmod(mode)
        return str(path)

    def load(self, **raw: Any) -> RemoteAccess | None:
        settings = Settings.parse(raw, lambda key: key)
        return load_remote_access(settings, settings.tenants or ())

    def tls(self) -> dict[str, Any]:
        return {
            "listen": "10.0.0.1:7400",
            "tls_certificate": self.file("cert"),
            "tls_key": self.file("key"),
            "tls_client_ca": self.file("ca"),
            "tenants": {"red": {"sans": ["red.test"], "admin_sans": ["ops.test"]}, "blue": {"sans": ["blue.test"]}},
        }

    def tokens(self) -> dict[str, Any]:
        red = {"token_file": self.file("red", f"{RED}\n"), "admin_token_file": self.file("ops", "o" * 64)}
        return {"listen": "127.0.0.1:7400", "tenants": {"red": red, "blue": {"token_file": self.file("blue", BLUE)}}}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_it_is_off_by_default(files: Files) -> None:
    assert files.load() is None
    assert files.load(tenants={"red": {"sans": ["red.test"]}}) is None
    assert describe_remote(None) == []


def test_mutual_tls(files: Files) -> None:
    access = files.load(**files.tls())
    assert access is not None
    assert access.sans == {
        "red.test": Identity("red.test", "red"),
        "ops.test": Identity("ops.test", "red", is_admin=True),
        "blue.test": Identity("blue.test", "blue"),
    }
    assert describe_remote(access) == ["listens on tcp 10.0.0.1:7400: mutual TLS, 3 names of certificates"]


def test_tokens_on_loopback_need_no_tls_and_do_not_show(files: Files) -> None:
    access = files.load(**files.tokens())
    assert access is not None
    assert access.by_token(RED.encode()) == Identity("red.token_file", "red")
    assert access.by_token(b"o" * 64) == Identity("red.admin_token_file", "red", is_admin=True)
    assert access.by_token(BLUE.encode()).tenant == "blue"
    assert access.tenants == {"red", "blue"}
    assert describe_remote(access) == ["listens on tcp 127.0.0.1:7400: no TLS (loopback), 3 tokens"]
    assert RED not in repr(access)


def test_tokens_over_the_network_with_tls(files: Files) -> None:
    tls = {key: value for key, value in files.tls().items() if key in ("listen", "tls_certificate", "tls_key")}
    access = files.load(**{**files.tokens(), **tls})
    assert access is not None
    assert access.certificate
    assert not access.client_ca


Change = Callable[[Files, dict[str, Any]], object]


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("tls", lambda _, raw: [raw.pop(key) for key in list(raw) if key != "listen"], "needs to know its clients"),
        ("tokens", lambda _, raw: raw.pop("tenants"), "on loopback too"),
        ("tokens", lambda _, raw: raw.update(listen="10.0.0.1:1"), "in the clear"),
        ("tokens", lambda _, raw: raw.update(listen="0.0.0.0:1"), "in the clear"),
        ("tokens", lambda _, raw: raw.update(listen="[::]:1"), "in the clear"),
        ("tls", lambda _, raw: raw.pop("tls_key"), "belong together"),
        ("tls", lambda _, raw: [raw.pop("tls_key"), raw.pop("tls_certificate")], "needs a server certificate"),
        ("tls", lambda _, raw: raw.update(tenants={"red": {"uids": [1]}}), "nobody could come in"),
        ("tls", lambda f, raw: raw.update(tenants=f.tokens()["tenants"]), "by certificates or by tokens"),
        ("tokens", lambda _, raw: raw["tenants"]["red"].update(sans=["x"]), "nothing without tls_client_ca"),
        ("tls", lambda _, raw: raw["tenants"]["blue"].update(sans=["red.test"]), "'red.test' is listed twice"),
        ("tls", lambda _, raw: raw["tenants"]["red"].update(sans=["ops.test"]), "'ops.test' is listed twice"),
        ("tls", lambda f, raw: raw.update(tls_key=f.file("key", mode=0o644)), "mode 0644, so others can use it"),
        ("tokens", lambda f, _: f.file("red", RED, mode=0o604), "mode 0604, so others can use it"),
        ("tokens", lambda f, _: f.file("red", "r" * 31 + "\n"), "holds 31 bytes; a token has 32"),
        ("tokens", lambda f, _: f.file("red", "r" * 1025), "holds 1025 bytes"),
        ("tokens", lambda f, _: f.file("blue", RED), "same token is in tenants.red.token_file"),
        ("tls", lambda f, raw: raw.update(tls_certificate=f.file("cert", "DER")), "not in PEM form"),
        ("tls", lambda _, raw: raw.update(tls_client_ca="/nonexistent/ca"), "cannot be read"),
        ("tls", lambda f, raw: raw.update(tls_client_ca=f.file("ca", "x" * (1 << 20) + "x")), "name the right file"),
    ],
)
def test_what_is_refused(files: Files, base: str, change: Change, message: str) -> None:
    raw = getattr(files, base)()
    change(files, raw)
    with pytest.raises(ConfigError, match=message):
        files.load(**raw)


@pytest.mark.parametrize(
    "listen", ["7400", "host", ":7400", "host:", "host:99999", "::1:7400", "tcp://host:1", "h ost:1"]
)
def test_what_is_no_address(files: Files, listen: str) -> None:
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        files.load(listen=listen)


def test_a_tenant_that_nobody_could_be(files: Files) -> None:
    with pytest.raises(ConfigError, match="nobody could be it"):
        files.load(tenants={"red": {"warm_bytes": "1GiB"}})


@pytest.mark.parametrize(
    ("host", "loops"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_what_is_loopback(host: str, loops: bool) -> None:
    assert is_loopback(host) is loops
    assert not is_loopback("localhost.example")


def test_names_of_a_certificate() -> None:
    sans = {name: Identity(name, tenant) for name, tenant in (("a", "red"), ("b", "red"), ("c", "blue"))}
    access = RemoteAccess("::1", 1, sans=sans)
    assert access.address == "[::1]:1"
    assert access.by_certificate([b"x", b"a"]).tenant == "red"
    assert access.by_certificate([b"a", b"b"]).tenant == "red", "two names of one tenant are one identity"
    with pytest.raises(PermissionDenied, match="several identities"):
        access.by_certificate([b"a", b"c"])
    for names in ([], [b"A"], [b"a.x"], [b"\xff"]):
        with pytest.raises(PermissionDenied, match="belong to no tenant"):
            access.by_certificate(names)


@pytest.mark.parametrize("token", [None, b"", b"r", RED.encode()[:-1], RED.encode() + b"r", RED.upper().encode()])
def test_a_token_must_be_the_very_one(files: Files, token: bytes | None) -> None:
    access = files.load(**files.tokens())
    assert access is not None
    with pytest.raises(Unauthenticated):
        access.by_token(token)
