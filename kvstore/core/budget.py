"""Byte budgets of a tier: one for all, and where configured one per tenant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Budget:
    """Counts bytes against a capacity and against limits per tenant. Never goes below zero."""

    capacity_bytes: int
    tenant_limits: Mapping[str, int] = field(default_factory=dict)
    used_bytes: int = 0
    by_tenant: dict[str, int] = field(default_factory=dict)

    def missing(self, tenant: str, nbytes: int) -> int:
        """How many bytes must leave before `tenant` may add `nbytes`; 0: it may now."""
        over = self.used_bytes + nbytes - self.capacity_bytes
        limit = self.tenant_limits.get(tenant) if self.tenant_limits else None
        if limit is not None:
            over = max(over, self.by_tenant.get(tenant, 0) + nbytes - limit)
        return over if over > 0 else 0

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return max(0, self.capacity_bytes - self.used_bytes)

    def fits(self, tenant: str, nbytes: int) -> bool:
        """Whether `tenant` could add `nbytes` if everything else left."""
        return nbytes <= min(self.capacity_bytes, self.tenant_limits.get(tenant, self.capacity_bytes))

    def over_own_limit(self, tenant: str, nbytes: int) -> bool:
        """Whether adding `nbytes` is for `tenant` to make room for, whatever the others hold."""
        limit = self.tenant_limits.get(tenant)
        return limit is not None and self.by_tenant.get(tenant, 0) + nbytes > limit

    def add(self, tenant: str, nbytes: int) -> None:
        """Count bytes that were added."""
        if not nbytes:
            return
        self.used_bytes += nbytes
        self.by_tenant[tenant] = self.by_tenant.get(tenant, 0) + nbytes

    def remove(self, tenant: str, nbytes: int) -> None:
        """Count bytes that have gone."""
        by_tenant = self.by_tenant
        left = by_tenant.get(tenant, 0) - nbytes
        assert left >= 0 and self.used_bytes >= nbytes, f"budget of {tenant!r} would fall below zero"
        self.used_bytes -= nbytes
        if left:
            by_tenant[tenant] = left
        else:
            by_tenant.pop(tenant, None)
