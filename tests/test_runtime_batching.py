"""Properties of the batch plan, over arbitrary lengths and budgets."""

import math
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_runtime.batching import plan_batches

LENGTHS = st.lists(st.one_of(st.integers(1, 100), st.integers(1, 9000)), max_size=80)


def lengths_and_budget(test: Callable[..., None]) -> Callable[..., None]:
    return settings(deadline=None)(given(lengths=LENGTHS, budget=st.integers(1, 10_000))(test))


@lengths_and_budget
def test_every_item_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(int(i) for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) for batch in batches)


@lengths_and_budget
def test_only_a_single_item_may_exceed_the_budget(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@lengths_and_budget
def test_padding_is_at_most_half_of_the_work_beyond_short_rows(lengths: list[int], budget: int) -> None:
    for batch in plan_batches(lengths, budget):
        longest = max(lengths[i] for i in batch)
        assert longest <= 64 or 2 * sum(lengths[i] for i in batch) >= len(batch) * longest


@lengths_and_budget
def test_keeping_padding_low_costs_few_batches(lengths: list[int], budget: int) -> None:
    by_budget_alone, width, rows = 0, 0, 0
    for length in sorted(lengths, reverse=True):
        if rows == 0 or width * (rows + 1) > budget:
            by_budget_alone, width, rows = by_budget_alone + 1, length, 0
        rows += 1
    extra = math.log2(max([*lengths, 64]) / 64) + 1
    assert len(plan_batches(lengths, budget)) <= by_budget_alone + extra


@lengths_and_budget
def test_the_plan_is_deterministic_and_longest_first_with_ties_in_order(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    again = plan_batches(np.array(lengths, dtype=np.int64), budget)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]
    order = [int(i) for batch in batches for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def test_a_budget_is_used_to_the_full() -> None:
    assert [batch.tolist() for batch in plan_batches([10] * 5, 40)] == [[0, 1, 2, 3], [4]]
    assert [batch.tolist() for batch in plan_batches([2000, 10, 10, 10], 8192)] == [[0], [1, 2, 3]]
    assert plan_batches([], 8192) == []


def test_long_rows_run_alone() -> None:
    plan = plan_batches([2047, 2048, 3000, 2047], 100_000)
    assert [batch.tolist() for batch in plan] == [[2], [1], [0, 3]]


def test_a_row_joins_from_half_of_the_longest_on() -> None:
    assert [batch.tolist() for batch in plan_batches([300, 150, 149], 8192)] == [[0, 1], [2]]
    assert [batch.tolist() for batch in plan_batches([64, 1], 8192)] == [[0, 1]]
    assert [batch.tolist() for batch in plan_batches([65, 1], 8192)] == [[0], [1]]
