"""Sessions over TCP: for workers on another host, with the same calls and no shared memory."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn

from google.protobuf.message import DecodeError

from kvstore.protocol.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KVStoreError,
    Unauthenticated,
    Unavailable,
)
from kvstore.v1 import kvstore_pb2 as pb
from kvstore_client._lazy import grpc, kvstore_pb2_grpc
from kvstore_client.fetching import RemotePlacement
from kvstore_client.grpc_link import GrpcLink, Metadata, error_of, metadata_of, open_tcp_channel
from kvstore_client.placement import Placement
from kvstore_client.put import PutTarget
from kvstore_client.session import Attachment, Options, Session, hello_of
from kvstore_client.storing import StorePipeline

ACCESS_KEY = "kvstore-access-bin"
_SERVICE = "/kvstore.v1.KVStore/"
_NOTICE_S = 0.05  # how long a call that failed waits for the stream to say that the session is over


def open_session(options: Options, deadline_s: float) -> Session:
    """Attach by whatever the address asks for. Raises as Session() does."""
    kind = RemoteSession if options.address.is_tcp else Session
    return kind(options, deadline_s)


class HelloStream:
    """A `kvstore_client.session.Attachment`: the open stream that a session over TCP lives and ends with."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata, on_lost: Callable[[str], None]) -> None:
        self._channel = channel
        self._metadata = metadata
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._call: Any = None

    def greet(self, request: pb.HelloRequest, deadline_s: float) -> pb.HelloResponse:
        """Say hello; a thread then waits for the end of the stream.

        Raises:
            KVStoreError: what the daemon answered, or that it did not.
        """
        answers: queue.SimpleQueue[pb.HelloResponse | KVStoreError] = queue.SimpleQueue()
        self._call = kvstore_pb2_grpc.KVStoreStub(self._channel).Hello(request, metadata=self._metadata)
        try:
            thread = threading.Thread(target=self._run, args=(answers,), name="kvstore-client-hello", daemon=True)
            thread.start()
            answer = answers.get(timeout=max(deadline_s - time.monotonic(), 0.001))
        except RuntimeError as error:
            raise Unavailable(f"no thread to be had for the session: {error}") from error
        except queue.Empty:
            raise DeadlineExceeded("the daemon did not answer the hello in time") from None
        if isinstance(answer, KVStoreError):
            raise answer
        return answer

    def _run(self, answers: queue.SimpleQueue[pb.HelloResponse | KVStoreError]) -> None:
        error: KVStoreError = Unavailable("the daemon ended the session")
        try:
            for message in self._call:
                answers.put(message)
        except grpc.RpcError as failure:
            error = error_of(failure)
        answers.put(error)
        self._end(str(error))

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._lost.is_set():
                return
            self._lost.set()
        self._on_lost(reason)

    @property
    def is_lost(self) -> bool:
        """Whether the stream has ended."""
        return self._lost.is_set()

    @property
    def has_late(self) -> bool:
        """Never: gRPC drops late answers."""
        return False

    def fileno(self) -> int:
        """There is no descriptor to watch; the stream's thread notices the end."""
        return -1

    def pump(self) -> None:
        """Nothing to do: gRPC's own threads take answers in."""

    def check_peer(self) -> None:
        """Nothing to do: the stream's thread notices the end."""

    def on_trouble(self, error: KVStoreError) -> None:
        """A call failed as if the session were over: see whether it is."""
        if isinstance(error, Unauthenticated):
            self._end(str(error))
        self._lost.wait(_NOTICE_S)

    def close(self) -> None:
        """End the session; idempotent."""
        self._end("this client closed the connection")
        if self._call is not None:
            self._call.cancel()
        self._channel.close()

    def abandon(self) -> None:
        """In a forked child: leave everything to the parent."""
        self._lost.set()

    def map_slabs(self, request: pb.MapSlabsRequest, deadline_s: float) -> NoReturn:
        """Refused: see Session.shares_memory."""
        raise InvalidRequest("there is no shared memory over TCP")


class RemoteSession(Session):
    """A session over TCP. Any thread may use it."""

    shares_memory: ClassVar[bool] = False
    attach: HelloStream

    def _connect(self, options: Options, deadline_s: float) -> Attachment:
        self._channel = open_tcp_channel(options.address, options.tls)
        self._access: Metadata = ((ACCESS_KEY, options.token),) if options.token else ()
        attach = HelloStream(self._channel, self._access, self._on_lost)
        self.link = self._link = GrpcLink(self._channel, self._access, attach.on_trouble)
        return attach

    def _greet(self, options: Options, deadline_s: float) -> pb.HelloResponse:
        hello = self.attach.greet(hello_of(options.name), deadline_s)
        self._metadata: Metadata = (*self._access, *metadata_of(hello.token))
        self.link = self._link = GrpcLink(self._channel, self._metadata, self.attach.on_trouble)
        self._fetch = self._channel.unary_stream(_SERVICE + "Fetch", None, None)
        self._store = self._channel.stream_unary(_SERVICE + "Store", None, None)
        return hello

    def _open(self, options: Options, deadline_s: float) -> None:
        super()._open(options, deadline_s)
        self._start_keeper()

    @contextlib.contextmanager
    def open_grpc(self) -> Iterator[tuple[grpc.Channel, Metadata]]:
        """The session's own channel."""
        yield self._channel, self._metadata

    @property
    def wants_renewal(self) -> bool:
        """Always: a session over TCP that says nothing for a lease's time is over."""
        return True

    def placement(self, group: pb.LeaseGroup, index: int, ready: int) -> Placement:
        """See Session."""
        return RemotePlacement(group, index, ready, self.fetch)

    def put_pipeline(self, target: PutTarget, count: int, deadline_s: float) -> StorePipeline:
        """See Session."""
        return StorePipeline(self, target, count, deadline_s)

    def fetch(self, request: pb.FetchRequest, deadline_s: float) -> Iterator[bytes]:
        """Serialized FetchChunks.

        Raises:
            KVStoreError: what the daemon answered, or no answer in time.
        """
        call = self._fetch(request.SerializeToString(), timeout=self._time_left(deadline_s), metadata=self._metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self._link.failure_of(error) from error
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def store(self, messages: Iterator[bytes], deadline_s: float) -> pb.PutResponse:
        """Send serialized StoreChunks; returns what became of the blocks. Raises as fetch() does."""
        try:
            reply = self._store(messages, timeout=self._time_left(deadline_s), metadata=self._metadata)
            return pb.PutResponse.FromString(reply)
        except grpc.RpcError as error:
            raise self._link.failure_of(error) from error
        except DecodeError as error:
            raise InternalError("the daemon's answer to Store cannot be read") from error

    def _time_left(self, deadline_s: float) -> float:
        self.link.flush()
        self.link.last_sent_s = now = time.monotonic()
        if deadline_s <= now:
            raise DeadlineExceeded("no time was left to ask the daemon")
        return deadline_s - now
