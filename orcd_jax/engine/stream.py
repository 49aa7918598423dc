"""One job's events on their way from the engine to whoever reads them, on the asyncio side."""

from __future__ import annotations

import asyncio
from collections import deque

from orcd_jax.engine.request import Event, Tokens
from orcd_jax.errors import ErrorCode, OrcdError


class JobStream:
    """Holds the unread events of one job; lives on the event loop.

    Consecutive unread token events are merged, so a slow reader holds at most one of them: what it can hold is bounded
    by the job's own max_tokens. Nothing follows a terminal event.
    """

    def __init__(self) -> None:
        """An empty stream."""
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the terminal event has arrived, read or not."""
        return self._closed

    def put(self, event: Event) -> None:
        """Adds an event; ignored after a terminal one."""
        if self._closed:
            return
        if isinstance(event, Tokens):
            if self._events and isinstance(last := self._events[-1], Tokens):
                self._events[-1] = Tokens(last.index, last.ids + event.ids, last.text + event.text)
            else:
                self._events.append(event)
        else:
            self._closed = True
            self._events.append(event)
        self._changed.set()

    def abort(self, event: Event) -> None:
        """Drops what is unread and ends the stream with ``event``; ignored when it has ended."""
        if not self._closed:
            self._events.clear()
            self.put(event)

    async def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event, or None when none came within ``timeout_s``.

        Raises:
          OrcdError: INTERNAL, when read past the terminal event.
        """
        while not self._events:
            if self._closed:
                raise OrcdError(ErrorCode.INTERNAL, "the job's stream was read past its end")
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), timeout_s)
            except TimeoutError:
                return None
        return self._events.popleft()
