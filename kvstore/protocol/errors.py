"""The error tree both sides share, with its mapping to gRPC status codes.

```
KVStoreError
├── Unavailable            no daemon, it is draining, or the connection was lost
├── DeadlineExceeded       the call's deadline passed
├── InvalidRequest         the request can never succeed as it stands
│   └── NotFound           it names a namespace, lease or block that does not exist
├── Unauthenticated        no session token, or one this daemon did not give
├── PermissionDenied       the token is good, the thing belongs to somebody else
├── QuotaExceeded          a limit is reached; the message says which
├── LeaseExpired           the lease ended, so its bytes must not be used
├── ProtocolMismatch       the two sides speak different protocol versions
└── InternalError          a defect of the daemon; it has the details in its log
```
"""

from __future__ import annotations

from typing import ClassVar


class KVStoreError(Exception):
    """Root of every error that this project raises on purpose."""

    code: ClassVar[int] = 2  # gRPC UNKNOWN


class Unavailable(KVStoreError):
    """No daemon answers, it is draining, or the connection was lost."""

    code = 14


class DeadlineExceeded(KVStoreError):
    """The call's deadline passed before an answer came."""

    code = 4


class InvalidRequest(KVStoreError):
    """The request can never succeed as it stands; the message names what is wrong and what would be right."""

    code = 3


class NotFound(InvalidRequest):
    """The request names a namespace, lease, token or block that does not exist."""

    code = 5


class Unauthenticated(KVStoreError):
    """No session token, or one that this daemon did not give."""

    code = 16


class PermissionDenied(KVStoreError):
    """The caller is known and may not do this."""

    code = 7


class QuotaExceeded(KVStoreError):
    """A limit is reached; the message says which, and what to do."""

    code = 8


class LeaseExpired(KVStoreError):
    """The lease ended; bytes read under it must not be used."""

    code = 9


class ProtocolMismatch(KVStoreError):
    """The two sides speak different protocol versions."""

    code = 12


class InternalError(KVStoreError):
    """A defect of the daemon; its log has the details."""

    code = 13


_BY_CODE: dict[int, type[KVStoreError]] = {
    kind.code: kind
    for kind in (
        Unavailable,
        DeadlineExceeded,
        InvalidRequest,
        NotFound,
        Unauthenticated,
        PermissionDenied,
        QuotaExceeded,
        LeaseExpired,
        ProtocolMismatch,
        InternalError,
    )
}


def from_code(code: int, message: str) -> KVStoreError:
    """The error for a gRPC status number (also used as the status of a local frame)."""
    return _BY_CODE.get(code, KVStoreError)(message)
