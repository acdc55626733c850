"""Budgets: one capacity for all, and limits of tenants and namespaces inside it."""

from __future__ import annotations

import pytest

from kvstore.core.block import Namespace
from kvstore.core.budget import Budget


def space(tenant: str, name: str = "") -> Namespace:
    return Namespace(f"{tenant}{name}".encode().ljust(32, b"."), tenant, 4096, 4096, 16, True)


A, B = space("a"), space("b")


def test_nothing_is_missing_up_to_the_capacity() -> None:
    budget = Budget(100)
    assert budget.missing(A, 100) == 0
    assert budget.missing(A, 101) == 1
    budget.add(A, 60)
    assert budget.missing(B, 40) == 0
    assert budget.missing(B, 50) == 10


def test_a_tenant_has_a_limit_of_its_own() -> None:
    budget = Budget(100, {"a": 30})
    budget.add(A, 20)
    assert budget.missing(A, 10) == 0
    assert budget.missing(A, 25) == 15
    assert budget.missing(B, 80) == 0


def test_a_namespace_has_a_limit_inside_its_tenants() -> None:
    other = space("a", "other")
    budget = Budget(100, {"a": 30}, {A: 10})
    budget.add(A, 8)
    assert budget.missing(A, 2) == 0
    assert budget.missing(A, 5) == 3
    assert budget.missing(other, 22) == 0
    budget.add(other, 20)
    assert budget.missing(A, 5) == 3  # 3 over both limits
    assert budget.missing(A, 4) == 2
    assert budget.missing(other, 5) == 3


def test_the_larger_of_two_shortages_counts() -> None:
    budget = Budget(100, {"a": 30})
    budget.add(A, 30)
    budget.add(B, 65)
    assert budget.missing(A, 10) == 10  # 5 over the capacity, 10 over the limit
    assert budget.missing(B, 10) == 5


def test_what_can_never_fit() -> None:
    other = space("a", "other")
    budget = Budget(100, {"a": 30}, {other: 10})
    budget.add(B, 100)
    assert budget.fits(A, 30) and not budget.fits(A, 31)
    assert budget.fits(B, 100) and not budget.fits(B, 101)
    assert budget.fits(other, 10) and not budget.fits(other, 11)


def test_whose_limit_is_reached() -> None:
    other = space("a", "other")
    budget = Budget(100, {"a": 30}, {other: 10})
    budget.add(A, 25)
    budget.add(other, 5)
    assert budget.over_tenant_limit(A, 1) and not budget.over_tenant_limit(A, 0)
    assert not budget.over_namespace_limit(A, 1000) and budget.over_limit(A, 1)
    assert budget.over_namespace_limit(other, 6) and not budget.over_namespace_limit(other, 5)
    assert not budget.over_limit(B, 1000)


def test_bytes_are_counted_for_all_by_tenant_and_by_namespace() -> None:
    other = space("b", "other")
    budget = Budget(100)
    budget.add(A, 10)
    budget.add(B, 20)
    budget.add(other, 5)
    budget.remove(A, 4)
    assert (budget.used_bytes, budget.by_tenant) == (31, {"a": 6, "b": 25})
    assert budget.by_namespace == {A: 6, B: 20, other: 5}


def test_whoever_has_no_bytes_leaves_no_entry() -> None:
    budget = Budget(100)
    budget.add(A, 10)
    budget.remove(A, 10)
    assert (budget.used_bytes, budget.by_tenant, budget.by_namespace) == (0, {}, {})


def test_it_never_goes_below_zero() -> None:
    budget = Budget(100)
    budget.add(A, 10)
    budget.add(B, 10)
    with pytest.raises(AssertionError, match="below zero"):
        budget.remove(A, 11)
    assert (budget.used_bytes, budget.by_tenant) == (20, {"a": 10, "b": 10})
