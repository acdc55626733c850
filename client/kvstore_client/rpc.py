"""The calls of the service, typed: one constant each, and what both transports offer to carry them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message

from kvstore.protocol.errors import InternalError, InvalidRequest
from kvstore.protocol.frames import Method
from kvstore.v1 import kvstore_pb2 as pb

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
R_co = TypeVar("R_co", bound=Message, covariant=True)

MAX_WAIT_S = 86_400.0  # what a deadline is cut to, so that it fits every clock and timer on the way


@dataclass(frozen=True, slots=True, eq=False)
class Rpc(Generic[Q, R]):
    """One call of the service.

    Attributes:
        method: its number on the local RPC.
        name: its name in the gRPC service.
        reply: the class of its answer.
        is_long: the daemon may work on it for milliseconds, so that nobody should spin for the answer.
    """

    method: Method
    name: str
    reply: type[R]
    is_long: bool = False

    def decode(self, payload: bytes) -> R:
        """The answer from its bytes.

        Raises:
            InternalError: the bytes are no such message.
        """
        try:
            return self.reply.FromString(payload)
        except DecodeError as error:
            raise InternalError(f"the daemon's answer to {self.name} cannot be read") from error


HELLO: Rpc[pb.HelloRequest, pb.HelloResponse] = Rpc(Method.HELLO, "Hello", pb.HelloResponse, True)
OPEN_SESSION: Rpc[pb.OpenSessionRequest, pb.OpenSessionResponse] = Rpc(
    Method.OPEN_SESSION, "OpenSession", pb.OpenSessionResponse, True
)
OPEN_NAMESPACE: Rpc[pb.OpenNamespaceRequest, pb.OpenNamespaceResponse] = Rpc(
    Method.OPEN_NAMESPACE, "OpenNamespace", pb.OpenNamespaceResponse
)
MAP_SLABS: Rpc[pb.MapSlabsRequest, pb.MapSlabsResponse] = Rpc(Method.MAP_SLABS, "MapSlabs", pb.MapSlabsResponse)
MATCH: Rpc[pb.MatchRequest, pb.MatchResponse] = Rpc(Method.MATCH, "Match", pb.MatchResponse)
EXISTS: Rpc[pb.ExistsRequest, pb.ExistsResponse] = Rpc(Method.EXISTS, "Exists", pb.ExistsResponse)
ACQUIRE: Rpc[pb.AcquireRequest, pb.LeaseReply] = Rpc(Method.ACQUIRE, "Acquire", pb.LeaseReply)
WAIT: Rpc[pb.WaitRequest, pb.WaitResponse] = Rpc(Method.WAIT, "Wait", pb.WaitResponse, True)
RENEW: Rpc[pb.RenewRequest, pb.RenewResponse] = Rpc(Method.RENEW, "Renew", pb.RenewResponse)
RELEASE: Rpc[pb.ReleaseRequest, pb.ReleaseResponse] = Rpc(Method.RELEASE, "Release", pb.ReleaseResponse)
HANDOFF: Rpc[pb.HandoffRequest, pb.HandoffResponse] = Rpc(Method.HANDOFF, "Handoff", pb.HandoffResponse)
ADOPT: Rpc[pb.AdoptRequest, pb.LeaseReply] = Rpc(Method.ADOPT, "Adopt", pb.LeaseReply)
PUT: Rpc[pb.PutRequest, pb.PutResponse] = Rpc(Method.PUT, "Put", pb.PutResponse, True)
PREFETCH: Rpc[pb.PrefetchRequest, pb.PrefetchResponse] = Rpc(Method.PREFETCH, "Prefetch", pb.PrefetchResponse)
DELETE: Rpc[pb.DeleteRequest, pb.DeleteResponse] = Rpc(Method.DELETE, "Delete", pb.DeleteResponse)
CLEAR: Rpc[pb.ClearRequest, pb.ClearResponse] = Rpc(Method.CLEAR, "Clear", pb.ClearResponse)


LateHandler: TypeAlias = Callable[[bytes | None], None]
"""Gets the bytes of an answer that came too late; None if it was an error."""


class Pending(Protocol[R_co]):
    """A call that was sent and whose answer has not been taken yet."""

    @property
    def was_answered(self) -> bool:
        """Whether the daemon has answered, and not so late that the late handler is told."""

    def take(self, deadline_s: float) -> R_co:
        """Take the answer. Raises as Link.call() does; after DeadlineExceeded the late handler stays armed."""

    def on_late(self, handler: LateHandler) -> None:
        """Call `handler` when the answer comes after take() gave up, from the thread that reads it."""


class Link(Protocol):
    """A transport for the calls of one session. Any thread may use it.

    start() is for several calls at once; defer() for those whose answer nobody needs.
    """

    last_sent_s: float
    """time.monotonic() of the last frame sent."""
    keeps_order: ClassVar[bool]
    """Whether the daemon gets calls in the order in which one thread starts them."""

    def call(self, rpc: Rpc[Q, R], request: Q, deadline_s: float, on_late: LateHandler | None = None) -> R:
        """Send a request and return its answer.

        Args:
            rpc: which call.
            request: its message.
            deadline_s: on time.monotonic().
            on_late: called if the answer comes after the deadline, from the thread that reads it.

        Raises:
            DeadlineExceeded: no answer came in time.
            Unavailable: the connection is lost.
            KVStoreError: what the daemon answered.
        """

    def start(self, rpc: Rpc[Q, R], request: Q, deadline_s: float) -> Pending[R]:
        """Send a request. Raises as call() does."""

    @property
    def has_deferred(self) -> bool:
        """Whether requests wait for flush()."""

    def defer(self, rpc: Rpc[Q, Any], request: Q) -> None:
        """Send a request whose answer nobody needs, before the next call or by flush(). Never waits or raises.

        In one piece with the next call it costs nothing; by itself it wakes the daemon, which takes 25 to 90 us.
        """

    def flush(self) -> None:
        """Send what was deferred, as far as the limit of calls in flight allows. Never waits or raises."""

    def pump(self) -> None:
        """Take in answers that have arrived, without waiting for any."""

    def close(self) -> None:
        """End the link; idempotent."""

    def abandon(self) -> None:
        """Close the descriptors in a forked child, without a word to the daemon."""


def deadline_after(timeout_s: float) -> float:
    """The deadline on time.monotonic() of a call that may take `timeout_s` from now.

    Raises:
        InvalidRequest: it is not a number of seconds from 0.
    """
    if not isinstance(timeout_s, (int, float)) or math.isnan(timeout_s) or timeout_s < 0:
        raise InvalidRequest(f"timeout_s is {timeout_s!r}; it must be a number of seconds, 0 or more")
    return time.monotonic() + (timeout_s if timeout_s < MAX_WAIT_S else MAX_WAIT_S)


def server_budget_s(remaining_s: float) -> float:
    """What the daemon is told of the time left: a little less, so that its answer arrives in time."""
    return remaining_s - min(0.02, remaining_s * 0.1)
