"""The fake daemon and its knobs."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from kvstore.protocol.errors import KVStoreError
from kvstore.protocol.frames import PROTOCOL_VERSION
from kvstore_client.address import ATTACH_SUFFIX
from kvstore_client.outcomes import RejectReason
from kvstore_client.testing.grpc_server import GrpcFront
from kvstore_client.testing.server import Served
from kvstore_client.testing.store import FakeStore

_LOADER_EVERY_S = 0.001


class FakeDaemon:
    """A daemon in this process; a context manager.

    Knobs, to be turned at any time:

    Attributes:
        address: for Client(...).
        latency_s: every answer but hello and MapSlabs comes so much later.
        failure: what every call answers instead; None: nothing is wrong.
        renew_every_s: what new sessions are told.
        staging_bytes_max: what new sessions get at most.
        protocol_version: what it claims to speak.
        calls: how often each method was asked for, by the names of kvstore.protocol.frames.Method.
        store: what it knows.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        warm_bytes: int = 256 << 20,
        slab_bytes: int = 8 << 20,
        tenant: str = "default",
        with_grpc: bool = False,
    ) -> None:
        """Start listening.

        Args:
            path: of its socket; None: in a temporary directory of its own.
            warm_bytes: how much it can store.
            slab_bytes: nominal size of a slab.
            tenant: of every client.
            with_grpc: serve the gRPC API as well, which transport="grpc" and Client.stats() need.
        """
        self._folder = None if path is not None else Path(tempfile.mkdtemp(prefix="kvs-"))
        self._path = str(path if path is not None else Path(str(self._folder)) / "s")
        self.address = f"unix:{self._path}"
        self.latency_s = 0.0
        self.failure: KVStoreError | None = None
        self.renew_every_s = 5.0
        self.staging_bytes_max = 1 << 30
        self.protocol_version = PROTOCOL_VERSION
        self.calls: Counter[str] = Counter()
        self.running = threading.Event()
        self._sizes = (tenant, warm_bytes, slab_bytes)
        self._grpc = GrpcFront(self, self._path) if with_grpc else None
        self._served: list[Served] = []
        self._listener: socket.socket | None = None
        self.store: FakeStore = FakeStore(*self._sizes)
        self._start()

    @property
    def grpc_target(self) -> str:
        """What hello says."""
        return f"unix:{self._path}"

    # --- knobs

    def lose(self, keys: Iterable[bytes]) -> int:
        """Forget blocks, also under a lease, as if it had expired; returns how many."""
        return self.store.lose(keys)

    def chill(self, keys: Iterable[bytes], load_s: float | None = None) -> int:
        """Make blocks cold; returns how many.

        Args:
            keys: of the blocks.
            load_s: how long loading takes once a lease wants it; None: until load().
        """
        self.store.load_s = load_s
        return self.store.chill(keys)

    def load(self) -> None:
        """Finish all loading now."""
        self.store.load_all()

    def withhold(self, worth: int | None) -> None:
        """Promise at most so many blocks to a worker that says what recomputing takes; None: all that are stored."""
        self.store.worth = worth

    def reject(self, reason: RejectReason | None) -> None:
        """Refuse every block that a put would store; None: store again."""
        self.store.reason = reason

    def retire_slabs(self) -> None:
        """Lose all warm blocks and their slabs; clients hear of it by their next Renew."""
        self.store.retire()

    def hang(self) -> None:
        """Answer nothing from now on, like a stopped process."""
        self.running.clear()

    def resume(self) -> None:
        """Answer again, and first what came meanwhile."""
        self.running.set()

    def die(self) -> None:
        """Vanish as after kill -9: connections break, the socket is dead, the store is gone."""
        self._stop()
        self.store = FakeStore(*self._sizes)

    def restart(self) -> None:
        """Listen again, with an empty store, after die()."""
        self._start()

    # --- life

    def close(self) -> None:
        """Stop for good; idempotent."""
        self._stop()
        self.store.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self.instance_id = secrets.token_hex(8)
        self.running.set()
        attach = Path(self._path + ATTACH_SUFFIX)
        attach.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(attach))
        listener.listen(64)
        self._listener = listener
        self._stopped = threading.Event()
        if self._grpc is not None:
            self._grpc.start()
        for target, args in ((self._accept, (listener,)), (self._load_due, (self._stopped, self.store))):
            threading.Thread(target=target, args=args, name=f"fake-kvstored-{target.__name__}", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:  # closed
                return
            served = Served(self, sock)
            self._served.append(served)
            served.start()

    @staticmethod
    def _load_due(stopped: threading.Event, store: FakeStore) -> None:
        while not stopped.wait(_LOADER_EVERY_S):
            store.load_due()

    def _stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._stopped.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        listener.close()
        served, self._served = self._served, []
        for connection in served:
            connection.close()
        self.running.set()
        if self._grpc is not None:
            self._grpc.stop()
