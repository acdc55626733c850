"""How a call is answered, whichever transport it came by: bytes in, bytes out, errors of the one tree.

Both transports look a method up in a table of `MethodSpec` and call `answer`; only they know frames or gRPC.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError, Message

from kvstore.protocol.errors import InternalError, InvalidRequest, KVStoreError
from kvstore.transport.engine import SessionView

log = logging.getLogger(__name__)

# (request, session, deadline in time.monotonic seconds) -> response. The request's type is the spec's.
Handler: TypeAlias = Callable[[Any, SessionView, float], Message]
# What to hold while a request of so many bytes is parsed and answered.
Gate: TypeAlias = Callable[[int], contextlib.AbstractContextManager[object]]

_NOTHING = contextlib.nullcontext()


def _no_gate(nbytes: int) -> contextlib.AbstractContextManager[object]:
    return _NOTHING


class Kind(IntEnum):
    """How long a method may take, hence where it runs on an attached session."""

    INLINE = 0  # does not block: on the session's reader thread
    WAIT = 1  # blocks for what others do: on the pool for waits
    PUT = 2  # copies bytes: in order of arrival on the session's own lane
    DESCRIPTORS = 3  # does not block; its reply carries descriptors


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """One method of a service."""

    name: str  # as in the .proto
    request: type[Message]
    response: type[Message]
    handle: Handler
    kind: Kind = Kind.INLINE
    gate: Gate = _no_gate


Methods: TypeAlias = Mapping[str, MethodSpec]


def parse(spec: MethodSpec, payload: bytes) -> Message:
    """The request in `payload`.

    Raises:
        InvalidRequest: the bytes are no such message.
    """
    try:
        return spec.request.FromString(payload)
    except DecodeError as error:
        raise InvalidRequest(f"{spec.name}: {len(payload)} bytes that are no {spec.request.__name__}") from error


def answer(spec: MethodSpec, payload: bytes, session: SessionView, deadline_s: float) -> bytes:
    """Parse, handle, serialize.

    Raises:
        KVStoreError: and nothing else; a defect becomes InternalError and is logged with its traceback.
    """
    try:
        with spec.gate(len(payload)):
            return spec.handle(parse(spec, payload), session, deadline_s).SerializeToString()
    except KVStoreError:
        raise
    except Exception as error:  # noqa: BLE001 - a defect in one call must not end the session, nor show a peer our insides
        raise internal_error(spec.name, error) from None


@contextlib.contextmanager
def defects_logged(name: str) -> Iterator[None]:
    """What `answer` does about defects, for calls that are answered in several steps."""
    try:
        yield
    except KVStoreError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise internal_error(name, error) from None


def internal_error(name: str, error: Exception) -> InternalError:
    """Log a defect with its traceback and give the error that the peer may see."""
    log.error("call failed: method=%s", name, exc_info=error)
    return InternalError("internal error, see the daemon's log")
