"""Between NamespaceSpec and its protobuf message."""

from __future__ import annotations

from kvstore.protocol.errors import InvalidRequest
from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore.protocol.namespace import CHAIN, SET, Kind, NamespaceSpec
from kvstore.v1 import types_pb2

_KIND_TO_PROTO = {CHAIN: types_pb2.NAMESPACE_KIND_CHAIN, SET: types_pb2.NAMESPACE_KIND_SET}
_KIND_FROM_PROTO: dict[int, Kind] = {number: kind for kind, number in _KIND_TO_PROTO.items()}


def to_proto(spec: NamespaceSpec) -> types_pb2.NamespaceSpec:
    """The message for a spec."""
    return types_pb2.NamespaceSpec(
        model=spec.model,
        revision=spec.revision,
        block_tokens=spec.block_tokens,
        kind=_KIND_TO_PROTO[spec.kind],
        layout=[
            types_pb2.TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, axes=tensor.axes)
            for tensor in spec.layout.tensors
        ],
        shard=[types_pb2.ShardAxis(axis=axis, rank=rank, size=size) for axis, (rank, size) in spec.shard_axes],
        identity=dict(spec.identity_pairs),
        hash_algorithm=spec.hash_algorithm,
        salt=spec.salt,
        cold_codec=spec.cold_codec,
    )


def from_proto(message: types_pb2.NamespaceSpec) -> NamespaceSpec:
    """The spec for a message.

    Raises:
        InvalidRequest: a field is missing or out of its limits.
    """
    kind = _KIND_FROM_PROTO.get(message.kind)
    if kind is None:
        raise InvalidRequest(f"kind is {message.kind}; it must be 1 (chain) or 2 (set)")
    return NamespaceSpec(
        model=message.model,
        revision=message.revision,
        block_tokens=message.block_tokens,
        kind=kind,
        layout=KVLayout(
            TensorSpec(tensor.name, tensor.dtype, tuple(tensor.shape), tensor.axes) for tensor in message.layout
        ),
        shard=tuple((axis.axis, (axis.rank, axis.size)) for axis in message.shard),
        identity=dict(message.identity),
        salt=message.salt,
        hash_algorithm=message.hash_algorithm,
        cold_codec=message.cold_codec,
    )
