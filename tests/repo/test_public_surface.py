"""The public surface: a name that appears, vanishes or moves is a decision and not an accident."""

from __future__ import annotations

import inspect

import pytest
from google.protobuf.descriptor import ServiceDescriptor

import kvstore_client
from kvstore.v1 import admin_pb2, kvstore_pb2

EXPORTED = [
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

PROMISED = {
    "Client": "acquire close namespace ping stats",
    "Namespace": "acquire adopt clear delete exists keys match prefetch put stage",
    "Lease": "blocks check handoff read_into read_layers ready release_to tensors tokens view wait withheld "
    "withheld_reason __enter__ __exit__",
    "StagedBuffers": "put __enter__ __exit__ __getitem__ __len__",
    "PagedCache": "gather load scatter",
    "Keys": "extend from_digests __bytes__ __getitem__ __len__",
    "Match": "blocks by_tier tokens withheld withheld_reason",
}

MAY_BLOCK = [
    ("Client", "acquire"),
    ("Client", "ping"),
    ("Client", "stats"),
    ("Lease", "handoff"),
    ("Lease", "read_into"),
    ("Lease", "read_layers"),
    ("Lease", "wait"),
    *(("Namespace", name) for name in PROMISED["Namespace"].split() if name != "keys"),
    ("StagedBuffers", "put"),
]

SERVICES = {
    kvstore_pb2.DESCRIPTOR.services_by_name["KVStore"]: (
        "OpenSession OpenNamespace MapSlabs Match Exists Acquire Wait Renew Release Handoff Adopt Put Prefetch "
        "Delete Clear Hello Fetch Store"
    ),
    admin_pb2.DESCRIPTOR.services_by_name["Admin"]: (
        "GetStats ListNamespaces ListSessions InspectBlock Evict Flush Verify Compact Drain SetLogLevel Resize Record "
        "Pin SetTerms"
    ),
}


def test_exported_names() -> None:
    assert sorted(kvstore_client.__all__) == sorted(EXPORTED)
    assert [name for name in EXPORTED if not hasattr(kvstore_client, name)] == []


def test_errors_form_one_tree() -> None:
    exported = [getattr(kvstore_client, name) for name in EXPORTED]
    errors = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(errors) == 11
    assert all(issubclass(kind, kvstore_client.KVStoreError) for kind in errors)
    assert all(kind.__name__ in (kvstore_client.__doc__ or "") for kind in errors), "the tree in the docstring is stale"


@pytest.mark.parametrize("name", PROMISED)
def test_promised_members(name: str) -> None:
    kind = getattr(kvstore_client, name)
    assert [member for member in PROMISED[name].split() if not hasattr(kind, member)] == []


@pytest.mark.parametrize(("owner", "name"), MAY_BLOCK, ids=lambda value: str(value))
def test_every_call_that_can_block_has_a_deadline(owner: str, name: str) -> None:
    signature = inspect.signature(getattr(getattr(kvstore_client, owner), name))
    assert isinstance(signature.parameters["timeout_s"].default, float)


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: str(service.full_name))
def test_methods_of_the_wire(service: ServiceDescriptor) -> None:
    assert [method.name for method in service.methods] == SERVICES[service].split()
