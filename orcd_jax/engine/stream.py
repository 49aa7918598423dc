"""One job's events on their way from the engine to whoever reads them, on the asyncio side."""

from __future__ import annotations

import asyncio
from collections import deque

from orcd_jax.engine.request import Event, Tokens
from orcd_jax.errors import ErrorCode, OrcdError


class JobStream:
    """Holds the unread events of one job; lives on the event loop.

    Consecutive unread token events are read as one: what a slow reader can hold is bounded by the job's own max_tokens.
    Nothing follows a terminal event.
    """

    def __init__(self) -> None:
        """An empty stream."""
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = self._ended = False

    @property
    def closed(self) -> bool:
        """Whether the terminal event has arrived, read or not."""
        return self._closed

    @property
    def ended(self) -> bool:
        """Whether the terminal event was read."""
        return self._ended

    def put(self, event: Event) -> None:
        """Adds an event; ignored after a terminal one."""
        if not self._closed:
            self._closed = not isinstance(event, Tokens)
            self._events.append(event)
            self._changed.set()

    def abort(self, event: Event) -> bool:
        """Drops what is unread, a terminal event too, and ends the stream with ``event``. False when it has ended."""
        if self._ended:
            return False
        self._events.clear()
        self._closed = False
        self.put(event)
        return True

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
                async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may lose that it was cancelled
                    await self._changed.wait()
            except TimeoutError:
                return None
        event = self._events.popleft()
        if not isinstance(event, Tokens):
            self._ended = True
            return event
        parts = [event]
        while self._events and isinstance(following := self._events[0], Tokens):
            parts.append(following)
            self._events.popleft()
        ids = tuple(token for part in parts for token in part.ids)
        return Tokens(event.index, ids, "".join(part.text for part in parts))
