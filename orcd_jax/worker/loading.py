"""One attempt to load, and everybody who watches it: whoever began it, and whoever asks for the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine

from orcd_jax.checkpoint.progress import Progress
from orcd_jax.worker.types import CommitEvent, CommitParams, Handle


class Loading:
    """Owns the task of one load. Lives on the event loop. A watcher that leaves does not end it."""

    def __init__(self, params: CommitParams, work: Coroutine[object, object, Handle]) -> None:
        """Begins ``work``."""
        self.params = params
        self._progress: Progress | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(work)
        self._task.add_done_callback(self._ended)

    @property
    def done(self) -> bool:
        """Whether it has ended, in either way."""
        return self._task.done()

    def advance(self, progress: Progress) -> None:
        """Something was done."""
        self._progress = progress
        self._tell()

    async def events(self) -> AsyncIterator[CommitEvent]:
        """Progress as it comes, the newest when several came at once; then the handle.

        Raises:
          OrcdError: why there is none.
        """
        told: Progress | None = None
        while not self._task.done():
            news = self._news
            if self._progress is not None and self._progress != told:
                told = self._progress
                yield told
            else:
                await news.wait()
        yield self._task.result()

    def _ended(self, task: asyncio.Task[Handle]) -> None:
        if not task.cancelled():
            task.exception()  # seen here, in case nobody watches: whoever loads has logged it
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
