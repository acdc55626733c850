"""What the daemon remembers of its namespaces across restarts: their specifications and epochs.

One small file, replaced atomically. Without it the blocks of the cold tier would be nameless, and a namespace
that was cleared could come back from the dead.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from google.protobuf.message import DecodeError

from kvstore.protocol.convert import from_proto, to_proto
from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.v1 import admin_pb2, types_pb2

_FILE = "namespaces.bin"
_CLEAN = "clean-shutdown"


class Catalogue:
    """The namespaces that have been opened, on disk."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the daemon's state directory, which it owns alone."""
        self._path = folder / _FILE
        self._clean = folder / _CLEAN
        self._lock = threading.Lock()
        self.entries: dict[bytes, admin_pb2.NamespaceInfo] = {}
        self._unwritten: dict[bytes, admin_pb2.NamespaceInfo] = {}  # the disk refused them
        self.damaged = False

    def load(self) -> None:
        """Read the file; a damaged one is set aside (its blocks are then swept from the cold tier)."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        try:
            message = admin_pb2.ListNamespacesResponse.FromString(data)
            for entry in message.namespaces:
                if from_proto(entry.spec).digest(entry.tenant) != entry.namespace:
                    raise InvalidRequest("a namespace does not match its digest")
                self.entries[entry.namespace] = entry
        except (DecodeError, InvalidRequest):
            self.entries.clear()
            self.damaged = True
            self._path.rename(self._path.with_suffix(".damaged"))

    def add(self, digest: bytes, tenant: str, spec: NamespaceSpec, epoch: int) -> None:
        """Remember a namespace, if it is new. Raises OSError where the disk refuses."""
        with self._lock:
            if digest in self.entries:
                return
            entry = admin_pb2.NamespaceInfo(
                namespace=digest, tenant=tenant, spec=to_proto(spec), block_nbytes=spec.block_nbytes, epoch=epoch
            )
            self.entries[digest] = entry
            try:
                self._write()
            except OSError:
                self._unwritten[digest] = self.entries.pop(digest)
                raise
            self._unwritten.pop(digest, None)

    def set_epoch(self, digest: bytes, epoch: int) -> None:
        """Remember that a namespace was cleared; durable when it returns.

        Also one that could not be remembered when it was opened: blocks that it had before would be swept at the next
        start, but that takes time, and if it was opened again meanwhile, the start after that would take them for good.

        Raises:
            OSError: the disk refuses. The old epoch stays.
        """
        with self._lock:
            entry = self.entries.get(digest, self._unwritten.get(digest))
            if entry is None:
                return
            before, entry.epoch = entry.epoch, epoch
            self.entries[digest] = entry
            try:
                self._write()
            except OSError:
                entry.epoch = before
                if digest in self._unwritten:
                    del self.entries[digest]
                raise
            self._unwritten.pop(digest, None)

    def set_terms(self, digest: bytes, terms: types_pb2.NamespaceTerms) -> None:
        """Remember how a namespace is treated; durable when it returns.

        Raises:
            OSError: the disk refuses. The old terms stay.
        """
        with self._lock:
            entry = self.entries[digest]
            before = types_pb2.NamespaceTerms()
            before.CopyFrom(entry.terms)
            entry.terms.CopyFrom(terms)
            try:
                self._write()
            except OSError:
                entry.terms.CopyFrom(before)
                raise

    def take_clean_mark(self) -> bool:
        """Whether the last daemon ended in order; the mark is taken away."""
        try:
            self._clean.unlink()
        except FileNotFoundError:
            return False
        return True

    def leave_clean_mark(self) -> None:
        """Say that everything was put away in order."""
        self._clean.touch(mode=0o600)

    def _write(self) -> None:
        message = admin_pb2.ListNamespacesResponse(namespaces=list(self.entries.values()))
        fresh = self._path.with_suffix(".new")
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(message.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
