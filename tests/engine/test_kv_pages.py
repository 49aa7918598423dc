"""The page pool never hands out a page twice and never loses one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.engine.kv_pages import KvPagePool


@given(st.lists(st.integers(0, 6), max_size=60), st.randoms(use_true_random=False))
def test_pages_are_conserved_and_never_shared(sizes: list[int], random: object) -> None:
    pool, held = KvPagePool(16), []
    for size in sizes:
        if pool.can_allocate(size):
            held.append(pool.allocate(size))
        elif held:
            pool.release(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        flat = [page for pages in held for page in pages]
        assert len(flat) == len(set(flat))
        assert len(flat) + pool.available == pool.total == 16


def test_a_page_cannot_be_released_twice() -> None:
    pool = KvPagePool(4)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(ValueError, match="is not allocated"):
        pool.release(pages)


def test_allocating_more_than_is_free_raises() -> None:
    with pytest.raises(ValueError, match="5 pages wanted, 4 free"):
        KvPagePool(4).allocate(5)
