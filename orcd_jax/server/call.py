"""The call that is being answered: who calls, until when, and under which name the logs know it."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import structlog
from grpclib.metadata import Deadline, decode_metadata

from orcd_jax.errors import ErrorCode, OrcdError

Headers = list[tuple[str, str]]
Event = TypeVar("Event")

CORRELATION_ID = "x-correlation-id"
"""Metadata that names a call: the client's, else ours; sent back with every answer."""

_CORRELATION_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_GRPC_TIMEOUT = re.compile(r"[0-9]{1,8}[HMSmun]")


class Permit:
    """What lets a call run: the token that it came with. Ends the call when that is taken away.

    Attributes:
      revoked: whether it was.
    """

    def __init__(self) -> None:
        """For a call that has not begun."""
        self.revoked = False
        self._timer: asyncio.Timeout | None = None

    def time(self, timer: asyncio.Timeout) -> None:
        """The call runs inside of ``timer``."""
        self._timer = timer

    def revoke(self) -> None:
        """Ends the call, unless it ends already."""
        self.revoked = True
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raises AUTH_FAILED when it was revoked."""
        if self.revoked:
            raise OrcdError(ErrorCode.AUTH_FAILED, "the token of this call is not valid any more: call with a new one")


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and until when.

    Attributes:
      fingerprint: of the token; empty for the open methods.
      deadline: the call's own, from the client's timeout.
      correlation_id: what logs, errors and metadata name the call by.
      traceparent: the client's trace context as it was sent, well-formed or not; empty when there is none.
      permit: what lets it run.
    """

    fingerprint: str
    deadline: Deadline | None
    correlation_id: str = ""
    traceparent: str = ""
    permit: Permit = field(default_factory=Permit)

    def owner(self, tenant: str) -> str:
        """The identity that a job belongs to."""
        return f"{self.fingerprint}/{tenant}"

    def remaining_ms(self) -> int | None:
        """Milliseconds until the deadline, at least 1; None without one."""
        return None if self.deadline is None else max(1, int(self.deadline.time_remaining() * 1e3))


_CALL: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that the running handler answers."""
    return _CALL.get()


def current_correlation_id() -> str:
    """Of the call that is being answered; empty outside of one."""
    call = _CALL.get(None)
    return "" if call is None else call.correlation_id


def enter(call: Call) -> None:
    """Makes it the current call, of logs too. A call is a task of its own, so nothing resets this."""
    _CALL.set(call)
    structlog.contextvars.bind_contextvars(
        correlation_id=call.correlation_id, token_fingerprint=call.fingerprint or None
    )


async def permitted(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    """The events of the current call, until its token is revoked. Closes ``events``.

    Raises:
      OrcdError: AUTH_FAILED then, so that the call can end in its own words.
    """
    permit = current_call().permit
    async with aclosing(events):
        try:
            async for event in events:
                permit.check()  # a wait that ended in the same moment hides that it was to end
                yield event
        except asyncio.CancelledError:
            permit.check()
            raise


def correlation_id(given: Sequence[object]) -> str:
    """The one that the client gave; a fresh one when it gave none, several, or one that is not well-formed."""
    value = only(given)
    return value if _CORRELATION_ID.fullmatch(value) else str(uuid.uuid4())


def only(given: Sequence[object]) -> str:
    """The one value of a header; empty when there is none, or there are several."""
    (value,) = given if len(given) == 1 else ("",)
    return value if isinstance(value, str) else ""


def readable(raw: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, OrcdError | None]:
    """The headers that grpclib can read, and what is wrong with the others."""
    headers: Headers = []
    problem = None
    for name, value in raw:
        try:
            header = (name.decode("ascii"), value.decode("ascii"))
            if header[0] == "grpc-timeout" and not _GRPC_TIMEOUT.fullmatch(header[1]):
                problem = _invalid("grpc-timeout", "it must be 1 to 8 digits and one of H M S m u n")
                continue
            decode_metadata([header])
        except UnicodeDecodeError:
            problem = _invalid("metadata", "one is not ASCII; send bytes in base64, under a name that ends in -bin")
        except ValueError:
            problem = _invalid("metadata", "the value of one whose name ends in -bin is not base64")
        else:
            headers.append(header)
    return headers, problem


def _invalid(field: str, rule: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"{field}: {rule}", field=field)
