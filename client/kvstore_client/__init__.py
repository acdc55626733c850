"""Client of the kvtier daemon: KV-cache blocks from GPU memory, pinned RAM and SSD behind one sidecar.

    from kvstore_client import Client, KVLayout, TensorSpec

    client = Client()
    layout = KVLayout([TensorSpec("kv", "bfloat16", (2, 32, 16, 8, 128), "kv layer token head dim")])
    ns = client.namespace(model="org/name", revision="main", block_tokens=16, layout=layout)
    keys = ns.keys(token_ids)
    with ns.acquire(keys) as lease:
        lease.read_into(out)
    outcomes = ns.put(keys, blocks)

A worker that treats the cache as optional uses Client(fail_open=True): a daemon that is gone, late or broken is then
a miss within the call's deadline, and nothing worse.

Errors:

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

On another host than the daemon's: Client("tcp://host:port", tls=TLS(...)), see docs/protocol.md.

`kvstore_client.testing` has a daemon in this process for tests of your own.
"""

from kvstore.protocol.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KVStoreError,
    LeaseExpired,
    NotFound,
    PermissionDenied,
    ProtocolMismatch,
    QuotaExceeded,
    Unauthenticated,
    Unavailable,
)
from kvstore.protocol.keys import Keys
from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore_client.address import TLS
from kvstore_client.client import Client
from kvstore_client.lease import Lease
from kvstore_client.namespace import Namespace
from kvstore_client.outcomes import (
    EXISTS,
    REJECTED,
    STORED,
    Match,
    PutOutcome,
    PutStatus,
    RejectReason,
    WithheldReason,
)
from kvstore_client.paged import PagedCache
from kvstore_client.reading import LeaseGroup
from kvstore_client.staged import StagedBuffers

__all__ = [
    "EXISTS",
    "REJECTED",
    "STORED",
    "TLS",
    "Client",
    "DeadlineExceeded",
    "InternalError",
    "InvalidRequest",
    "KVLayout",
    "KVStoreError",
    "Keys",
    "Lease",
    "LeaseExpired",
    "LeaseGroup",
    "Match",
    "Namespace",
    "NotFound",
    "PagedCache",
    "PermissionDenied",
    "ProtocolMismatch",
    "PutOutcome",
    "PutStatus",
    "QuotaExceeded",
    "RejectReason",
    "StagedBuffers",
    "TensorSpec",
    "Unauthenticated",
    "Unavailable",
    "WithheldReason",
]
