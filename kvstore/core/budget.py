"""Byte budgets of a tier: one for all, and where configured one per tenant and per namespace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.core.block import Namespace


@dataclass(slots=True)
class Budget:
    """Counts bytes against a capacity and against limits per tenant and namespace. Never goes below zero."""

    capacity_bytes: int
    tenant_limits: Mapping[str, int] = field(default_factory=dict)
    namespace_limits: dict[Namespace, int] = field(default_factory=dict)
    used_bytes: int = 0
    by_tenant: dict[str, int] = field(default_factory=dict)
    by_namespace: dict[Namespace, int] = field(default_factory=dict)

    def missing(self, namespace: Namespace, nbytes: int) -> int:
        """How many bytes must leave before the namespace may add `nbytes`; 0: it may now."""
        over = self.used_bytes + nbytes - self.capacity_bytes
        tenant = namespace.tenant
        limit = self.tenant_limits.get(tenant) if self.tenant_limits else None
        if limit is not None:
            over = max(over, self.by_tenant.get(tenant, 0) + nbytes - limit)
        if self.namespace_limits:
            over = max(over, self._over_own(namespace, nbytes))
        return over if over > 0 else 0

    @property
    def free_bytes(self) -> int:
        """What nobody has."""
        return max(0, self.capacity_bytes - self.used_bytes)

    def fits(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether the namespace could add `nbytes` if everything else left."""
        limit = self.tenant_limits.get(namespace.tenant, self.capacity_bytes)
        return nbytes <= min(self.capacity_bytes, limit, self.namespace_limits.get(namespace, limit))

    def over_limit(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether adding `nbytes` is for the namespace or its tenant to make room for, whatever the others hold."""
        return self.over_tenant_limit(namespace, nbytes) or self.over_namespace_limit(namespace, nbytes)

    def over_tenant_limit(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether the tenant would be over its limit."""
        limit = self.tenant_limits.get(namespace.tenant)
        return limit is not None and self.by_tenant.get(namespace.tenant, 0) + nbytes > limit

    def over_namespace_limit(self, namespace: Namespace, nbytes: int) -> bool:
        """Whether the namespace would be over its own."""
        return bool(self.namespace_limits) and self._over_own(namespace, nbytes) > 0

    def _over_own(self, namespace: Namespace, nbytes: int) -> int:
        limit = self.namespace_limits.get(namespace)
        return 0 if limit is None else self.by_namespace.get(namespace, 0) + nbytes - limit

    def add(self, namespace: Namespace, nbytes: int) -> None:
        """Count bytes that were added."""
        if not nbytes:
            return
        tenant = namespace.tenant
        self.used_bytes += nbytes
        self.by_tenant[tenant] = self.by_tenant.get(tenant, 0) + nbytes
        self.by_namespace[namespace] = self.by_namespace.get(namespace, 0) + nbytes

    def remove(self, namespace: Namespace, nbytes: int) -> None:
        """Count bytes that have gone."""
        tenant = namespace.tenant
        left = self.by_namespace.get(namespace, 0) - nbytes
        assert left >= 0 and self.used_bytes >= nbytes, f"budget of a namespace of {tenant!r} would fall below zero"
        self.used_bytes -= nbytes
        if left:
            self.by_namespace[namespace] = left
        else:
            self.by_namespace.pop(namespace, None)
        self.by_tenant[tenant] -= nbytes
        if not self.by_tenant[tenant]:
            del self.by_tenant[tenant]
