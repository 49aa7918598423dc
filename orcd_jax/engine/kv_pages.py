"""Which KV pages are free: exact host-side accounting, no JAX."""

from __future__ import annotations


class KvPagePool:
    """Owns the free list of one KV group's pages. Pages are handed out lowest id first and never shared."""

    def __init__(self, pages: int) -> None:
        """A pool of page ids ``0 … pages - 1``, all free."""
        self._free = list(range(pages - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def total(self) -> int:
        """Pages in the pool, free or not."""
        return len(self._free) + len(self._taken)

    @property
    def available(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` would succeed."""
        return count <= len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes ``count`` pages. Raises ValueError when fewer are free: callers ask ``can_allocate`` first."""
        if not self.can_allocate(count):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free of {self.total}")
        pages = tuple(self._free.pop() for _ in range(count))
        self._taken.update(pages)
        return pages

    def release(self, pages: tuple[int, ...]) -> None:
        """Gives pages back. Raises ValueError on a page that is not allocated."""
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"page {page} is not allocated")
            self._taken.remove(page)
            self._free.append(page)
