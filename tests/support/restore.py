"""Restart a stateful iterator at every step and compare everything that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
State = TypeVar("State")


def assert_restores_at_every_step(
    iterate: Callable[[State], Iterator[Item]],
    start: State,
    state_after: Callable[[Item], State],
    content: Callable[[Item], object],
    *,
    max_items: int = 1000,
) -> list[Item]:
    """Check that ``iterate(state_after(item))`` yields exactly what followed ``item`` in the uninterrupted run.

    Args:
        iterate: makes a fresh iterator from a state; must share nothing with the ones before.
        state_after: the state that an item carries.
        content: what to compare, by ``==``.
        max_items: cut an endless run here.

    Returns:
        The items of the uninterrupted run.
    """
    items = list(islice(iterate(start), max_items))
    contents = [content(item) for item in items]
    assert items, "nothing to restore"
    for position, item in enumerate(items):
        rest = islice(iterate(state_after(item)), max_items - position - 1)
        found = [content(later) for later in rest]
        assert found == contents[position + 1 :], f"restored after step {position}"
    return items
