"""All transports over one engine."""

from __future__ import annotations

import contextlib
import logging
import time

from kvstore.transport.admin import AdminHandlers, AdminHooks
from kvstore.transport.attach import AttachServer
from kvstore.transport.config import TransportConfig, TransportHooks
from kvstore.transport.engine import Engine
from kvstore.transport.grpc_server import GrpcServer
from kvstore.transport.handlers import Handlers, by_frame_method
from kvstore.transport.registry import SessionRegistry
from kvstore.transport.remote import RemoteServer

log = logging.getLogger(__name__)


class Transport:
    """The attach socket, the gRPC server and, where asked for, the TCP listener.

    Call sequence: start, (set_draining), stop.

    The caller holds the lock on the state directory before start, keeps the engine alive until stop has
    returned, and then closes it.
    """

    def __init__(self, engine: Engine, config: TransportConfig, hooks: TransportHooks) -> None:
        """Put the transports together; binds nothing.

        Raises:
            InvalidRequest: the configuration cannot work.
        """
        config.validate()
        self._config = config
        self._hooks = hooks
        handlers = Handlers(engine, config.lease_ttl_s)
        admin = AdminHandlers(engine, AdminHooks(hooks.is_operator, hooks.set_log_level, self._drained))
        registry = SessionRegistry()
        self._grpc = GrpcServer(engine, handlers, admin.methods(), config, registry)
        self._attach = AttachServer(engine, handlers, by_frame_method(handlers.methods()), config, hooks, registry)
        self._remote: RemoteServer | None = None
        if config.remote is not None:
            # Every call has passed the gate for admins before it gets here; a uid of this machine says nothing there.
            ops = AdminHandlers(engine, AdminHooks(lambda _: True, hooks.set_log_level, self._drained))
            self._remote = RemoteServer(engine, handlers, ops.methods(), config, config.remote)

    @property
    def grpc_target(self) -> str:
        """The address for clients, `unix:/path`."""
        return self._config.grpc_target

    def start(self) -> None:
        """Serve. The attach socket comes last: who can attach can call.

        Raises:
            PathTaken: a socket's path is in use.
            InvalidRequest: the socket's group cannot be given.
            OSError: the directory is missing or not writable; the TCP address cannot be had.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self._grpc.stop, 0.0)
            self._grpc.start()
            undo.callback(self._attach.close_door)
            self._attach.start()
            if self._remote is not None:
                undo.callback(self._remote.stop, 0.0)
                self._remote.start()
            undo.pop_all()
        log.info("serving on %s and %s", self._config.grpc_path, self._config.attach_path)

    def set_draining(self) -> None:
        """Report NOT_SERVING from now on; everything is still answered. Idempotent."""
        self._grpc.set_serving(False)

    def stop(self, grace_s: float) -> None:
        """Take nothing new, let what runs finish for up to `grace_s`, end every session. Idempotent."""
        until_s = time.monotonic() + grace_s
        self.set_draining()
        self._attach.close_door()
        if self._remote is not None:
            self._remote.stop(grace_s)
        self._grpc.stop(max(until_s - time.monotonic(), 0.0))
        self._attach.stop(max(until_s - time.monotonic(), 0.0))

    def _drained(self) -> None:
        self.set_draining()
        self._hooks.on_drain()
