"""Budgets: one capacity for all, and limits of tenants inside it."""

from __future__ import annotations

import pytest

from kvstore.core.budget import Budget


def test_nothing_is_missing_up_to_the_capacity() -> None:
    budget = Budget(100)
    assert budget.missing("a", 100) == 0
    assert budget.missing("a", 101) == 1
    budget.add("a", 60)
    assert budget.missing("b", 40) == 0
    assert budget.missing("b", 50) == 10


def test_a_tenant_has_a_limit_of_its_own() -> None:
    budget = Budget(100, {"a": 30})
    budget.add("a", 20)
    assert budget.missing("a", 10) == 0
    assert budget.missing("a", 25) == 15
    assert budget.missing("b", 80) == 0


def test_the_larger_of_two_shortages_counts() -> None:
    budget = Budget(100, {"a": 30})
    budget.add("a", 30)
    budget.add("b", 65)
    assert budget.missing("a", 10) == 10  # 5 over the capacity, 10 over the limit
    assert budget.missing("b", 10) == 5


def test_what_can_never_fit() -> None:
    budget = Budget(100, {"a": 30})
    budget.add("b", 100)
    assert budget.fits("a", 30) and not budget.fits("a", 31)
    assert budget.fits("b", 100) and not budget.fits("b", 101)


def test_whose_limit_is_reached() -> None:
    budget = Budget(100, {"a": 30})
    budget.add("a", 30)
    assert budget.over_own_limit("a", 1) and not budget.over_own_limit("a", 0)
    assert not budget.over_own_limit("b", 1000)


def test_bytes_are_counted_for_all_and_by_tenant() -> None:
    budget = Budget(100)
    budget.add("a", 10)
    budget.add("b", 20)
    budget.remove("a", 4)
    assert (budget.used_bytes, budget.by_tenant) == (26, {"a": 6, "b": 20})


def test_a_tenant_without_bytes_leaves_no_entry() -> None:
    budget = Budget(100)
    budget.add("a", 10)
    budget.remove("a", 10)
    assert (budget.used_bytes, budget.by_tenant) == (0, {})


def test_it_never_goes_below_zero() -> None:
    budget = Budget(100)
    budget.add("a", 10)
    budget.add("b", 10)
    with pytest.raises(AssertionError, match="below zero"):
        budget.remove("a", 11)
    assert (budget.used_bytes, budget.by_tenant) == (20, {"a": 10, "b": 10})
