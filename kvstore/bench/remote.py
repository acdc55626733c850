"""A remote worker's reads over TCP with mutual TLS, against the same bytes as a bare gRPC stream: remote_get.

python -m kvstore.bench.remote FOLDER BLOCKS BLOCK_NBYTES (the bare stream's server, until its standard input ends)
"""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import grpc
import numpy as np

from kvstore import runtime
from kvstore.bench import worker
from kvstore.bench.daemon import DaemonFailed, SpawnedDaemon, spawned
from kvstore.bench.figures import Result
from kvstore.bench.memory import WorkingSet, kv_like_blocks
from kvstore.bench.scale import Scale
from kvstore.bench.worker import IncompleteTransfer
from kvstore_client import TLS, Client

BLOCK_NBYTES = 2 << 20
_BATCH = 64
_TIMEOUT_S = 60.0
_METHOD = "/bench.Bare/Stream"
_MESSAGE_BYTES_MAX = 8 << 20
_SAN = "spiffe://bench/worker"
_DAYS = "2"


class NoOpenssl(RuntimeError):
    """There is no openssl to make certificates with."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority in a folder of its own, for one run of a benchmark or test."""

    folder: Path

    @classmethod
    def made_in(cls, folder: Path) -> Authority:
        """Make one.

        Raises:
            NoOpenssl: there is none on the PATH.
        """
        if shutil.which("openssl") is None:
            raise NoOpenssl("there is no openssl on the PATH to make certificates with")
        made = cls(folder)
        made._openssl(
            "req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", _DAYS, "-subj", "/CN=ca"
        )
        return made

    @property
    def ca(self) -> Path:
        """Its own certificate."""
        return self.folder / "ca.pem"

    def issue(self, name: str, san: str) -> tuple[Path, Path]:
        """(certificate, key) for subject alternative names such as "DNS:localhost,IP:127.0.0.1"."""
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={san}\n", encoding="utf-8")
        self._openssl("req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", _DAYS)
        self._openssl("x509", "-req", "-in", f"{name}.csr", *signing, "-extfile", f"{name}.ext", "-out", f"{name}.pem")
        (self.folder / f"{name}.key").chmod(0o600)
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments],
            cwd=self.folder,
            check=True,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def get(name: str, scale: Scale, folder: Path) -> Result:
    """acquire, read_into, release of 64 blocks at a time, against a bare stream of the same blocks, in turn.

    Both with mutual TLS on loopback, from a process of their own, into memory touched before.

    Raises:
        DaemonFailed, NoOpenssl, KVStoreError: it cannot be measured.
    """
    authority = Authority.made_in(folder)
    blocks = max(1, scale.working_set_bytes // BLOCK_NBYTES)
    working = WorkingSet(blocks, BLOCK_NBYTES)
    certificate, key = authority.issue("server", "DNS:localhost,IP:127.0.0.1")
    client_certificate, client_key = authority.issue("worker", f"URI:{_SAN}")
    tls = TLS(authority.ca, client_certificate, client_key)
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "tls_certificate": str(certificate),
        "tls_key": str(key),
        "tls_client_ca": str(authority.ca),
        "tenants.bench.sans": [_SAN],
    }
    with (
        spawned(scale.warm_bytes, 0, **settings) as daemon,
        Client(_address(daemon), tls=tls, name="bench") as client,
        _bare(authority, blocks) as bare,
    ):
        ours = _reader(client, working)
        return _alternate(name, working, scale, (ours, lambda: bare(working)))


def _alternate(
    name: str, working: WorkingSet, scale: Scale, pair: tuple[Callable[[], None], Callable[[], None]]
) -> Result:
    taken: tuple[list[float], list[float]] = ([], [])
    memcpy_s = []
    turns = list(zip(pair, taken, strict=True))
    for counted in (False, *[True] * scale.rounds):
        memcpy_s.append(working.memcpy_seconds())
        turns.reverse()  # neither is always the first
        for read, seconds in turns:
            working.out[:] = 0
            started = time.perf_counter()
            read()
            if counted:
                seconds.append(time.perf_counter() - started)
            working.check()
    ours_s, bare_s = taken
    ratios = [bare / ours for bare, ours in zip(bare_s, ours_s, strict=True)]
    return Result(
        name,
        {
            "ratio_grpc": round(statistics.median(ratios), 4),
            "ratio_min": round(min(ratios), 4),
            "ratio_max": round(max(ratios), 4),
            "ratio_memcpy": round(statistics.median(memcpy_s) / statistics.median(ours_s), 4),
            "seconds": statistics.median(ours_s),
            "bytes": working.nbytes,
            "gb_s": round(working.nbytes / statistics.median(ours_s) / 1e9, 3),
            "rounds": len(ratios),
        },
    )


def _reader(client: Client, working: WorkingSet) -> Callable[[], None]:
    space = worker.namespace(client, BLOCK_NBYTES, "remote")
    keys = space.keys(worker.tokens(len(working.source)))
    worker.put_all(space, keys, working.source, _TIMEOUT_S)

    def read_all() -> None:
        for start in range(0, len(keys), _BATCH):
            part = keys[start : start + _BATCH]
            with space.acquire(part, timeout_s=_TIMEOUT_S) as lease:
                if lease.blocks != len(part):
                    raise IncompleteTransfer(f"remote_get: {lease.blocks} of {len(part)} blocks are stored")
                lease.read_into(working.out[start : start + _BATCH], timeout_s=_TIMEOUT_S)

    return read_all


def _address(daemon: SpawnedDaemon) -> str:
    found = re.search(r"serving on (tcp://\S+)", daemon.log_tail(100))
    if found is None:
        raise DaemonFailed("the daemon does not say where it listens")
    return found[1]


@contextlib.contextmanager
def _bare(authority: Authority, blocks: int) -> Iterator[Callable[[WorkingSet], None]]:
    """A reader of the bare stream, whose server ends with the block."""
    command = [sys.executable, "-m", "kvstore.bench.remote", str(authority.folder), str(blocks), str(BLOCK_NBYTES)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline() or 0)
        files = [(authority.folder / file).read_bytes() for file in ("ca.pem", "worker.key", "worker.pem")]
        options = [("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX)]
        credentials = grpc.ssl_channel_credentials(*files)
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
            yield lambda working: _read_bare(channel, working)
    finally:
        process.stdin.close()
        process.wait(_TIMEOUT_S)
        process.stdout.close()


def _read_bare(channel: grpc.Channel, working: WorkingSet) -> None:
    stream = channel.unary_stream(_METHOD, None, None)(b"", timeout=_TIMEOUT_S)
    for target, message in zip(working.out, stream, strict=True):
        np.copyto(target, np.frombuffer(message, np.uint8))


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("blocks", type=int)
@click.argument("block_nbytes", type=int)
def serve_bare(folder: Path, blocks: int, block_nbytes: int) -> None:
    """Serve the working set as a stream of a message for each block, all made beforehand."""
    runtime.tune()
    messages = [row.tobytes() for row in kv_like_blocks(blocks, block_nbytes)]

    def stream(request: bytes, context: Any) -> Iterator[bytes]:  # noqa: ANN401 - gRPC's
        yield from messages

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_send_message_length", _MESSAGE_BYTES_MAX)])
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", handlers),))
    pair = [((folder / "server.key").read_bytes(), (folder / "server.pem").read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, (folder / "ca.pem").read_bytes(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    click.echo(port)
    sys.stdin.buffer.read()
    server.stop(0)


if __name__ == "__main__":
    serve_bare()
