"""A daemon with a TCP listener, and clients of several identities; the certificates are made for the run."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from daemon_fixtures import Daemons, StartDaemon
from daemon_process import DaemonProcess
from kvstore.bench.remote import Authority, NoOpenssl
from kvstore.v1 import admin_pb2_grpc, kvstore_pb2_grpc
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client import TLS, Client
from polling import PATIENCE_S

SANS = {
    "server": "DNS:localhost,IP:127.0.0.1",
    "red": "URI:spiffe://test/red",
    "blue": "DNS:blue.test",
    "ops": "URI:spiffe://test/ops",
    "stranger": "URI:spiffe://test/stranger",
    "both": "URI:spiffe://test/red,DNS:blue.test",
    "elsewhere": "DNS:elsewhere.test",
}
TENANTS = {
    "red": {"sans": ["spiffe://test/red"], "admin_sans": ["spiffe://test/ops"]},
    "blue": {"sans": ["blue.test"]},
    "default": {"uids": [os.getuid()]},
}


@dataclass(frozen=True)
class Certificates:
    """One authority that the daemon trusts, and one that it does not, which has issued the same names."""

    authority: Authority
    foreign: Authority

    def tls(self, who: str, *, foreign: bool = False, **changes: Any) -> TLS:
        """What a client shows."""
        issuer = self.foreign if foreign else self.authority
        files = {
            "ca": self.authority.ca,
            "certificate": issuer.folder / f"{who}.pem",
            "key": issuer.folder / f"{who}.key",
        }
        return TLS(**{**files, **changes})

    def settings(self, server: str = "server") -> dict[str, Any]:
        """Of a daemon with mutual TLS."""
        folder = self.authority.folder
        return {
            "listen": "127.0.0.1:0",
            "tls_certificate": str(folder / f"{server}.pem"),
            "tls_key": str(folder / f"{server}.key"),
            "tls_client_ca": str(self.authority.ca),
            "tenants": TENANTS,
        }


@dataclass
class Remote:
    """A daemon reached over TCP."""

    daemon: DaemonProcess
    certificates: Certificates
    tokens: dict[str, str] = field(default_factory=dict)
    _channels: list[grpc.Channel] = field(default_factory=list)
    _clients: list[Client] = field(default_factory=list)

    @property
    def target(self) -> str:
        """HOST:PORT that it said last."""
        return re.findall(r"serving on tcp://(\S+)", self.daemon.log())[-1]

    def options(self, who: str) -> dict[str, Any]:
        """Of a client that is `who`."""
        return {"token": self.tokens[who]} if self.tokens else {"tls": self.certificates.tls(who)}

    def client(self, who: str = "red", **options: Any) -> Client:
        """A client that is `who`."""
        made = Client(f"tcp://{self.target}", **{**self.options(who), **options})
        self._clients.append(made)
        return made

    def raw(self, who: str = "red") -> RawRemote:
        """A session by hand."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 8 << 20)]
        if self.tokens:
            channel = grpc.insecure_channel(self.target, options=options)
        else:
            tls = self.certificates.tls(who)
            files = [Path(str(file)).read_bytes() for file in (tls.ca, tls.key, tls.certificate)]
            channel = grpc.secure_channel(self.target, grpc.ssl_channel_credentials(*files), options=options)
        self._channels.append(channel)
        access = (("kvstore-access-bin", self.tokens[who].encode()),) if self.tokens else ()
        return RawRemote(channel, access)

    def close(self) -> None:
        """Close what was made here."""
        for client in self._clients:
            client.close()
        for channel in self._channels:
            channel.close()


class RawRemote:
    """A session that does exactly what a test tells it, well or badly."""

    def __init__(self, channel: grpc.Channel, access: tuple[tuple[str, str | bytes], ...]) -> None:
        self.channel = channel
        self.data: Any = kvstore_pb2_grpc.KVStoreStub(channel)
        self.admin: Any = admin_pb2_grpc.AdminStub(channel)
        self.access = access
        self.metadata = access
        self.hello_stream: Any = None

    def hello(self, name: str = "raw", version: int = 1) -> RawRemote:
        """Begin the session."""
        request = pb.HelloRequest(protocol_version=version, client_name=name)
        self.hello_stream = self.data.Hello(request, metadata=self.access, timeout=3600)
        reply = next(self.hello_stream)
        self.metadata = (*self.access, ("kvstore-token", reply.token.hex()))
        return self

    def call(self, method: Any, request: Any, timeout: float = PATIENCE_S) -> Any:
        """One call of the session."""
        return method(request, metadata=self.metadata, timeout=timeout)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Made once for the run."""
    made = []
    for name in ("ours", "foreign"):
        try:
            authority = Authority.made_in(tmp_path_factory.mktemp(name))
        except NoOpenssl as error:
            pytest.skip(str(error))
        for who, san in SANS.items():
            authority.issue(who, san)
        made.append(authority)
    return Certificates(*made)


@pytest.fixture(scope="module")
def remote_served(certificates: Certificates) -> Iterator[DaemonProcess]:
    """A daemon with mutual TLS that all tests of a module share. 128 MiB warm."""
    with Daemons() as daemons:
        yield daemons.start(**certificates.settings(), warm_bytes="128MiB")


@pytest.fixture
def start_remote(start_daemon: StartDaemon, certificates: Certificates) -> Iterator[Any]:
    """Starts daemons with mutual TLS, or with `tokens`, by further keys of the configuration file."""
    made: list[Remote] = []

    def start(tokens: bool = False, **settings: Any) -> Remote:
        shown: dict[str, str] = {}
        wanted = certificates.settings()
        if tokens:
            shown = {who: secrets.token_hex(32) for who in ("red", "blue", "ops")}
            wanted = {"listen": "127.0.0.1:0", "tenants": token_tenants(certificates.authority.folder, shown)}
        made.append(Remote(start_daemon(**{**wanted, **settings}), certificates, shown))
        return made[-1]

    yield start
    for each in made:
        each.close()


def token_tenants(folder: Path, tokens: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Tenants known by token files, which are written."""
    for who, token in tokens.items():
        file = folder / f"{who}.token"
        file.touch(mode=0o600)
        file.write_text(token + "\n")
    return {
        "red": {"token_file": str(folder / "red.token"), "admin_token_file": str(folder / "ops.token")},
        "blue": {"token_file": str(folder / "blue.token")},
        "default": {"uids": [os.getuid()]},
    }
