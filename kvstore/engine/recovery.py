"""After a restart: which blocks of the cold tier can still be trusted to be what they were."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.core.block import COLD, Namespace
from kvstore.core.cache import BlockCache, NamespaceShape, RecoveredBlock
from kvstore.engine.catalogue import Catalogue
from kvstore.engine.mover import DurableTier
from kvstore.engine.treatment import core_terms
from kvstore.protocol.convert import from_proto
from kvstore.protocol.errors import InvalidRequest, KVStoreError, QuotaExceeded, Unavailable
from kvstore.protocol.namespace import NamespaceSpec
from kvstore.tiers.base import BlockRef, StoredRecord
from kvstore.v1 import admin_pb2

_SCAN_FAILURES_MAX = 8  # a damaged medium is set aside once it has cost three agents
_SCAN_PATIENCE_S = 30.0
_SCAN_RETRY_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Recovered:
    """Outcome of a recovery."""

    blocks: int = 0
    swept: list[BlockRef] = field(default_factory=list)  # of no known namespace, an old epoch, or a wrong size


def scan_records(cold: DurableTier) -> list[StoredRecord]:
    """All cold records; an agent that dies meanwhile is replaced, so ask again before giving up on them.

    Raises:
        Unavailable: they cannot be read.
    """
    failures, deadline_s = 0, time.monotonic() + _SCAN_PATIENCE_S
    while failures < _SCAN_FAILURES_MAX and time.monotonic() < deadline_s:
        if cold.state == "ok":
            try:
                return list(cold.scan())
            except KVStoreError as error:
                _log.warning("reading the cold tier's records failed: %s", error)
                failures += 1
        time.sleep(_SCAN_RETRY_S)
    raise Unavailable(f"the cold tier cannot be read ({cold.state}); start with --cold-bytes 0 to do without it")


def shape_of(tenant: str, spec: NamespaceSpec) -> NamespaceShape:
    """What the core needs of a specification."""
    return NamespaceShape(
        tenant, spec.block_nbytes, spec.block_tokens, spec.kind == "chain", spec.layout.text, spec.cold_codec
    )


def recover(cache: BlockCache, catalogue: Catalogue, records: Iterable[StoredRecord]) -> Recovered:
    """Enter every record that belongs to a remembered namespace at its present epoch. Under the engine's lock."""
    result = Recovered()
    namespaces = {}
    for digest, entry in catalogue.entries.items():
        opened = _reopen(cache, entry)
        if opened is not None:
            namespaces[digest] = opened
    for record in records:
        namespace = namespaces.get(record.ref.namespace)
        if namespace is None and record.ref.namespace in catalogue.entries:
            continue  # it does not fit this daemon's settings; another start may serve it
        if namespace is None or record.epoch != namespace.epoch or record.nbytes != namespace.block_nbytes:
            result.swept.append(record.ref)
            continue
        cache.recover(
            namespace,
            RecoveredBlock(record.ref.key, record.parent, record.checksum, record.stored_bytes, record.lossy),
        )
        result.blocks += 1
    for namespace in namespaces.values():
        cache.recovered(namespace)
    cache.trim(COLD)  # the tier, or a tenant's share of it, may have been made smaller
    return result


def _reopen(cache: BlockCache, entry: admin_pb2.NamespaceInfo) -> Namespace | None:
    try:
        shape = shape_of(entry.tenant, from_proto(entry.spec))
        return cache.open_namespace(entry.namespace, shape, entry.epoch, core_terms(entry.terms))
    except (InvalidRequest, QuotaExceeded) as error:
        _log.warning("namespace %s is left out: %s", entry.namespace[:8].hex(), error)
        return None
