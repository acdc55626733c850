"""Who makes room for whom: one tenant cannot flush another."""

from __future__ import annotations

from collections.abc import Mapping


def payers(used: Mapping[str, int], capacity: int, tenant: str, nbytes: int) -> list[str]:
    """Tenants that may be asked to make room for `nbytes` more of `tenant`, in the order in which they are asked.

    Max-min fairness: the largest goes first, and nobody but the one who asks goes below an equal share of the tier.
    What a tenant leaves unused is everybody's until it comes for it.
    """
    if not used or (len(used) == 1 and tenant in used):
        return [tenant]
    wanted = {**used, tenant: used.get(tenant, 0) + nbytes}
    share = capacity / len(wanted)
    largest_first = sorted(wanted, key=wanted.__getitem__, reverse=True)
    return [name for name in largest_first if name == tenant or wanted[name] > share]
