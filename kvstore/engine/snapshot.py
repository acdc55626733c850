"""What operators see of the engine, as protobuf messages. The core's part is read under the engine's lock."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from kvstore.core.block import COLD, HOT, PINNED, WARM, Block
from kvstore.core.cache import TIER_NAMES, BlockCache
from kvstore.core.puts import Reject
from kvstore.engine.media_stats import MediaStats
from kvstore.engine.sessions import Session
from kvstore.engine.spokes import AgentedTier
from kvstore.tiers.warm import WarmPool
from kvstore.v1 import admin_pb2


class Snapshots:
    """Builds the messages."""

    def __init__(self, version: str, instance_id: str, started_s: float) -> None:
        self._version = version
        self._instance_id = instance_id
        self._started_s = started_s

    def stats(self, cache: BlockCache, now_s: float) -> admin_pb2.GetStatsResponse:
        """Counters and sizes of the core."""
        residency, reads, puts = cache.residency, cache.reads, cache.puts
        message = admin_pb2.GetStatsResponse(
            version=self._version,
            instance_id=self._instance_id,
            uptime_ms=int(1000 * (now_s - self._started_s)),
            leases=len(reads.leases),
            namespaces=len(cache.index.namespaces),
            lookups=reads.lookups,
            hit_blocks=reads.hit_blocks,
            match_lookups=reads.match_lookups,
            match_hit_blocks=reads.match_hit_blocks,
            put_stored=puts.stored,
            put_exists=puts.exists,
            put_rejected={_reason(k): n for k, n in puts.rejected.items()},
            dropped_unsaved=residency.dropped_unsaved,
            orphans=cache.index.orphans,
            quarantined_bytes=_abandoned_bytes(cache),
        )
        for tier in (HOT, WARM, COLD):
            message.tiers.append(_tier(cache, tier))
        message.counters["slots_filling"] = cache.slots.filling
        message.counters["dirty_blocks"] = residency.unsaved
        message.counters["leaving_bytes"] = residency.leaving_bytes
        message.counters["prefetched_bytes"] = residency.prefetched_bytes
        for name, number in asdict(residency.admission.counts).items():
            message.counters[f"cold_{name}"] = number
        gate = cache.gate
        message.counters["expired_blocks"] = cache.terms.expired
        message.counters["withheld_blocks"] = gate.withheld_blocks
        message.counters["gated_acquires"] = gate.gated_acquires
        message.counters["probes"] = gate.probes
        return message

    def add_media(
        self, message: admin_pb2.GetStatsResponse, media: Mapping[int, AgentedTier], pool: WarmPool, said: MediaStats
    ) -> None:
        """What is known of the media; asks no agent."""
        for tier, entry in zip((HOT, WARM, COLD), message.tiers, strict=True):
            medium = media.get(tier)
            if tier == WARM:
                entry.state, entry.device, entry.populated_bytes = "ok", pool.lock_state, pool.populated_bytes
            elif medium is None:
                entry.state = "off"
            else:
                entry.state, entry.device, entry.restarts = medium.state, medium.device, medium.restarts
                entry.medium.update(said.latest(tier))
        message.anonymous_bytes = _anonymous_bytes()

    def namespaces(
        self, cache: BlockCache, entries: Mapping[bytes, admin_pb2.NamespaceInfo], tenant: str
    ) -> list[admin_pb2.NamespaceInfo]:
        """The tenant's namespaces with what they hold."""
        found = []
        for digest, namespace in cache.index.namespaces.items():
            if namespace.tenant == tenant:
                info = admin_pb2.NamespaceInfo(
                    namespace=digest, tenant=tenant, block_nbytes=namespace.block_nbytes,
                    blocks=sum(1 for block in namespace.blocks.values() if block.copies), epoch=namespace.epoch,
                )  # fmt: skip
                info.warm_bytes = cache.residency.budgets[WARM].by_namespace.get(namespace, 0)
                info.cold_bytes = cache.residency.budgets[COLD].by_namespace.get(namespace, 0)
                if digest in entries:
                    info.spec.CopyFrom(entries[digest].spec)
                    info.terms.CopyFrom(entries[digest].terms)
                found.append(info)
        return found

    def session(self, session: Session, cache: BlockCache, now_s: float) -> admin_pb2.SessionInfo:
        """One session."""
        leases = cache.reads.leases.of_session(session.id)
        return admin_pb2.SessionInfo(
            session_id=session.id,
            client_name=session.name,
            pid=session.pid,
            uid=session.uid,
            tenant=session.tenant,
            leases=len(leases),
            pinned_blocks=sum(lease.pinned for lease in leases),
            staging_bytes=session.staging.nbytes if session.staging is not None else 0,
            age_ms=int(1000 * (now_s - session.created_s)),
            idle_ms=int(1000 * (now_s - session.last_frame_s)),
            calls=session.calls,
        )

    def block(self, block: Block) -> admin_pb2.BlockInfo:
        """One block."""
        return admin_pb2.BlockInfo(
            key=block.key,
            namespace=block.namespace.digest,
            parent=block.parent.key if block.parent is not None else b"",
            tiers=[name for tier, name in TIER_NAMES.items() if block.copies & tier],
            pins=block.slot.pins if block.slot is not None else 0,
            children=sum(1 for _ in block.children()),
            orphan=block.orphan,
            depth=block.depth,
            checksum=block.checksum,
            nbytes=block.namespace.block_nbytes,
            stored_bytes=block.stored_bytes,
            hits=block.hits,
            pinned=block.level == PINNED,
        )


def _reason(reason: Reject) -> str:
    return reason.name.lower()


def _tier(cache: BlockCache, tier: int) -> admin_pb2.TierStats:
    count, budget = cache.residency.counts[tier], cache.residency.budgets[tier]
    message = admin_pb2.TierStats(
        name=TIER_NAMES[tier],
        capacity_bytes=budget.capacity_bytes,
        used_bytes=budget.used_bytes,
        blocks=count.blocks,
        hits=count.hits,
        evictions=count.evictions,
        writes=count.writes,
        write_failures=count.write_failures,
        corrupt=count.corrupt,
        promotions=count.promotions,
    )
    if tier == COLD:
        message.stored_bytes, message.raw_bytes = budget.used_bytes, cache.residency.raw_cold_bytes
    else:
        message.stored_bytes = message.raw_bytes = budget.used_bytes
    if tier == WARM:
        message.fetch_bytes_per_s = round(cache.gate.copy_bytes_per_s)
    else:
        cost = cache.gate.costs.cost(tier)
        message.fetch_bytes_per_s = round(1 / cost.s_per_byte) if cost.s_per_byte else 0
        message.fetch_fixed_us = round(1e6 * cost.fixed_s)
    return message


def _abandoned_bytes(cache: BlockCache) -> int:
    """Slots that are still being filled though nobody waits for them any more."""
    return sum(
        block.namespace.slot_bytes for block in cache.reads.loads if block.slot is not None and block.slot.pins == 0
    )


def _anonymous_bytes() -> int:
    """Anonymous memory of this process; the pool is shared memory and not in it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
