"""Blocks whose bytes follow from their key, namespace and version, so that any mix-up is seen.

A version is what a worker's weights are: a clear that has returned begins the next one.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import xxhash

from kvstore.protocol.layout import KVLayout, TensorSpec
from kvstore.protocol.namespace import NamespaceSpec


class Content(NamedTuple):
    """Whose bytes they are."""

    digest: bytes
    key: bytes
    version: int
    lossy: bool
    checksum: bytes


class Contents:
    """Derives bytes, and says whose some bytes are."""

    def __init__(self) -> None:
        self._bytes: dict[tuple[bytes, bytes, int, bool], bytes] = {}
        self._owners: dict[bytes, Content] = {}

    def of(self, digest: bytes, key: bytes, version: int, nbytes: int, lossy: bool = False) -> bytes:
        """The bytes that belong under a key; `lossy`: as a lossy codec gives them back."""
        name = (digest, key, version, lossy)
        found = self._bytes.get(name)
        if found is None:
            seed = digest + key + b"%d %d" % (version, lossy)
            found = self._bytes[name] = hashlib.shake_128(seed).digest(nbytes)
            self._owners[found] = Content(*name, checksum_of(found))
        return found

    def owner(self, data: bytes) -> Content | None:
        """Whose bytes these are; None: nobody's, or a mixture."""
        return self._owners.get(data)


def checksum_of(data: bytes) -> bytes:
    """xxh3-128, as the engine computes it."""
    return xxhash.xxh3_128(data).digest()


def key_of(path: str) -> bytes:
    """The key at the end of a path; the same in every namespace."""
    return hashlib.sha256(path.encode()).digest()


_KEYS: dict[str, list[bytes]] = {}


def keys_of(path: str) -> list[bytes]:
    """A path in a tree of a few branches a node: each of its beginnings is the parent of the next."""
    found = _KEYS.get(path)
    if found is None:
        found = _KEYS[path] = [key_of(path[: i + 1]) for i in range(len(path))]
    return found


def spec_of(
    model: str, nbytes: int, *, kind: str = "chain", block_tokens: int = 16, cold_codec: str = ""
) -> NamespaceSpec:
    """A namespace of blocks of so many bytes."""
    layout = KVLayout([TensorSpec("kv", "uint8", (nbytes,), "layer")])
    return NamespaceSpec(model, "1", block_tokens, kind, layout, cold_codec=cold_codec)  # type: ignore[arg-type]
